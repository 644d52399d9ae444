"""An outbox as years of work leave it: a million records, most of them delivered, some of every other kind.

Made by the same code that queues, with nothing synced, and settled by SQL.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing

from versioner_agent import events
from versioner_agent.batches import CHUNK
from versioner_agent.outbox import Outbox

DAY_S = 86_400.0
PRODUCTS = 5000
RARE = "rare-product"
OLD_DAYS = 400

_FAST = ("PRAGMA synchronous = OFF", "PRAGMA journal_mode = MEMORY", "PRAGMA cache_size = -200000")


def fill(path: str, size: int, *, rare: int = 3) -> None:
    """Queue *size* builds at *path*, *rare* of them, far apart, of RARE."""
    every = max(1, size // rare)
    with Outbox(path) as outbox:
        outbox.enqueue_all([_build(0, 1)])
        with outbox.store.read() as connection:
            for pragma in _FAST:
                connection.execute(pragma).fetchall()
        for start in range(1, size, CHUNK):
            outbox.enqueue_all([_build(n, every) for n in range(start, min(start + CHUNK, size))])


def settle(path: str) -> None:
    """Make of every thousand records 949 delivered 400 days ago, 30 an hour ago, 10 failed, 10 exported; 1 waits."""
    now = time.time()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in _FAST:
            connection.execute(pragma).fetchall()
        connection.execute("BEGIN")
        for state, least, most, age_s in (
            ("delivered", 0, 949, OLD_DAYS * DAY_S),
            ("delivered", 949, 979, 3600.0),
            ("failed", 979, 989, 3600.0),
            ("exported", 989, 999, 3600.0),
        ):
            connection.execute(SETTLE, (state, now - age_s, state, state, least, most))
        connection.execute(ATTEMPTS, (now - OLD_DAYS * DAY_S,))
        connection.execute("COMMIT")


def _build(number: int, every: int) -> events.Event:
    product = RARE if number % every == every // 2 else f"product-{number % PRODUCTS:04}"
    fields = {"product_name": product, "version": f"1.{number}", "status": "success", "invoke_id": f"run-{number}"}
    return events.validate("build", fields)


SETTLE = """
    UPDATE record SET state = ?, settled_at = ?, attempts = 1,
        batch = CASE ? WHEN 'exported' THEN -1 ELSE batch END,
        reason = CASE ? WHEN 'failed' THEN 'conflict' END
    WHERE id % 1000 >= ? AND id % 1000 < ?
"""
ATTEMPTS = """
    INSERT INTO attempt (record_id, at, outcome, http_status, detail, duration_s)
    SELECT id, ?, 'delivered', 201, NULL, 0.1 FROM record WHERE state <> 'pending'
"""
