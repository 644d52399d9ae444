"""Making an outbox: its directory, its tables, and the space set aside in it (see `reserve`)."""

from __future__ import annotations

import os
import sqlite3

from versioner_agent import schema
from versioner_agent.errors import OutboxError
from versioner_agent.files import RESERVE_BYTES
from versioner_agent.hostid import machine
from versioner_agent.pages import PAGE_BYTES


def make_tables(connection: sqlite3.Connection) -> None:
    """Make an outbox in an empty file, in one transaction."""
    # Neither can be changed once there is a table; pages of another size could not be read without the header.
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("BEGIN IMMEDIATE")
    for statement in schema.statements(schema.VERSION):
        connection.execute(statement)
    connection.execute("UPDATE outbox SET machine = ?", (machine(),))
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {schema.VERSION}")
    connection.execute("COMMIT")


def make_reserve(connection: sqlite3.Connection, *, journal_too: bool) -> None:
    """Reserve space, in transactions of its own: the second one's journal grows to the same size, and stays so."""
    connection.execute("INSERT OR IGNORE INTO reserve (id, filler) VALUES (1, zeroblob(?))", (RESERVE_BYTES,))
    if journal_too:
        connection.execute("UPDATE reserve SET filler = randomblob(?)", (RESERVE_BYTES,))


def make_reserve_first(connection: sqlite3.Connection, *, journal_too: bool) -> None:
    """Do so in place of the transaction that has just begun, and begin it again; without it, where a quota forbids."""
    connection.execute("ROLLBACK")
    try:
        make_reserve(connection, journal_too=journal_too)
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
    connection.execute("BEGIN IMMEDIATE")


def make_private_directory(path: str) -> None:
    """Make the directory of an outbox that nobody named, with all above it; raises OutboxError.

    Only there: a missing directory of one that somebody named is a typing error, or a disk that is not mounted, and
    nobody would deliver from it.
    """
    directory = os.path.dirname(path)
    if os.path.isdir(directory):
        return
    parent = os.path.dirname(directory)
    try:
        os.makedirs(parent, exist_ok=True)
        os.mkdir(directory, 0o700)
        sync_directory(parent)
    except FileExistsError:
        pass
    except OSError as exc:
        raise OutboxError(f"can't make the directory {directory}: {exc.strerror}") from exc


def sync_directory(path: str) -> None:
    """Make a new name in *path* durable (fsync(2): the file's own sync does not cover its directory entry)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
