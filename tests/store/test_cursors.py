"""Failures told once to each cursor, the oldest first, and none lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time

import pytest

from versioner_agent import cursors, review
from versioner_agent.errors import OutboxBusy, OutboxError
from versioner_agent.filters import Filter
from versioner_agent.storage import OutboxMissing, Store

FAILED = Filter("failed")


def queue(outbox, count=1, product="a"):
    from versioner_agent import events

    fields = {"product_name": product, "version": "1", "status": "ok"}
    return [each.id for each in outbox.enqueue_all([events.validate("build", fields)] * count)]


def fail(outbox, *ids):
    with outbox.store.write() as connection:
        connection.executemany(
            "UPDATE record SET state = 'failed', reason = 'conflict' WHERE id = ?", [(i,) for i in ids]
        )


def told(outbox, name="mail", wanted=FAILED, limit=None):
    """Read by a cursor as `list --new` does."""
    found = []
    with cursors.held(outbox.store, name):
        for step in cursors.unseen(outbox.store, name, wanted, limit):
            found += [record.id for record in step.records]
            cursors.move(outbox.store, name, step)
    return found


def test_each_failure_is_told_once_to_each_cursor(outbox):
    queue(outbox, 4)
    fail(outbox, 3, 1)

    assert told(outbox) == [3, 1]  # in the order in which they failed
    assert told(outbox) == []
    fail(outbox, 2)
    assert told(outbox, "pager") == [3, 1, 2]
    assert told(outbox) == [2]
    assert told(outbox) == told(outbox, "pager") == []


def test_what_fails_again_is_told_again_and_only_once(outbox):
    queue(outbox, 2)
    fail(outbox, 1, 2)
    assert told(outbox) == [1, 2]
    review.retry(outbox.store, [1])
    assert told(outbox) == []
    fail(outbox, 1)

    assert told(outbox) == [1]
    assert told(outbox, "late") == [2, 1]


def test_what_is_no_failure_any_more_is_passed_over(outbox):
    queue(outbox, 5)
    fail(outbox, 1, 2, 3, 4)
    review.retry(outbox.store, [1])
    review.discard(outbox.store, [2])
    with outbox.store.write() as connection:
        connection.execute("DELETE FROM record WHERE id = 3")

    assert told(outbox) == told(outbox, "others", Filter()) == [4]


@pytest.mark.parametrize("page", [1, 3, 500])
def test_a_limit_leaves_the_rest_for_the_next_time(outbox, monkeypatch, page):
    monkeypatch.setattr(cursors, "PAGE", page)
    ids = queue(outbox, 10)
    fail(outbox, *ids)
    review.discard(outbox.store, [2, 5])
    left = [each for each in ids if each not in (2, 5)]

    assert told(outbox, limit=3) == left[:3]
    assert told(outbox, limit=3) == left[3:6]
    assert told(outbox) == left[6:]


def test_what_a_filter_leaves_out_counts_as_seen(outbox):
    queue(outbox, 1, "a")
    queue(outbox, 1, "b")
    fail(outbox, 1, 2)

    assert told(outbox, wanted=Filter("failed", "b")) == [2]
    assert told(outbox) == []


def test_a_cursor_that_was_not_moved_tells_again(outbox):
    fail(outbox, *queue(outbox, 3))

    list(cursors.unseen(outbox.store, "mail", FAILED))

    assert told(outbox) == [1, 2, 3]


def test_a_cursor_never_goes_back(outbox):
    fail(outbox, *queue(outbox, 3))
    (step,) = cursors.unseen(outbox.store, "mail", FAILED)
    cursors.move(outbox.store, "mail", step)
    cursors.move(outbox.store, "mail", step._replace(seq=1))

    assert told(outbox) == []


def test_a_cursor_is_not_moved_in_an_outbox_that_took_the_place_of_the_one_that_was_read(outbox):
    """A mended or restored one counts its failures anew: some would never be told."""
    fail(outbox, *queue(outbox, 3))
    (step,) = cursors.unseen(outbox.store, "mail", FAILED)
    outbox.close()
    shutil.copy(outbox.store.path, f"{outbox.store.path}.copy")
    os.replace(f"{outbox.store.path}.copy", outbox.store.path)
    with pytest.raises(OutboxError, match="replaced"):
        cursors.move(outbox.store, "mail", step)

    assert told(outbox) == [1, 2, 3]


def test_ten_thousand_failures_are_told_in_short_reads(outbox):
    ids = queue(outbox, 10_000)
    with outbox.store.write() as connection:
        connection.execute("UPDATE record SET state = 'failed', reason = 'conflict'")
    steps = list(cursors.unseen(outbox.store, "mail", FAILED))

    assert [record.id for step in steps for record in step.records] == ids
    assert max(len(step.records) for step in steps) <= cursors.PAGE


def test_one_run_of_a_name_at_a_time_and_others_beside_it(outbox):
    """Who comes second waits for the first, and so never tells what the first has told."""
    fail(outbox, *queue(outbox, 3))
    second = []
    started = threading.Event()

    def later():
        with_own = Store(outbox.store.path)
        started.set()
        with cursors.held(with_own, "mail"):
            second.extend(cursors.unseen(with_own, "mail", FAILED))
        with_own.close()

    thread = threading.Thread(target=later)
    with cursors.held(outbox.store, "mail"):
        thread.start()
        started.wait(30)
        for step in cursors.unseen(outbox.store, "mail", FAILED):
            cursors.move(outbox.store, "mail", step)
        other = Store(outbox.store.path)
        with cursors.held(other, "pager"):
            pass
        other.close()
    thread.join(30)

    assert not thread.is_alive()
    assert second == []


def test_who_waits_too_long_is_told_so(outbox):
    queue(outbox)
    other = Store(outbox.store.path, 0.05)
    with cursors.held(outbox.store, "mail"), pytest.raises(OutboxBusy, match="another"), cursors.held(other, "mail"):
        pass
    other.close()


def test_without_an_outbox_there_is_nothing_and_nothing_is_made(tmp_path):
    store = Store(tmp_path / "outbox.db")
    with pytest.raises(OutboxMissing), cursors.held(store, "mail"):
        pass

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [1, 2])
def test_an_outbox_of_an_older_schema_has_no_cursors(outbox, version):
    queue(outbox)
    outbox.store.close()
    with sqlite3.connect(outbox.store.path) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()

    with pytest.raises(OutboxError) as caught, cursors.held(outbox.store, "mail"):
        pass
    assert "restart the agent" in caught.value.hint


def test_a_cursor_remembers_when_it_was_used(outbox):
    fail(outbox, *queue(outbox))
    before = time.time()
    told(outbox)
    with outbox.store.read() as connection:
        rows = connection.execute("SELECT name, seq, used_at FROM cursor").fetchall()

    assert [row[:2] for row in rows] == [("mail", 1)]
    assert before <= rows[0][2] <= time.time()
