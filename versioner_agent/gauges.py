"""Measuring an outbox: a few look-ups in indexes and kept counts, whatever its size, and who is at it.

Nothing here counts records one by one: a reader blocks every commit of a rollback-journal database.
"""

from __future__ import annotations

import platform
import sqlite3
from contextlib import suppress
from typing import Any, NamedTuple

from versioner_agent import __version__, notices, review, schema
from versioner_agent.atonce import at_once
from versioner_agent.errors import OutboxError
from versioner_agent.files import changed_at, require_place
from versioner_agent.locks import FLUSHER_SUFFIX, FlusherLock
from versioner_agent.records import number
from versioner_agent.review import Stats
from versioner_agent.snapshot import Snapshot
from versioner_agent.storage import OutboxMissing, Store

MOST_HELD = 50_000  # products counted in one read: about 20 ms


class _More(NamedTuple):
    """What `review.stats` does not tell."""

    deliveries: int = 0
    held: int | None = 0
    failures: int | None = 0
    failed: dict[str, int] | None = None
    batches: int | None = 0
    oldest_batch_at: float | None = None


_NOTHING = _More(failed=dict.fromkeys(schema.FAILED_REASONS, 0))


def look(store: Store, *, is_named: bool = False, max_backoff: float = 0.0) -> Snapshot:
    """Measure the outbox, which need not be there; raises OutboxError.

    Where it *is_named*, somebody has chosen its directory: that must be there, or its disk is not mounted.
    *max_backoff* (seconds) is the longest pause between two tries.
    """
    is_there, sign = True, None
    presence = FlusherLock(store.path).presence()
    try:
        with at_once(store) as connection:
            stats, more = review.stats_of(store, connection), _more(store, connection)
            if not presence.has_borrower:  # an agent that has lent delivering tries nothing
                sign = last_sign_at(store, connection, stats, max_backoff)
    except OutboxMissing:
        if is_named:
            require_place(store.path)
        is_there, stats, more = False, review.EMPTY, _NOTHING
    free = None
    with suppress(OutboxError):  # no directory, no space
        free = store.free_space()
    return Snapshot(
        is_there=is_there,
        counts={state: _whole(count) for state, count in stats.counts.items()},
        bytes=stats.bytes,
        free_bytes=free,
        oldest_pending_at=stats.oldest_pending_at,
        last_delivered_at=stats.last_delivered_at,
        state=stats.health.state,
        reason=stats.health.reason,
        since=stats.health.since,
        damage=None if stats.damage is None else str(stats.damage),
        last_sign_at=sign,
        has_agent=presence.has_agent,
        is_delivering=presence.is_delivering,
        **more._asdict(),
    )


def last_sign_at(store: Store, connection: sqlite3.Connection, stats: Stats, max_backoff: float) -> float | None:
    """Return when whoever delivers has last shown, or is to show next, while something waits for him; else None.

    What waits for a receipt, behind exported records of its product, does not.
    """
    query = FIRST_UNHELD if store.version >= schema.EXPORTS_SINCE else notices.OLDEST_PENDING
    found = connection.execute(query).fetchone()
    if found is None:
        return None
    started = changed_at(store.path + FLUSHER_SUFFIX)
    queued_at, tried_at = map(number, found)
    due_at = tried_at and tried_at + max_backoff
    signs = (queued_at, due_at, stats.last_delivered_at, stats.health.next_attempt_at, started and started / 1e9)
    return max(sign or 0.0 for sign in signs)


def build() -> dict[str, str]:
    """Say what is running."""
    return {"version": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}


def _more(store: Store, connection: sqlite3.Connection) -> _More:
    deliveries = _whole(store.only(connection.execute(DELIVERIES))[0])
    held = connection.execute(COUNT_HELD, (MOST_HELD + 1,)).fetchone()[0]
    found = _More(deliveries, held if held <= MOST_HELD else None)
    if store.version < schema.EXPORTS_SINCE:
        return found._replace(failures=None, batches=None)
    failures = connection.execute(COUNT_FAILURES).fetchone()
    failed = dict(connection.execute(FAILED).fetchall())
    batches, oldest = connection.execute(BATCHES).fetchone()
    return found._replace(
        failures=_whole(failures[0]) if failures else 0,
        failed={reason: _whole(failed.get(reason)) for reason in schema.FAILED_REASONS},
        batches=batches,
        oldest_batch_at=number(oldest),
    )


def _whole(value: Any) -> int:
    """Return a count, 0 for what is none: in a damaged file it may have become something else."""
    return value if isinstance(value, int) else 0


# Of the first thousand: a reader may look at no more.
FIRST_UNHELD = """
    SELECT queued_at, last_attempt_at FROM (
        SELECT id, product_name, queued_at, last_attempt_at FROM record INDEXED BY record_state
        WHERE state = 'pending' ORDER BY id LIMIT 1000
    ) AS waiting
    WHERE NOT EXISTS (
        SELECT 1 FROM record INDEXED BY record_held_by_export
        WHERE state = 'exported' AND product_name = waiting.product_name
    )
    ORDER BY id LIMIT 1
"""
DELIVERIES = "SELECT deliveries FROM destination WHERE id = 1"
COUNT_HELD = """
    SELECT count(*) FROM (
        SELECT DISTINCT product_name FROM record INDEXED BY record_held WHERE held_since IS NOT NULL LIMIT ?
    )
"""
# The largest number ever given, also of those whose records are pruned (https://sqlite.org/autoinc.html).
COUNT_FAILURES = "SELECT seq FROM sqlite_sequence WHERE name = 'failure'"
FAILED = "SELECT reason, n FROM failed_tally"
BATCHES = """
    SELECT count(*), min(created_at) FROM export WHERE state = 'marking' OR (state = 'marked' AND EXISTS (
        SELECT 1 FROM record INDEXED BY record_exported WHERE state = 'exported' AND batch = -export.id
    ))
"""
