"""Space that only recording deliveries may use: a row inside the file, and a journal grown to the same size.

A full disk must not keep a delivery from being recorded, or it would be repeated for ever. Both lie inside the outbox's
own files, so that no neighbour can eat them. It takes the pages of the largest event, which a settlement may have to
write again, and some for the indexes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from versioner_agent.creation import make_reserve
from versioner_agent.files import RESERVE_BYTES, ROOM_BYTES, size_of
from versioner_agent.storage import Store


def keep(store: Store) -> None:
    """Make the reserve where it or its journal is missing and there is room, in the file or beside it."""
    has_journal = size_of(store.path + "-journal") >= RESERVE_BYTES
    with store.read() as connection:
        if has_journal and store.has_reserve(connection):
            return
    if store.free_space() >= ROOM_BYTES or (has_journal and store.free_pages() >= 2 * RESERVE_BYTES):
        with store.turn(), store.read() as connection:
            make_reserve(connection, journal_too=not has_journal)


def has_room_inside(store: Store, room: int) -> bool:
    """Tell whether the file has *room* bytes that nothing uses, beside what recording deliveries may need."""
    return store.free_pages() >= RESERVE_BYTES + room


def is_short(store: Store) -> bool:
    """Tell whether the reserve has been given up and there is no room for another one."""
    with store.read() as connection:
        is_there = store.has_reserve(connection)
    return not is_there and store.free_space() < ROOM_BYTES


def give_up(store: Store) -> None:
    """Turn the reserve into free pages."""
    with store.write() as connection, wiping_less(connection):
        connection.execute("DELETE FROM reserve")


@contextmanager
def wiping_less(connection: sqlite3.Connection) -> Iterator[None]:
    """Leave pages that become free as they are for the block: wiping them would need room in the journal."""
    connection.execute("PRAGMA secure_delete = FAST").fetchall()
    try:
        yield
    finally:
        connection.execute("PRAGMA secure_delete = ON").fetchall()
