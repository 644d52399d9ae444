"""Putting a sound outbox in the place of a damaged one, with every record whose digest proves it.

The damaged set is kept as `*.corrupt-<time>`; what can be read from its bytes goes into a new file that takes its place
in one rename, all while holding the write queue. Killed at any point, the damaged file is still there for the next try.
An enqueue imports this only where something is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable

from versioner_agent.creation import make_tables, sync_directory
from versioner_agent.damage import Damage, examine, find, is_large, noted, recount, refuse_foreign
from versioner_agent.errors import OutboxDamaged, OutboxError
from versioner_agent.files import create_beside, inode_of, open_plain, size_of
from versioner_agent.locks import QUEUE_SUFFIX, FlusherLock
from versioner_agent.salvage import Salvage, rows_of
from versioner_agent.storage import LENGTH, Store, is_wal

IDS_KEPT = 20
MENDING_SUFFIX = ".mending"
JOURNALS = ("-journal", "-wal", "-shm")
ROWS_A_SIGN = 2000  # rows read from one sign of life to the next


def ensure_sound(store: Store, mend_it: Callable[[OutboxDamaged], Damage | None]) -> Damage | None:
    """Look for damage and have it mended; for who starts to deliver. Raises as `mend` does.

    Nobody can queue meanwhile. An agent that runs has looked, and mends what it meets.
    """
    if FlusherLock(store.path).presence().has_agent:
        return None
    damage = find(store)
    mended = None if damage is None else mend_it(damage)
    if not is_large(store):
        recount(store)
    return mended


def mend(store: Store, damage: OutboxDamaged) -> Damage | None:
    """Put a sound outbox in the place of the damaged one; None where that was not needed, or somebody else did it.

    Raises *damage* where it does not show in the file, OutboxError for a file that was never an outbox, OutboxBusy,
    OutboxFull.
    """
    with store.translated():
        store.disconnect()
        if damage.inode is not None and not store.is_remembered():
            refuse_foreign(store)
        with store.turn():
            store.disconnect()
            if inode_of(store.path) != damage.inode:
                return None
            # SQLite also takes a disk that failed once for a malformed file.
            found = damage if damage.is_certain and is_large(store) else examine(store, deep=True)
            if found is not None:
                if damage.inode is not None:
                    refuse_foreign(store)
                return _replace(store, found.what)
            if _cut(store) or damage.is_certain:
                return None
        if not recount(store):
            raise damage
        return None


def _cut(store: Store) -> bool:
    """Shorten a sound file to what its header says, as SQLite does after a commit; False where it is no longer."""
    with store.read() as connection:
        connection.execute("BEGIN EXCLUSIVE")
        try:
            length = connection.execute(LENGTH).fetchone()[0]
            is_longer = size_of(store.path) > length and not is_wal(connection)
            fd = _truncated(store, length) if is_longer else None
        finally:
            connection.execute("COMMIT")
    if fd is not None:
        store.disconnect()  # to close a descriptor of the file drops SQLite's locks
        os.close(fd)
    return is_longer


def _truncated(store: Store, length: int) -> int:
    """Cut the file that *store* has open to *length*; returns a descriptor of it. A link there is not followed."""
    fd = os.open(store.path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    if store.is_open_as(inode_of(fd)):
        os.ftruncate(fd, length)
    return fd


def _replace(store: Store, what: str) -> Damage:
    side = store.path + MENDING_SUFFIX
    now = time.time()
    name = _free_name(f"{store.path}.corrupt-{_stamp(now)}")
    kept = None if inode_of(store.path) is None else name
    with contextlib.suppress(FileNotFoundError):
        os.unlink(side)
    try:
        with contextlib.suppress(OutboxError), store.read() as connection:
            connection.execute("SELECT 1 FROM record LIMIT 1").fetchone()  # rolls back what a crash left half done
        earlier, before, live = _earlier(store), _records(store), _live(store)
        store.disconnect()
        damage = _build(store, side, Damage(now, what, kept, {}, 0, [], earlier), before, live)
        for suffix in ("", *JOURNALS):
            _keep(store.path + suffix, name + suffix)
        # No old journal must ever be there beside the new file: SQLite would take it for the new file's.
        for suffix in JOURNALS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(store.path + suffix)
        os.replace(side, store.path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(side)
        raise
    sync_directory(os.path.dirname(store.path))
    return damage


def _build(store: Store, side: str, damage: Damage, before: int, live: frozenset[int]) -> Damage:
    """Make a synced outbox at *side* of what is found at the store's path, where *before* records are known of."""
    fd = create_beside(side)
    try:
        _same_owner(fd, store.path if damage.kept else store.path + QUEUE_SUFFIX)
        with contextlib.closing(sqlite3.connect(side, isolation_level=None)) as connection:
            if os.path.islink(side) or inode_of(side) != inode_of(fd):
                raise OutboxError(f"somebody took {side} away", "look who may write there, then try again")
            connection.execute("PRAGMA synchronous = OFF")  # synced as a whole below
            connection.execute("PRAGMA journal_mode = MEMORY")
            make_tables(connection)
            connection.execute("BEGIN")
            found = Salvage(connection, live)
            if damage.kept:
                for number, row in enumerate(rows_of(store.path)):
                    found.take(row)
                    if number % ROWS_A_SIGN == 0:
                        if store.is_told_to_stop():
                            raise OutboxError("told to stop while mending; the damaged file is as it was")
                        os.utime(store.path, follow_symlinks=False)  # who waits to queue sees that we get on
            counts, ids = found.finish()
            unreadable = max(len(ids), before - sum(counts.values()))
            if unreadable or not before:
                # What is imported again may be what was lost: better sent twice than not at all.
                connection.execute("UPDATE arrival SET records = 0")
            damage = damage._replace(salvaged=counts, unreadable=unreadable, unreadable_ids=ids[:IDS_KEPT])
            connection.execute("INSERT INTO meta (key, value) VALUES ('damage', ?)", (json.dumps(damage._asdict()),))
            connection.execute("COMMIT")
        os.fsync(fd)
    finally:
        os.close(fd)
    return damage


def _same_owner(fd: int, reference: str) -> None:
    """Give a file made by root to who owned the one it replaces, with its mode."""
    with contextlib.suppress(OSError):
        found = os.stat(reference, follow_symlinks=False)
        os.fchmod(fd, found.st_mode & 0o777)
        if os.geteuid() == 0:
            os.fchown(fd, found.st_uid, found.st_gid)


def _keep(path: str, name: str) -> None:
    """Give *path* a second name, so that at no moment there is none; a copy where links are not to be had.

    In a shared directory others may put links of their own into both places: none is followed, and a name that somebody
    took meanwhile ends this try.
    """
    try:
        os.link(path, name, follow_symlinks=False)
    except FileNotFoundError:
        return
    except OSError:
        with open(open_plain(path, follow=False), "rb") as source, open(create_beside(name), "wb") as copy:
            shutil.copyfileobj(source, copy)


def _free_name(name: str) -> str:
    number, free = 1, name
    while any(os.path.lexists(free + suffix) for suffix in ("", *JOURNALS)):
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


def _records(store: Store) -> int:
    """Return how many records the file says it has; 0 where it can't say."""
    try:
        with store.read() as connection:
            counts = connection.execute("SELECT n FROM tally").fetchall()
    except OutboxError:
        return 0
    return sum(row[0] for row in counts if isinstance(row[0], int))


def _live(store: Store) -> frozenset[int]:
    """Return the ids that an index names, which is not touched where a page of records was torn; none if unreadable."""
    try:
        with store.read() as connection:
            return frozenset(row[0] for row in connection.execute(LIVE).fetchall())
    except OutboxError:
        return frozenset()


LIVE = "SELECT id FROM record INDEXED BY record_state"
