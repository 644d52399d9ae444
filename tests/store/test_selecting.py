"""Records by filter, against a plain model; windows and index look-ups made so small that each case is met."""

from __future__ import annotations

import itertools
import os
import random
import sqlite3

import pytest

from versioner_agent import review, selecting
from versioner_agent.filters import Filter
from versioner_agent.records import COLUMNS, as_record
from versioner_agent.schema import STATES

BASE = 1_794_000_000.0
SEED = int(os.environ.get("SEED", "1"))


def change(outbox, query, *values):
    with outbox.store.write() as connection:
        connection.execute(query, values)


@pytest.fixture
def filled(outbox):
    """Two hundred records of all states, products, versions, reasons and times, with gaps between their ids."""
    dice = random.Random(SEED)
    outbox.enqueue("build", {"product_name": "p", "version": "v", "status": "ok"})
    row_of = (
        "UPDATE record SET state = ?, product_name = ?, version = ?, reason = ?, late = ?, queued_at = ? WHERE id = ?"
    )
    for number in range(200):
        record_id = outbox.enqueue("build", {"product_name": "p", "version": str(number), "status": "ok"}).id
        state = dice.choice([*STATES, "staged"])
        reason = dice.choice(["conflict", "invalid", "blocked"]) if state in ("failed", "discarded") else None
        is_late = reason == "blocked" and dice.random() < 0.5
        change(outbox, row_of, state, dice.choice("abc"), dice.choice("12"), reason, is_late, BASE + number, record_id)
    change(outbox, "DELETE FROM record WHERE id % 7 = 0 OR id BETWEEN 60 AND 110")
    return outbox


def everything(outbox):
    with outbox.store.read() as connection:
        rows = connection.execute(f"SELECT {COLUMNS} FROM record WHERE state <> 'staged' ORDER BY id").fetchall()
    return [as_record(row) for row in rows]


def is_meant(wanted, record):
    """The same as the filter says, written down again."""
    return (
        (wanted.state is None or record.state == wanted.state)
        and (wanted.product is None or record.product_name == wanted.product)
        and (wanted.version is None or record.version == wanted.version)
        and (wanted.reason is None or record.reason == wanted.reason or (wanted.reason == "late" and record.late == 1))
        and (wanted.since is None or wanted.since <= record.queued_at)
        and (wanted.until is None or wanted.until > record.queued_at)
    )


FILTERS = [
    Filter(*each)
    for each in itertools.product(
        (None, "failed", "pending"),
        (None, "b", "x"),
        (None, "2"),
        (None, "conflict", "late"),
        (None, BASE + 50),
        (None, BASE + 150),
    )
]


@pytest.mark.parametrize(("window", "known"), [(1000, 5000), (3, 2)])
def test_a_filter_finds_what_the_model_finds(filled, monkeypatch, window, known):
    monkeypatch.setattr(selecting, "WINDOW", window)
    monkeypatch.setattr(selecting, "MOST_KNOWN", known)
    records = everything(filled)
    some = 0
    for wanted in FILTERS:
        meant = [record.id for record in records if is_meant(wanted, record)]
        some += bool(meant)
        for oldest_first, limit in ((False, None), (True, None), (False, 5)):
            pages = list(selecting.select(filled.store, wanted, limit=limit, oldest_first=oldest_first, page=4))
            expected = (meant if oldest_first else meant[::-1])[:limit]

            assert [record.id for page in pages for record in page] == expected, wanted
            assert all(0 < len(page) <= 4 for page in pages)
            assert all(wanted.matches(record) for page in pages for record in page)
    assert some > len(FILTERS) / 3


@pytest.mark.parametrize("version", [1, 2, 3])
def test_outboxes_of_older_schemas_are_filtered_too(filled, version):
    records = everything(filled)
    filled.store.close()
    with sqlite3.connect(filled.store.path) as connection:
        if version < 3:
            connection.execute("DROP INDEX record_refused")
            connection.execute("DROP TABLE failure")
        if version < 2:
            connection.execute("DROP INDEX record_version")
        for trigger in ("failure_insert", "failure_update", "failure_delete") if version < 3 else ():
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    wanted = Filter("failed", "b", "2")

    found = [record.id for page in selecting.select(filled.store, wanted) for record in page]

    assert found == [record.id for record in records if is_meant(wanted, record)][::-1]
    assert review.amended_by(filled.store, 1) is None


def test_a_rare_match_is_looked_for_in_windows(filled, monkeypatch):
    """No read looks at more than a window of records, so nobody waits for one that finds nothing."""
    monkeypatch.setattr(selecting, "WINDOW", 10)
    seen = []
    filled.store.read = lambda real=filled.store.read: (seen.append(1), real())[1]

    assert list(selecting.select(filled.store, Filter(reason="gave_up"))) == []
    assert len(seen) >= len(everything(filled)) // 10


def test_queuing_between_pages_is_free(outbox):
    """Nothing is locked while a page is shown, and no record is shown twice."""
    build = {"product_name": "a", "version": "1", "status": "ok"}
    for _ in range(4):
        outbox.enqueue("build", build)
    seen = []
    for page in selecting.select(outbox.store, page=2):
        seen += [record.id for record in page]
        outbox.enqueue("build", build)

    assert seen == [4, 3, 2, 1]
