"""An outbox in numbers: each equals what SQL counts, on outboxes that went through everything at random."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3

import pytest
from exposition import has, read, value
from specimen import make_tables

from versioner_agent import damage, gauges, metrics, review, schema
from versioner_agent.errors import OutboxDamaged
from versioner_agent.locks import FlusherLock
from versioner_agent.outbox import Outbox
from versioner_agent.storage import Store

REASONS = ("conflict", "blocked", "invalid", "gave_up", "damaged", "a word of the far side", None)
FAILED_IN_SQL = {
    "conflict": "reason = 'conflict'",
    "blocked": "reason = 'blocked' AND late = 0",
    "blocked_late": "reason = 'blocked' AND late <> 0",
    "invalid": "reason = 'invalid'",
    "gave_up": "reason = 'gave_up'",
    "damaged": "reason = 'damaged'",
    "other": "reason IS NULL OR reason NOT IN ('conflict', 'blocked', 'invalid', 'gave_up', 'damaged')",
}


@pytest.fixture
def store(outbox):
    with contextlib.closing(Store(outbox.store.path)) as opened:
        yield opened


def told(store):
    """The metrics of an outbox, read as a collector reads them."""
    return read(metrics.render(metrics.families(gauges.look(store), gauges.build())))


def fill(outbox, dice, count=80):
    """Queue events of a few products, and let everything happen to them that can."""
    for number in range(count):
        product = dice.choice("abcdefg")
        outbox.enqueue("build", {"product_name": product, "version": str(number), "status": "completed"})
    with outbox.store.write() as connection:
        for export in range(1, 4):
            state = dice.choice(["open", "marking", "marked"])
            row = (export, f"uid-{export}", 1000.0 + export, state)
            connection.execute("INSERT INTO export (id, uid, created_at, state) VALUES (?, ?, ?, ?)", row)
    for _ in range(4 * count):
        with outbox.store.write() as connection:
            shake(connection, dice, dice.randint(1, count))


def shake(connection, dice, record_id):
    """Do one thing to a record that may happen to one."""
    state = dice.choice(schema.STATES)
    failed = state == "failed"
    connection.execute(
        "UPDATE record SET state = ?, reason = ?, late = ?, held_since = ?, batch = ?, settled_at = ? WHERE id = ?",
        (
            state,
            dice.choice(REASONS),
            failed and dice.randint(0, 1),
            dice.choice([None, 5.0]) if state == "pending" else None,
            -dice.randint(1, 3) if state == "exported" else None,
            None if state == "pending" else dice.random(),
            record_id,
        ),
    )
    if failed and dice.random() < 0.1:
        connection.execute("DELETE FROM record WHERE id = ?", (record_id,))
    if state == "delivered":
        connection.execute("UPDATE destination SET deliveries = deliveries + 1, last_delivered_at = 77.5")


@pytest.mark.parametrize("seed", range(8))
def test_every_number_equals_a_direct_count(outbox, store, seed):
    fill(outbox, random.Random(seed))
    found = told(store)

    def sql(query):
        with store.read() as connection:
            return connection.execute(f"SELECT {query}").fetchone()[0]

    for state in schema.STATES:
        assert value(found, "records", state=state) == sql(f"count(*) FROM record WHERE state = '{state}'")
    assert set(FAILED_IN_SQL) == set(schema.FAILED_REASONS)
    for reason, where in FAILED_IN_SQL.items():
        expected = sql(f"count(*) FROM record WHERE state = 'failed' AND ({where})")
        assert value(found, "failed_records", reason=reason) == expected
    assert value(found, "failures_total") == sql("max(seq) FROM sqlite_sequence WHERE name = 'failure'")
    assert value(found, "failures_total") >= sql("count(*) FROM failure")
    assert value(found, "held_products") == sql("count(DISTINCT product_name) FROM record WHERE held_since IS NOT NULL")
    assert value(found, "deliveries_total") == sql("deliveries FROM destination")
    assert value(found, "last_delivery_timestamp_seconds") == sql("last_delivered_at FROM destination")
    oldest = sql("queued_at FROM record WHERE state = 'pending' ORDER BY id LIMIT 1")
    assert value(found, "oldest_pending_timestamp_seconds") == oldest
    exported = "state = 'marking' OR id IN (SELECT -batch FROM record WHERE state = 'exported') AND state <> 'open'"
    assert value(found, "exported_batches") == sql(f"count(*) FROM export WHERE {exported}")
    if sql(f"count(*) FROM export WHERE {exported}"):
        first = sql(f"min(created_at) FROM export WHERE {exported}")
        assert value(found, "oldest_export_timestamp_seconds") == first
    assert value(found, "outbox_bytes") == os.stat(store.path).st_size


@pytest.mark.parametrize(
    ("state", "is_exported", "count"),
    [("open", False, 0), ("marking", False, 1), ("marking", True, 1), ("marked", True, 1), ("marked", False, 0)],
)
def test_a_batch_counts_from_its_mark_to_its_last_receipt(outbox, store, state, is_exported, count):
    outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})
    with store.write() as connection:
        connection.execute("INSERT INTO export (id, uid, created_at, state) VALUES (7, 'u', 5.5, ?)", (state,))
        if is_exported:
            connection.execute("UPDATE record SET state = 'exported', batch = -7")

    found = gauges.look(store)

    assert (found.batches, found.oldest_batch_at) == (count, 5.5 if count else None)


def test_a_failure_is_counted_once_however_often_it_is_written(outbox, store):
    """The totals are counters: acting on failures does not make them smaller."""
    outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})
    with store.write() as connection:
        connection.execute("UPDATE record SET state = 'failed', reason = 'conflict'")
        connection.execute("UPDATE record SET reason = 'invalid', detail = 'words'")
    before = gauges.look(store)
    review.discard(store, [1])
    after = gauges.look(store)

    assert (before.failures, after.failures) == (1, 1)
    assert before.failed == dict.fromkeys(schema.FAILED_REASONS, 0) | {"invalid": 1}
    assert after.failed == dict.fromkeys(schema.FAILED_REASONS, 0)


def test_more_held_products_than_can_be_counted_at_once_are_left_out(outbox, store, monkeypatch):
    for product in "abc":
        outbox.enqueue("build", {"product_name": product, "version": "1", "status": "completed"})
    with store.write() as connection:
        connection.execute("UPDATE record SET held_since = 1")

    monkeypatch.setattr(gauges, "MOST_HELD", 3)
    assert gauges.look(store).held == 3
    monkeypatch.setattr(gauges, "MOST_HELD", 2)
    assert gauges.look(store).held is None
    assert not has(told(store), "held_products")


def test_of_an_outbox_that_was_never_made_all_counts_are_0(tmp_path):
    with contextlib.closing(Store(tmp_path / "outbox.db")) as store:
        view, found = gauges.look(store), told(store)

    assert not view.is_there
    assert value(found, "outbox_readable") == 1
    assert all(value(found, "records", state=state) == 0 for state in schema.STATES)
    assert all(value(found, "failed_records", reason=reason) == 0 for reason in schema.FAILED_REASONS)
    assert not has(found, "oldest_pending_timestamp_seconds")
    assert os.listdir(tmp_path) == []


def test_who_is_there_is_seen_also_by_itself(outbox, store):
    outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})
    assert (gauges.look(store).has_agent, gauges.look(store).is_delivering) == (False, False)
    with contextlib.closing(FlusherLock(store.path)) as lock:
        assert lock.claim_agent()
        assert (gauges.look(store).has_agent, gauges.look(store).is_delivering) == (True, False)
        assert lock.claim_delivery()
        assert (gauges.look(store).has_agent, gauges.look(store).is_delivering) == (True, True)


@pytest.mark.parametrize("version", [1, 2])
def test_an_outbox_that_its_agent_has_not_upgraded_tells_what_it_knows(tmp_path, version):
    path = str(tmp_path / "outbox.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        make_tables(connection, version)
    (tmp_path / "outbox.db.queue").write_bytes(b"outbox\n")
    with Outbox(path) as outbox:
        outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})

    with contextlib.closing(Store(path)) as store:
        found = told(store)

    assert value(found, "records", state="pending") == 1
    for name in ("failures_total", "failed_records", "exported_batches"):
        assert not has(found, name)


@pytest.mark.parametrize("seed", range(3))
def test_a_count_that_a_bit_has_changed_is_corrected(outbox, store, seed):
    fill(outbox, random.Random(seed), 20)
    before = gauges.look(store)
    assert not damage.recount(store)
    with store.write() as connection:
        connection.execute("UPDATE failed_tally SET n = n + 64 WHERE reason = 'conflict'")
        connection.execute("DELETE FROM failed_tally WHERE reason = 'other'")
    assert gauges.look(store).failed != before.failed

    assert damage.recount(store)
    assert gauges.look(store)._replace(free_bytes=None) == before._replace(free_bytes=None)
    assert not damage.recount(store)


def test_who_delivers_has_until_the_end_of_the_longest_pause(outbox, store):
    """A product whose event fails waits by itself, and the destination is up."""
    record_id = outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"}).id
    with store.write() as connection:
        connection.execute("UPDATE record SET last_attempt_at = 4e9 WHERE id = ?", (record_id,))

    assert gauges.look(store, max_backoff=3600.0).last_sign_at == 4e9 + 3600


def test_nonsense_in_a_damaged_file_is_no_traceback(outbox, store):
    outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})
    with store.write() as connection:
        connection.execute("UPDATE failed_tally SET n = x'00'")
        connection.execute("UPDATE destination SET deliveries = 'x', last_delivered_at = 'y', since = x'ff', state = 7")
        connection.execute("UPDATE record SET queued_at = 'never'")

    found = told(store)

    assert value(found, "deliveries_total") == 0
    assert value(found, "failed_records", reason="conflict") == 0
    assert value(found, "destination_state", state="unknown") == 1
    with store.write() as connection:
        connection.execute("UPDATE tally SET n = 'many' WHERE state = 'failed'")
    with pytest.raises(OutboxDamaged, match="counts of records"):
        gauges.look(store)
