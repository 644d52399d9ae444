"""The outbox as people see it: show, stats, retry, discard (`selecting` lists).

What is read is fetched before it is shown. A reader blocks every commit in a rollback-journal database, so no read here
lasts longer than a page takes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from versioner_agent import exports
from versioner_agent.atonce import at_once
from versioner_agent.birthplace import is_elsewhere
from versioner_agent.damage import Damage, noted
from versioner_agent.exports import Overview
from versioner_agent.ledger import Health, as_health
from versioner_agent.outbox import LIVE_STATES, Destination
from versioner_agent.records import COLUMNS, Record, as_record, is_intact, number, text
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
    exports: Overview = Overview([], 0)
    other_machine: bool = False  # it was made on another one


class Verdict(NamedTuple):
    """What became of one id given to `retry` or `discard`."""

    id: int
    outcome: str  # retried | discarded | superseded | out_of_order | not_found | refused
    detail: str = ""


def stats(store: Store) -> Stats:
    """Return the outbox at a glance; a handful of index look-ups, whatever its size."""
    with at_once(store) as connection:
        return stats_of(store, connection)


def stats_of(store: Store, connection: sqlite3.Connection) -> Stats:
    """Do the same through *connection*, which is `at_once`."""
    size = connection.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()[0]
    tally = dict(connection.execute("SELECT state, n FROM tally").fetchall())
    if not all(isinstance(tally.get(state), int) for state in STATES):
        raise store.suspected("the counts of records by state are not readable")
    published = connection.execute(COUNT_PUBLISHED).fetchone()[0]
    oldest = connection.execute(OLDEST_PENDING).fetchone()
    failure = connection.execute(LAST_FAILURE.format(_latest(store)), (1,)).fetchone()
    held = connection.execute(HELD, (HELD_SHOWN,)).fetchall()
    row = store.only(connection.execute(DESTINATION_ROW))
    damage = noted(connection)
    other_machine = is_elsewhere(store, connection)
    marking = exports.marking(store, connection)
    overview = exports.overview(connection) if exports.has_tables(store) else Overview([], 0)
    tally["pending"] = max(0, tally["pending"] + published - marking)
    tally["exported"] += marking
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
        overview,
        other_machine,
    )


def show(store: Store, record_id: int) -> tuple[Record, bytes, list[Attempt]] | None:
    """Return a record, its payload and its attempts, the oldest first; None when there is no such record."""
    with store.read() as connection:
        row = connection.execute(SHOW, (record_id,)).fetchone()
        attempts = connection.execute(ATTEMPTS, (record_id,)).fetchall()
    if row is None:
        return None
    payload = row[-1] if isinstance(row[-1], bytes) else str(row[-1]).encode()
    return as_record(row[:-1]), payload, [_attempt(each) for each in attempts]


def host_of(store: Store, record: Record) -> str | None:
    """Return the name of the host that *record* was imported from, None where that is not known."""
    with store.read() as connection:
        if record.origin is None or store.version < EXPORTS_SINCE:
            return None
        row = connection.execute(HOST_OF, (record.origin,)).fetchone()
    return text(row[0]) if row else None


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
    """Return records that failed since *then* (seconds since 1970), of the latest page of them."""
    with store.read() as connection:
        rows = connection.execute(FAILED_SINCE.format(_latest(store)), (PAGE, then)).fetchall()
    return [as_record(row) for row in rows]


def _latest(store: Store) -> str:
    """Return the query for the ids of the latest failures: by their order, where the outbox has it by now."""
    return LATEST if store.version >= EXPORTS_SINCE else LATEST_BY_TIME


def retry(store: Store, ids: list[int], *, out_of_order: bool = False) -> list[Verdict]:
    """Make failed and exported records pending again, each in its own transaction and as a new request.

    Skipped: what was queued again since (`superseded`), and what a delivered successor has overtaken
    (`out_of_order`), unless *out_of_order*.
    """
    verdicts = []
    for record_id in ids:
        with store.write() as connection:
            verdicts.append(retry_one(connection, record_id, out_of_order=out_of_order))
    return verdicts


def discard(store: Store, ids: list[int], *, pending_too: bool = False) -> list[Verdict]:
    """Discard failed and exported records, and pending ones if *pending_too*; they stay visible."""
    verdicts = []
    for record_id in ids:
        with store.write() as connection:
            verdicts.append(discard_one(connection, record_id, pending_too=pending_too))
    return verdicts


def find(connection: sqlite3.Connection, ids: Sequence[int]) -> list[Record]:
    """Return those of a few records that there are, in the order of their ids."""
    rows = connection.execute(FIND.format(placeholders(list(ids))), tuple(ids)).fetchall()
    return [as_record(row) for row in rows]


def retry_one(connection: sqlite3.Connection, record_id: int, *, out_of_order: bool) -> Verdict:
    """Make one record pending again, inside a transaction of the caller's."""
    found = find(connection, [record_id])
    if not found:
        return Verdict(record_id, "not_found", "there is no such record")
    against = retry_objection(connection, found[0], out_of_order=out_of_order)
    if against is None:
        connection.execute(RETRY, (record_id,))
    return against or Verdict(record_id, "retried", EXPORTED_TOO if found[0].state == "exported" else "")


def retry_objection(connection: sqlite3.Connection, record: Record, *, out_of_order: bool) -> Verdict | None:
    """Return why *record* is not to be retried, None where nothing stands against it."""
    if record.state not in ("failed", "exported"):
        return Verdict(record.id, "refused", f"it is {record.state}; only failed and exported ones are retried")
    if record.reason == "damaged" and not _is_intact(connection, record):  # it may have been damaged elsewhere
        return Verdict(record.id, "refused", "its content is damaged and will not be sent; queue the event again")
    if record.identity is not None:
        again = connection.execute(QUEUED_AGAIN, (record.identity, record.id, *LIVE_STATES)).fetchone()
        if again:
            return Verdict(record.id, "superseded", f"the same event was queued again as {again[0]}")
    after = None if out_of_order else overtaken_by(connection, record)
    if after is not None:
        words = f"{after} of the same run was delivered since; --out-of-order sends it"
        return Verdict(record.id, "out_of_order", words)
    return None


def _is_intact(connection: sqlite3.Connection, record: Record) -> bool:
    row = connection.execute(PAYLOAD, (record.id,)).fetchone()
    return isinstance(row[0], bytes) and is_intact(record, row[0])


def overtaken_by(connection: sqlite3.Connection, record: Record) -> int | None:
    """Return a later record of the run, product and environment of *record* that was delivered; None without one."""
    return _of_its_run(connection, record, "delivered")


def waiting_after(connection: sqlite3.Connection, record: Record) -> int | None:
    """Return a later record of the run, product and environment of *record* that is pending; None without one."""
    return _of_its_run(connection, record, "pending")


def _of_its_run(connection: sqlite3.Connection, record: Record, state: str) -> int | None:
    if record.invoke_id is None:
        return None
    named = (record.invoke_id, record.product_name, record.environment_name, record.kind, record.id, state)
    row = connection.execute(LATER_OF_RUN, named).fetchone()
    return int(row[0]) if row else None


def discard_one(connection: sqlite3.Connection, record_id: int, *, pending_too: bool) -> Verdict:
    """Discard one record, inside a transaction of the caller's."""
    found = find(connection, [record_id])
    if not found:
        return Verdict(record_id, "not_found", "there is no such record")
    against = discard_objection(found[0], pending_too=pending_too)
    if against is None:
        connection.execute(DISCARD, (time.time(), record_id))
    return against or Verdict(record_id, "discarded", sent_still(found[0]))


def sent_still(record: Record) -> str:
    """Say who may send *record* though it is given up here; empty where nobody does."""
    if record.state == "exported":
        return EXPORTED_STILL
    return CLAIMED_STILL if record.state == "pending" and (record.batch or 0) < 0 else ""


def discard_objection(record: Record, *, pending_too: bool) -> Verdict | None:
    """Return why *record* is not to be discarded, None where nothing stands against it."""
    if record.state == "pending" and not pending_too:
        return Verdict(record.id, "refused", "it is pending and will still be delivered; --yes discards it")
    if record.state not in ("pending", "failed", "exported"):
        return Verdict(record.id, "refused", f"it is {record.state}")
    return None


def amended_by(store: Store, record_id: int) -> int | None:
    """Return the corrected copy of a record; None without one, or where an outbox of old schema can't tell."""
    with store.read() as connection:
        if store.version < EXPORTS_SINCE:
            return None
        row = connection.execute(AMENDED_BY, (record_id,)).fetchone()
    return int(row[0]) if row else None


EXPORTED_TOO = "whoever imports the file it was exported to sends it too"
EXPORTED_STILL = "whoever imports the file it was exported to sends it all the same"
CLAIMED_STILL = "an export that is under way, or was never marked, has it: whoever imports that sends it all the same"
COUNT_PUBLISHED = "SELECT COALESCE(sum(waiting), 0) FROM batch WHERE published = 1"
OLDEST_PENDING = "SELECT queued_at FROM record WHERE state = 'pending' ORDER BY id LIMIT 1"
LATEST = "SELECT record_id FROM failure ORDER BY seq DESC LIMIT ?"
LATEST_BY_TIME = "SELECT id FROM record WHERE state = 'failed' ORDER BY settled_at DESC LIMIT ?"
LAST_FAILURE = f"SELECT {COLUMNS} FROM record WHERE id = ({{}}) AND state = 'failed'"  # noqa: S608  # a constant
HELD = """
    SELECT product_name, min(id), held_since, reason FROM record INDEXED BY record_held
    WHERE held_since IS NOT NULL GROUP BY product_name LIMIT ?
"""
DESTINATION_ROW = """
    SELECT origin, account, state, reason, since, next_attempt_at, retry_at, last_delivered_at
    FROM destination WHERE id = 1
"""
SHOW = f"SELECT {COLUMNS}, payload FROM record WHERE id = ? AND state <> 'staged'"  # noqa: S608
HOST_OF = "SELECT host FROM arrival INDEXED BY arrival_origin WHERE origin = ? ORDER BY id DESC LIMIT 1"
PAYLOAD = "SELECT payload FROM record WHERE id = ?"
FIND = f"SELECT {COLUMNS} FROM record WHERE id IN ({{}}) AND state <> 'staged' ORDER BY id"  # noqa: S608
AMENDED_BY = "SELECT id FROM record INDEXED BY record_amends WHERE amends = ? LIMIT 1"
ATTEMPTS = "SELECT at, outcome, http_status, detail, duration_s FROM attempt WHERE record_id = ? ORDER BY id"
BY_ID = f"SELECT {COLUMNS} FROM record WHERE id IN ({{}})"  # noqa: S608  # a constant
FIRST_PENDING = f"""
    SELECT {COLUMNS} FROM record INDEXED BY record_pending
    WHERE state = 'pending' AND product_name = ? ORDER BY id LIMIT 1
"""  # noqa: S608
FAILED_SINCE = f"""
    SELECT {COLUMNS} FROM record WHERE id IN ({{}}) AND settled_at >= ? AND state = 'failed' ORDER BY settled_at
"""  # noqa: S608
QUEUED_AGAIN = f"""
    SELECT id FROM record WHERE identity = ? AND id > ? AND state IN ({placeholders(list(LIVE_STATES))}) LIMIT 1
"""  # noqa: S608
# A corrected copy has the place of the event that was amended first.
LATER_OF_RUN = """
    SELECT id FROM record AS later
    WHERE invoke_id = ?1 AND product_name = ?2 AND environment_name IS ?3 AND kind = ?4 AND id > ?5 AND state = ?6
        AND (amends IS NULL OR ?5 < (
            WITH RECURSIVE amended (id) AS (
                SELECT later.amends
                UNION SELECT record.amends FROM amended JOIN record USING (id) WHERE record.amends IS NOT NULL
            )
            SELECT min(id) FROM amended
        ))
    LIMIT 1
"""
RETRY = """
    UPDATE record SET state = 'pending', batch = CASE WHEN batch > 0 THEN batch END, retries = retries + 1,
        settled_at = NULL, held_since = NULL,
        counted = 0, counted_since = NULL, counted_mark = NULL, unanswered = 0, reason = NULL, code = NULL,
        rule = NULL, retry_after = NULL, late = 0, detail = NULL, http_status = NULL
    WHERE id = ?
"""
DISCARD = """
    UPDATE record SET state = 'discarded', held_since = NULL, settled_at = ? WHERE id = ?
"""

#: What `status` says of an outbox that was never made.
EMPTY = Stats(0, dict.fromkeys(STATES, 0), None, None, None, [], Destination(None, None), Health(), None)
