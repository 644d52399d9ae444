"""Damage of an outbox: how it is found, and the note that is kept of it. `mending` does something about it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from typing import Any, NamedTuple

from versioner_agent import schema
from versioner_agent.errors import OutboxDamaged
from versioner_agent.files import CHECKED_BYTES, inode_of, open_plain
from versioner_agent.pages import PAGE_BYTES
from versioner_agent.records import time_json
from versioner_agent.salvage import Salvage, rows_of
from versioner_agent.storage import OutboxMissing, Store

#: First bytes of every file of ours (https://sqlite.org/fileformat2.html#the_database_header): offset, bytes, meaning.
_HEADER = (
    (0, b"SQLite format 3\0", "its first bytes are not SQLite's"),
    (16, PAGE_BYTES.to_bytes(2), "its page size is another"),
    (20, b"\0\x40\x20\x20", "its header is not as it was made"),
    (44, b"\0\0\0\4", "its schema format is another"),
    (56, b"\0\0\0\1", "its text encoding is another"),
    (68, schema.APPLICATION_ID.to_bytes(4), "it does not say that it is an outbox"),
)
#: Beginning of a table's page without rows: no tables, where it is the schema's.
_EMPTY_PAGE = b"\x0d\0\0\0\0"
#: Where the schema lies: in the first pages, for it was the first thing written.
SCHEMA_PAGES = 64
_SCHEMA_TEXT = b"CREATE TRIGGER tally_insert"


class Damage(NamedTuple):
    """What happened to an outbox, as `status` tells it until a person has acknowledged it."""

    at: float  # seconds since 1970
    what: str
    kept: str | None  # the damaged file; None where there was none
    salvaged: dict[str, int]  # records by state
    unreadable: int  # records that are seen in the file and fail their digest
    unreadable_ids: list[int]  # the first of them
    earlier: int = 0  # damages before this one that nobody has acknowledged

    def __str__(self) -> str:
        """Say it in a line."""
        counts = ", ".join(f"{count} {state}" for state, count in self.salvaged.items()) or "none"
        kept = f"; the damaged file is kept as {self.kept}" if self.kept else ""
        return f"{self.what}; records saved: {counts}; unreadable: {self.unreadable}{kept}"


def damage_json(damage: Damage | None) -> dict[str, Any] | None:
    """Return *damage* with the documented keys."""
    return None if damage is None else {**damage._asdict(), "at": time_json(damage.at)}


def find(store: Store, *, deep: bool = False) -> OutboxDamaged | None:
    """Look for damage: header, tables and, up to CHECKED_BYTES or with *deep*, the whole file.

    None also where there is no outbox yet. Holds the write queue meanwhile. Raises OutboxBusy, OutboxError.
    """
    with store.translated():
        if not store.is_remembered():
            if not os.path.exists(store.path):
                return None
            store.disconnect()
            store.refuse_planted_link()
            refuse_foreign(store)  # nothing is made beside somebody else's file
        with store.turn():
            return examine(store, deep=deep)


def is_large(store: Store) -> bool:
    """Tell whether reading the whole file takes longer than a build should wait."""
    try:
        return os.stat(store.path).st_size > CHECKED_BYTES
    except FileNotFoundError:
        return False


def acknowledged(store: Store) -> Damage | None:
    """Forget the note of the last damage and return it; None where there is none."""
    with store.write() as connection:
        found = noted(connection)
        connection.execute("DELETE FROM meta WHERE key = 'damage'")
    return found


def noted(connection: sqlite3.Connection) -> Damage | None:
    """Return the damage that nobody has acknowledged."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'damage'").fetchone()
    if row is None:
        return None
    try:
        found = Damage(**json.loads(row[0]))
        if isinstance(found.at, int | float) and isinstance(found.salvaged, dict) and isinstance(found.earlier, int):
            return found
    except (ValueError, TypeError):
        pass
    return Damage(0.0, "the note about it is unreadable", None, {}, 0, [])


# --- looking


def examine(store: Store, *, deep: bool) -> OutboxDamaged | None:
    """Return what is wrong with the file at the store's path. Only while holding the write queue."""
    try:
        with store.read():
            pass  # before the file is read as a file: SQLite takes back what a crash left half written
        store.disconnect()  # likewise: closing the file drops SQLite's locks
        inode = inode_of(store.path)
        if what := _header_problem(store.path):
            return store.damaged(what, inode)
        with store.read() as connection:
            if store.version <= schema.VERSION and not _tables(connection) >= _expected_tables(store.version):
                return store.damaged("its tables are not as they were made", inode)
            if connection.execute("SELECT 1 FROM destination WHERE id = 1").fetchone() is None:
                return store.damaged("the row of its destination is missing", inode)
            if deep or not is_large(store):
                lines = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)").fetchall()]
                if lines != ["ok"]:
                    return store.damaged("; ".join(" ".join(line.split()) for line in lines), inode)
                if connection.execute(WRONG_TYPES).fetchone() is not None:
                    return store.damaged("a column has become another type", inode)
    except OutboxMissing:
        return None
    except OutboxDamaged as exc:
        return store.damaged(exc.what, exc.inode)
    return None


def _header_problem(path: str) -> str:
    with open(open_plain(path), "rb") as file:
        header = file.read(100)
    found = next((what for at, expected, what in _HEADER if header[at : at + len(expected)] != expected), "")
    return found or ("" if {*header[18:20]} <= {1, 2} else "its file format is another")  # 2: write-ahead logging


def _tables(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    return set(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall())


def _expected_tables(version: int) -> set[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        _make(fresh, version)
        return _tables(fresh)


def _make(connection: sqlite3.Connection, version: int) -> None:
    for statement in schema.statements(version):
        connection.execute(statement)


def refuse_foreign(store: Store) -> None:
    """Raise OutboxError for a file that never was an outbox, and for one of a newer schema; OSError for no file."""
    with open(open_plain(store.path), "rb") as file:
        start = file.read(SCHEMA_PAGES * PAGE_BYTES)
    if not start or (len(start) == PAGE_BYTES and start[100:105] == _EMPTY_PAGE):
        return  # half made: by who was killed before the first commit
    magic, id_at = _HEADER[0][1], 68
    is_sqlite = start.startswith(magic)
    is_ours = start[id_at : id_at + 4] == schema.APPLICATION_ID.to_bytes(4) or _SCHEMA_TEXT in start
    if is_sqlite and is_ours and int.from_bytes(start[60:64]) > schema.VERSION:
        raise store.unknown_version(int.from_bytes(start[60:64]))
    if is_ours or (store.is_remembered() and (not is_sqlite or _has_records(store.path))):
        return
    raise store.foreign()


def _has_records(path: str) -> bool:
    """Tell whether a record in the file proves itself: then the file was an outbox, whatever it says."""
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        _make(fresh, schema.VERSION)
        salvage = Salvage(fresh)
        return any(salvage.proven(row) for row in rows_of(path))


def recount(store: Store) -> bool:
    """Correct the counts that are kept of records, and tell whether that was needed: a flipped bit is valid SQLite."""
    if inode_of(store.path) is None:
        return False
    by_state = _recount(store, TALLY, COUNTED, schema.ALL_STATES, "tally", "state")
    if store.version < schema.EXPORTS_SINCE:
        return by_state
    by_reason = _recount(store, FAILED_TALLY, FAILED_COUNTED, schema.FAILED_REASONS, "failed_tally", "reason")
    return by_state or by_reason


def _recount(store: Store, kept: str, counted: str, keys: tuple[str, ...], table: str, column: str) -> bool:
    """Correct one table of counts; it has a row for each of *keys*."""
    with store.read() as connection:
        found, by_key = (dict(connection.execute(query).fetchall()) for query in (kept, counted))
    if found == {**dict.fromkeys(keys, 0), **by_key}:
        return False
    with store.write() as connection:
        by_key = dict(connection.execute(counted).fetchall())
        connection.execute(f"DELETE FROM {table}")  # noqa: S608  # our own names
        insert = f"INSERT INTO {table} ({column}, n) VALUES (?, ?)"  # noqa: S608
        connection.executemany(insert, [(key, by_key.get(key, 0)) for key in keys])
    return True


TALLY = "SELECT state, n FROM tally"
COUNTED = "SELECT state, count(*) FROM record INDEXED BY record_state GROUP BY state"
FAILED_TALLY = "SELECT reason, n FROM failed_tally"
FAILED_COUNTED = f"""
    SELECT {schema.FAILED_REASON.format(row="record")}, count(*) FROM record INDEXED BY record_state
    WHERE state = 'failed' GROUP BY 1
"""  # noqa: S608  # a constant
# What no statement of ours stores: SQLite takes any type in any column.
WRONG_TYPES = """
    SELECT id FROM record WHERE typeof(event_id) <> 'text' OR typeof(state) <> 'text' OR typeof(kind) <> 'text'
        OR typeof(product_name) <> 'text' OR typeof(digest) <> 'blob' OR typeof(payload) <> 'blob' LIMIT 1
"""
