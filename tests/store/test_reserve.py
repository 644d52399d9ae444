"""Space for recording deliveries: when it is made, and what is written where it is all there is."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import subprocess
import sys

import pytest

from versioner_agent import Outbox, reserve, review
from versioner_agent.errors import OutboxBusy, OutboxFull
from versioner_agent.files import RESERVE_BYTES, ROOM_BYTES
from versioner_agent.ledger import BRIEF_CHARS, Health, Ledger
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import Outcome
from versioner_agent.policy import Counters, Decision
from versioner_agent.records import is_intact
from versioner_agent.settling import Settlement
from versioner_agent.storage import Store

HERE = Destination("https://api.example", "acme")
DELIVERED = Outcome("delivered", "", http_status=200, server_id="evt-" + "0" * 36)
CONFLICT = Outcome("conflict", "w" * 2000, http_status=409)
SILENCE = Outcome("no_answer", "r" * 2000)
STATES = {"delivered": "delivered", "conflict": "failed", "no_answer": "pending"}


@pytest.fixture
def full(outbox, monkeypatch):
    """A ledger over forty records whose file can grow no more, and whose journal is as large as it is."""
    for number in range(40):
        outbox.enqueue("build", {"product_name": f"p{number}", "version": "1", "status": "ok", "invoke_id": "7"})
    monkeypatch.setattr(Store, "free_space", lambda _: 0)
    run(outbox.store, f"PRAGMA max_page_count = {page_count(outbox.store)}")
    return Ledger(outbox.store)


def run(store, statement):
    with store.read() as connection:
        return connection.execute(statement).fetchall()


def settle(ledger, record_id, outcome):
    record = review.show(ledger.store, record_id)[0]
    decision = Decision(STATES[outcome.reason], outcome.reason, outcome.detail, Counters())
    return ledger.settle([Settlement(record, outcome, decision, 1.8e9, 0.25)], Health("up", "r" * 2000), HERE)


def reserved(store):
    return run(store, "SELECT length(filler) FROM reserve")


def eat_free_pages(store):
    with contextlib.suppress(OutboxFull):
        for number in itertools.count():
            with store.write() as connection:
                connection.execute("INSERT INTO meta (key, value) VALUES (?, zeroblob(3000))", (f"eaten{number}",))
    assert store.free_pages() == 0


def page_count(store):
    return run(store, "PRAGMA page_count")[0][0]


def journal_bytes(store):
    return os.stat(store.path + "-journal").st_size


def test_the_first_enqueue_makes_it_and_a_journal_of_its_size(outbox):
    outbox.enqueue("build", {"product_name": "p", "version": "1", "status": "ok"})

    assert reserved(outbox.store) == [(RESERVE_BYTES,)]
    assert journal_bytes(outbox.store) >= RESERVE_BYTES


EVENT = {"product_name": "p", "version": "1", "status": "ok"}


def queue(store):
    with Outbox(store.path) as outbox:
        outbox.enqueue("build", {**EVENT, "version": "2"})


MAKERS = pytest.mark.parametrize("make", [reserve.keep, queue], ids=["agent", "enqueue"])


@MAKERS
def test_nothing_is_accepted_where_there_is_no_room_for_it(outbox, monkeypatch, make):
    """Or deliveries could not be recorded if others filled the disk."""
    monkeypatch.setattr(Store, "free_space", lambda _: ROOM_BYTES - 1)
    with pytest.raises(OutboxFull, match="below 1024 KiB nothing new is queued"):
        outbox.enqueue("build", EVENT)
    reserve.keep(outbox.store)
    assert reserved(outbox.store) == []

    monkeypatch.setattr(Store, "free_space", lambda _: ROOM_BYTES)
    make(outbox.store)
    assert reserved(outbox.store) == [(RESERVE_BYTES,)]
    assert journal_bytes(outbox.store) >= RESERVE_BYTES


@MAKERS
def test_one_that_was_given_up_is_made_again(outbox, make):
    outbox.enqueue("build", EVENT)
    reserve.give_up(outbox.store)

    make(outbox.store)

    assert reserved(outbox.store) == [(RESERVE_BYTES,)]


@MAKERS
def test_a_journal_that_somebody_removed_is_grown_again(outbox, make):
    outbox.enqueue("build", EVENT)
    outbox.close()
    os.remove(outbox.store.path + "-journal")

    make(outbox.store)

    assert journal_bytes(outbox.store) >= RESERVE_BYTES


def test_a_mended_outbox_has_it_before_anything_is_accepted(outbox):
    outbox.enqueue("build", EVENT)
    outbox.close()
    with open(outbox.store.path, "r+b") as file:
        file.write(b"garbage")

    queue(outbox.store)

    assert reserved(outbox.store) == [(RESERVE_BYTES,)]
    assert journal_bytes(outbox.store) >= RESERVE_BYTES


def test_a_journal_that_is_rolled_back_keeps_its_size(outbox):
    """SQLite's own way is to delete it, and a neighbour would eat what that frees."""
    outbox.enqueue("build", {"product_name": "p", "version": "1", "status": "ok"})
    outbox.close()
    killed = "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
    killed += "c.execute('PRAGMA journal_mode = PERSIST'); c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN')\n"
    killed += "c.execute('UPDATE record SET detail = zeroblob(90000)'); os._exit(0)"
    subprocess.run([sys.executable, "-c", killed, outbox.store.path], check=True)
    before = journal_bytes(outbox.store)

    record, _, _ = review.show(outbox.store, 1)

    assert record.detail is None
    assert journal_bytes(outbox.store) == before >= RESERVE_BYTES
    with Outbox(outbox.store.path, busy_timeout=0.1) as other:  # and no lock was kept
        other.enqueue("build", {"product_name": "p", "version": "2", "status": "ok"})


@pytest.mark.parametrize("outcome", [DELIVERED, CONFLICT, SILENCE], ids=lambda outcome: outcome.reason)
def test_every_decision_is_recorded_on_a_full_disk(full, outcome):
    assert [settle(full, record_id, outcome) for record_id in range(1, 41)] == [[]] * 40

    assert review.stats(full.store).counts[STATES[outcome.reason]] == 40
    assert reserved(full.store) == []
    assert run(full.store, "PRAGMA integrity_check") == [("ok",)]


def test_a_quota_keeps_nobody_from_starting_to_deliver(full, monkeypatch):
    """The disk says that there is room, and has none for us."""
    reserve.give_up(full.store)
    eat_free_pages(full.store)
    monkeypatch.setattr(Store, "free_space", lambda _: 10**12)

    with full.store.write(create=True) as connection:
        connection.execute("UPDATE destination SET reason = 'x'")
    outbox = Outbox(full.store.path)
    outbox.store = full.store

    assert reserved(full.store) == []
    with pytest.raises(OutboxFull, match="nothing new is queued"):
        outbox.enqueue("build", EVENT)


def test_a_reader_that_keeps_the_file_is_named_and_not_taken_for_a_full_disk(outbox):
    outbox.enqueue("build", EVENT)
    reserve.give_up(outbox.store)
    outbox.close()
    with contextlib.closing(sqlite3.connect(outbox.store.path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM record").fetchone()
        with Outbox(outbox.store.path, busy_timeout=0.1) as other, pytest.raises(OutboxBusy):
            other.enqueue("build", EVENT)


def test_queuing_is_refused_all_the_while(full):
    with Outbox(full.store.path) as outbox, pytest.raises(OutboxFull, match="nothing new is queued"):
        outbox.enqueue("build", {"product_name": "x", "version": "1", "status": "ok"})

    assert reserved(full.store) == [(RESERVE_BYTES,)]


def test_what_is_delivered_on_a_full_disk_keeps_all_but_its_payload(full, monkeypatch):
    reserve.give_up(full.store)
    before, _, _ = review.show(full.store, 1)
    settle(full, 1, DELIVERED)

    record, payload, attempts = review.show(full.store, 1)
    changed = {"state", "attempts", "last_attempt_at", "settled_at", "http_status", "server_id", "digest"}
    assert {name for name in record._fields if getattr(record, name) != getattr(before, name)} == changed
    assert (payload, attempts) == (b"", [])
    assert is_intact(record, payload)
    monkeypatch.setattr(Store, "free_space", lambda _: ROOM_BYTES)
    with Outbox(full.store.path) as outbox:
        again = outbox.enqueue("build", {"product_name": "p0", "version": "1", "status": "ok", "invoke_id": "7"})
        assert (again.outcome, again.id) == ("duplicate", 1)


def test_what_is_refused_on_a_full_disk_keeps_its_payload_and_the_first_words(full):
    reserve.give_up(full.store)
    settle(full, 1, CONFLICT)

    record, payload, _ = review.show(full.store, 1)
    assert record.detail == "w" * (BRIEF_CHARS - 1) + "…"
    assert is_intact(record, payload)
    assert payload


@pytest.mark.parametrize("outcome", [CONFLICT, SILENCE], ids=lambda outcome: outcome.reason)
def test_a_bare_decision_needs_no_free_page(full, outcome):
    """However many are refused: a row that is settled is not larger than one that waits."""
    reserve.give_up(full.store)
    eat_free_pages(full.store)

    assert [settle(full, record_id, outcome) for record_id in range(1, 41)] == [[]] * 40

    record, payload, _ = review.show(full.store, 40)
    assert (record.state, record.reason) == (STATES[outcome.reason], outcome.reason)
    assert is_intact(record, payload)


def test_what_there_is_no_room_for_is_returned(full, monkeypatch):
    def no_room(*_):
        raise OutboxFull("no room")

    reserve.give_up(full.store)
    monkeypatch.setattr("versioner_agent.settling.write_briefly", no_room)

    assert [settlement.record.id for settlement in settle(full, 1, CONFLICT)] == [1]
    assert review.show(full.store, 1)[0].state == "pending"


def test_room_that_deliveries_leave_is_used_by_new_events(full):
    """Rows that were let go are packed together, and their pages become free."""
    reserve.give_up(full.store)
    free = full.store.free_pages()
    for record_id in range(1, 41):
        settle(full, record_id, DELIVERED)

    assert full.store.free_pages() > free
