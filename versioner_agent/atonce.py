"""Several queries at once: all of them see the same state of the outbox, whatever others commit meanwhile."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from versioner_agent.storage import Store


@contextmanager
def at_once(store: Store) -> Iterator[sqlite3.Connection]:
    """Lend the connection as `Store.read` does, for queries that belong together; no block may lie in another.

    No commit happens meanwhile, so that it must be short. Raises OutboxMissing, OutboxBusy, OutboxError.
    """
    with store.read() as connection:
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
