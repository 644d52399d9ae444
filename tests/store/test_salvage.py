"""What is saved of a damaged outbox beside the records' own bytes: states, runs, batches, the destination, the last id."""

from __future__ import annotations

import contextlib
import os
import sqlite3

import pytest

from versioner_agent import Outbox, mending, review, settling
from versioner_agent.batches import INSERT_BATCH
from versioner_agent.ledger import Health, Ledger
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import Outcome
from versioner_agent.pages import PAGE_BYTES, rows
from versioner_agent.policy import Counters, Decision
from versioner_agent.records import is_intact
from versioner_agent.storage import Store

HERE = Destination("https://api.example", "acme")
RUN = {"product_name": "payments", "version": "1.2.3", "status": "completed", "invoke_id": "7"}
DELIVERED = Outcome("delivered", "", http_status=200, server_id="evt-1")


@pytest.fixture
def path(tmp_path):
    made = str(tmp_path / "outbox.db")
    with Outbox(made) as outbox:
        for version in range(1, 6):
            outbox.enqueue("build", {**RUN, "version": str(version)})
    return made


def run(path, statement, *values):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("PRAGMA secure_delete = ON")
        return connection.execute(statement, values).fetchall()


def replace_bytes(path, old, new):
    """Change bytes in the file, as a disk would; there must be exactly one such place in a row."""
    with open(path, "r+b") as file:
        data = file.read()
        assert len(old) == len(new)
        assert data.count(old) >= 1
        file.seek(0)
        file.write(data.replace(old, new, 1))


def mend(path):
    """Break the header, so that all is read from bytes, and mend; returns the ledger's view of it."""
    with open(path, "r+b") as file:
        file.write(b"garbage")
    with contextlib.closing(Store(path)) as store:
        return Ledger(store).open(create=True)


def settle(path, record_id):
    with contextlib.closing(Store(path)) as store:
        record = review.show(store, record_id)[0]
        decision = Decision("delivered", "delivered", "", Counters())
        settlement = settling.Settlement(record, DELIVERED, decision, 1.8e9, 0.1)
        Ledger(store).settle([settlement], Health("up"), HERE)


def state_of(path, record_id):
    with contextlib.closing(Store(path)) as store:
        found = review.show(store, record_id)
        return found and found[0].state


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("qending", "pending"), ("deliverec", "delivered"), ("faileD", "failed"), ("expnrted", "exported"),
     (b"discarded", "discarded"), ("dhscarded", "discarded"), ("", "pending"), (7, "pending")],
    ids=repr,
)  # fmt: skip
def test_a_state_is_what_it_was_before_a_bit_flipped(path, wrong, right):
    run(path, "UPDATE record SET state = ? WHERE id = 3", wrong)
    mend(path)

    assert state_of(path, 3) == right


@pytest.mark.parametrize("column", ["content", "identity"])
def test_a_run_is_known_again_whichever_of_its_digests_was_damaged(path, column):
    run(path, f"UPDATE record SET {column} = zeroblob(32) WHERE id = 3")
    mend(path)

    with Outbox(path) as outbox:
        again = outbox.enqueue("build", {**RUN, "version": "3"})
    assert (again.outcome, again.id) == ("duplicate", 3)


def test_a_run_is_known_again_when_both_were_damaged(path):
    run(path, "UPDATE record SET content = zeroblob(32), identity = zeroblob(32) WHERE id = 3")
    mend(path)

    with Outbox(path) as outbox:
        assert outbox.enqueue("build", {**RUN, "version": "3"}).outcome == "duplicate"


def test_an_altered_payload_is_neither_saved_nor_silent(path):
    replace_bytes(path, b'"version":"4"', b'"version":"9"')
    damage = mend(path)

    assert state_of(path, 4) is None
    assert (damage.unreadable, damage.unreadable_ids) == (1, [4])
    assert damage.salvaged == {"pending": 4}


def test_pruned_records_do_not_come_back_and_their_ids_are_not_given_again(path):
    for record_id in (4, 5):
        settle(path, record_id)
    with contextlib.closing(Store(path)) as store:
        assert Ledger(store).prune(9e9) == 2
    mend(path)

    assert [state_of(path, record_id) for record_id in (3, 4, 5)] == ["pending", None, None]
    with Outbox(path) as outbox:
        assert outbox.enqueue("build", {**RUN, "version": "6"}).id == 6


def leaf_with(path, record_id):
    """Where the page of a record begins in the file, and the row in it."""
    with open(path, "rb") as file:
        data = file.read()
    for start in range(PAGE_BYTES, len(data), PAGE_BYTES):
        for row in rows(data[start : start + PAGE_BYTES], lambda _: b""):
            if row.rowid == record_id and len(row.values) > 30 and not row.is_free:
                return start, row
    raise AssertionError("no such record")


def mend_as_it_is(path):
    with contextlib.closing(Store(path)) as store, store.turn():
        return mending._replace(store, "torn")


@pytest.mark.parametrize("size", [8, 512])
def test_a_record_is_saved_whose_page_begins_as_it_was_before_the_record(path, size):
    """A write that was torn: the head of the page says that nothing lies where the record is."""
    with open(path, "rb") as file:
        before = file.read()
    with Outbox(path) as outbox:
        outbox.enqueue("build", {**RUN, "version": "6"})
    start, _ = leaf_with(path, 6)
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(before[start : start + size])
    damage = mend_as_it_is(path)

    assert damage.salvaged == {"pending": 6}
    assert state_of(path, 6) == "pending"


def test_a_delivered_record_whose_time_was_damaged_is_not_pruned_at_once(path):
    settle(path, 3)
    run(path, "UPDATE record SET settled_at = 1.0 WHERE id = 3")
    mend(path)
    with contextlib.closing(Store(path)) as store:
        assert Ledger(store).prune(1.7e9) == 0

    assert state_of(path, 3) == "delivered"


def test_a_record_is_saved_that_lies_within_what_is_left_of_another(path):
    """The beginning of another page was written over the beginning of its own."""
    with Outbox(path) as outbox:
        for version in ("6", "7"):
            outbox.enqueue("build", {**RUN, "version": version, "extra_metadata": {"notes": "n" * 2400}})
    (other, whole), (start, row) = leaf_with(path, 6), leaf_with(path, 7)
    assert start != other
    assert row.start > 500
    with open(path, "r+b") as file:
        file.seek(other + whole.start)
        beginning = file.read(300)
        file.seek(start)
        file.write(b"\x0d\0\0\0\x01\0\x64\0\0\x64" + bytes(90) + beginning)
    mend(path)

    assert state_of(path, 7) == "pending"


@pytest.mark.parametrize("mend_it", [mend, mend_as_it_is], ids=["garbage-header", "readable"])
def test_an_old_copy_of_a_pruned_record_stays_where_it_is(path, mend_it):
    """SQLite leaves such copies in what a page says is free, where it moved rows to another page."""
    start, row = leaf_with(path, 4)
    with open(path, "rb") as file:
        file.seek(start + row.start)
        copy = file.read(row.end - row.start)
    settle(path, 4)
    with contextlib.closing(Store(path)) as store:
        assert Ledger(store).prune(9e9) == 1
    with open(path, "r+b") as file:
        file.seek(start)
        head = file.read(8)
        at = 8 + 2 * int.from_bytes(head[3:5])
        assert at + len(copy) < int.from_bytes(head[5:7])
        file.seek(start + at)
        file.write(copy)
    damage = mend_it(path)

    assert damage.salvaged == {"pending": 4}
    assert state_of(path, 4) is None


def test_no_bytes_of_what_was_pruned_are_left_in_the_file(path):
    with contextlib.closing(Store(path)) as store:
        event_ids = [review.show(store, record_id)[0].event_id.encode() for record_id in (1, 2, 3)]
    for record_id in (1, 2, 3):
        settle(path, record_id)
    with contextlib.closing(Store(path)) as store:
        Ledger(store).prune(9e9)
    with open(path, "rb") as file:
        data = file.read()

    assert not any(event_id in data for event_id in event_ids)


def test_the_destination_and_its_deliveries_are_kept(path):
    settle(path, 1)
    mend(path)

    with contextlib.closing(Store(path)) as store:
        destination, health, deliveries = Ledger(store).destination()
    assert (destination, health.state, deliveries) == (HERE, "unknown", 1)


def test_what_was_delivered_on_a_full_disk_is_saved_without_its_payload(path):
    with contextlib.closing(Store(path)) as store, store.write() as connection:
        record = review.show(store, 2)[0]
        decision = Decision("delivered", "delivered", "", Counters())
        settling.write_briefly(connection, settling.Settlement(record, DELIVERED, decision, 1.8e9, 0.1), 0)
    mend(path)

    with contextlib.closing(Store(path)) as store:
        record, payload, _ = review.show(store, 2)
    assert (record.state, payload) == ("delivered", b"")
    assert is_intact(record, payload)
    with Outbox(path) as outbox:
        assert outbox.enqueue("build", {**RUN, "version": "2"}).id == 2


@pytest.mark.parametrize(("batch", "state"), [("published", "staged"), ("gone", "pending"), ("unpublished", "staged")])
def test_staged_records_go_with_their_batch(path, batch, state):
    """Where the batch is gone they may have been acknowledged: better sent than lost."""
    with contextlib.closing(Store(path)) as store, store.write() as connection:
        number = connection.execute(INSERT_BATCH, ("enqueue", 1.0)).lastrowid
        connection.execute("UPDATE batch SET published = ?, waiting = 5", (batch == "published",))
        connection.execute("UPDATE record SET state = 'staged', batch = ?", (number,))
    if batch == "gone":
        run(path, "DELETE FROM batch")
    mend(path)

    assert {row[0] for row in run(path, "SELECT state FROM record")} == {state}
    assert run(path, "SELECT count(*) FROM batch") == [(0 if batch == "gone" else 1,)]


def test_of_two_copies_the_later_state_counts(path):
    """A change of two pages of which one was written leaves a record twice."""
    with open(path, "rb") as file:
        before = file.read()
    settle(path, 3)
    with open(path, "r+b") as file:
        size = os.path.getsize(path)
        file.seek(size + -size % 4096)
        file.write(before)  # as if the old pages were somewhere else in the file
    mend(path)

    assert state_of(path, 3) == "delivered"
    assert state_of(path, 2) == "pending"


def test_a_record_whose_overflow_pages_are_gone_is_counted_and_named(tmp_path):
    path = str(tmp_path / "outbox.db")
    with Outbox(path) as outbox:
        outbox.enqueue("build", {**RUN, "extra_metadata": {"notes": "n" * 90_000}})
        outbox.enqueue("build", {**RUN, "version": "2"})
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(data.index(b"n" * 4092) // 4096 * 4096)
        file.write(bytes(4096))
    damage = mend(path)

    assert damage.salvaged == {"pending": 1}
    assert (damage.unreadable, damage.unreadable_ids) == (1, [1])


def test_records_of_which_nothing_is_left_are_counted(path):
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(data.index(b'"version":"3"') // 4096 * 4096)
        file.write(bytes(4096))
    with contextlib.closing(Store(path)) as store:
        damage = Ledger(store).open(create=True)

    assert damage.unreadable == 5 - sum(damage.salvaged.values()) > 0


def test_a_file_that_lost_its_name_and_schema_is_still_known_by_its_records(path):
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(68)
        file.write(bytes(4))
        file.seek(data.index(b"CREATE TRIGGER tally_insert"))
        file.write(bytes(30))
    with contextlib.closing(Store(path)) as store:
        assert Ledger(store).open(create=True).salvaged == {"pending": 5}


def test_a_batch_whose_mark_of_being_published_was_lost_is_handed_over(path):
    with contextlib.closing(Store(path)) as store, store.write() as connection:
        number = connection.execute(INSERT_BATCH, ("enqueue", 1.0)).lastrowid
        connection.execute("UPDATE batch SET published = 0, waiting = 5")
        connection.execute("UPDATE record SET state = 'staged', batch = ?", (number,))
    with contextlib.closing(Store(path)) as store:
        ledger = Ledger(store)
        ledger.sweep_batches(9e9)
        assert ledger.head("payments")[0].id == 1


def test_what_crossing_an_air_gap_needs_is_kept(path):
    """Which outbox it is, what left it and what came in: without them receipts would find nobody."""
    uid = "0123456789abcdef" * 2
    with contextlib.closing(Store(path)) as store, store.write() as connection:
        connection.execute("UPDATE outbox SET uid = ?, machine = 'here'", (uid,))
        connection.execute(
            "INSERT INTO export (uid, created_at, state, records, waiting) VALUES (?, 1.5, 'marked', 5, 0)", (uid,)
        )
        connection.execute("UPDATE record SET state = 'exported', batch = -1 WHERE id < 3")
        connection.execute("INSERT INTO arrival VALUES (7, ?, 'elsewhere', 'host', 2, 1.5, 2.5, 0)", (uid,))
    before = rows_of_tables(path, "outbox", "export", "arrival")
    with open(path, "r+b") as file:
        file.write(b"broken")
    mend(path)

    assert rows_of_tables(path, "outbox", "export", "arrival") == before
    assert state_of(path, 2) == "exported"


def rows_of_tables(path, *names):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [connection.execute(f"SELECT * FROM {name}").fetchall() for name in names]


def test_exported_records_whose_batch_is_lost_are_in_one_that_can_be_written_again(path):
    """They hold their products: `status` must show it, and a receipt must find them."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE record SET state = 'exported', batch = -7 WHERE id = 1")
        connection.execute("UPDATE record SET state = 'exported', batch = ? WHERE id = 2", (-(2**40),))
    with open(path, "r+b") as file:
        file.write(b"broken")
    mend(path)

    with contextlib.closing(Store(path)) as store:
        overview = review.stats(store).exports
        batches = [review.show(store, each)[0].batch for each in (1, 2)]
    assert [(each.id, each.state, each.records, each.awaited) for each in overview.batches] == [
        (7, "marked", 1, 1),
        (8, "marked", 1, 1),
    ]
    assert overview.held_products == 1
    assert batches == [-7, -8]
