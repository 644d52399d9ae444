"""Batches: what is too large for one transaction is staged in steps and published by one update.

Until that update nobody sees any of it; from then on all of it is queued, and whoever comes first, the one who queued
it or the flusher, hands it over in steps.
"""

from __future__ import annotations

import sqlite3

from versioner_agent.errors import OutboxError, OutboxFull
from versioner_agent.storage import Store

#: Events that one transaction takes at most: it holds the write queue for well under 100 ms.
CHUNK = 500
CHUNK_BYTES = 1024 * 1024  # of payloads, likewise; a single one may be a quarter of it
#: Pages that one step changes are kept until its commit (KiB): writing them earlier would sync the journal once more.
CACHE_KIB = 8192

INSERT_BATCH = "INSERT INTO batch (kind, created_at) VALUES (?, ?)"
COUNT_BATCH = "UPDATE batch SET waiting = ? WHERE id = ?"
PUBLISH_BATCH = "UPDATE batch SET published = 1 WHERE id = ?"
# What waits was published, in the same transaction, whatever has become of that bit.
FIND_PUBLISHED = "SELECT id FROM batch WHERE published = 1 OR waiting > 0 ORDER BY id LIMIT 1"
HAND_OVER = """
    UPDATE record SET state = 'pending' WHERE id IN (
        SELECT id FROM record WHERE batch = ? AND state = 'staged' ORDER BY id LIMIT ?
    )
"""
COUNT_HANDED_OVER = "UPDATE batch SET waiting = waiting - ? WHERE id = ?"
DELETE_BATCH = "DELETE FROM batch WHERE id = ?"
SELECT_UNPUBLISHED = "SELECT 1 FROM batch WHERE id = ? AND published = 0"
SIZES = "SELECT length(payload) FROM record WHERE batch = ? AND state = 'staged' ORDER BY id LIMIT ?"
DROP_STAGED = """
    DELETE FROM record WHERE id IN (SELECT id FROM record WHERE batch = ? AND state = 'staged' ORDER BY id LIMIT ?)
"""


def hand_over_batch(store: Store, step: int = CHUNK) -> bool:
    """Turn one *step* of the oldest published batch into pending records; False when there is none left."""
    with store.read() as connection:
        found = connection.execute(FIND_PUBLISHED).fetchall()
    if not found:
        return False
    with store.write() as connection:
        keep_pages(connection)
        count = _fitting(connection, found[0][0], step)
        handed_over = connection.execute(HAND_OVER, (found[0][0], count)).rowcount
        connection.execute(COUNT_HANDED_OVER, (handed_over, found[0][0]))
        if not count:
            connection.execute(DELETE_BATCH, found[0])
    return True


def drop_staged(store: Store, batch: int | None, step: int = CHUNK) -> bool:
    """Remove one *step* of a batch that was never published; False when it is gone."""
    with store.write() as connection:
        if connection.execute(SELECT_UNPUBLISHED, (batch,)).fetchone() is None:
            return False
        if not connection.execute(DROP_STAGED, (batch, _fitting(connection, batch, step))).rowcount:
            connection.execute(DELETE_BATCH, (batch,))
    return True


def hand_over_all(store: Store) -> None:
    """Hand over what is published, as far as that goes: it is queued, and the flusher hands over what is left."""
    try:
        while hand_over_batch(store):
            pass
    except OutboxError:
        pass


def drop_batch(store: Store, batch: int | None) -> None:
    """Remove a batch that was never published, as far as that goes: what stays is never sent, and swept later.

    On a full disk in steps of one record, for which the journal that is there has room.
    """
    step = CHUNK
    try:
        while True:
            try:
                if not drop_staged(store, batch, step):
                    return
            except OutboxFull:
                if step == 1:
                    raise
                step = 1
    except OutboxError:
        pass


def keep_pages(connection: sqlite3.Connection) -> None:
    """Have room for all that one step changes: every index has its own page for nearly each record."""
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")


def _fitting(connection: sqlite3.Connection, batch: int | None, step: int) -> int:
    """Return how many of the next *step* records of *batch* one transaction takes: large ones are written slowly."""
    count = size = 0
    for (length,) in connection.execute(SIZES, (batch, step)).fetchall():
        size += length
        if count and size > CHUNK_BYTES:
            break
        count += 1
    return count
