"""The outbox as the flusher sees it: what is next, what was decided, what the destination is like.

A record leaves `pending` only in the transaction that writes its decision; there is no in-flight state to rescue.
Order is the outbox's id within an ordering key. Used only by whoever holds the flusher lock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Container
from typing import Any, NamedTuple

from versioner_agent import damage, migration
from versioner_agent.batches import FIND_PUBLISHED, drop_staged, hand_over_batch
from versioner_agent.damage import Damage
from versioner_agent.errors import OutboxDamaged, OutboxFull
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import Outcome
from versioner_agent.policy import Decision
from versioner_agent.records import COLUMNS, Record
from versioner_agent.storage import Store

ATTEMPTS_KEPT = 20
SEEK_STEPS = 500  # keys one read may pass over: about 5 ms
PRUNE_STEP = 200
BATCH_ABANDONED_S = 3600.0
RESERVE_BYTES = 256 * 1024


class Settlement(NamedTuple):
    """One attempt and what was decided about its record."""

    record: Record
    outcome: Outcome
    decision: Decision
    at: float  # when the answer came, seconds since 1970
    duration_s: float

    @property
    def settled(self) -> Record:
        """The record as it is once this is written."""
        return self.record._replace(
            state=self.decision.state,
            reason=self.decision.reason,
            detail=self.decision.detail,
            code=self.outcome.code,
            settled_at=self.at,
        )


class Health(NamedTuple):
    """The destination's state as other processes may see it; times are seconds since 1970."""

    state: str = "unknown"
    reason: str | None = None
    since: float | None = None
    next_attempt_at: float | None = None
    retry_at: float | None = None  # a Retry-After that still runs


class Seek(NamedTuple):
    """Keys found from a key on, the key to go on from, and whether the last key was passed."""

    keys: list[str]
    after: str
    is_end: bool


class Ledger:
    """Choosing and settling over a Store."""

    def __init__(self, store: Store) -> None:
        """Use *store*, which belongs to the calling thread."""
        self.store = store
        store.oldest_version = 1  # older ones are migrated before anything else is done with them

    def open(self, *, create: bool) -> Damage | None:
        """Mend the outbox if it is damaged, make it if it is missing and *create*; returns what was mended."""
        mended = damage.ensure_sound(self.store)
        if create:
            with self.store.write(create=True):
                pass
        return mended

    def migrate(self) -> str | None:
        """Bring the outbox to this program's schema; only while holding the flusher lock. See `migration.migrate`."""
        return migration.migrate(self.store)

    def mend(self, found: OutboxDamaged) -> Damage | None:
        """Go on with what can be saved of a damaged file; None where somebody else has done it."""
        return damage.mend(self.store, found)

    def keys(self, after: str, wanted: int, skip: Container[str]) -> Seek:
        """Find up to *wanted* ordering keys with pending records behind *after*, none of them in *skip*.

        Seeks from key to key, so the cost follows the keys passed over, not the records behind them.
        """
        keys: list[str] = []
        with self.store.read() as connection:
            for _ in range(SEEK_STEPS):
                row = connection.execute(NEXT_KEY, (after,)).fetchone()
                if row is None:
                    return Seek(keys, "", is_end=True)
                if not isinstance(row[0], str) or row[0] <= after:  # it would be walked in circles
                    raise self.store.suspected("the index of pending records is out of order")
                after = row[0]
                if after not in skip:
                    keys.append(after)
                    if len(keys) >= wanted:
                        break
        return Seek(keys, after, is_end=False)

    def hand_over(self) -> bool:
        """Do one step of handing over what a dying enqueue had published; False when there is nothing left."""
        return hand_over_batch(self.store)

    def head(self, key: str) -> tuple[Record, bytes] | None:
        """Return the first pending record of *key* and its payload; None when nothing of it waits.

        One snapshot also tells whether a published batch is still being handed over: its records come first.
        """
        while True:
            with self.store.read() as connection:
                connection.execute("BEGIN")
                try:
                    row = connection.execute(HEAD_OF, (key,)).fetchone()
                    is_handing_over = connection.execute(FIND_PUBLISHED).fetchone() is not None
                finally:
                    connection.execute("COMMIT")
            if not is_handing_over:
                return self._checked(key, row) if row else None
            hand_over_batch(self.store)

    def _checked(self, key: str, row: tuple[Any, ...]) -> tuple[Record, bytes]:
        """Return what the index named as the head of *key*, if that is what it is: a settled one must not go again."""
        record = Record(*row[:-1])
        if record.state != "pending" or record.product_name != key:
            raise self.store.suspected(f"the index of pending records is wrong about record {record.id}")
        return record, row[-1]

    def pending(self) -> int:
        """Return how many records wait."""
        with self.store.read() as connection:
            return int(connection.execute(COUNT_WAITING).fetchone()[0])

    def data_version(self) -> int:
        """Return a number that changes when another connection commits (https://sqlite.org/pragma.html)."""
        with self.store.read() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    def settle(self, settlements: list[Settlement], health: Health, here: Destination) -> None:
        """Write decisions, attempts and the destination's state in one transaction.

        On a full disk the reserve inside the file is given up for it. The first verdict of the API binds the outbox
        to *here*. A record that a person discarded meanwhile keeps that state; its attempt is kept all the same.
        """
        try:
            self._settle(settlements, health, here)
        except OutboxFull:
            with self.store.write() as connection:
                connection.execute("DELETE FROM reserve")
            self._settle(settlements, health, here)

    def condemn(self, record: Record, detail: str, now: float) -> None:
        """Fail a record that must never be sent."""
        with self.store.write() as connection:
            connection.execute(CONDEMN, {"id": record.id, "detail": detail, "now": now})

    def destination(self) -> tuple[Destination, Health, int]:
        """Return where the outbox delivers to, how that is, and how many deliveries there were."""
        with self.store.read() as connection:
            row = connection.execute(SELECT_DESTINATION_ROW).fetchone()
        return Destination(row[0], row[1]), Health(*row[2:7]), row[7]

    def unbind(self) -> None:
        """Forget the destination: the next verdict binds the outbox anew."""
        with self.store.write() as connection:
            connection.execute(UNBIND)

    def sweep_batches(self, now: float) -> None:
        """Remove what was staged and never published; nobody was told that it is queued."""
        with self.store.read() as connection:
            rows = connection.execute(FIND_ABANDONED, (now - BATCH_ABANDONED_S,)).fetchall()
        for (batch,) in rows:
            while drop_staged(self.store, batch):
                pass

    def prune(self, before: float) -> int:
        """Remove one small step of delivered and discarded records settled before *before*; returns how many."""
        with self.store.read() as connection:
            rows = connection.execute(FIND_OLD, (before, PRUNE_STEP)).fetchall()
        if rows:
            with self.store.write() as connection:
                for row in rows:
                    connection.execute(PRUNE, row)
        return len(rows)

    def give_space_back(self) -> None:
        """Return a step of free pages to the file system."""
        with self.store.write() as connection:
            connection.execute("PRAGMA incremental_vacuum(64)").fetchall()

    def keep_reserve(self) -> None:
        """Make the reserve where it is missing and there is room.

        Written twice, so that the journal, which keeps its size, has grown to the same size.
        """
        with self.store.read() as connection:
            found = connection.execute("SELECT 1 FROM reserve").fetchone()
        if found is not None or self.store.free_space() < 8 * RESERVE_BYTES:
            return
        with self.store.write() as connection:
            connection.execute("INSERT INTO reserve (id, filler) VALUES (1, zeroblob(?))", (RESERVE_BYTES,))
        with self.store.write() as connection:
            connection.execute("UPDATE reserve SET filler = randomblob(?)", (RESERVE_BYTES,))

    def _settle(self, settlements: list[Settlement], health: Health, here: Destination) -> None:
        with self.store.write() as connection:
            for settlement in settlements:
                if settlement.outcome.was_sent:
                    _write(connection, settlement)
            delivered = [s.at for s in settlements if s.decision.state == "delivered"]
            if any(s.outcome.is_verdict for s in settlements):
                connection.execute(BIND, here)
            connection.execute(UPDATE_DESTINATION, (*health, len(delivered), delivered[-1] if delivered else None))


def _write(connection: sqlite3.Connection, settlement: Settlement) -> None:
    record, outcome, decision, at, duration_s = settlement
    is_settled = decision.state != "pending"
    named = {
        "id": record.id,
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
    connection.execute(SETTLE, named)
    connection.execute(
        INSERT_ATTEMPT,
        (record.id, at, outcome.reason, outcome.http_status, outcome.detail or None, duration_s),
    )
    if record.attempts >= ATTEMPTS_KEPT:
        connection.execute(TRIM_ATTEMPTS, {"id": record.id, "kept": ATTEMPTS_KEPT})


NEXT_KEY = """
    SELECT product_name FROM record INDEXED BY record_pending
    WHERE state = 'pending' AND product_name > ? ORDER BY product_name LIMIT 1
"""
HEAD_OF = f"""
    SELECT {COLUMNS}, payload FROM record INDEXED BY record_pending
    WHERE state = 'pending' AND product_name = ? ORDER BY id LIMIT 1
"""  # noqa: S608  # a constant
COUNT_WAITING = """
    SELECT (SELECT n FROM tally WHERE state = 'pending')
        + (SELECT COALESCE(sum(waiting), 0) FROM batch WHERE published = 1)
"""
SETTLE = """
    UPDATE record SET
        state = :state, attempts = attempts + 1, unanswered = unanswered + :unanswered,
        counted = :counted, counted_since = :counted_since, counted_mark = :counted_mark,
        held_since = CASE WHEN :held_since IS NULL THEN NULL ELSE COALESCE(held_since, :held_since) END,
        last_attempt_at = :at, settled_at = :settled_at, http_status = :http_status, server_id = :server_id,
        reason = :reason, code = :code, rule = :rule, retry_after = :retry_after, late = :late, detail = :detail
    WHERE id = :id AND state = 'pending'
"""
INSERT_ATTEMPT = """
    INSERT INTO attempt (record_id, at, outcome, http_status, detail, duration_s) VALUES (?, ?, ?, ?, ?, ?)
"""
TRIM_ATTEMPTS = """
    DELETE FROM attempt WHERE record_id = :id AND id <= (
        SELECT id FROM attempt WHERE record_id = :id ORDER BY id DESC LIMIT 1 OFFSET :kept
    )
"""
CONDEMN = """
    UPDATE record SET state = 'failed', reason = 'damaged', detail = :detail, settled_at = :now, held_since = NULL
    WHERE id = :id AND state = 'pending'
"""
SELECT_DESTINATION_ROW = """
    SELECT origin, account, state, reason, since, next_attempt_at, retry_at, deliveries
    FROM destination WHERE id = 1
"""
UPDATE_DESTINATION = """
    UPDATE destination SET state = ?, reason = ?, since = ?, next_attempt_at = ?, retry_at = ?,
        deliveries = deliveries + ?, last_delivered_at = COALESCE(?, last_delivered_at)
    WHERE id = 1
"""
BIND = "UPDATE destination SET origin = COALESCE(origin, ?), account = COALESCE(account, ?) WHERE id = 1"
UNBIND = """
    UPDATE destination SET origin = NULL, account = NULL, state = 'unknown', reason = NULL, since = NULL,
        next_attempt_at = NULL, retry_at = NULL WHERE id = 1
"""
FIND_ABANDONED = "SELECT id FROM batch WHERE published = 0 AND created_at < ?"
FIND_OLD = """
    SELECT id FROM record
    WHERE settled_at < ? AND settled_at IS NOT NULL AND state IN ('delivered', 'discarded')
    ORDER BY settled_at LIMIT ?
"""
PRUNE = "DELETE FROM record WHERE id = ?"
