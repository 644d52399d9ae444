"""The outbox as those who queue see it: validate, deduplicate, insert, sync, receipt.

Enqueue and nothing else: delivering is in `ledger`, looking and acting on records in `review`. Knows neither
configuration nor network. Duplicates: an event with an invoke_id repeats a live record of the same kind, run, run
attempt and content; a deployment is compared only with the newest record of its run, product and environment, because
1.2.3 → 1.2.4 → 1.2.3 within a run are transitions.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from versioner_agent import events
from versioner_agent.batches import (
    CHUNK,
    CHUNK_BYTES,
    COUNT_BATCH,
    INSERT_BATCH,
    PUBLISH_BATCH,
    drop_batch,
    hand_over_all,
)
from versioner_agent.errors import OtherDestination, OutboxDamaged, OutboxError, OutboxFull
from versioner_agent.files import FLOOR_BYTES, ROOM_BYTES
from versioner_agent.integrity import digest
from versioner_agent.notices import MOST_EVENTS, Notices, Subject
from versioner_agent.storage import DEFAULT_BUSY_TIMEOUT_S, Store

LIVE_STATES = ("pending", "delivered", "exported")
CLOCK_WARNING = "this host's clock is before the agent's release: events are queued without automatic times"


class Destination(NamedTuple):
    """The API as an outbox knows it: `scheme://host:port` and the account in the key; None = not known."""

    origin: str | None
    account: str | None

    def __str__(self) -> str:
        """Say it in a message."""
        return f"{self.origin or 'any API'} (account {self.account})" if self.account else str(self.origin)

    def differs_from(self, other: Destination) -> bool:
        """Tell whether both name an origin or an account, and another one."""
        pairs = ((self.origin, other.origin), (self.account, other.account))
        return any(ours is not None and theirs is not None and ours != theirs for ours, theirs in pairs)


class Receipt(NamedTuple):
    """What `enqueue` answers: `queued`, or `duplicate` with the record that was there first.

    `warnings` are for the author, a line each: what keeps the event from being delivered, or will (see `notices`).
    """

    outcome: str
    id: int
    event_id: str
    invoke_id: str | None
    kind: str
    product_name: str
    version: str
    environment_name: str | None
    status: str
    warnings: tuple[str, ...] = ()


class _Ready(NamedTuple):
    """An event with all that can be computed before a lock is taken."""

    event: events.Event
    event_id: str
    content: bytes
    identity: bytes | None
    payload: bytes


class Outbox:
    """A local SQLite file of events, safe to use from many processes at once.

    One `Outbox` belongs to the thread that made it. The file is made by the first enqueue.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_timeout: float = DEFAULT_BUSY_TIMEOUT_S,
        queued_by: str | None = None,
    ) -> None:
        """Name the file; *busy_timeout* (seconds) bounds every wait for other writers."""
        self.store = Store(path, busy_timeout)
        self._notices = Notices(self.store)
        self.queued_by = queued_by or f"uid {os.getuid()}"

    def enqueue(
        self,
        kind: str,
        fields: Mapping[str, Any],
        *,
        run_attempt: str | None = None,
        new: bool = False,
        allow_unknown: bool = False,
    ) -> Receipt:
        """Queue one event of *kind* ("build" or "deployment"); it is synced to the disk when this returns.

        *run_attempt* keeps a re-run of the same CI run apart; *new* queues a repeat all the same. Raises
        ValidationError, OutboxBusy, OutboxFull, OutboxError.
        """
        event = events.validate(kind, fields, allow_unknown=allow_unknown)
        return self.enqueue_all([event], run_attempt=run_attempt, new=new)[0]

    def enqueue_all(
        self,
        valid: Iterable[events.Event],
        *,
        run_attempt: str | None = None,
        new: bool = False,
        destination: Destination | None = None,
        event_ids: Sequence[str] | None = None,
    ) -> list[Receipt]:
        """Queue valid events, all or nothing, in their order; receipts in the same order.

        *destination*, where given, must not differ from the outbox's own (OtherDestination). *event_ids*, where given,
        are used instead of new ones: one for each event, UUIDs that no other event has.
        """
        now = time.time()
        listed = list(valid)
        ids = [str(uuid.uuid4()) for _ in listed] if event_ids is None else event_ids
        ready = [self._prepare(event, each, now, run_attempt) for event, each in zip(listed, ids, strict=True)]
        chunks = _chunks(ready)
        if not chunks:
            return []
        context = _Context(now, run_attempt, new, None)
        try:
            receipts = self._queue(chunks, context, destination)
        except OutboxDamaged as found:
            warnings = self._mend(found)
            first, *others = self._queue(chunks, context, destination)
            receipts = [first._replace(warnings=(*first.warnings, *warnings)), *others]
        return self._with_notices(receipts, ready)

    def close(self) -> None:
        """Give the file back; using the outbox again opens it again."""
        self.store.close()

    def __enter__(self) -> Self:
        """Close at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _queue(self, chunks: list[list[_Ready]], context: _Context, destination: Destination | None) -> list[Receipt]:
        if len(chunks) > 1:
            return self._enqueue_staged(chunks, context, destination)
        with self.store.write(create=True) as connection:
            self._check(connection, destination)
            return self._insert(connection, chunks[0], context)

    def _mend(self, found: OutboxDamaged) -> tuple[str, ...]:
        """Go on with what can be saved of a damaged file, unless that would take long; returns what to tell."""
        from versioner_agent import damage, mending  # noqa: PLC0415  # loaded only for damage

        if damage.is_large(self.store):
            raise OutboxError(
                found.message,
                "its size makes saving what is in it take long: run `versioner-agent flush`, or the agent",
            )
        mended = mending.mend(self.store, found)
        return () if mended is None else (f"the outbox was damaged: {mended}",)

    def _with_notices(self, receipts: list[Receipt], ready: list[_Ready]) -> list[Receipt]:
        """Add what the authors should know; the events are safe by now."""
        looked_at = zip(receipts[:MOST_EVENTS], ready, strict=False)
        subjects = [_subject(receipt, each.event) for receipt, each in looked_at]
        subjects += [None] * (len(receipts) - len(subjects))
        return [
            receipt._replace(warnings=(*receipt.warnings, *said)) if said else receipt
            for receipt, said in zip(receipts, self._notices.on(subjects), strict=True)
        ]

    def _prepare(self, event: events.Event, event_id: str, now: float, run_attempt: str | None) -> _Ready:
        from versioner_agent import __version__  # noqa: PLC0415  # the package's name must be complete first

        content = events.content_digest(event)
        stamp = events.Stamp(event_id, now, os.uname().nodename, __version__)
        body = events.payload(event, stamp)
        identity = events.identity(event.kind, event.fields.get("invoke_id"), run_attempt, content)
        return _Ready(event, event_id, content, identity, body)

    def _check(self, connection: sqlite3.Connection, destination: Destination | None) -> None:
        """Refuse what would be delivered to the wrong place, or take the space that deliveries need."""
        if destination is not None:
            bound = Destination(*self.store.only(connection.execute(SELECT_DESTINATION)))
            if destination.differs_from(bound):
                raise OtherDestination(
                    f"this outbox delivers to {bound}, the event is meant for {destination}",
                    "use another outbox (--db) for it, or `flush --new-destination` to move this one",
                )
        check_space(self.store, connection)

    def _enqueue_staged(
        self, chunks: list[list[_Ready]], context: _Context, destination: Destination | None
    ) -> list[Receipt]:
        """Queue more than one transaction may hold: stage in steps, publish with one update, then hand over.

        Until the update nobody sees any of them; from then on the flusher completes the handing over if we die.
        """
        receipts: list[Receipt] = []
        with self.store.write(create=True) as connection:
            self._check(connection, destination)
            batch = connection.execute(INSERT_BATCH, ("enqueue", context.now)).lastrowid
        context = context._replace(batch=batch)
        try:
            for chunk in chunks:
                with self.store.write() as connection:
                    self._check(connection, None)
                    receipts += self._insert(connection, chunk, context)
            with self.store.write() as connection:
                queued = sum(receipt.outcome == "queued" for receipt in receipts)
                connection.execute(COUNT_BATCH, (queued, batch))
                if connection.execute(PUBLISH_BATCH, (batch,)).rowcount != 1:
                    raise OutboxError("the batch was swept while it was being written; nothing was queued")
        except BaseException:
            drop_batch(self.store, batch)
            raise
        hand_over_all(self.store)
        return receipts

    def _insert(self, connection: sqlite3.Connection, chunk: list[_Ready], context: _Context) -> list[Receipt]:
        # Ids are given by us, not by SQLite, because the digest covers them.
        next_id = connection.execute(SELECT_NEXT_ID).fetchone()[0]
        receipts = []
        for ready in chunk:
            duplicate, occurrence = _look_up(connection, ready, context)
            if duplicate is not None:
                receipts.append(_receipt("duplicate", duplicate[0], duplicate[1], ready.event, context))
                continue
            connection.execute(INSERT_RECORD, self._row(next_id, ready, occurrence, context))
            receipts.append(_receipt("queued", next_id, ready.event_id, ready.event, context))
            next_id += 1
        return receipts

    def _row(self, record_id: int, ready: _Ready, occurrence: int, context: _Context) -> tuple[Any, ...]:
        kind, fields = ready.event
        names = (fields["product_name"], fields["version"], fields.get("environment_name"), fields["status"])
        run = (fields.get("invoke_id"), context.run_attempt)
        signed = digest(record_id, ready.event_id, kind, names, run, occurrence, context.now, None, ready.payload)
        state = "pending" if context.batch is None else "staged"
        return (
            record_id, ready.event_id, state, kind, *names, *run, ready.content, ready.identity, occurrence,
            context.now, self.queued_by, context.batch, signed, ready.payload,
        )  # fmt: skip


def check_space(store: Store, connection: sqlite3.Connection) -> None:
    """Accept nothing whose delivery there would be no room to record, should others fill the disk by then.

    Raises OutboxFull.
    """
    free = store.free_space()
    is_reserved = store.has_reserve(connection)
    if is_reserved and free >= FLOOR_BYTES:
        return
    from versioner_agent import reserve  # noqa: PLC0415  # only on a full disk

    if not reserve.has_room_inside(store, FLOOR_BYTES):
        needed = FLOOR_BYTES if is_reserved else ROOM_BYTES
        raise OutboxFull(
            f"no space left for the outbox {store.path}: {free // 1024} KiB are free there, and below "
            f"{needed // 1024} KiB nothing new is queued",
            "free some space on its disk, then try again; what is queued is kept, and delivered all the same",
        )


def _chunks(ready: list[_Ready]) -> list[list[_Ready]]:
    """Split what is too much for one transaction."""
    chunks: list[list[_Ready]] = []
    size = 0
    for each in ready:
        size += len(each.payload)
        if not chunks or len(chunks[-1]) == CHUNK or size > CHUNK_BYTES:
            chunks.append([])
            size = len(each.payload)
        chunks[-1].append(each)
    return chunks


class _Context(NamedTuple):
    """What all events of one call share."""

    now: float
    run_attempt: str | None
    new: bool
    batch: int | None


SELECT_DESTINATION = "SELECT origin, account FROM destination WHERE id = 1"
# Behind every id ever given, pruned ones too, and behind those that are there whatever became of the counter.
# A counter far ahead of them is damaged.
SELECT_NEXT_ID = """
    SELECT 1 + last + CASE WHEN seq - last BETWEEN 0 AND 10000000 THEN seq - last ELSE 0 END FROM (
        SELECT COALESCE((SELECT max(id) FROM record), 0) AS last,
            COALESCE((SELECT CAST(seq AS INTEGER) FROM sqlite_sequence WHERE name = 'record'), 0) AS seq
    )
"""
INSERT_RECORD = """
    INSERT INTO record (
        id, event_id, state, kind, product_name, version, environment_name, status, invoke_id, run_attempt,
        content, identity, occurrence, queued_at, queued_by, batch, digest, payload
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""

# A staged record is there for its own batch, and for everybody once the batch is published.
_VISIBLE = "(state <> 'staged' OR batch = :batch OR batch IN (SELECT id FROM batch WHERE published = 1))"
FIND_SAME = f"""
    SELECT id, event_id, identity, occurrence, state, {_VISIBLE} FROM record
    WHERE identity = :identity ORDER BY occurrence
"""  # noqa: S608  # a constant
FIND_NEWEST_OF_RUN = f"""
    SELECT id, event_id, identity, occurrence, state FROM record
    WHERE invoke_id = :invoke_id AND product_name = :product_name AND environment_name = :environment_name
        AND kind = 'deployment' AND origin IS NULL AND {_VISIBLE}
    ORDER BY id DESC LIMIT 1
"""  # noqa: S608


def _look_up(connection: sqlite3.Connection, ready: _Ready, context: _Context) -> tuple[tuple[int, str] | None, int]:
    """Return (id and event_id of the record it repeats or None, the occurrence to insert with)."""
    if ready.identity is None:
        return None, 0
    named = {"identity": ready.identity, "batch": context.batch}
    same = connection.execute(FIND_SAME, named).fetchall()
    if not same:
        return None, 0
    occurrence = same[-1][3] + 1
    if context.new:
        return None, occurrence
    live = [row for row in same if row[5] and (row[4] in LIVE_STATES or row[4] == "staged")]
    if ready.event.kind == "deployment":
        fields = ready.event.fields
        named |= {name: fields[name] for name in ("invoke_id", "product_name", "environment_name")}
        newest = connection.execute(FIND_NEWEST_OF_RUN, named).fetchone()
        live = [row for row in live if newest is not None and row[0] == newest[0]]
    return ((live[0][0], live[0][1]), occurrence) if live else (None, occurrence)


def _subject(receipt: Receipt, event: events.Event) -> Subject | None:
    """Return what notices are looked up by, None for a duplicate."""
    if receipt.outcome != "queued":
        return None
    return Subject(receipt.id, receipt.product_name, receipt.version, event.fields.get("scm_sha"))


def _receipt(outcome: str, record_id: int, event_id: str, event: events.Event, context: _Context) -> Receipt:
    fields = event.fields
    has_no_time = not events.clock_is_plausible(context.now) and events.automatic_times(event)
    return Receipt(
        outcome,
        record_id,
        event_id,
        fields.get("invoke_id"),
        event.kind,
        fields["product_name"],
        fields["version"],
        fields.get("environment_name"),
        fields["status"],
        (CLOCK_WARNING,) if has_no_time else (),
    )
