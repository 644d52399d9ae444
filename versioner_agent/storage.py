"""The outbox's file: opening, creating, transactions, and SQLite's errors in our words.

Rollback journal (PERSIST) with synchronous=FULL, so a commit is on the disk when it returns
(https://sqlite.org/pragma.html#pragma_synchronous), and not WAL, which SQLite before 3.51.3 can corrupt when two
processes write and checkpoint together (https://sqlite.org/wal.html#walresetbug). In this mode a reader blocks every
commit: reads fetch all they want at once and are done. Nothing but SQLite may open the file while a connection is open,
for closing any descriptor drops its locks (https://sqlite.org/howtocorrupt.html).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from versioner_agent import schema
from versioner_agent.errors import OutboxBusy, OutboxError, OutboxFull
from versioner_agent.locks import QUEUE_SUFFIX, WriteQueue, open_beside

DEFAULT_BUSY_TIMEOUT_S = 10.0
#: Below this much free space nothing new is accepted: what is left belongs to recording deliveries (bytes).
FREE_SPACE_FLOOR = 256 * 1024


IDENTIFY = """
    SELECT application_id, user_version, page_count
    FROM pragma_application_id, pragma_user_version, pragma_page_count
"""


class OutboxMissing(OutboxError):
    """There is no outbox at this path."""


class Store:
    """One connection to one outbox file; belongs to the thread that made it."""

    def __init__(self, path: str | os.PathLike[str], busy_timeout: float = DEFAULT_BUSY_TIMEOUT_S) -> None:
        """Name the file; nothing is touched yet. Links are followed once, so that locks lie beside the real file."""
        self.path = os.path.realpath(os.fspath(path))
        self.busy_timeout = busy_timeout
        self._queue = WriteQueue(self.path + QUEUE_SUFFIX)
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    @contextmanager
    def write(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Run the block as one synced transaction, after waiting our turn; all of it happens, or nothing.

        Raises OutboxBusy after `busy_timeout` seconds, OutboxFull, OutboxMissing (unless *create*), OutboxError.
        """
        with self._translated():
            if create:
                self._make_directory()
            elif not os.path.exists(self.path):
                raise self._missing()
            if not self._queue.acquire(self.busy_timeout):
                raise OutboxBusy(
                    f"other writers kept the outbox {self.path} busy for {self.busy_timeout:g} s",
                    "try again, or raise --busy-timeout",
                )
            try:
                connection = self._connected(create=create)
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            finally:
                self._queue.release()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for queries that fetch everything before the block ends.

        Raises OutboxMissing, OutboxBusy, OutboxError.
        """
        with self._translated():
            if not os.path.exists(self.path):
                raise self._missing()
            yield self._connected(create=False)

    def close(self) -> None:
        """Give everything back; using the store again opens it again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._queue.close()

    def free_space(self) -> int:
        """Return the bytes that an ordinary user may still write beside the outbox."""
        found = os.statvfs(os.path.dirname(self.path))
        return found.f_bavail * found.f_frsize

    def _connected(self, *, create: bool) -> sqlite3.Connection:
        """Return the connection to the file that is at the path now: it may have been replaced while we waited."""
        inode = _inode(self.path)
        if self._connection is not None and (inode is None or inode != self._inode):
            self._connection.close()
            self._connection = None
        if self._connection is None:
            if inode is None:
                if not create:
                    raise self._missing()
                os.close(open_beside(self.path))
            self._connection = self._connect(create=create)
            self._inode = _inode(self.path)
        return self._connection

    def _connect(self, *, create: bool) -> sqlite3.Connection:
        connection = self._raw_connection()
        try:
            # Before any setting is made: a file that is not ours must not be changed.
            application_id, version, pages = connection.execute(IDENTIFY).fetchone()
            if (
                pages == 0 and os.stat(self.path).st_size == 0
            ):  # just made, or by somebody who was killed before the first commit
                if not create:
                    raise self._missing()
                self._create(connection)
                application_id, version = schema.APPLICATION_ID, schema.VERSION
            if application_id != schema.APPLICATION_ID:
                raise OutboxError(
                    f"{self.path} is not an outbox of versioner-agent; it is left as it is",
                    "name another file with --db or VERSIONER_AGENT_DB",
                )
            if version != schema.VERSION:
                raise OutboxError(
                    f"the outbox {self.path} has schema {version}, this versioner-agent knows {schema.VERSION}",
                    "use the version of versioner-agent that made it",
                )
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA journal_mode = PERSIST")
        except BaseException:
            connection.close()
            raise
        return connection

    def _raw_connection(self) -> sqlite3.Connection:
        # mode=rw: SQLite itself must never make the file, it would choose the wrong mode.
        quoted = self.path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        return sqlite3.connect(f"file:{quoted}?mode=rw", uri=True, timeout=self.busy_timeout, isolation_level=None)

    def _create(self, connection: sqlite3.Connection) -> None:
        """Make the tables in one transaction.

        Runs while holding the write queue, so that twenty first enqueues make one outbox.
        """
        connection.execute("PRAGMA synchronous = FULL")
        # Can't be changed once there is a table.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in schema.TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {schema.VERSION}")
        connection.execute("COMMIT")
        _sync_directory(os.path.dirname(self.path))
        self._queue.remember(b"outbox\n")

    def _make_directory(self) -> None:
        directory = os.path.dirname(self.path)
        if os.path.isdir(directory):
            return
        parent = os.path.dirname(directory)
        os.makedirs(parent, exist_ok=True)
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            return
        _sync_directory(parent)

    def _missing(self) -> OutboxMissing:
        return OutboxMissing(f"there is no outbox at {self.path}", "it is made by the first enqueue")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Say SQLite's and the system's errors in our words."""
        try:
            yield
        except sqlite3.Error as exc:
            raise self._in_our_words(exc) from exc
        except OSError as exc:
            raise OutboxError(
                f"can't use the outbox {self.path}: {exc.strerror or exc}", self._access_hint(exc)
            ) from exc

    def _in_our_words(self, exc: sqlite3.Error) -> OutboxError:
        code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return OutboxBusy(
                f"the outbox {self.path} was locked for {self.busy_timeout:g} s",
                "look for a program that keeps it open (fuser), then try again",
            )
        if code == sqlite3.SQLITE_FULL:
            return OutboxFull(f"no space left for the outbox {self.path}", "free some space, then try again")
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return OutboxError(
                f"{self.path} is damaged, or no outbox at all ({exc}); it is left as it is",
                "keep a copy of it and its -journal, and name another file with --db to go on",
            )
        return OutboxError(f"can't use the outbox {self.path}: {exc}", self._access_hint(exc))

    def _access_hint(self, exc: Exception) -> str | None:
        """Name the group to join where that is what is missing."""
        directory = os.path.dirname(self.path)
        try:
            found = os.stat(directory)
        except OSError:
            return f"check that {directory} exists and that you may use it"
        is_denied = isinstance(exc, PermissionError) or not os.access(directory, os.W_OK | os.X_OK)
        if is_denied and found.st_mode & 0o020:
            return f"ask for membership in the group {_group_name(found.st_gid)}, which shares {directory}"
        return f"check the permissions of {directory}" if is_denied else None


def _group_name(gid: int) -> str:
    try:
        import grp  # noqa: PLC0415  # POSIX only, and only for a message

        return grp.getgrgid(gid).gr_name
    except (ImportError, KeyError):
        return str(gid)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _sync_directory(path: str) -> None:
    """Make a new name in *path* durable (fsync(2): the file's own sync does not cover its directory entry)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def placeholders(values: list[Any]) -> str:
    """Return `?, ?, …` for *values*."""
    return ", ".join("?" * len(values))
