"""The machine an outbox was made on: whether it is this one, and making it this one.

One that came here by a copied disk, a machine image or a backup may hold events that the original delivers too.
"""

from __future__ import annotations

import sqlite3

from versioner_agent import schema
from versioner_agent.hostid import machine
from versioner_agent.storage import Store


def is_elsewhere(store: Store, connection: sqlite3.Connection) -> bool:
    """Tell whether the outbox was made on another machine; False where either has no name."""
    here, there = machine(), _noted(store, connection)
    return here is not None and there is not None and here != there


def settle_in(store: Store, *, moved_too: bool = False) -> bool:
    """Note this machine where none is noted, or with *moved_too* another one; returns whether that was needed.

    Raises OutboxMissing, OutboxError.
    """
    with store.read() as connection:
        here, there = machine(), _noted(store, connection)
    if store.version < schema.EXPORTS_SINCE or here is None or there == here or not (there is None or moved_too):
        return False
    with store.write() as connection:
        connection.execute("UPDATE outbox SET machine = ?", (here,))
    return True


def _noted(store: Store, connection: sqlite3.Connection) -> str | None:
    if store.version < schema.EXPORTS_SINCE:
        return None  # its agent has not upgraded it yet
    row = connection.execute("SELECT machine FROM outbox").fetchone()
    return row[0] if row and isinstance(row[0], str) else None
