"""The outbox's file: opening, creating, transactions, and SQLite's errors in our words.

Rollback journal (PERSIST) with synchronous=FULL, so a commit is on the disk when it returns
(https://sqlite.org/pragma.html#pragma_synchronous), and not WAL, which SQLite before 3.51.3 can corrupt when two
processes write and checkpoint together (https://sqlite.org/wal.html#walresetbug). In this mode a reader blocks every
commit: reads fetch all they want at once and are done. Nothing but SQLite may open the file while a connection is open,
for closing any descriptor drops its locks (https://sqlite.org/howtocorrupt.html).
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from versioner_agent import schema
from versioner_agent.errors import OutboxBusy, OutboxDamaged, OutboxError, OutboxFull
from versioner_agent.files import (
    CHECKED_BYTES,
    RESERVE_BYTES,
    ROOM_BYTES,
    access_hint,
    changed_at,
    has_hot_journal,
    inode_of,
    open_beside,
    size_of,
    unusable,
)
from versioner_agent.locks import QUEUE_SUFFIX, WriteQueue

DEFAULT_BUSY_TIMEOUT_S = 10.0
PATIENCE = 3
INSTRUCTIONS_A_LOOK = 1_000_000  # of SQLite's machine, some tens of milliseconds

_TEXT = partial(str, encoding="utf-8", errors="replace")
IDENTIFY = """
    SELECT application_id, user_version, page_count, auto_vacuum
    FROM pragma_application_id, pragma_user_version, pragma_page_count, pragma_auto_vacuum
"""
#: What IDENTIFY finds between two steps of making an outbox: setting auto_vacuum writes the first page.
_HALF_MADE = (0, 0, 1, 2)
LENGTH = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
FREE_PAGES = "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size"
#: What our statements never meet on tables as they were made.
_IMPOSSIBLE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG)


class OutboxMissing(OutboxError):
    """There is no outbox at this path."""


class Store:
    """One connection to one outbox file; belongs to the thread that made it."""

    def __init__(self, path: str | os.PathLike[str], busy_timeout: float = DEFAULT_BUSY_TIMEOUT_S) -> None:
        """Name the file; nothing is touched yet. Links are followed once, so that locks lie beside the real file."""
        self._given = os.path.abspath(os.fspath(path))
        self.path = os.path.realpath(self._given)
        self.busy_timeout = busy_timeout
        #: So many times `busy_timeout` is waited where the writers before us get on.
        self.patience = PATIENCE
        #: Ends a statement that takes long; an agent that is told to stop does not finish looking through a large file.
        self.is_told_to_stop: Callable[[], bool] = lambda: False
        self._queue = WriteQueue(self.path + QUEUE_SUFFIX)
        #: The schema of the file that is open. What is queued fits into every older one: no upgrade fails a build.
        self.version = schema.VERSION
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    @contextmanager
    def write(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Run the block as one synced transaction, after waiting our turn; all of it happens, or nothing.

        With *create*, an outbox that is missing is made, and space for recording deliveries set aside.
        Raises OutboxBusy after `busy_timeout` seconds, OutboxFull, OutboxMissing (unless *create*), OutboxError.
        """
        with self.translated():
            if not create and inode_of(self.path) is None:
                raise self._missing()
            if not self.is_remembered() and size_of(self.path):
                with suppress(OutboxMissing):
                    self._connected(create=False)  # somebody else's file gets no queue beside it
            with self.turn():
                connection = self._connected(create=create)
                self._queue.remember(b"outbox\n")
                connection.execute("BEGIN IMMEDIATE")
                try:
                    if create:
                        self._check_length(connection)
                        self._make_reserve(connection)
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    self._roll_back(connection)
                    raise

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the write queue for the block: nobody else writes meanwhile. Raises OutboxBusy, OSError."""
        self.refuse_planted_link()
        most = self.busy_timeout * self.patience
        if not self._queue.acquire(self.busy_timeout, most=most, progress=partial(changed_at, self.path)):
            raise OutboxBusy(
                f"other writers kept the outbox {self.path} busy for {self.busy_timeout:g} s",
                "try again, or raise --busy-timeout",
            )
        try:
            yield
        finally:
            self._queue.release()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for queries that fetch everything before the block ends.

        Raises OutboxMissing, OutboxBusy, OutboxError.
        """
        with self.translated():
            if inode_of(self.path) is None:
                raise self._missing()
            yield self._connected(create=False)

    def only(self, found: sqlite3.Cursor) -> tuple[Any, ...]:
        """Return the row that is always there; raises OutboxDamaged where it is not."""
        row: tuple[Any, ...] | None = found.fetchone()
        if row is None:
            raise self.suspected("a row that is always there is missing")
        return row

    def close(self) -> None:
        """Give everything back; using the store again opens it again."""
        self.disconnect()
        self._queue.close()

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self.disconnect()  # what the journal holds is taken back by whoever opens the file next

    def disconnect(self) -> None:
        """Let go of the file, but not of our turn."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def free_space(self) -> int:
        """Return the bytes that an ordinary user may still write beside the outbox; raises OutboxError."""
        with self.translated():
            found = os.statvfs(os.path.dirname(self.path))
        return found.f_bavail * found.f_frsize

    def free_pages(self) -> int:
        """Return the bytes inside the file that nothing uses."""
        with self.read() as connection:
            return int(connection.execute(FREE_PAGES).fetchone()[0])

    def is_remembered(self) -> bool:
        """Tell whether an outbox was made here: then a missing or empty file is damage, not a fresh start."""
        return size_of(self.path + QUEUE_SUFFIX) > 0

    def _connected(self, *, create: bool) -> sqlite3.Connection:
        """Return the connection to the file that is at the path now: it may have been replaced while we waited."""
        inode = self._plain_inode()
        if self._connection is not None and (inode is None or inode != self._inode):
            self.disconnect()
        if self._connection is None:
            self.refuse_planted_link()
            if inode is None:
                if not create or self.is_remembered():
                    raise self._missing()
                os.close(open_beside(self.path))
            self._inode = inode_of(self.path)
            self._connection = self._connect(create=create)
        return self._connection

    def _plain_inode(self) -> tuple[int, int] | None:
        """Return the inode of the file; raises OutboxError for what is no file: a pipe could keep us for ever."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise OutboxError(
                f"can't use the outbox {self.path}: it is not a regular file", access_hint(self.path, None)
            )
        return found.st_dev, found.st_ino

    def refuse_planted_link(self) -> None:
        """In a shared directory a link could make us write to a place of its maker's choice."""
        if not os.path.islink(self._given):
            return
        maker = os.lstat(self._given).st_uid
        if maker not in (0, os.geteuid(), os.stat(os.path.dirname(self._given)).st_uid):
            raise OutboxError(
                f"{self._given} is a symbolic link made by uid {maker}; it is not followed",
                "remove it, or name the outbox itself with --db or VERSIONER_AGENT_DB",
            )

    def _connect(self, *, create: bool) -> sqlite3.Connection:
        has_journal = has_hot_journal(self.path)
        connection = self._raw_connection()
        try:
            if has_journal:
                # Else SQLite, whose own mode is to delete it, would give its space away as it rolls back.
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            # Before any setting is made: a file that is not ours must not be changed.
            is_new = self._identify(connection, create=create)
            connection.execute("PRAGMA synchronous = FULL")
            self._leave_wal(connection)
            if has_journal:
                connection.execute("PRAGMA locking_mode = NORMAL")
                connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone()  # the next read gives locks back
            # What is deleted is overwritten, so that salvage finds no old copies.
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA temp_store = MEMORY")  # no other disk's room matters
            # Damaged text must not make a page of records unreadable; its digest tells.
            connection.text_factory = _TEXT
            if is_new:
                self._create(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _identify(self, connection: sqlite3.Connection, *, create: bool) -> bool:
        """Tell whether the tables are still to be made; raises OutboxError for what is no outbox, or a damaged one."""
        connection.execute("BEGIN")  # in one transaction, for somebody may be making the tables just now
        found = connection.execute(IDENTIFY).fetchone()
        size = size_of(self.path)
        connection.execute("COMMIT")
        application_id, self.version, pages, _ = found
        if pages == size == 0 or found == _HALF_MADE:
            # Just being made, or by somebody who was killed before the first commit.
            if not create or self.is_remembered():
                raise self._missing()
            return True
        if application_id != schema.APPLICATION_ID:
            what = "it does not say that it is an outbox"
            raise self.damaged(what, self._inode) if self.is_remembered() else self.foreign()
        if not 1 <= self.version <= schema.VERSION + 1:
            raise self.unknown_version(self.version)
        return False

    def is_open_as(self, inode: tuple[int, int] | None) -> bool:
        """Tell whether the connection is to the file *inode*."""
        return self._connection is not None and inode == self._inode

    def keep_rollback_journal(self) -> None:
        """Leave write-ahead logging again, should somebody have switched it on and be gone."""
        with self.read() as connection:
            self._leave_wal(connection)

    def _leave_wal(self, connection: sqlite3.Connection) -> None:
        # Somebody's tool may have switched the file to write-ahead logging. That can't be undone while another
        # connection uses it so; events are synced there too, and with the write queue nobody else writes meanwhile.
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = PERSIST")

    def _raw_connection(self) -> sqlite3.Connection:
        # mode=rw: SQLite itself must never make the file, it would choose the wrong mode.
        quoted = self.path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        connection = sqlite3.connect(
            f"file:{quoted}?mode=rw", uri=True, timeout=self.busy_timeout, isolation_level=None
        )
        connection.set_progress_handler(self._ends_statement, INSTRUCTIONS_A_LOOK)
        return connection

    def _ends_statement(self) -> bool:
        return self.is_told_to_stop()

    def _create(self, connection: sqlite3.Connection) -> None:
        """Make the tables, while holding the write queue, so that twenty first enqueues make one outbox."""
        from versioner_agent import creation  # noqa: PLC0415  # once in an outbox's life

        creation.make_tables(connection)
        self.version = schema.VERSION
        creation.sync_directory(os.path.dirname(self.path))

    def has_reserve(self, connection: sqlite3.Connection) -> bool:
        """Tell whether space for recording deliveries is set aside in the file; how, `reserve` tells."""
        return connection.execute("SELECT 1 FROM reserve").fetchone() is not None

    def _make_reserve(self, connection: sqlite3.Connection) -> None:
        """Make it, instead of the transaction that has just begun, where it is missing and there is room."""
        # Where somebody's tool has switched to write-ahead logging there is no journal to grow.
        has_journal = size_of(self.path + "-journal") >= RESERVE_BYTES or is_wal(connection)
        if (has_journal and self.has_reserve(connection)) or self.free_space() < ROOM_BYTES:
            return
        from versioner_agent import creation  # noqa: PLC0415  # hardly ever

        creation.make_reserve_first(connection, journal_too=not has_journal)

    def _check_length(self, connection: sqlite3.Connection) -> None:
        """Suspect a file that is longer than its header says: SQLite would write over what lies behind.

        It may be no more than a cut that was not made, for SQLite commits before it shortens a file. A large one can't
        be looked through while a build waits.
        """
        length = connection.execute(LENGTH).fetchone()[0]
        if length < size_of(self.path) <= CHECKED_BYTES and not is_wal(connection):
            raise self.suspected("it is longer than its header says")

    def _missing(self) -> OutboxError:
        if self.is_remembered():
            inode = inode_of(self.path)
            return self.damaged("the file is missing" if inode is None else "the file is empty", inode)
        return OutboxMissing(f"there is no outbox at {self.path}", "it is made by the first enqueue")

    def damaged(self, what: str, inode: tuple[int, int] | None) -> OutboxDamaged:
        """Say that an outbox, seen in the file *inode*, can't be used as it is."""
        return OutboxDamaged(
            f"the outbox {self.path} is damaged: {what}",
            "the agent, a flush or the next enqueue replaces it, saves what can be read and keeps the damaged file",
            what,
            inode,
        )

    def suspected(self, what: str) -> OutboxDamaged:
        """Say that something happened which can't on a sound file: it has to be looked through."""
        return OutboxDamaged(
            f"can't use the outbox {self.path}: {what}",
            "the agent or a flush mends it if it is damaged; `versioner-agent doctor --deep` looks at all of it",
            what,
            self._inode,
            is_certain=False,
        )

    def _full(self) -> OutboxFull:
        return OutboxFull(f"no space left for the outbox {self.path}", "free some space, then try again")

    def foreign(self) -> OutboxError:
        """Say that the file is somebody else's."""
        return OutboxError(
            f"{self.path} is not an outbox of versioner-agent; it is left as it is",
            "name another file with --db or VERSIONER_AGENT_DB",
        )

    def unknown_version(self, version: int) -> OutboxError:
        """Say that the file is of a schema that this program can't use."""
        return OutboxError(
            f"the outbox {self.path} has schema {version}, this versioner-agent knows {schema.VERSION}; "
            "it is left as it is",
            "use the version of versioner-agent that made it",
        )

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Say SQLite's and the system's errors in our words."""
        try:
            yield
        except sqlite3.Error as exc:
            raise self._in_our_words(exc) from exc
        except UnicodeDecodeError as exc:  # SQLite quotes what it can't make sense of
            raise self.damaged("its schema is not readable", self._inode) from exc
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full() from exc
            raise unusable(self.path, exc) from exc

    def _in_our_words(self, exc: sqlite3.Error) -> OutboxError:
        extended = getattr(exc, "sqlite_errorcode", 0)
        code = extended & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return OutboxBusy(
                f"the outbox {self.path} was locked for {self.busy_timeout:g} s",
                "look for a program that keeps it open (fuser), then try again",
            )
        if code == sqlite3.SQLITE_FULL:
            return self._full()
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            if code == sqlite3.SQLITE_NOTADB and not self.is_remembered():
                return OutboxDamaged(
                    f"{self.path} is damaged, or no outbox at all ({exc}); it is left as it is",
                    "name another file with --db or VERSIONER_AGENT_DB",
                    str(exc),
                    self._inode,
                )
            return self.damaged(str(exc), self._inode)
        if code in _IMPOSSIBLE or extended == sqlite3.SQLITE_IOERR_SHORT_READ:
            return self.suspected(str(exc))
        return OutboxError(f"can't use the outbox {self.path}: {exc}", access_hint(self.path, exc))


def is_wal(connection: sqlite3.Connection) -> bool:
    """Tell whether somebody's tool has switched the file to write-ahead logging."""
    return bool(connection.execute("PRAGMA journal_mode").fetchone() == ("wal",))


def placeholders(values: list[Any]) -> str:
    """Return `?, ?, …` for *values*."""
    return ", ".join("?" * len(values))
