"""Forgetting what is old and giving its space back, in steps that nobody who queues has to wait for.

What goes: delivered and discarded records that were settled before a given time; of those that were imported, the ones
whose verdict was told before it; where that is set, exported ones without a verdict. What waits, failed or is still to
be told stays, however old. Batches that were imported stay known for good: a file that turns up again must add nothing.
Used only by whoever holds the flusher lock.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

from versioner_agent.batches import keep_pages
from versioner_agent.errors import OutboxFull
from versioner_agent.files import RESERVE_BYTES
from versioner_agent.reserve import give_up
from versioner_agent.schema import EXPORTS_SINCE
from versioner_agent.stepping import StepSize
from versioner_agent.storage import Store

#: Payloads that one transaction removes at most (bytes): their pages are wiped, and kept in the journal until then.
STEP_BYTES = 1024 * 1024
#: Free space inside the file that is kept, for new events can use it on a full disk.
KEPT_FREE_BYTES = 8 * RESERVE_BYTES
#: Removes one record inside a transaction; returns how many that were.
_Remove = Callable[[sqlite3.Connection, int], int]


class Pruner:
    """Removes from one outbox, as much in one transaction as the disk allows."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        """Remove from *store*, which belongs to the calling thread; *clock* counts seconds."""
        self._store = store
        self._records = StepSize(clock)
        self._pages = StepSize(clock)

    def prune(self, before: float) -> int:
        """Remove one step of what was settled, or told, before *before* (seconds since 1970); returns how many."""
        return self._step(self._old(before), self._remove_one)

    def prune_exported(self, before: float) -> int:
        """Remove one step of what was exported in batches made before *before* and has no verdict; returns how many."""
        return self._step(self._old_exported(before), _remove_exported)

    def give_space_back(self) -> bool:
        """Return one step of free pages to the file system, but for KEPT_FREE_BYTES; False when there are no more.

        On a full disk it may find no room for its journal: then nothing happens, for new events use those pages.
        """
        if self._store.free_pages() <= KEPT_FREE_BYTES:
            return False
        try:
            with self._store.write() as connection:
                self._pages.start()
                connection.execute(f"PRAGMA incremental_vacuum({self._pages.value})").fetchall()
        except OutboxFull:
            self._pages.value = 1
            return False
        self._pages.end(self._pages.value)
        return True

    def _old(self, before: float) -> list[tuple[int, int]]:
        """Return ids and sizes of records that may go, as many as one transaction should take."""
        with self._store.read() as connection:
            if self._store.version < EXPORTS_SINCE:
                return []  # not upgraded yet: nothing is delivered from it either
            rows = connection.execute(FIND_OLD, (before, self._records.value)).fetchall()
            return rows or connection.execute(FIND_TOLD, (before, self._records.value)).fetchall()

    def _old_exported(self, before: float) -> list[tuple[int, int]]:
        with self._store.read() as connection:
            if self._store.version < EXPORTS_SINCE:
                return []
            row = connection.execute(FIND_OLD_EXPORT, (before,)).fetchone()
            return connection.execute(EXPORTED_IDS, (-row[0], self._records.value)).fetchall() if row else []

    def _step(self, rows: list[tuple[int, int]], remove_one: _Remove) -> int:
        """Remove some of *rows*, ids and sizes of records; returns how many."""
        if not rows:
            return 0
        try:
            return self._remove(rows, remove_one)
        except OutboxFull:  # its journal has room for one
            give_up(self._store)
            return self._remove(rows[:1], remove_one)

    def _remove(self, rows: list[tuple[int, int]], remove_one: _Remove) -> int:
        """Remove as many of *rows* as one transaction has time and room for, at least one; returns how many."""
        done = size = removed = 0
        with self._store.write() as connection:
            self._records.start()
            keep_pages(connection)
            for record_id, length in rows:
                size += length
                if done and (size > STEP_BYTES or self._records.is_over):
                    break
                removed += remove_one(connection, record_id)
                done += 1
        self._records.end(done)
        return removed

    def _remove_one(self, connection: sqlite3.Connection, record_id: int) -> int:
        """Remove a record, looking at its state again; one that was told and is not over is to be told again."""
        is_found = connection.execute(PRUNE, (record_id,)).rowcount or connection.execute(UNTELL, (record_id,)).rowcount
        if not is_found and connection.execute(IS_IMPORTED, (record_id,)).fetchone() is None:
            # and would be looked at for ever; one that was imported has arrived again meanwhile, and is to be told anew
            raise self._store.suspected(f"the index of old records is wrong about record {record_id}")
        return is_found


def _remove_exported(connection: sqlite3.Connection, record_id: int) -> int:
    """Remove an exported record, unless somebody retried or discarded it meanwhile."""
    return connection.execute(PRUNE_EXPORTED, (record_id,)).rowcount


FIND_OLD = """
    SELECT id, length(payload) FROM record INDEXED BY record_prunable
    WHERE settled_at < ? AND state IN ('delivered', 'discarded') AND origin IS NULL ORDER BY settled_at LIMIT ?
"""
FIND_TOLD = """
    SELECT record_id, COALESCE(length(payload), 0) FROM told INDEXED BY told_at LEFT JOIN record ON id = record_id
    WHERE at < ? ORDER BY at LIMIT ?
"""
PRUNE = """
    DELETE FROM record WHERE id = ? AND state IN ('delivered', 'discarded')
        AND (origin IS NULL OR EXISTS (SELECT 1 FROM told WHERE record_id = record.id))
"""
IS_IMPORTED = "SELECT 1 FROM record WHERE id = ? AND origin IS NOT NULL"
UNTELL = "DELETE FROM told WHERE record_id = ?"
FIND_OLD_EXPORT = """
    SELECT id FROM export INDEXED BY export_unanswered
    WHERE awaited + waiting > 0 AND state = 'marked' AND created_at < ? AND EXISTS (
        SELECT 1 FROM record INDEXED BY record_exported WHERE state = 'exported' AND batch = -export.id
    ) ORDER BY id LIMIT 1
"""
EXPORTED_IDS = """
    SELECT id, length(payload) FROM record INDEXED BY record_exported
    WHERE state = 'exported' AND batch = ? ORDER BY id LIMIT ?
"""
PRUNE_EXPORTED = "DELETE FROM record WHERE id = ? AND state = 'exported'"
