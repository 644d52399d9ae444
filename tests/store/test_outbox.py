"""Queuing: what a receipt promises, and what survives a kill."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections import Counter
from contextlib import closing, contextmanager

import pytest
from freezegun import freeze_time

from versioner_agent import Outbox, batches, events, review, selecting
from versioner_agent import outbox as outbox_module
from versioner_agent.errors import OtherDestination, OutboxBusy, OutboxError, OutboxFull, ValidationError
from versioner_agent.files import FLOOR_BYTES
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import Destination
from versioner_agent.records import is_intact

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}

ENQUEUE_ONE = """
import sys
from versioner_agent import Outbox
print("ready"); input()
with Outbox(sys.argv[1]) as outbox:
    receipt = outbox.enqueue("build", {"product_name": "p", "version": "1", "status": "ok", "invoke_id": "7"})
    print(receipt.outcome, receipt.id, receipt.event_id)
"""
ENQUEUE_AND_DIE = """
import os, signal, sys
from versioner_agent import Outbox
Outbox(sys.argv[1]).enqueue("build", {"product_name": "p", "version": "1", "status": "ok"})
os.kill(os.getpid(), signal.SIGKILL)
"""
DIE_AT = """
import os, signal, sys
from versioner_agent import Outbox, batches, events, outbox
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
outbox.CHUNK = 5
if sys.argv[2] == "hand over":
    batches.hand_over_batch = die
elif sys.argv[2] == "in the middle of handing over":
    step, steps = batches.hand_over_batch, []
    batches.hand_over_batch = lambda store: die() if steps else (steps.append(1), step(store))[1]
else:
    outbox.PUBLISH_BATCH = "UPDATE batch SET published = die() WHERE id = ?"
    connect = outbox.Store._connect
    def connected(self, **how):
        connection = connect(self, **how)
        connection.create_function("die", 0, die)
        return connection
    outbox.Store._connect = connected
made = [events.validate("build", {"product_name": "p", "version": str(n), "status": "ok"}) for n in range(12)]
Outbox(sys.argv[1]).enqueue_all(made)
"""


def make(count, **more):
    return [events.validate("build", {**BUILD, "version": str(n), **more}) for n in range(count)]


def states(path):
    with closing(sqlite3.connect(path)) as connection:
        return Counter(row[0] for row in connection.execute("SELECT state FROM record"))


def drain_order(store):
    """Versions in the order in which a flusher would send them."""
    ledger, versions = Ledger(store), []
    while (found := ledger.head("payments") or ledger.head("p")) is not None:
        record, payload = found
        assert is_intact(record, payload)
        versions.append(record.version)
        review.discard(store, [record.id], pending_too=True)
    return versions


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(outbox_module, "CHUNK", 5)


def test_receipt_says_what_was_queued(outbox):
    receipt = outbox.enqueue("deployment", {**BUILD, "environment_name": "prod", "status": "OK", "invoke_id": "7"})

    assert receipt._replace(event_id="", warnings=()) == (
        "queued", 1, "", "7", "deployment", "payments", "1.2.3", "prod", "completed", (),
    )  # fmt: skip
    assert outbox.enqueue("build", BUILD).id == 2


def test_record_holds_the_payload_that_was_stamped(outbox):
    with freeze_time("2026-11-20T10:00:00Z"):
        receipt = outbox.enqueue("build", {**BUILD, "extra_metadata": {"a": 1}})
    record, payload, attempts = review.show(outbox.store, receipt.id)
    body = json.loads(payload)

    assert is_intact(record, payload)
    assert attempts == []
    assert body["completed_at"] == body["extra_metadata"]["vi_agent_queued_at"] == "2026-11-20T10:00:00.000Z"
    assert body["extra_metadata"]["vi_agent_event_id"] == record.event_id == receipt.event_id
    assert record.idempotency_key == receipt.event_id
    assert receipt.warnings == ()


def test_host_with_a_clock_before_the_release_is_warned(outbox):
    with freeze_time("2001-01-01"):
        with_time = outbox.enqueue("build", BUILD)
        without = outbox.enqueue("build", {**BUILD, "status": "pending"})

    assert with_time.warnings == (outbox_module.CLOCK_WARNING,)
    assert without.warnings == ()
    assert "completed_at" not in json.loads(review.show(outbox.store, with_time.id)[1])


def test_record_names_who_queued_it(tmp_path):
    with Outbox(tmp_path / "outbox.db", queued_by="ana") as outbox:
        outbox.enqueue("build", BUILD)

        assert review.show(outbox.store, 1)[0].queued_by == "ana"


def test_invalid_event_touches_nothing(outbox, tmp_path):
    with pytest.raises(ValidationError):
        outbox.enqueue("build", {})

    assert list(tmp_path.iterdir()) == []


def test_no_events_touch_nothing(outbox, tmp_path):
    assert outbox.enqueue_all([]) == []
    assert list(tmp_path.iterdir()) == []


def test_another_process_sees_the_row_when_enqueue_returns(outbox, child):
    receipt = outbox.enqueue("build", BUILD)
    seen = child("import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT event_id FROM record')"
                 ".fetchall()[0][0])", outbox.store.path)  # fmt: skip

    assert seen.says() == receipt.event_id


def test_row_survives_a_kill_right_after_enqueue(outbox, child):
    assert child(ENQUEUE_AND_DIE, outbox.store.path).ends() == -signal.SIGKILL
    assert drain_order(outbox.store) == ["1"]


def test_twenty_processes_queue_one_event_once(outbox, child):
    writers = [child(ENQUEUE_ONE, outbox.store.path) for _ in range(20)]
    assert {writer.says() for writer in writers} == {"ready"}
    for writer in writers:
        writer.go()
    answers = [writer.says().split() for writer in writers]

    assert Counter(answer[0] for answer in answers) == {"queued": 1, "duplicate": 19}
    assert len({tuple(answer[1:]) for answer in answers}) == 1
    assert states(outbox.store.path) == {"pending": 1}


def test_many_events_are_queued_in_their_order(outbox, small_steps):
    receipts = outbox.enqueue_all(make(23))

    assert [receipt.id for receipt in receipts] == list(range(1, 24))
    assert {receipt.outcome for receipt in receipts} == {"queued"}
    assert states(outbox.store.path) == {"pending": 23}
    assert drain_order(outbox.store) == [str(n) for n in range(23)]


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_real_step_size_loses_nothing_at_its_edge(outbox, extra):
    count = outbox_module.CHUNK + extra

    assert len(outbox.enqueue_all(make(count))) == count
    assert review.stats(outbox.store).counts["pending"] == count


def test_repeats_within_many_events_are_found(outbox, small_steps):
    receipts = outbox.enqueue_all([*make(8, invoke_id="7"), *make(8, invoke_id="7")])

    assert [receipt.outcome for receipt in receipts] == ["queued"] * 8 + ["duplicate"] * 8
    assert [receipt.id for receipt in receipts[8:]] == list(range(1, 9))


@pytest.mark.parametrize("count", [3, 12], ids=["one step", "many steps"])
def test_all_or_nothing(outbox, small_steps, monkeypatch, count):
    """A failure at the last event leaves none of them."""
    outbox.enqueue("build", BUILD)
    look_up = outbox_module._look_up

    def fail_at_the_last(connection, ready, context):
        if ready.event.fields["version"] == str(count - 1):
            raise OutboxError("no")
        return look_up(connection, ready, context)

    monkeypatch.setattr(outbox_module, "_look_up", fail_at_the_last)
    with pytest.raises(OutboxError):
        outbox.enqueue_all(make(count))

    assert states(outbox.store.path) == {"pending": 1}
    with outbox.store.read() as connection:
        assert connection.execute("SELECT count(*) FROM batch").fetchall() == [(0,)]


def test_what_is_staged_is_invisible_until_it_is_published(outbox, small_steps, monkeypatch):
    seen = []
    insert = Outbox._insert

    def look(self, connection, chunk, context):
        with Outbox(outbox.store.path) as other:
            stats = review.stats(other.store)
            seen.append((Ledger(other.store).head("payments"), stats.counts["pending"], review.show(other.store, 1)))
            assert list(selecting.select(other.store)) == []
        return insert(self, connection, chunk, context)

    monkeypatch.setattr(Outbox, "_insert", look)
    outbox.enqueue_all(make(12))

    assert seen == [(None, 0, None)] * 3
    assert review.stats(outbox.store).counts["pending"] == 12


def test_killed_before_publishing_leaves_nothing_after_the_sweep(outbox, child):
    assert child(DIE_AT, outbox.store.path, "publish").ends() == -signal.SIGKILL
    ledger = Ledger(outbox.store)

    assert states(outbox.store.path) == {"staged": 12}
    assert ledger.head("p") is None
    assert ledger.keys("", 10, ()).keys == []
    assert ledger.pending() == 0
    with outbox.store.read() as connection:
        ((created_at,),) = connection.execute("SELECT created_at FROM batch").fetchall()
    ledger.sweep_batches(created_at + 60)
    assert states(outbox.store.path) == {"staged": 12}
    ledger.sweep_batches(created_at + 4000)
    assert states(outbox.store.path) == {}
    assert review.stats(outbox.store).counts["pending"] == 0


@pytest.mark.parametrize("moment", ["hand over", "in the middle of handing over"])
def test_killed_after_publishing_loses_nothing(outbox, child, small_steps, moment):
    """The next look for something to send completes the handing over, in order."""
    assert child(DIE_AT, outbox.store.path, moment).ends() == -signal.SIGKILL
    ledger = Ledger(outbox.store)
    late = outbox.enqueue("build", {**BUILD, "product_name": "p", "version": "12"})

    assert late.id == 13
    assert ledger.pending() == 13
    assert review.stats(outbox.store).counts["pending"] == 13
    ledger.sweep_batches(2e12)
    assert drain_order(outbox.store) == [str(n) for n in range(13)]


def test_batch_that_was_swept_meanwhile_is_reported(outbox, small_steps, monkeypatch):
    monkeypatch.setattr(outbox_module, "PUBLISH_BATCH", "UPDATE batch SET published = 1 WHERE id = -?")
    with pytest.raises(OutboxError, match="nothing was queued"):
        outbox.enqueue_all(make(12))

    assert states(outbox.store.path) == {}


def test_published_events_are_queued_even_if_handing_over_has_to_wait(outbox, small_steps, monkeypatch):
    """From publishing on they will be delivered: an error would make the script queue them again."""

    def busy(store):
        raise OutboxBusy("others")

    with monkeypatch.context() as patch:
        patch.setattr(batches, "hand_over_batch", busy)
        receipts = outbox.enqueue_all(make(12))

    assert len(receipts) == 12
    assert Ledger(outbox.store).pending() == 12


def test_little_space_is_left_to_deliveries(outbox, monkeypatch):
    outbox.enqueue("build", BUILD)
    monkeypatch.setattr(outbox.store, "free_space", lambda: FLOOR_BYTES - 1)
    with pytest.raises(OutboxFull, match="255 KiB are free there, and below 256 KiB nothing new is queued") as caught:
        outbox.enqueue("build", BUILD)

    assert "free some space" in caught.value.hint
    assert states(outbox.store.path) == {"pending": 1}


@pytest.mark.parametrize(
    ("meant", "is_other"),
    [
        (Destination("https://a", "acme"), False), (Destination("https://a", None), False),
        (Destination(None, "acme"), False), (Destination(None, None), False), (Destination("https://b", None), True),
        (Destination(None, "umbrella"), True), (Destination("https://a", "umbrella"), True),
    ],
)  # fmt: skip
def test_event_for_another_destination_is_refused(outbox, meant, is_other):
    Ledger(outbox.store).open(create=True)
    with outbox.store.write() as connection:
        connection.execute("UPDATE destination SET origin = 'https://a', account = 'acme'")
    if is_other:
        with pytest.raises(OtherDestination, match="https://a") as caught:
            outbox.enqueue_all(make(1), destination=meant)
        assert caught.value.exit_code == 3
        assert str(meant) in caught.value.message
    else:
        outbox.enqueue_all(make(1), destination=meant)

    assert states(outbox.store.path) == ({} if is_other else {"pending": 1})


def test_unbound_outbox_takes_events_for_any_destination(outbox):
    assert outbox.enqueue_all(make(1), destination=Destination("https://b", "x"))[0].outcome == "queued"


def test_an_array_of_large_events_is_written_in_steps_of_a_megabyte(outbox, monkeypatch):
    """A transaction of hundreds of megabytes would keep every other build waiting."""
    sizes = "SELECT state, sum(length(payload)) FROM record GROUP BY state"
    steps = []
    write = outbox.store.write

    @contextmanager
    def watched(**how):
        with write(**how) as connection:
            before = Counter(dict(connection.execute(sizes).fetchall()))
            yield connection
            after = Counter(dict(connection.execute(sizes).fetchall()))
            steps.append(sum((after - before).values()))

    monkeypatch.setattr(outbox.store, "write", watched)
    large = {**BUILD, "extra_metadata": {"notes": "n" * 90_000}}
    receipts = outbox.enqueue_all([events.validate("build", {**large, "version": str(n)}) for n in range(40)])

    assert [receipt.outcome for receipt in receipts] == ["queued"] * 40
    assert max(steps) <= 1024 * 1024
    assert sum(steps) > 2 * 40 * 90_000  # staged, then handed over
