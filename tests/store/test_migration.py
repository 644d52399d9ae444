"""Outboxes of other schemas: older ones are brought to this one, newer ones are left as they are.

There is only one schema so far. What a second one will need is tried with an invented step.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys

import pytest
from crash import killed_at, needs_strace, points_of

from versioner_agent import Outbox, migration, review, schema
from versioner_agent.errors import OutboxError, OutboxFull
from versioner_agent.ledger import Ledger
from versioner_agent.storage import Store

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
STEP = (
    "ALTER TABLE destination ADD COLUMN region TEXT",
    "CREATE INDEX record_version ON record (version)",
    "UPDATE destination SET region = 'somewhere'",
)
MIGRATE = f"""
import sys
from versioner_agent import schema
schema.STEPS, schema.VERSION = ({STEP!r},), 2
from versioner_agent.ledger import Ledger
from versioner_agent.storage import Store
Ledger(Store(sys.argv[1])).migrate()
"""


@pytest.fixture
def path(tmp_path):
    """An outbox of schema 1, as this program makes it before it learns of another."""
    made = str(tmp_path / "outbox.db")
    with Outbox(made) as outbox:
        for number in range(50):
            outbox.enqueue("build", {**BUILD, "version": str(number)})
    return made


@pytest.fixture
def next_schema(monkeypatch):
    monkeypatch.setattr(schema, "STEPS", (STEP,))
    monkeypatch.setattr(schema, "VERSION", 2)


def tables_and_version(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()
        return tables, connection.execute("PRAGMA user_version").fetchone()[0]


def records(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM record ORDER BY id").fetchall()


def migrated(path):
    with contextlib.closing(Store(path)) as store:
        ledger = Ledger(store)
        ledger.open(create=True)
        return ledger.migrate()


def test_an_outbox_of_this_schema_needs_nothing(path):
    assert migrated(path) is None
    assert sorted(os.listdir(os.path.dirname(path))) == ["outbox.db", "outbox.db-journal", "outbox.db.queue"]


def test_an_older_outbox_becomes_what_a_new_one_is_and_a_copy_of_it_is_kept(path, tmp_path, next_schema):
    before, old_records = tables_and_version(path), records(path)

    kept = migrated(path)

    with Outbox(tmp_path / "fresh.db") as fresh:
        fresh.enqueue("build", BUILD)
    assert tables_and_version(path) == tables_and_version(tmp_path / "fresh.db")
    assert records(path) == old_records
    assert (tables_and_version(kept), records(kept)) == (before, old_records)
    assert migrated(path) is None


def test_an_enqueue_writes_to_the_neighbours_and_migrates_none(path, monkeypatch):
    for version, known in ((1, 2), (2, 1)):
        monkeypatch.setattr(schema, "STEPS", (STEP,) * (known - 1))
        monkeypatch.setattr(schema, "VERSION", known)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA user_version = {version}")
        with Outbox(path) as outbox:
            assert outbox.enqueue("build", BUILD).outcome == "queued"
            assert review.stats(outbox.store).counts["pending"] > 50
        assert tables_and_version(path)[1] == version


def test_a_newer_outbox_is_not_delivered_from(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    with contextlib.closing(Store(path)) as store, pytest.raises(OutboxError, match="has schema 2"):
        Ledger(store).migrate()

    assert tables_and_version(path)[1] == 2


def test_a_migration_waits_for_room_for_the_copy(path, next_schema, monkeypatch):
    before = records(path), tables_and_version(path)
    monkeypatch.setattr(Store, "free_space", lambda _: 100_000)

    with pytest.raises(OutboxFull, match="must be upgraded"):
        migrated(path)

    assert (records(path), tables_and_version(path)) == before


def test_a_step_that_fails_changes_nothing(path, next_schema, monkeypatch):
    before = records(path), tables_and_version(path)
    monkeypatch.setattr(schema, "STEPS", ((*STEP, "INSERT INTO nowhere VALUES (1)"),))

    with pytest.raises(OutboxError):
        migrated(path)

    assert (records(path), tables_and_version(path)) == before


@needs_strace
def test_a_migration_killed_anywhere_has_happened_or_not(path, tmp_path):
    old = records(path)
    with open(path, "rb") as file:
        content = file.read()
    command = (sys.executable, "-c", MIGRATE, path)
    points = points_of(command, ("pwrite64", "fdatasync", "fsync", "rename", "unlink"), env=dict(os.environ))
    assert len(points) > 30
    writes = [point for point in points if point[0] == "pwrite64"]
    versions = []
    for call, number in [*(point for point in points if point not in writes), *writes[::20], *writes[-8:]]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}-journal")
        with open(path, "wb") as file:
            file.write(content)
        was_killed, _ = killed_at(call, number, command, env=dict(os.environ))
        assert was_killed, (call, number)
        with Outbox(path) as outbox:
            outbox.store.oldest_version = 1
            with outbox.store.read():
                versions.append(outbox.store.version)
        tables, version = tables_and_version(path)
        assert any(name == "record_version" for _, name, _ in tables) == (version == 2)
        assert records(path) == old
        if os.path.exists(f"{path}.schema-1"):
            assert records(f"{path}.schema-1") == old
            os.remove(f"{path}.schema-1")
    assert set(versions) == {1, 2}


def test_a_copy_left_half_made_is_made_again(path, next_schema):
    with open(path + migration.COPYING_SUFFIX, "wb") as file:
        file.write(b"half")

    assert records(migrated(path)) == records(path)
