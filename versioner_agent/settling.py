"""Writing a decision about a record, with the attempt that led to it; on a full disk with fewer words.

Everything here runs inside a transaction of the caller's.
"""

from __future__ import annotations

import sqlite3
from typing import Any, NamedTuple

from versioner_agent.outcomes import Outcome
from versioner_agent.policy import Decision
from versioner_agent.records import Record, digest_of
from versioner_agent.reserve import wiping_less
from versioner_agent.storage import placeholders
from versioner_agent.text import bounded

ATTEMPTS_KEPT = 20
REPACKED = 12  # rows: enough for a page to become empty, few enough for the journal that is there


class Settlement(NamedTuple):
    """One attempt and what was decided about its record."""

    record: Record
    outcome: Outcome
    decision: Decision
    at: float  # when the answer came, seconds since 1970
    duration_s: float
    payload: bytes = b""

    @property
    def settled(self) -> Record:
        """The record as it is once this is written."""
        return self.record._replace(
            state=self.decision.state,
            reason=self.decision.reason,
            detail=self.decision.detail,
            code=self.outcome.code,
            rule=self.outcome.rule,
            retry_after=self.outcome.retry_after,
            late=int(self.decision.is_late),
            http_status=self.outcome.http_status,
            settled_at=self.at,
        )


def write(connection: sqlite3.Connection, settlement: Settlement) -> None:
    """Write the decision and add the attempt to the record's log."""
    record, outcome, _, at, duration_s, _ = settlement
    connection.execute(SETTLE, _named(settlement))
    connection.execute(
        INSERT_ATTEMPT,
        (at, outcome.reason, outcome.http_status, outcome.detail or None, duration_s, record.id, record.event_id),
    )
    if record.attempts >= ATTEMPTS_KEPT:
        connection.execute(TRIM_ATTEMPTS, {"id": record.id, "kept": ATTEMPTS_KEPT})


def write_briefly(connection: sqlite3.Connection, settlement: Settlement, words: int) -> None:
    """Write the decision with at most *words* characters of detail, and no attempt, so that it takes hardly any space.

    What was delivered is let go: the record keeps everything but payload and attempts, under a digest that says so, and
    leaves room for new events. Without words the row does not grow at all: what follows from its payload makes place.
    """
    named = _named(settlement)
    if settlement.decision.state == "delivered":
        with wiping_less(connection):
            connection.execute(SETTLE_AND_LET_GO, {**named, "digest": digest_of(settlement.record, b"")})
        _repack(connection, settlement.record.id)
    elif words:
        connection.execute(SETTLE, {**named, "detail": named["detail"] and bounded(named["detail"], words)})
    else:
        connection.execute(SETTLE_IN_PLACE, {**named, "detail": None, "code": None, "rule": None, "retry_after": None})


def _repack(connection: sqlite3.Connection, record_id: int) -> None:
    """Take rows that were let go, up to *record_id*, out and put them back: SQLite merges pages only on a deletion."""
    cursor = connection.execute(FIND_LET_GO, (record_id, record_id - REPACKED))
    rows = cursor.fetchall()
    names = [column[0] for column in cursor.description]
    connection.executemany("DELETE FROM record WHERE id = ?", [row[:1] for row in rows])
    connection.executemany(
        f"INSERT INTO record ({', '.join(names)}) VALUES ({placeholders(names)})",  # noqa: S608  # our own names
        rows,
    )


def _named(settlement: Settlement) -> dict[str, Any]:
    record, outcome, decision, at, *_ = settlement
    is_settled = decision.state != "pending"
    return {
        "id": record.id,
        # The file may have been replaced meanwhile, and the id be another event's.
        "event_id": record.event_id,
        "state": decision.state,
        "at": at,
        "settled_at": at if is_settled else None,
        "held_since": None if is_settled else at,
        "http_status": outcome.http_status,
        "server_id": outcome.server_id,
        "reason": None if decision.state == "delivered" else decision.reason,
        "code": outcome.code,
        "rule": outcome.rule,
        "retry_after": outcome.retry_after,
        "late": decision.is_late,
        "detail": decision.detail or None,
        "unanswered": not outcome.is_answered,
        **decision.counters._asdict(),
    }


_SETTLE = """
    UPDATE record SET
        state = :state, attempts = attempts + 1, unanswered = unanswered + :unanswered,
        counted = :counted, counted_since = :counted_since, counted_mark = :counted_mark,
        held_since = CASE WHEN :held_since IS NULL THEN NULL ELSE COALESCE(held_since, :held_since) END,
        last_attempt_at = :at, settled_at = :settled_at, http_status = :http_status, server_id = :server_id,
        reason = :reason, code = :code, rule = :rule, retry_after = :retry_after, late = :late, detail = :detail{more}
    WHERE id = :id AND state = 'pending' AND event_id = :event_id
"""
SETTLE = _SETTLE.format(more="")
SETTLE_IN_PLACE = _SETTLE.format(more=", content = x''")
SETTLE_AND_LET_GO = _SETTLE.format(more=", payload = x'', digest = :digest")
FIND_LET_GO = """
    SELECT * FROM record WHERE id <= ? AND id > ? AND state = 'delivered' AND payload = x'' ORDER BY id
"""
INSERT_ATTEMPT = """
    INSERT INTO attempt (record_id, at, outcome, http_status, detail, duration_s)
    SELECT id, ?, ?, ?, ?, ? FROM record WHERE id = ? AND event_id = ?
"""
TRIM_ATTEMPTS = """
    DELETE FROM attempt WHERE record_id = :id AND id <= (
        SELECT id FROM attempt WHERE record_id = :id ORDER BY id DESC LIMIT 1 OFFSET :kept
    )
"""
