"""A damaged outbox: finding it, keeping its files, and going on with every record whose digest proves it.

The damaged set is kept as `*.corrupt-<time>`; what can be read from its bytes goes into a new file that takes its place
in one rename, all while holding the write queue. Killed at any point, the damaged file is still there for the next try.
Nothing here is imported where all is well.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from typing import Any, NamedTuple

from versioner_agent import schema
from versioner_agent.creation import make_tables, sync_directory
from versioner_agent.errors import OutboxDamaged, OutboxError
from versioner_agent.locks import QUEUE_SUFFIX, create_beside
from versioner_agent.pages import PAGE_BYTES
from versioner_agent.records import time_json
from versioner_agent.salvage import Salvage, rows_of
from versioner_agent.storage import OutboxMissing, Store, inode_of

#: Larger files are not read as a whole when an agent starts, and not mended by an enqueue (bytes).
CHECKED_BYTES = 50 * 1024 * 1024
IDS_KEPT = 20
MENDING_SUFFIX = ".mending"

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


def find(store: Store) -> OutboxDamaged | None:
    """Look for damage: header, tables and, up to CHECKED_BYTES, the whole file.

    None also where there is no outbox yet. Holds the write queue meanwhile. Raises OutboxBusy, OutboxError.
    """
    with store.translated():
        if not store.is_remembered():
            if not os.path.exists(store.path):
                return None
            store.disconnect()
            _refuse_foreign(store)  # nothing is made beside somebody else's file
        with store.turn():
            return _examine(store, deep=False)


def mend(store: Store, damage: OutboxDamaged) -> Damage | None:
    """Put a sound outbox in the place of the damaged one; None where somebody else has done it.

    Raises *damage* where it does not show in the file, OutboxError for a file that was never an outbox, OutboxBusy,
    OutboxFull.
    """
    with store.translated():
        store.disconnect()
        if damage.inode is not None and not store.is_remembered():
            _refuse_foreign(store)
        return _mend(store, damage)


def _mend(store: Store, damage: OutboxDamaged) -> Damage | None:
    with store.turn():
        store.disconnect()
        if inode_of(store.path) != damage.inode:
            return None
        found = damage if damage.is_certain else _examine(store, deep=True)
        if found is None:
            raise damage
        if damage.inode is not None:
            _refuse_foreign(store)
        return _replace(store, found.what)


def is_large(store: Store) -> bool:
    """Tell whether reading the whole file takes longer than a build should wait."""
    try:
        return os.stat(store.path).st_size > CHECKED_BYTES
    except FileNotFoundError:
        return False


def ensure_sound(store: Store) -> Damage | None:
    """Look for damage and mend it; for who starts to deliver. Raises as `mend` does."""
    damage = find(store)
    mended = None if damage is None else mend(store, damage)
    _recount(store)
    return mended


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
        return Damage(**json.loads(row[0]))
    except (ValueError, TypeError):
        return Damage(0.0, "the note about it is unreadable", None, {}, 0, [])


# --- looking


def _examine(store: Store, *, deep: bool) -> OutboxDamaged | None:
    """Return what is wrong with the file at the store's path. Only while holding the write queue."""
    try:
        with store.read():
            pass  # before the file is read as a file: SQLite takes back what a crash left half written
        store.disconnect()  # likewise: closing the file drops SQLite's locks
        inode = inode_of(store.path)
        if what := _header_problem(store.path):
            return store.damaged(what, inode)
        with store.read() as connection:
            if store.version == schema.VERSION and not _tables(connection) >= _expected_tables():
                return store.damaged("its tables are not as they were made", inode)
            if deep or not is_large(store):
                lines = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)").fetchall()]
                if lines != ["ok"]:
                    return store.damaged("; ".join(" ".join(line.split()) for line in lines), inode)
    except OutboxMissing:
        return None
    except OutboxDamaged as exc:
        return store.damaged(exc.what, exc.inode)
    return None


def _header_problem(path: str) -> str:
    with open(path, "rb") as file:
        header = file.read(100)
    found = next((what for at, expected, what in _HEADER if header[at : at + len(expected)] != expected), "")
    return found or ("" if {*header[18:20]} <= {1, 2} else "its file format is another")  # 2: write-ahead logging


def _tables(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    return set(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall())


def _expected_tables() -> set[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        for statement in schema.statements():
            fresh.execute(statement)
        return _tables(fresh)


def _refuse_foreign(store: Store) -> None:
    """Raise OutboxError for a file that never was an outbox, and for one of a newer schema."""
    with open(store.path, "rb") as file:
        start = file.read(SCHEMA_PAGES * PAGE_BYTES)
    if not start or (len(start) == PAGE_BYTES and start[100:105] == _EMPTY_PAGE):
        return  # half made: by who was killed before the first commit
    magic, id_at = _HEADER[0][1], 68
    is_ours = start[id_at : id_at + 4] == schema.APPLICATION_ID.to_bytes(4) or _SCHEMA_TEXT in start
    version = int.from_bytes(start[60:64])
    is_sqlite = start.startswith(magic)
    if not is_ours and (is_sqlite or not store.is_remembered()):
        raise store.foreign()
    if is_sqlite and is_ours and version > schema.VERSION:
        raise store.unknown_version(version)


def _recount(store: Store) -> None:
    """Correct the tally of states: a flipped bit in it is valid SQLite."""
    if inode_of(store.path) is None or is_large(store):
        return
    with store.read() as connection:
        wrong = connection.execute(WRONG_TALLY).fetchone()
    if wrong is not None:
        with store.write() as connection:
            connection.execute(RECOUNT)


# --- replacing


def _replace(store: Store, what: str) -> Damage:
    side = store.path + MENDING_SUFFIX
    now = time.time()
    kept = None if inode_of(store.path) is None else _free_name(f"{store.path}.corrupt-{_stamp(now)}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(side)
    try:
        with contextlib.suppress(OutboxError), store.read() as connection:
            connection.execute("SELECT 1 FROM record LIMIT 1").fetchone()  # rolls back what a crash left half done
        earlier = _earlier(store)
        store.disconnect()
        damage = _build(store, side, Damage(now, what, kept, {}, 0, [], earlier))
        if kept is not None:
            _keep(store.path, kept)
            _keep(store.path + "-journal", kept + "-journal")
        # The old journal must never be there beside the new file: SQLite would roll it back into that.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(store.path + "-journal")
        os.replace(side, store.path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(side)
        raise
    sync_directory(os.path.dirname(store.path))
    return damage


def _build(store: Store, side: str, damage: Damage) -> Damage:
    """Make a synced outbox at *side* of what is found at the store's path."""
    fd = create_beside(side)
    try:
        _same_owner(fd, store.path if damage.kept else store.path + QUEUE_SUFFIX)
        with contextlib.closing(sqlite3.connect(side, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = OFF")  # synced as a whole below
            connection.execute("PRAGMA journal_mode = MEMORY")
            make_tables(connection)
            connection.execute("BEGIN")
            found = Salvage(connection)
            if damage.kept:
                for row in rows_of(store.path):
                    found.take(row)
            counts, unreadable = found.finish()
            damage = damage._replace(salvaged=counts, unreadable=len(unreadable), unreadable_ids=unreadable[:IDS_KEPT])
            connection.execute("INSERT INTO meta (key, value) VALUES ('damage', ?)", (json.dumps(damage._asdict()),))
            connection.execute("COMMIT")
        os.fsync(fd)
    finally:
        os.close(fd)
    return damage


def _same_owner(fd: int, reference: str) -> None:
    """Give a file made by root to who owned the one it replaces, with its mode."""
    with contextlib.suppress(OSError):
        found = os.stat(reference)
        os.fchmod(fd, found.st_mode & 0o777)
        if os.geteuid() == 0:
            os.fchown(fd, found.st_uid, found.st_gid)


def _keep(path: str, name: str) -> None:
    """Give *path* a second name, so that at no moment there is none; a copy where links are not to be had."""
    try:
        os.link(path, name, follow_symlinks=False)
    except FileNotFoundError:
        return
    except OSError:
        shutil.copyfile(path, name)


def _free_name(name: str) -> str:
    number, free = 1, name
    while os.path.lexists(free):
        number += 1
        free = f"{name}-{number}"
    return free


def _stamp(now: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))


def _earlier(store: Store) -> int:
    try:
        with store.read() as connection:
            before = noted(connection)
    except OutboxError:
        return 0
    return before.earlier + 1 if before else 0


WRONG_TALLY = """
    SELECT 1 FROM tally
    WHERE n <> (SELECT count(*) FROM record INDEXED BY record_state WHERE record.state = tally.state) LIMIT 1
"""
RECOUNT = "UPDATE tally SET n = (SELECT count(*) FROM record WHERE record.state = tally.state)"
