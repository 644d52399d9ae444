"""The outbox as people see it: list, show, stats, retry, discard. Reads are paged and fetched before anything is shown.

A reader blocks every commit in a rollback-journal database, so no read here lasts longer than a page takes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from versioner_agent.damage import Damage, noted
from versioner_agent.ledger import Health, as_health
from versioner_agent.outbox import LIVE_STATES, Destination
from versioner_agent.records import COLUMNS, Record, as_record, number, text
from versioner_agent.schema import EXPORTS_SINCE, STATES
from versioner_agent.storage import Store, placeholders

PAGE = 500  # rows one read returns
HELD_SHOWN = 100


class Attempt(NamedTuple):
    """One POST and what came of it."""

    at: float
    outcome: str
    http_status: int | None
    detail: str | None
    duration_s: float


class Held(NamedTuple):
    """What an ordering key waits for."""

    product_name: str
    id: int
    since: float
    reason: str | None


class Stats(NamedTuple):
    """The outbox at a glance; times are seconds since 1970, sizes bytes."""

    bytes: int
    counts: dict[str, int]
    oldest_pending_at: float | None
    last_delivered_at: float | None
    last_failure: Record | None
    held: list[Held]
    destination: Destination
    health: Health
    damage: Damage | None  # that nobody has acknowledged


class Verdict(NamedTuple):
    """What became of one id given to `retry` or `discard`."""

    id: int
    outcome: str  # retried | discarded | superseded | out_of_order | not_found | refused
    detail: str = ""


def stats(store: Store) -> Stats:
    """Return the outbox at a glance; a handful of index look-ups, whatever its size."""
    with store.read() as connection:
        size = connection.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()[
            0
        ]
        tally = dict(connection.execute("SELECT state, n FROM tally").fetchall())
        if not {*STATES} <= tally.keys():
            raise store.suspected("the counts of records by state are not readable")
        published = connection.execute(COUNT_PUBLISHED).fetchone()[0]
        oldest = connection.execute(OLDEST_PENDING).fetchone()
        failure = connection.execute(LAST_FAILURE.format(_by_time(store))).fetchone()
        held = connection.execute(HELD, (HELD_SHOWN,)).fetchall()
        row = store.only(connection.execute(DESTINATION_ROW))
        damage = noted(connection)
    tally["pending"] += published
    return Stats(
        size,
        {state: tally[state] for state in STATES},
        number(oldest[0]) if oldest else None,
        number(row[7]),
        as_record(failure) if failure else None,
        [Held(text(each[0]) or "", each[1], number(each[2]) or 0.0, text(each[3])) for each in held],
        Destination(text(row[0]), text(row[1])),
        as_health(row[2:7]),
        damage,
    )


def select(
    store: Store, *, state: str | None = None, product: str | None = None, limit: int | None = None
) -> Iterator[list[Record]]:
    """Yield pages of records, the newest first; nothing is locked between pages."""
    before: int = 2**63 - 1
    left = limit
    while left is None or left > 0:
        with store.read() as connection:
            query = PAGE_OF_STATE if state else PAGE_OF_ALL
            rows = connection.execute(query, {"state": state, "before": before, "page": PAGE}).fetchall()
        if not rows:
            return
        before = rows[-1][0]
        found = [as_record(row) for row in rows if product is None or row[4] == product][:left]
        if found:
            yield found
        if left is not None:
            left -= len(found)


def show(store: Store, record_id: int) -> tuple[Record, bytes, list[Attempt]] | None:
    """Return a record, its payload and its attempts, the oldest first; None when there is no such record."""
    with store.read() as connection:
        row = connection.execute(SHOW, (record_id,)).fetchone()
        attempts = connection.execute(ATTEMPTS, (record_id,)).fetchall()
    if row is None:
        return None
    payload = row[-1] if isinstance(row[-1], bytes) else str(row[-1]).encode()
    return as_record(row[:-1]), payload, [_attempt(each) for each in attempts]


def _attempt(row: Sequence[Any]) -> Attempt:
    at, outcome, http_status, detail, duration_s = row
    status = http_status if isinstance(http_status, int) else None
    return Attempt(number(at) or 0.0, text(outcome) or "", status, text(detail), number(duration_s) or 0.0)


def by_id(store: Store, ids: Sequence[int]) -> dict[int, Record]:
    """Return those of at most a page of records that there are, of a batch that is still handed over as pending."""
    with store.read() as connection:
        rows = connection.execute(BY_ID.format(placeholders(list(ids))), tuple(ids)).fetchall()
    found = map(as_record, rows)
    return {each.id: each._replace(state="pending") if each.state == "staged" else each for each in found}


def first_pending(store: Store, product: str) -> Record | None:
    """Return the record of *product* that goes next; None when none waits."""
    with store.read() as connection:
        row = connection.execute(FIRST_PENDING, (product,)).fetchone()
    return as_record(row) if row else None


def failed_since(store: Store, then: float) -> list[Record]:
    """Return records that failed since *then* (seconds since 1970), at most a page of them."""
    with store.read() as connection:
        rows = connection.execute(FAILED_SINCE.format(_by_time(store)), (then, PAGE)).fetchall()
    return [as_record(row) for row in rows]


def _by_time(store: Store) -> str:
    """Name the index of failures by time, where the outbox has it by now."""
    return "INDEXED BY record_failed_at" if store.version >= EXPORTS_SINCE else ""


def failed_ids(store: Store) -> list[int]:
    """Return the ids of all failed records, the oldest first."""
    with store.read() as connection:
        return [row[0] for row in connection.execute(FAILED_IDS).fetchall()]


def retry(store: Store, ids: list[int], *, out_of_order: bool = False) -> list[Verdict]:
    """Make failed and exported records pending again, each in its own transaction and as a new request.

    Skipped: what was queued again since (`superseded`), and what a delivered successor has overtaken
    (`out_of_order`), unless *out_of_order*.
    """
    verdicts = []
    for record_id in ids:
        with store.write() as connection:
            verdicts.append(_retry(connection, record_id, out_of_order=out_of_order))
    return verdicts


def discard(store: Store, ids: list[int], *, pending_too: bool = False) -> list[Verdict]:
    """Discard failed and exported records, and pending ones if *pending_too*; they stay visible."""
    verdicts = []
    for record_id in ids:
        with store.write() as connection:
            verdicts.append(_discard(connection, record_id, pending_too=pending_too))
    return verdicts


def _retry(connection: sqlite3.Connection, record_id: int, *, out_of_order: bool) -> Verdict:
    row = connection.execute(FIND, (record_id,)).fetchone()
    if row is None:
        return Verdict(record_id, "not_found", "there is no such record")
    record = as_record(row)
    if record.state not in ("failed", "exported"):
        return Verdict(record_id, "refused", f"it is {record.state}; only failed and exported ones are retried")
    if record.reason == "damaged":
        return Verdict(record_id, "refused", "its content is damaged and will not be sent; queue the event again")
    if record.identity is not None:
        again = connection.execute(QUEUED_AGAIN, (record.identity, record.id, *LIVE_STATES)).fetchone()
        if again:
            return Verdict(record_id, "superseded", f"the same event was queued again as {again[0]}")
    if record.invoke_id is not None and not out_of_order:
        named = (record.invoke_id, record.product_name, record.environment_name, record.kind, record.id)
        after = connection.execute(DELIVERED_AFTER, named).fetchone()
        if after:
            return Verdict(
                record_id, "out_of_order", f"{after[0]} of the same run was delivered since; --out-of-order sends it"
            )
    connection.execute(RETRY, (record_id,))
    return Verdict(record_id, "retried")


def _discard(connection: sqlite3.Connection, record_id: int, *, pending_too: bool) -> Verdict:
    row = connection.execute(FIND, (record_id,)).fetchone()
    if row is None:
        return Verdict(record_id, "not_found", "there is no such record")
    record = as_record(row)
    if record.state == "pending" and not pending_too:
        return Verdict(record_id, "refused", "it is pending and will still be delivered; --yes discards it")
    if record.state not in ("pending", "failed", "exported"):
        return Verdict(record_id, "refused", f"it is {record.state}")
    connection.execute(DISCARD, (time.time(), record_id))
    return Verdict(record_id, "discarded")


COUNT_PUBLISHED = "SELECT COALESCE(sum(waiting), 0) FROM batch WHERE published = 1"
OLDEST_PENDING = "SELECT queued_at FROM record WHERE state = 'pending' ORDER BY id LIMIT 1"
LAST_FAILURE = f"""
    SELECT {COLUMNS} FROM record WHERE id = (
        SELECT id FROM record {{}} WHERE state = 'failed' ORDER BY settled_at DESC LIMIT 1
    )
"""  # noqa: S608  # a constant
HELD = """
    SELECT product_name, min(id), held_since, reason FROM record INDEXED BY record_held
    WHERE held_since IS NOT NULL GROUP BY product_name LIMIT ?
"""
DESTINATION_ROW = """
    SELECT origin, account, state, reason, since, next_attempt_at, retry_at, last_delivered_at
    FROM destination WHERE id = 1
"""
PAGE_OF_ALL = f"""
    SELECT {COLUMNS} FROM record WHERE id < :before AND state <> 'staged' ORDER BY id DESC LIMIT :page
"""  # noqa: S608
PAGE_OF_STATE = f"""
    SELECT {COLUMNS} FROM record INDEXED BY record_state
    WHERE state = :state AND id < :before ORDER BY id DESC LIMIT :page
"""  # noqa: S608
SHOW = f"SELECT {COLUMNS}, payload FROM record WHERE id = ? AND state <> 'staged'"  # noqa: S608
FIND = f"SELECT {COLUMNS} FROM record WHERE id = ? AND state <> 'staged'"  # noqa: S608
ATTEMPTS = "SELECT at, outcome, http_status, detail, duration_s FROM attempt WHERE record_id = ? ORDER BY id"
BY_ID = f"SELECT {COLUMNS} FROM record WHERE id IN ({{}})"  # noqa: S608  # a constant
FIRST_PENDING = f"""
    SELECT {COLUMNS} FROM record INDEXED BY record_pending
    WHERE state = 'pending' AND product_name = ? ORDER BY id LIMIT 1
"""  # noqa: S608
FAILED_SINCE = f"""
    SELECT {COLUMNS} FROM record {{}} WHERE settled_at >= ? AND state = 'failed' ORDER BY settled_at LIMIT ?
"""  # noqa: S608
FAILED_IDS = "SELECT id FROM record WHERE state = 'failed' ORDER BY id"
QUEUED_AGAIN = f"""
    SELECT id FROM record WHERE identity = ? AND id > ? AND state IN ({placeholders(list(LIVE_STATES))}) LIMIT 1
"""  # noqa: S608
DELIVERED_AFTER = """
    SELECT id FROM record
    WHERE invoke_id = ? AND product_name = ? AND environment_name IS ? AND kind = ? AND id > ?
        AND state = 'delivered' LIMIT 1
"""
RETRY = """
    UPDATE record SET state = 'pending', retries = retries + 1, settled_at = NULL, held_since = NULL,
        counted = 0, counted_since = NULL, counted_mark = NULL, unanswered = 0, reason = NULL, code = NULL,
        rule = NULL, retry_after = NULL, late = 0, detail = NULL, http_status = NULL
    WHERE id = ?
"""
DISCARD = """
    UPDATE record SET state = 'discarded', held_since = NULL, settled_at = ? WHERE id = ?
"""

#: What `status` says of an outbox that was never made.
EMPTY = Stats(0, dict.fromkeys(STATES, 0), None, None, None, [], Destination(None, None), Health(), None)
