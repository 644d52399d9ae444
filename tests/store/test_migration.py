"""Outboxes of other schemas: older ones are brought to this one, newer ones are left as they are.

What a schema after this one will need is tried with an invented step.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import time

import pytest
from crash import killed_at, needs_strace, points_of
from specimen import make_tables

from versioner_agent import Outbox, migration, review, schema
from versioner_agent.errors import OutboxError, OutboxFull
from versioner_agent.integrity import digest
from versioner_agent.ledger import Ledger
from versioner_agent.records import is_intact
from versioner_agent.storage import Store

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
STEP = (
    "ALTER TABLE destination ADD COLUMN region TEXT",
    "CREATE INDEX record_author ON record (queued_by)",
    "UPDATE destination SET region = 'somewhere'",
)
INDEXES = {"record_version", "record_refused", "record_exported"}
MIGRATE = """
import sys
from versioner_agent.ledger import Ledger
from versioner_agent.storage import Store
Ledger(Store(sys.argv[1])).migrate()
"""
#: How the first version queued.
INSERT_OF_1 = """
    INSERT INTO record (
        id, event_id, state, kind, product_name, version, environment_name, status, invoke_id, run_attempt,
        content, identity, occurrence, queued_at, queued_by, batch, digest, payload
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


@pytest.fixture
def path(tmp_path):
    """An outbox of this program's schema."""
    return filled(str(tmp_path / "outbox.db"))


@pytest.fixture
def path_of_1(tmp_path):
    """An outbox of schema 1, made by the statements of then."""
    made = str(tmp_path / "outbox.db")
    make_schema_1(made)
    return filled(made)


@pytest.fixture
def next_schema(monkeypatch):
    """A schema after this program's."""
    add_step(monkeypatch, STEP)


def add_step(monkeypatch, step):
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, step))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)


def make_schema_1(path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        make_tables(connection, 1)
    with open(f"{path}.queue", "wb") as queue:
        queue.write(b"outbox\n")


def filled(path):
    with Outbox(path) as outbox:
        for number in range(50):
            outbox.enqueue("build", {**BUILD, "version": str(number)})
    return path


def insert_as_1_did(path, version):
    """Queue an event as a program of schema 1 does, to a file of any."""
    body = b'{"product_name":"payments","status":"completed"}'
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (record_id,) = connection.execute("SELECT max(id) + 1 FROM record").fetchone()
        names, run, now = ("payments", version, None, "completed"), (None, None), time.time()
        signed = digest(record_id, "e", "build", names, run, 0, now, None, body)
        row = (record_id, "e", "pending", "build", *names, *run, bytes(32), None, 0, now, "uid 0", None, signed, body)
        connection.execute(INSERT_OF_1, row)
        connection.commit()
    return record_id


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


def test_an_outbox_of_schema_1_becomes_what_a_new_one_is_and_a_copy_of_it_is_kept(path_of_1, tmp_path):
    before, old_records = tables_and_version(path_of_1), records(path_of_1)
    assert (before[1], len(old_records)) == (1, 50)
    assert not INDEXES & {name for _, name, _ in before[0]}

    kept = migrated(path_of_1)

    with Outbox(tmp_path / "fresh.db") as fresh:
        fresh.enqueue("build", BUILD)
    assert kept == f"{path_of_1}.schema-1"
    assert tables_and_version(path_of_1) == tables_and_version(tmp_path / "fresh.db")
    assert tables_and_version(path_of_1)[1] == schema.VERSION == 3
    assert records(path_of_1) == old_records
    assert (tables_and_version(kept), records(kept)) == (before, old_records)
    assert migrated(path_of_1) is None


def test_what_an_older_program_queues_after_the_upgrade_is_delivered_and_found(path_of_1):
    migrated(path_of_1)

    record_id = insert_as_1_did(path_of_1, "9.9")

    with Outbox(path_of_1) as outbox:
        record, payload, _ = review.show(outbox.store, record_id)
        with outbox.store.read() as connection:
            query = (
                "SELECT id FROM record INDEXED BY record_version WHERE product_name = 'payments' AND version = '9.9'"
            )
            found = connection.execute(query).fetchall()
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert is_intact(record, payload)
        assert found == [(record_id,)]
        assert review.stats(outbox.store).counts["pending"] == 51
        assert outbox.enqueue("build", BUILD).id == record_id + 1


def test_an_older_outbox_becomes_what_a_new_one_is_by_every_step(path_of_1, tmp_path, next_schema):
    old_records = records(path_of_1)

    migrated(path_of_1)

    with Outbox(tmp_path / "fresh.db") as fresh:
        fresh.enqueue("build", BUILD)
    assert tables_and_version(path_of_1) == tables_and_version(tmp_path / "fresh.db")
    assert records(path_of_1) == old_records


def test_the_next_schema_keeps_a_copy_of_this_one(path, tmp_path, next_schema):
    before, old_records = tables_and_version(path), records(path)

    kept = migrated(path)

    with Outbox(tmp_path / "fresh.db") as fresh:
        fresh.enqueue("build", BUILD)
    assert tables_and_version(path) == tables_and_version(tmp_path / "fresh.db")
    assert records(path) == old_records
    assert (tables_and_version(kept), records(kept)) == (before, old_records)
    assert migrated(path) is None


def test_an_enqueue_writes_to_the_neighbours_and_migrates_none(path, monkeypatch):
    this = schema.VERSION
    for version, known in ((this, this + 1), (this + 1, this)):
        with monkeypatch.context() as program:
            if known > this:
                add_step(program, STEP)
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute(f"PRAGMA user_version = {version}")
            with Outbox(path) as outbox:
                assert outbox.enqueue("build", BUILD).outcome == "queued"
                assert review.stats(outbox.store).counts["pending"] > 50
        assert tables_and_version(path)[1] == version


def test_an_enqueue_leaves_schema_1_as_it_is(path_of_1):
    before = tables_and_version(path_of_1)
    with Outbox(path_of_1) as outbox:
        assert outbox.enqueue("build", {**BUILD, "scm_sha": "abc"}).outcome == "queued"
        assert outbox.store.version == 1

    assert tables_and_version(path_of_1) == before


def test_damage_of_an_older_outbox_is_found_and_mended_before_it_is_upgraded(path_of_1):
    with contextlib.closing(sqlite3.connect(path_of_1)) as connection:
        connection.execute("DROP TABLE batch")

    with contextlib.closing(Store(path_of_1)) as store:
        mended = Ledger(store).open(create=True)

    assert mended.salvaged == {"pending": 50}
    assert tables_and_version(path_of_1)[1] == schema.VERSION


def test_a_newer_outbox_is_not_delivered_from(path):
    newer = schema.VERSION + 1
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
    with contextlib.closing(Store(path)) as store, pytest.raises(OutboxError, match=f"has schema {newer}"):
        Ledger(store).migrate()

    assert tables_and_version(path)[1] == newer


def test_a_migration_waits_for_room_for_the_copy(path_of_1, monkeypatch):
    before = records(path_of_1), tables_and_version(path_of_1)
    monkeypatch.setattr(Store, "free_space", lambda _: 100_000)

    with pytest.raises(OutboxFull, match="must be upgraded"):
        migrated(path_of_1)

    assert (records(path_of_1), tables_and_version(path_of_1)) == before


def test_a_step_that_fails_changes_nothing(path, monkeypatch):
    before = records(path), tables_and_version(path)
    add_step(monkeypatch, (*STEP, "INSERT INTO nowhere VALUES (1)"))

    with pytest.raises(OutboxError):
        migrated(path)

    assert (records(path), tables_and_version(path)) == before


@needs_strace
def test_a_migration_killed_anywhere_has_happened_or_not(path_of_1):
    path, old = path_of_1, records(path_of_1)
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
        with Outbox(path) as outbox, outbox.store.read():
            versions.append(outbox.store.version)
        tables, version = tables_and_version(path)
        assert INDEXES & {name for _, name, _ in tables} == (INDEXES if version == 3 else set())
        assert records(path) == old
        if os.path.exists(f"{path}.schema-1"):
            assert records(f"{path}.schema-1") == old
            os.remove(f"{path}.schema-1")
    assert set(versions) == {1, 3}


def test_who_waits_to_queue_sees_it_get_on(path_of_1, monkeypatch):
    """By the file's times, or waiting writers would give up while a large outbox is copied and its indexes are made."""
    monkeypatch.setattr(migration, "COPIED_AT_ONCE", 10)
    seen = []
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda *args, **how: (seen.append(args), utime(*args, **how)))

    migrated(path_of_1)

    steps = os.path.getsize(f"{path_of_1}.schema-1") // 4096 // 10 + sum(map(len, schema.STEPS))
    assert len(seen) >= steps
    assert set(seen) == {(path_of_1,)}


def test_a_copy_left_half_made_is_made_again(path, next_schema):
    with open(path + migration.COPYING_SUFFIX, "wb") as file:
        file.write(b"half")

    assert records(migrated(path)) == records(path)
