"""Bringing an outbox of an older schema to this program's: all steps in one transaction, a copy of the old file kept.

Only who holds the flusher lock does it. `enqueue` never does: it writes to older versions and the next one as they
are, so that neither an upgrade nor a way back fails a build.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3

from versioner_agent import schema
from versioner_agent.creation import sync_directory
from versioner_agent.errors import OutboxFull
from versioner_agent.files import create_beside
from versioner_agent.storage import Store

#: Room that the migration itself may take beside the copy (bytes).
MARGIN_BYTES = 4 * 1024 * 1024
#: Pages that are copied from one sign of life to the next.
COPIED_AT_ONCE = 4096
COPYING_SUFFIX = ".copying"


def migrate(store: Store) -> str | None:
    """Bring the outbox to this program's schema; returns the copy kept of it, None where there was nothing to do.

    Raises OutboxFull where the copy does not fit (nothing is changed then), OutboxError for a newer schema, OutboxBusy.
    """
    if not is_due(store):
        return None
    with store.translated(), store.turn():
        with store.read() as connection:
            version = store.version
            if version > schema.VERSION:
                raise store.unknown_version(version)
            kept = f"{store.path}.schema-{version}"
            _keep_copy(store, connection, kept)
            _upgrade(store, connection, version)
        store.disconnect()
    return kept


def is_due(store: Store) -> bool:
    """Tell whether the outbox is of another schema than this program's; raises OutboxError."""
    with store.read():
        pass  # reads the version
    return store.version != schema.VERSION


def _get_on(store: Store) -> None:
    """Let those who wait to queue see that we get on, or they would give up."""
    with contextlib.suppress(OSError):
        os.utime(store.path, follow_symlinks=False)


def _upgrade(store: Store, connection: sqlite3.Connection, version: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in schema.STEPS[version - 1 :]:
            for statement in step:
                connection.execute(statement)
                _get_on(store)
        connection.execute(f"PRAGMA user_version = {schema.VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _keep_copy(store: Store, connection: sqlite3.Connection, kept: str) -> None:
    """Make the copy under another name first, so that half a copy is never taken for one."""
    needed = os.stat(store.path).st_size + MARGIN_BYTES
    if store.free_space() < needed:
        raise OutboxFull(
            f"the outbox {store.path} must be upgraded before anything is delivered, which needs {needed >> 20} MiB "
            "beside it for a copy of the old one",
            "free some space, or go back to the version of versioner-agent that made it",
        )
    side = store.path + COPYING_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        os.unlink(side)
    fd = create_beside(side)
    try:
        with contextlib.closing(sqlite3.connect(side, isolation_level=None)) as copy:
            connection.backup(copy, pages=COPIED_AT_ONCE, progress=lambda *_: _get_on(store))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(side, kept)
    sync_directory(os.path.dirname(kept))
