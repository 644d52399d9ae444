"""The outbox as the flusher sees it: what is next, what was decided, what the destination is like.

A record leaves `pending` only in the transaction that writes its decision; there is no in-flight state to rescue.
Order is the outbox's id within an ordering key. Used only by whoever holds the flusher lock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

from versioner_agent import exports, mending, migration, reserve, settling
from versioner_agent.atonce import at_once
from versioner_agent.batches import CHUNK, FIND_PUBLISHED, drop_staged, hand_over_batch
from versioner_agent.damage import Damage
from versioner_agent.errors import OutboxDamaged, OutboxFull
from versioner_agent.files import RESERVE_BYTES
from versioner_agent.outbox import Destination
from versioner_agent.pruning import Pruner
from versioner_agent.records import COLUMNS, Record, as_record, number, text
from versioner_agent.schema import ALL_STATES
from versioner_agent.settling import Settlement
from versioner_agent.stepping import StepSize
from versioner_agent.storage import Store, placeholders
from versioner_agent.text import bounded

SEEK_STEPS = 500  # keys one read may pass over: about 5 ms
HELD_SEEKS = 20  # reads that looking for one key that is not held may take
BATCH_ABANDONED_S = 3600.0
BRIEF_CHARS = 200  # of the API's words, on a full disk
WORDY_BYTES = RESERVE_BYTES * 3 // 4  # free pages that are needed for words


Done = TypeVar("Done")


class Health(NamedTuple):
    """The destination's state as other processes may see it; times are seconds since 1970."""

    state: str = "unknown"
    reason: str | None = None
    since: float | None = None
    next_attempt_at: float | None = None
    retry_at: float | None = None  # a Retry-After that still runs


def as_health(row: Sequence[Any]) -> Health:
    """Return five columns of the destination as Health, each of its own type whatever a damaged file holds."""
    state, reason, *times = row
    return Health(text(state) or "unknown", text(reason), *(number(time) for time in times))


class Standing(NamedTuple):
    """How things are, in a few numbers."""

    pending: int
    failed: int
    health: Health


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
        self._pruner = Pruner(store)
        self._claiming = StepSize()
        self._turning = StepSize()
        #: Wrapped around what takes long, with its name: somebody may be waiting for a sign of life.
        self.at_length: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()

    def open(self, *, create: bool) -> Damage | None:
        """Mend the outbox if it is damaged, make it if it is missing and *create*; returns what was mended.

        Raises OutboxMissing where there is none and it is not made.
        """
        with self.at_length("looking through the outbox"):
            mended = mending.ensure_sound(self.store, self.mend)
        try:
            if create:
                with self.store.write(create=True):
                    pass
            self.check()
        except OutboxDamaged as found:
            mended = self.mend(found) or mended
        return mended

    def check(self) -> None:
        """Read what is always there, also of a file too large to be looked through; raises OutboxDamaged."""
        self.destination()
        with self.store.read() as connection:
            if connection.execute(READABLE_COUNTS, ALL_STATES).fetchone()[0] != len(ALL_STATES):
                raise self.store.suspected("the counts of records by state are not readable")

    def migrate(self) -> str | None:
        """Bring the outbox to this program's schema; only while holding the flusher lock. See `migration.migrate`."""
        if not migration.is_due(self.store):
            return None
        with self.at_length("upgrading the outbox"):
            return migration.migrate(self.store)

    def mend(self, found: OutboxDamaged) -> Damage | None:
        """Go on with what can be saved of a damaged file; None where somebody else has done it."""
        with self.at_length("mending the outbox"):
            return mending.mend(self.store, found)

    def keys(self, after: str, wanted: int, skip: Container[str]) -> Seek:
        """Find up to *wanted* ordering keys with pending records behind *after*, none of them in *skip*.

        Seeks from key to key, so the cost follows the keys passed over, not the records behind them. A key with
        exported records is passed over: what they became is not known yet.
        """
        keys: list[str] = []
        steps = 0
        with self.store.read() as connection:
            are_held = self._has_exports(connection)
            while steps < SEEK_STEPS:
                steps += 1 + are_held
                row = connection.execute(NEXT_KEY, (after,)).fetchone()
                if row is None:
                    return Seek(keys, "", is_end=True)
                if not isinstance(row[0], str):  # damaged: such keys are sorted behind all others
                    return Seek(keys, "", is_end=True)
                if row[0] <= after:  # it would be walked in circles
                    raise self.store.suspected("the index of pending records is out of order")
                after = row[0]
                if after not in skip and not (are_held and exports.holds(connection, after)):
                    keys.append(after)
                    if len(keys) >= wanted:
                        break
        return Seek(keys, after, is_end=False)

    def holds_all(self) -> bool:
        """Tell whether all that waits is behind exported records; False also where that takes long to find out."""
        with self.store.read() as connection:
            if not self._has_exports(connection):
                return False
        after = ""
        for _ in range(HELD_SEEKS):
            found = self.keys(after, 1, ())
            if found.keys or found.is_end:
                return not found.keys and self.pending() > 0
            after = found.after
        return False

    def hand_over(self) -> bool:
        """Do one step of what others have published or exported and died; False when there is nothing left."""
        return self._step(lambda step: hand_over_batch(self.store, step), CHUNK) or self._sized(
            lambda size: exports.turn(self.store, size), self._turning
        )

    def head(self, key: str) -> tuple[Record, bytes] | None:
        """Return the first pending record of *key* and its payload; None when nothing of it waits, or all is held.

        One snapshot also tells whether a published batch is still being handed over: its records come first. Those of a
        batch that is being marked as exported only look as if they waited.
        """
        while True:
            with at_once(self.store) as connection:
                row = connection.execute(HEAD_OF, (key,)).fetchone()
                is_handing_over = connection.execute(FIND_PUBLISHED).fetchone() is not None
                if exports.has_tables(self.store):
                    is_handing_over = is_handing_over or exports.is_marking(connection)
                    row = None if row and exports.holds(connection, key) else row
            if not is_handing_over:
                return self._checked(key, row) if row else None
            self.hand_over()

    def _has_exports(self, connection: sqlite3.Connection) -> bool:
        return exports.has_tables(self.store) and connection.execute(exports.ANY_EXPORTED).fetchone() is not None

    def _checked(self, key: str, row: tuple[Any, ...]) -> tuple[Record, bytes]:
        """Return what the index named as the head of *key*, if that is what it is: a settled one must not go again."""
        record = as_record(row[:-1])
        if (record.event_id, record.state, record.product_name) != (row[1], "pending", key):
            raise self.store.suspected(f"the index of pending records is wrong about record {record.id}")
        return record, row[-1]

    def pending(self) -> int:
        """Return how many records wait."""
        with at_once(self.store) as connection:
            waiting = self.store.only(connection.execute(COUNT_WAITING))[0]
            marking = exports.marking(self.store, connection)
        return max(0, waiting - marking) if isinstance(waiting, int) else 0

    def standing(self) -> Standing:
        """Return how many records wait and how many failed, and the destination's state."""
        with at_once(self.store) as connection:
            waiting, failed = self.store.only(connection.execute(COUNT_WAITING_AND_FAILED))
            row = self.store.only(connection.execute(SELECT_DESTINATION_ROW))
            marking = exports.marking(self.store, connection)
        return Standing(max(0, int(number(waiting) or 0) - marking), int(number(failed) or 0), as_health(row[2:7]))

    def oldest_pending(self) -> int | None:
        """Return the id of the pending record that was queued first, found by its state.

        One that an exported record holds does not count; None also where many of them come first.
        """
        with self.store.read() as connection:
            if not self._has_exports(connection):
                row = connection.execute(OLDEST_PENDING, (1,)).fetchone()
                return int(row[0]) if row else None
            rows = connection.execute(OLDEST_PENDING, (SEEK_STEPS,)).fetchall()
            held = {key: exports.holds(connection, key) for _, key in rows}
        return next((int(record_id) for record_id, key in rows if not held[key]), None)

    def data_version(self) -> int:
        """Return a number that changes when another connection commits (https://sqlite.org/pragma.html)."""
        with self.store.read() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    def settle(self, settlements: list[Settlement], health: Health, here: Destination) -> list[Settlement]:
        """Write decisions, attempts and the destination's state in one transaction.

        The first verdict of the API binds the outbox to *here*. A record that a person discarded meanwhile keeps that
        state; its attempt is kept all the same. On a full disk the reserve inside the file is given up, and each
        decision is written for itself, with fewer words. Returns those for which there was no room even so.
        """
        if not reserve.is_short(self.store):
            try:
                self._settle(settlements, health, here)
            except OutboxFull:
                reserve.give_up(self.store)
            else:
                return []
        return [settlement for settlement in settlements if not self._settle_briefly(settlement, health, here)]

    def condemn(self, record: Record, detail: str, now: float) -> None:
        """Fail a record that must never be sent."""

        def act(_step: int) -> None:
            with self.store.write() as connection:
                named = {"id": record.id, "digest": record.digest, "detail": detail, "now": now}
                is_done = connection.execute(CONDEMN, named).rowcount > 0
                if not is_done and connection.execute(IS_PENDING, (record.id,)).fetchone():
                    raise self.store.suspected(f"the damaged record {record.id} can't be marked as such")

        self._step(act, 1)

    def destination(self) -> tuple[Destination, Health, int]:
        """Return where the outbox delivers to, how that is, and how many deliveries there were."""
        with self.store.read() as connection:
            row = self.store.only(connection.execute(SELECT_DESTINATION_ROW))
        deliveries = row[7] if isinstance(row[7], int) else 0
        return Destination(text(row[0]), text(row[1])), as_health(row[2:7]), deliveries

    def unbind(self) -> None:
        """Forget the destination: the next verdict binds the outbox anew."""
        with self.store.write() as connection:
            connection.execute(UNBIND)

    def claim(self, export: exports.Export, after: int, wanted: int, now: float) -> exports.Claimed:
        """Claim a step of at most *wanted* pending records behind the id *after* for *export*."""
        return self._sized(lambda size: exports.claim(self.store, export, after, size, wanted, now), self._claiming)

    def with_room(self, act: Callable[[], Done]) -> Done:
        """Do *act*, a small write, on a full disk with the space that is set aside."""
        return self._step(lambda _: act(), 1)

    def mark(self, export: exports.Export, written: exports.Written, waiting: int, file: str | None) -> None:
        """Let *waiting* claimed records count as exported; `hand_over` turns them."""
        self.with_room(lambda: exports.mark(self.store, export, written, waiting, file))

    def sweep_batches(self, now: float) -> None:
        """Remove what was staged and never published; nobody was told that it is queued. Likewise exports."""
        exports.sweep(self.store, now)
        with self.store.read() as connection:
            rows = connection.execute(FIND_ABANDONED, (now - BATCH_ABANDONED_S,)).fetchall()
        for (batch,) in rows:
            while self._step(lambda step, batch=batch: drop_staged(self.store, batch, step), CHUNK):  # type: ignore[misc]
                pass

    def prune(self, before: float) -> int:
        """Remove one small step of what is over since *before*; returns how many records. See `pruning`."""
        return self._pruner.prune(before)

    def prune_exported(self, before: float) -> int:
        """Remove one step of exported records in batches made before *before*; returns how many."""
        return self._pruner.prune_exported(before)

    def _step(self, act: Callable[[int], Done], step: int) -> Done:
        """Do *act* with so many records at once, on a full disk with one, for which its journal has room."""
        try:
            return act(step)
        except OutboxFull:
            reserve.give_up(self.store)
            return act(1)

    def _sized(self, act: Callable[[StepSize], Done], size: StepSize) -> Done:
        """Do *act* in a step of *size*, on a full disk likewise."""

        def step(most: int) -> Done:
            size.value = most
            return act(size)

        return self._step(step, size.value)

    def give_space_back(self) -> bool:
        """Return a step of free pages to the file system; False when there are no more to return."""
        return self._pruner.give_space_back()

    def keep_reserve(self) -> None:
        """Make the space that recording deliveries needs on a full disk, where it is missing and there is room."""
        reserve.keep(self.store)

    def _settle(self, settlements: list[Settlement], health: Health, here: Destination) -> None:
        with self.store.write() as connection:
            for settlement in settlements:
                if settlement.outcome.was_sent:
                    settling.write(connection, settlement)
            _write_destination(connection, settlements, health, here)

    def _settle_briefly(self, settlement: Settlement, health: Health, here: Destination) -> bool:
        # Words make pages split; most of the reserve is for the bare decisions of the rest.
        words = BRIEF_CHARS if self.store.free_pages() > WORDY_BYTES else 0
        reason = health.reason and bounded(health.reason, BRIEF_CHARS)
        try:
            with self.store.write() as connection:
                if settlement.outcome.was_sent:
                    settling.write_briefly(connection, settlement, words)
                _write_destination(connection, [settlement], health._replace(reason=reason), here)
        except OutboxFull:
            return False
        return True


def _write_destination(
    connection: sqlite3.Connection, settlements: list[Settlement], health: Health, here: Destination
) -> None:
    delivered = [s.at for s in settlements if s.decision.state == "delivered"]
    if any(s.outcome.is_verdict for s in settlements):
        connection.execute(BIND, here)
    connection.execute(UPDATE_DESTINATION, (*health, len(delivered), delivered[-1] if delivered else None))


NEXT_KEY = """
    SELECT product_name FROM record INDEXED BY record_pending
    WHERE state = 'pending' AND product_name > ? ORDER BY product_name LIMIT 1
"""
READABLE_COUNTS = f"""
    SELECT count(*) FROM tally WHERE typeof(n) = 'integer' AND state IN ({placeholders(list(ALL_STATES))})
"""  # noqa: S608  # a constant
OLDEST_PENDING = """
    SELECT id, product_name FROM record INDEXED BY record_state WHERE state = 'pending' ORDER BY id LIMIT ?
"""
HEAD_OF = f"""
    SELECT {COLUMNS}, payload FROM record INDEXED BY record_pending
    WHERE state = 'pending' AND product_name = ? ORDER BY id LIMIT 1
"""  # noqa: S608  # a constant
_WAITING = """
    (SELECT n FROM tally WHERE state = 'pending') + (SELECT COALESCE(sum(waiting), 0) FROM batch WHERE published = 1)
"""
COUNT_WAITING = f"SELECT {_WAITING}"
COUNT_WAITING_AND_FAILED = f"SELECT {_WAITING}, (SELECT n FROM tally WHERE state = 'failed')"  # noqa: S608  # a constant
CONDEMN = """
    UPDATE record SET state = 'failed', reason = 'damaged', detail = :detail, settled_at = :now, held_since = NULL
    WHERE id = :id AND state = 'pending' AND digest = :digest
"""
IS_PENDING = "SELECT 1 FROM record WHERE id = ? AND state = 'pending'"
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
# What waits was published, whatever has become of that bit.
FIND_ABANDONED = "SELECT id FROM batch WHERE published = 0 AND waiting = 0 AND created_at < ?"
