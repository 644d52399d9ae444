"""Batches: what is too large for one transaction is staged in steps and published by one update.

Until that update nobody sees any of it; from then on all of it is queued, and whoever comes first, the one who queued
it or the flusher, hands it over in steps.
"""

from __future__ import annotations

from versioner_agent.storage import Store

#: Events that one transaction takes at most: it holds the write queue for well under 100 ms.
CHUNK = 500

INSERT_BATCH = "INSERT INTO batch (kind, created_at) VALUES (?, ?)"
COUNT_BATCH = "UPDATE batch SET waiting = ? WHERE id = ?"
PUBLISH_BATCH = "UPDATE batch SET published = 1 WHERE id = ?"
FIND_PUBLISHED = "SELECT id FROM batch WHERE published = 1 ORDER BY id LIMIT 1"
HAND_OVER = """
    UPDATE record SET state = 'pending' WHERE id IN (
        SELECT id FROM record WHERE batch = ? AND state = 'staged' ORDER BY id LIMIT ?
    )
"""
COUNT_HANDED_OVER = "UPDATE batch SET waiting = waiting - ? WHERE id = ?"
DELETE_BATCH = "DELETE FROM batch WHERE id = ?"
SELECT_UNPUBLISHED = "SELECT 1 FROM batch WHERE id = ? AND published = 0"
DROP_STAGED = """
    DELETE FROM record WHERE id IN (SELECT id FROM record WHERE batch = ? AND state = 'staged' LIMIT ?)
"""


def hand_over_batch(store: Store, step: int = CHUNK) -> bool:
    """Turn one *step* of the oldest published batch into pending records; False when there is none left."""
    with store.read() as connection:
        found = connection.execute(FIND_PUBLISHED).fetchall()
    if not found:
        return False
    with store.write() as connection:
        handed_over = connection.execute(HAND_OVER, (found[0][0], step)).rowcount
        connection.execute(COUNT_HANDED_OVER, (handed_over, found[0][0]))
        if handed_over < step:
            connection.execute(DELETE_BATCH, found[0])
    return True


def drop_staged(store: Store, batch: int | None, step: int = CHUNK) -> bool:
    """Remove one *step* of a batch that was never published; False when it is gone."""
    with store.write() as connection:
        if connection.execute(SELECT_UNPUBLISHED, (batch,)).fetchone() is None:
            return False
        if connection.execute(DROP_STAGED, (batch, step)).rowcount < step:
            connection.execute(DELETE_BATCH, (batch,))
    return True
