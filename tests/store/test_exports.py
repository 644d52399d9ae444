"""Batches for the far side: what is claimed, what counts as exported when, what is held, and what is given up."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time

import pytest
from bench import DELIVERED
from host import COMMAND

import versioner_agent.outbox
from versioner_agent import damage, events, exports, pruning, review
from versioner_agent.batches import CHUNK_BYTES
from versioner_agent.config import load
from versioner_agent.errors import OutboxBusy
from versioner_agent.exporting import export, export_to, mark
from versioner_agent.flusher import LOOK_S
from versioner_agent.ledger import Ledger
from versioner_agent.stepping import FIRST_STEP, StepSize
from versioner_agent.storage import Store
from versioner_agent.upkeep import MAINTENANCE_S

BUILD = {"status": "completed"}


def queue(outbox, product, count=1, first=1):
    valid = [
        events.validate("build", {**BUILD, "product_name": product, "version": str(number)})
        for number in range(first, first + count)
    ]
    return [receipt.id for receipt in outbox.enqueue_all(valid)]


@pytest.fixture
def settings(outbox):
    return load({"db": outbox.store.path}, {}, os.devnull)


@pytest.fixture
def ledger(outbox):
    with contextlib.closing(Store(outbox.store.path)) as store:
        yield Ledger(store)


def of(records):
    """A step of so many records."""
    size = StepSize()
    size.value = records
    return size


def claimed(ledger, product=None, limit=500):
    """A batch with all its claims, as an export has it just before it marks."""
    batch = exports.begin(ledger.store, product, time.time())
    ids = []
    while len(ids) < limit:
        step = ledger.claim(batch, ids[-1] if ids else 0, limit - len(ids), time.time())
        ids += [record.id for record, _ in step.records]
        if step.is_end:
            break
    return batch, exports.Written(len(ids), ids[0], ids[-1], "d" * 64)


def marked(ledger, *args, **how):
    """A batch that counts as exported, none of whose records is turned yet."""
    batch, written = claimed(ledger, *args, **how)
    exports.mark(ledger.store, batch, written, written.records, "/media/stick/file")
    return batch


def states(ledger):
    return {state: count for state, count in review.stats(ledger.store).counts.items() if count}


def rows(ledger, query, *args):
    with ledger.store.read() as connection:
        return connection.execute(query, args).fetchall()


def test_a_claim_changes_nothing_but_who_may_mark_it(outbox, ledger):
    queue(outbox, "a", 3)

    claimed(ledger)

    assert states(ledger) == {"pending": 3}
    assert ledger.head("a")[0].id == 1


def test_one_update_makes_all_of_it_count_as_exported(outbox, ledger):
    queue(outbox, "a", 3)

    marked(ledger)

    assert states(ledger) == {"exported": 3}
    assert (ledger.pending(), ledger.standing().pending) == (0, 0)
    assert rows(ledger, "SELECT DISTINCT state FROM record") == [("pending",)]


def test_whoever_chooses_next_completes_what_a_dead_export_marked(outbox, ledger):
    queue(outbox, "a", 1200)
    queue(outbox, "b")
    batch = marked(ledger, "a")
    queue(outbox, "a", first=2000)

    assert ledger.head("b")[0].product_name == "b"
    assert ledger.head("a") is None

    assert rows(ledger, "SELECT state, waiting, awaited FROM export") == [("marked", 0, 500)]
    assert rows(ledger, "SELECT count(*) FROM record WHERE state = 'exported' AND batch = ?", -batch.id) == [(500,)]
    assert states(ledger) == {"pending": 702, "exported": 500}


def test_every_step_turns_a_part_and_the_counts_stay(outbox, ledger):
    queue(outbox, "a", 7)
    marked(ledger)
    seen = []
    while exports.turn(ledger.store, of(2)):
        seen.append(rows(ledger, "SELECT count(*) FROM record WHERE state = 'exported'")[0][0])
        assert states(ledger) == {"exported": 7}

    assert seen == [2, 4, 6, 7]


def test_what_was_retried_or_queued_meanwhile_is_not_marked(outbox, ledger):
    queue(outbox, "a", 4)
    first = marked(ledger, limit=2)
    while ledger.hand_over():
        pass
    review.retry(ledger.store, [1])
    second, written = claimed(ledger, limit=2)
    review.retry(ledger.store, [2])
    queue(outbox, "a")
    exports.mark(ledger.store, second, written, 2, None)
    while ledger.hand_over():
        pass

    found = rows(ledger, "SELECT id, state, batch FROM record ORDER BY id")
    assert found == [(1, "exported", -second.id), (2, "pending", None), (3, "exported", -second.id),
                     (4, "pending", None), (5, "pending", None)]  # fmt: skip
    assert first.id != second.id
    assert rows(ledger, "SELECT id, awaited FROM export") == [(first.id, 0), (second.id, 2)]


def test_a_batch_that_is_published_meanwhile_goes_before_what_is_queued_after_it(outbox, ledger, monkeypatch):
    """Whoever published it is slow to hand it over; neither the export nor what is queued then may overtake."""
    queue(outbox, "a")
    batch = exports.begin(ledger.store, None, time.time())
    with monkeypatch.context() as patched:
        patched.setattr(versioner_agent.outbox, "hand_over_all", lambda _: None)
        queue(outbox, "a", 600, first=2)
    queue(outbox, "a", first=602)

    first = ledger.claim(batch, 0, 500, time.time())
    assert exports.begin(ledger.store, None, time.time()) is None
    while ledger.hand_over():
        pass
    batch, written = claimed(ledger, limit=1000)

    assert [record.id for record, _ in first.records] == [1]
    assert (written.records, written.last_id) == (602, 602)


def test_what_is_published_while_an_export_runs_is_left_whole_for_the_next_one(outbox, ledger):
    """Some of it lies before what is claimed by then: that would be exported behind the rest of its batch."""
    queue(outbox, "a", 4)
    rows(ledger, "INSERT INTO batch (id, kind, created_at) VALUES (7, 'enqueue', ?)", time.time())
    rows(ledger, "UPDATE record SET state = 'staged', batch = 7 WHERE id IN (2, 4)")
    batch = exports.begin(ledger.store, None, time.time())
    first = ledger.claim(batch, 0, 2, time.time())
    rows(ledger, "UPDATE batch SET published = 1, waiting = 2 WHERE id = 7")
    while ledger.hand_over():
        pass
    second = ledger.claim(batch, first.last_id, 2, time.time())

    assert [record.id for record, _ in first.records] == [1, 3]
    assert second.is_end
    assert not second.records


def test_an_export_ends_however_fast_others_queue(outbox, ledger, settings, tmp_path, monkeypatch):
    queue(outbox, "a", 3)
    claim = exports.claim

    def beside_others(*args):
        queue(outbox, "a", 3, first=1000 * len(rows(ledger, "SELECT 1 FROM record")))
        return claim(*args)

    monkeypatch.setattr(exports, "claim", beside_others)

    assert export(settings, str(tmp_path / "1")).records == 3


def test_what_counts_as_exported_is_not_said_to_be_unmarked(outbox, ledger, settings, tmp_path, monkeypatch):
    """Other writers may keep us from turning it: the next one to choose does."""
    queue(outbox, "a", 3)
    turn = exports.turn

    def busy(store, *args):
        if states(ledger).get("exported"):
            raise OutboxBusy("others write")
        return turn(store, *args)

    with monkeypatch.context() as patched:
        patched.setattr(exports, "turn", busy)
        assert export(settings, str(tmp_path / "1")).records == 3

    assert states(ledger) == {"exported": 3}
    assert ledger.head("a") is None
    assert rows(ledger, "SELECT DISTINCT state FROM record") == [("exported",)]


def test_an_export_that_is_ended_while_it_turns_has_said_what_it_wrote(outbox, ledger, settings, tmp_path, monkeypatch):
    """Its file is complete and marked by then: nobody should take it for one that was cut short."""
    queue(outbox, "a", 3)
    turn = exports.turn
    said = []

    def interrupted(store, *args):
        if said:
            raise KeyboardInterrupt
        return turn(store, *args)

    monkeypatch.setattr(exports, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(settings, str(tmp_path / "1"), on_marked=said.append)

    assert [(done.file, done.records) for done in said] == [(str(tmp_path / "1"), 3)]
    assert states(ledger) == {"exported": 3}


def test_what_is_discarded_just_before_it_is_claimed_is_not_said_to_be_damaged(
    outbox, ledger, settings, tmp_path, monkeypatch
):
    queue(outbox, "a")
    begin = exports.begin

    def slow(*args):
        review.discard(ledger.store, [1], pending_too=True)
        return begin(*args)

    monkeypatch.setattr(exports, "begin", slow)

    assert export(settings, str(tmp_path / "1")) is None
    assert states(ledger) == {"discarded": 1}
    assert rows(ledger, "SELECT id FROM export") == []


def test_on_a_slow_disk_a_step_claims_and_turns_little(outbox, ledger, monkeypatch):
    """A clock that goes on by a second whenever it is looked at."""
    seconds = itertools.count()
    for size in (ledger._claiming, ledger._turning):
        monkeypatch.setattr(size, "_clock", lambda: float(next(seconds)))
    queue(outbox, "a", 60)
    batch = exports.begin(ledger.store, None, time.time())
    first = ledger.claim(batch, 0, 60, time.time())
    second = ledger.claim(batch, first.last_id, 60, time.time())
    batch, written = claimed(ledger)
    ledger.mark(batch, written, written.records, None)
    turned = [
        rows(ledger, "SELECT count(*) FROM record WHERE state = 'exported'")[0][0]
        for _ in range(2)
        if ledger.hand_over()
    ]

    assert (len(first.records), len(second.records)) == (FIRST_STEP, 1)
    assert turned == [FIRST_STEP, FIRST_STEP + 1]


def test_large_payloads_make_short_steps(outbox, ledger):
    for number in range(10):
        outbox.enqueue("build", {**BUILD, "product_name": "a", "version": str(number),
                                 "scm_branch": "x" * 200_000})  # fmt: skip
    batch = exports.begin(ledger.store, None, time.time())

    sizes, after, is_end = [], 0, False
    while not is_end:
        step = ledger.claim(batch, after, 500, time.time())
        after, is_end = step.last_id, step.is_end
        sizes.append(len(step.records))

    assert sum(sizes) == 10
    assert max(sizes) <= 5


def test_a_product_among_many_is_claimed_and_marked_through_its_own_index(outbox, ledger, settings, tmp_path):
    for number in range(50):
        queue(outbox, "a", 20, first=20 * number)
        queue(outbox, "b", 20, first=20 * number)

    done = export(settings, str(tmp_path / "f"), product="b")

    assert (done.records, states(ledger)) == (1000, {"pending": 1000, "exported": 1000})
    assert rows(ledger, "SELECT DISTINCT product_name FROM record WHERE state = 'exported'") == [("b",)]


# --- held keys


def test_a_held_key_is_neither_found_nor_given_out_until_it_is_freed(outbox, ledger):
    for product in ("a", "b", "c"):
        queue(outbox, product, 2)
    marked(ledger, "b", limit=1)

    assert ledger.head("b") is None
    assert ledger.keys("", 10, ()).keys == ["a", "c"]
    review.discard(ledger.store, [3])
    assert ledger.keys("", 10, ()).keys == ["a", "b", "c"]
    assert ledger.head("b")[0].id == 4


def test_it_is_known_when_all_that_waits_is_held(outbox, ledger):
    queue(outbox, "a", 2)
    assert not ledger.holds_all()
    marked(ledger, limit=1)
    while ledger.hand_over():
        pass
    assert ledger.holds_all()
    queue(outbox, "b")
    assert not ledger.holds_all()
    review.discard(ledger.store, [2, 3], pending_too=True)
    assert not ledger.holds_all(), "nothing waits"


def test_many_held_keys_are_passed_over_in_bounded_reads(outbox, ledger):
    for _ in range(2):
        valid = [events.validate("build", {**BUILD, "product_name": f"p{n:04}", "version": "1"}) for n in range(600)]
        outbox.enqueue_all(valid)
    marked(ledger, limit=500)
    batch = exports.begin(ledger.store, None, time.time())
    ledger.claim(batch, 500, 100, time.time())
    exports.mark(ledger.store, batch, exports.Written(100, 501, 600, "e" * 64), 100, None)
    while ledger.hand_over():
        pass

    seek = ledger.keys("", 1, ())

    assert (seek.keys, seek.is_end) == ([], False)
    assert ledger.holds_all()


def test_the_flusher_sends_nothing_of_a_held_key_and_everything_once_it_is_freed(bench, caplog):
    b = bench()
    b.queue("a", 3)
    marked(b.ledger, limit=1)
    b.queue("b")

    assert [b.step() for _ in range(3)][-1] == ["b"]
    assert b.answer(("b", DELIVERED)) == []
    for _ in range(3):
        assert b.step(after=MAINTENANCE_S) == [], "what is held is no sign of damage"
    assert "can't be found" not in caplog.text
    with contextlib.closing(Store(b.path)) as store:
        review.retry(store, [1])
    assert b.step(after=LOOK_S) == ["a"]
    b.drain()

    assert b.wire.versions("a") == ["1", "2", "3"]


def test_a_key_that_became_held_while_it_was_ready_is_passed_over(bench):
    b = bench(concurrency=1)
    for product in ("a", "b"):
        b.queue(product, 2)
    assert b.step() == ["a"]

    with contextlib.closing(Store(b.path)) as store:
        marked(Ledger(store), "b", limit=1)

    b.answer(("a", DELIVERED), after=LOOK_S)
    assert [b.step() for _ in range(3)][-1] == ["a"]
    assert b.answer(("a", DELIVERED)) == []
    assert b.states() == {"delivered": 2, "pending": 1, "exported": 1}


def test_a_resting_flusher_settles_and_sends_nothing_new(bench):
    b = bench(concurrency=2)
    b.queue("a", 2)
    b.queue("b", 2)
    b.step()
    b.flusher.rest(is_resting=True)

    assert b.answer_all(DELIVERED) == []
    assert not b.flusher.is_busy()
    b.flusher.rest(is_resting=False)
    assert sorted(b.step()) == ["a", "b"]


# --- giving up, sweeping, salvage


def test_large_records_are_turned_and_given_up_in_small_transactions(outbox, ledger):
    """A row is written, or wiped, as a whole: the journal tells how much at once, and keeps its size."""
    notes = {"extra_metadata": {"notes": "n" * 90_000}}
    for number in range(60):
        outbox.enqueue("build", {**BUILD, **notes, "product_name": "a", "version": str(number)})
    batch, written = claimed(ledger)
    ledger.mark(batch, written, written.records, None)
    while ledger.hand_over():
        pass
    while ledger.prune_exported(time.time() + 1):
        pass

    assert rows(ledger, "SELECT count(*), (SELECT awaited FROM export) FROM record") == [(0, 0)]
    assert os.path.getsize(outbox.store.path + "-journal") < 3 * CHUNK_BYTES


def test_a_count_that_is_wrong_keeps_no_later_batch(outbox, ledger):
    queue(outbox, "a")
    gone = marked(ledger)
    ledger.hand_over()
    assert ledger.prune_exported(time.time() + 1) == 1
    with ledger.store.write() as connection:
        connection.execute("UPDATE export SET awaited = 5 WHERE id = ?", (gone.id,))
    queue(outbox, "a")
    marked(ledger)
    ledger.hand_over()

    assert ledger.prune_exported(time.time() + 1) == 1


@pytest.mark.parametrize(("days", "left"), [(0.0, {"exported": 3}), (1.0, {})])
def test_exported_records_are_given_up_only_where_that_is_set(bench, days, left):
    b = bench(exported_retention_days=days)
    b.queue("a", 3)
    batch = marked(b.ledger)
    with b.store.write() as connection:
        connection.execute("UPDATE export SET created_at = created_at - 100000 WHERE id = ?", (batch.id,))

    for _ in range(4):
        b.step(after=MAINTENANCE_S)

    assert b.states() == left
    with b.store.read() as connection:
        assert connection.execute("SELECT awaited FROM export").fetchone() == (sum(left.values()),)


def test_exported_records_stay_while_the_clock_disagrees_with_the_api(bench):
    b = bench(exported_retention_days=1.0, retention_days=30.0)
    b.queue("b")
    b.step()
    b.answer(("b", DELIVERED._replace(server_time=time.time() - 2 * 86_400)))
    b.queue("a")
    batch = marked(b.ledger)
    with b.store.write() as connection:
        connection.execute("UPDATE export SET created_at = created_at - 100000 WHERE id = ?", (batch.id,))

    for _ in range(4):
        b.step(after=MAINTENANCE_S)

    assert b.states()["exported"] == 1


def test_an_export_gives_up_old_batches_where_there_is_no_agent(outbox, ledger, tmp_path):
    settings = load({"db": outbox.store.path, "exported_retention_days": 1}, {}, os.devnull)
    queue(outbox, "a", 3)
    export(settings, str(tmp_path / "1"))
    with ledger.store.write() as connection:
        connection.execute("UPDATE export SET created_at = created_at - 100000")
    queue(outbox, "a", first=4)

    export(settings, str(tmp_path / "2"))

    assert rows(ledger, "SELECT id FROM record") == [(4,)]


@pytest.mark.parametrize(
    ("age_s", "digest", "is_swept"),
    [
        (20 * 86_400, None, False),
        (20 * 86_400, "d" * 64, False),
        (40 * 86_400, None, True),
        (40 * 86_400, "d" * 64, True),
    ],
)
def test_a_batch_that_nobody_will_mark_is_swept(outbox, ledger, age_s, digest, is_swept):
    queue(outbox, "a")
    batch, written = claimed(ledger)
    if digest:
        exports.close(ledger.store, batch, written)

    ledger.sweep_batches(time.time() + age_s)

    assert (rows(ledger, "SELECT id FROM export") == []) == is_swept
    assert states(ledger) == {"pending": 1}


def test_batches_with_every_verdict_are_forgotten_in_the_end(outbox, ledger, monkeypatch):
    monkeypatch.setattr(exports, "ANSWERED_KEPT", 2)
    for number in range(5):
        (record_id,) = queue(outbox, "a", first=number)
        marked(ledger)
        while ledger.hand_over():
            pass
        if number:
            review.discard(ledger.store, [record_id])

    ledger.sweep_batches(time.time())

    assert [row[0] for row in rows(ledger, "SELECT id FROM export ORDER BY id")] == [1, 3, 4, 5]


def test_no_batch_takes_over_the_claims_of_one_that_was_lost_with_a_damaged_file(outbox, ledger):
    """The counter of batches begins anew in a mended file: what an old claim says must not count for a new batch."""
    queue(outbox, "a", 3)
    claimed(ledger)
    claimed(ledger)
    with ledger.store.write() as connection:
        connection.execute("DELETE FROM export")
    mend(outbox, ledger)

    assert rows(ledger, "SELECT batch FROM record") == [(None,)] * 3


def test_a_mended_file_knows_what_is_awaited_and_gives_no_number_again(outbox, ledger):
    queue(outbox, "a", 4)
    for _ in range(2):
        marked(ledger, limit=2)
        while ledger.hand_over():
            pass
    review.discard(ledger.store, [1])
    with ledger.store.write() as connection:
        connection.execute("UPDATE export SET awaited = 77 WHERE id = 1")
        connection.execute("DELETE FROM export WHERE id = 2")
    mend(outbox, ledger)

    assert rows(ledger, "SELECT id, awaited FROM export") == [(1, 1), (2, 2)]
    assert rows(ledger, "SELECT id, batch FROM record WHERE state = 'exported'") == [(2, -1), (3, -2), (4, -2)]
    queue(outbox, "a")
    assert exports.begin(ledger.store, None, 0.0).id == 3


def mend(outbox, ledger):
    """Break the header, so that all is read from bytes."""
    outbox.close()
    ledger.store.close()
    with open(ledger.store.path, "r+b") as file:
        file.write(b"garbage")
    assert ledger.open(create=False) is not None
    assert damage.find(ledger.store) is None


# --- cost


def test_memory_is_flat(outbox, tmp_path):
    """What an export holds does not grow with what it writes."""
    peaks = []
    for count in (2000, 18_000):
        for start in range(0, count, 2000):
            queue(outbox, "a", 2000, first=start)
        process = subprocess.Popen(
            (*COMMAND, "export", str(tmp_path / f"{count}.jsonl")), stdout=subprocess.DEVNULL,
            env={**os.environ, "VERSIONER_AGENT_DB": outbox.store.path, "VERSIONER_AGENT_CONFIG": os.devnull},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss)

    assert peaks[1] - peaks[0] < 6 * 1024, peaks
    assert len((tmp_path / "18000.jsonl").read_bytes().splitlines()) == 18_002


@pytest.mark.parametrize(
    "query",
    [exports.FIND_MARKING, exports.COUNT_MARKING, exports.HELD, exports.ANY_EXPORTED, exports.NEXT_HELD,
     exports.UNANSWERED, pruning.FIND_OLD_EXPORT, exports.EXPORTED_OF, pruning.EXPORTED_IDS,
     exports.NEXT_OF_ALL.format("id", "7"), exports.NEXT_OF_PRODUCT.format("id", "7")],
)  # fmt: skip
def test_nothing_that_is_asked_often_looks_through_a_table(outbox, ledger, query):
    queue(outbox, "a")
    with ledger.store.read() as connection:
        named = {"product": "a", "after": 0, "until": 9, "limit": 1}
        values = named if ":" in query else (1,) * query.count("?")
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", values).fetchall()]

    assert not [line for line in plan if line.startswith("SCAN") and "INDEX" not in line], plan
    assert not [line for line in plan if "TEMP B-TREE" in line], plan


def test_marking_by_digest_counts_in_short_reads(outbox, ledger, settings, monkeypatch):
    monkeypatch.setattr(exports, "LOOKED_AT", 3)
    queue(outbox, "a", 10)
    with open(os.devnull, "wb") as stream:
        done = export_to(settings, stream)
    review.discard(ledger.store, [4], pending_too=True)

    found = mark(settings, done.sha256)

    assert (found.records, found.marked, states(ledger)) == (10, 9, {"exported": 9, "discarded": 1})


def test_a_batch_that_somebody_else_marks_meanwhile_is_marked_once(outbox, ledger, settings, monkeypatch):
    queue(outbox, "a", 3)
    with open(os.devnull, "wb") as stream:
        digest = export_to(settings, stream).sha256
    found = exports.by_digest(ledger.store, digest)
    assert mark(settings, digest).marked == 3
    monkeypatch.setattr(exports, "by_digest", lambda *_: found)  # as it was before

    assert mark(settings, digest) == (found[0].uid, 3, 0, True)


def test_the_lines_are_those_of_the_format(outbox, settings, tmp_path):
    queue(outbox, "ü\u2028 1")

    export(settings, str(tmp_path / "f"))

    lines = (tmp_path / "f").read_text().split("\n")
    assert len(lines) == 4
    assert lines[1] == json.dumps(json.loads(lines[1]), ensure_ascii=False, separators=(",", ":"))
    assert "ü\u2028 1" in lines[1]
