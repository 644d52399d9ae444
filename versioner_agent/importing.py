"""Importing export files: the events of other outboxes are queued here, verdicts on ours are applied.

All events of one call are queued or none: they are staged in steps and published by one update, as a large enqueue is.
An imported record is known by the outbox it comes from and its event_id, never by the local dedup identity, and what
is pruned by its batch, so that importing twice adds nothing. One import runs at a time: what it finds staged and
unpublished was left by a dead one.
"""

from __future__ import annotations

import heapq
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from versioner_agent import exports, migration, receipts
from versioner_agent.batches import (
    CHUNK,
    CHUNK_BYTES,
    COUNT_BATCH,
    INSERT_BATCH,
    PUBLISH_BATCH,
    SELECT_UNPUBLISHED,
    drop_batch,
    hand_over_all,
    keep_pages,
)
from versioner_agent.errors import OutboxBusy, OutboxError, UsageError
from versioner_agent.exportfile import Header
from versioner_agent.files import changed_at
from versioner_agent.importfile import ExportFile
from versioner_agent.importlines import Exported
from versioner_agent.integrity import digest
from versioner_agent.locks import IMPORT_SUFFIX, FlusherLock, WriteQueue
from versioner_agent.opening import lock_errors
from versioner_agent.outbox import SELECT_NEXT_ID, check_space
from versioner_agent.receipts import Applied
from versioner_agent.records import Record
from versioner_agent.schema import EXPORTS_SINCE
from versioner_agent.stepping import StepSize
from versioner_agent.storage import OutboxMissing, Store

KIND = "import"  # of the batches made here
PATIENCE_S = 600.0  # for another import, as long as the outbox changes


class Queued(NamedTuple):
    """What became of a file's events."""

    queued: int
    present: int  # were here already, in whatever state


class Result(NamedTuple):
    """A file, and what was done with it."""

    file: ExportFile
    done: Queued | Applied


class Listener(NamedTuple):
    """Who is told of what happens meanwhile."""

    on_warning: Callable[[str], None] = lambda _: None
    on_failed: Callable[[Record], None] = lambda _: None


def import_all(store: Store, files: Sequence[ExportFile], listener: Listener) -> list[Result]:
    """Import files that were checked, of any content, in one go; returns a result for each, in their order.

    Raises UsageError for files that are not for this outbox (then nothing was done), Changed, OutboxFull, OutboxBusy,
    OutboxError. Verdicts are applied in steps: what was applied before an error stays, and importing again goes on.
    """
    events = [file for file in files if file.checked.header.content == "events"]
    verdicts = [file for file in files if file.checked.header.content != "events"]
    _open(store, create=bool(events))
    with _alone(store):
        _upgrade(store, listener)
        _drop_left_behind(store)
        ours = exports.outbox_uid(store) or ""
        _refuse_own(events, ours)
        for file in verdicts:
            receipts.refuse_others(store, file, ours)
        if verdicts:
            exports.turn_all(store)  # a batch that is still being marked: its records wait for these verdicts too
        done: dict[int, Queued | Applied] = {}
        if events:
            _warn_of_gaps(store, events, listener)
            queued = _queue(store, events, ours)
            done |= {id(file): each for file, each in zip(events, queued, strict=True)}
        for file in verdicts:
            done[id(file)] = receipts.apply(store, file, ours, listener.on_failed)
    return [Result(file, done[id(file)]) for file in files]


def _open(store: Store, *, create: bool) -> None:
    """Look at the outbox before anything is put beside it; make it if it is missing and *create*."""
    try:
        with store.read():
            pass
    except OutboxMissing as exc:
        if not create:
            raise UsageError(
                f"there is no outbox at {store.path} that these verdicts could be about",
                "import them on the host that exported the events, or name its outbox with --db",
            ) from exc
        with store.write(create=True):
            pass


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Keep other imports out for the block; raises OutboxBusy."""
    lock = WriteQueue(store.path + IMPORT_SUFFIX)
    try:
        with store.translated():
            is_ours = lock.acquire(store.busy_timeout, most=PATIENCE_S, progress=partial(changed_at, store.path))
        if not is_ours:
            raise OutboxBusy(f"another import into the outbox {store.path} is under way", "try again when it is over")
        yield
    finally:
        lock.close()


def _upgrade(store: Store, listener: Listener) -> None:
    """Bring an outbox without the tables for this to our schema, unless an agent has to; raises OutboxError."""
    with store.read():
        pass  # reads the version
    if store.version >= EXPORTS_SINCE:
        return
    lock = FlusherLock(store.path)
    try:
        with lock_errors(lock):
            is_ours = not lock.presence().has_agent and lock.claim_delivery()
        if not is_ours:
            raise OutboxError(
                f"the outbox {store.path} is of an older versioner-agent, and somebody delivers from it "
                f"(pid {lock.presence().pid or 'unknown'})",
                "restart its agent, which upgrades it, then import again",
            )
        kept = migration.migrate(store)
    finally:
        lock.close()
    if kept is not None:
        listener.on_warning(f"the outbox was upgraded; the old one is kept as {kept}")


def _drop_left_behind(store: Store) -> None:
    """Remove what killed imports have staged: it would be taken for events that are here already."""
    with store.read() as connection:
        found = connection.execute(FIND_UNPUBLISHED, (KIND,)).fetchall()
    for (batch,) in found:
        drop_batch(store, batch)
    with store.read() as connection:
        if connection.execute(FIND_UNPUBLISHED, (KIND,)).fetchone() is not None:
            raise OutboxError(
                "what an import that was killed left behind can't be removed; nothing was imported",
                "free some space, then try again",
            )


def _refuse_own(files: Sequence[ExportFile], ours: str) -> None:
    for file in files:
        if file.checked.header.outbox == ours:
            raise UsageError(
                f"the events in {file.name} were exported from this very outbox; nothing was imported",
                "import them on another host; `versioner-agent retry` makes them pending here again",
            )


def _warn_of_gaps(store: Store, files: Sequence[ExportFile], listener: Listener) -> None:
    """Tell of batches that should have come first: order is kept for what is here."""
    given = {file.checked.header.batch for file in files}
    for file in files:
        _, _, host, batch, _, previous, *_ = header = file.checked.header
        if previous is None or previous in given or _has_arrived(store, header):
            continue
        listener.on_warning(
            f"batch {short(previous)} of {host}, which comes before batch {short(batch)}, has not arrived here: "
            "its events will be delivered after these, also those of the same products; "
            f"`versioner-agent export --again {short(previous)} FILE` on {host} writes it again"
        )


def _has_arrived(store: Store, header: Header) -> bool:
    with store.read() as connection:
        return connection.execute(FIND_ARRIVAL, (header.previous,)).fetchone() is not None


def short(uid: str) -> str:
    """Return what people are shown of a batch's uid."""
    return uid[:8]


class _Staging:
    """The events of some files, on their way into one batch."""

    def __init__(self, store: Store, files: Sequence[ExportFile], ours: str) -> None:
        self._store = store
        self._files = files
        self._ours = ours
        self._size = StepSize()
        self._first_id: int | None = None
        self.queued = [0] * len(files)
        self.present = [0] * len(files)
        with store.write(create=True) as connection:
            keep_pages(connection)
            check_space(store, connection)
            self.batch = connection.execute(INSERT_BATCH, (KIND, time.time())).lastrowid
            self._have_arrived = [_was_whole(connection, file) for file in files]

    def stage(self, chunk: list[tuple[int, Exported]]) -> None:
        """Add events, each with the number of its file; what is here already is counted."""
        start = 0
        while start < len(chunk):
            start += self._step(chunk[start : start + self._size.value])

    def _step(self, events: list[tuple[int, Exported]]) -> int:
        """Add as many of *events* as one transaction has time for; returns how many."""
        done = 0
        with self._store.write() as connection:
            self._size.start()
            check_space(self._store, connection)
            self._check_whole(connection)
            connection.execute(TOUCH_BATCH, (time.time(), self.batch))
            next_id = connection.execute(SELECT_NEXT_ID).fetchone()[0]
            for number, event in events:
                if done and self._size.is_over:
                    break
                next_id += self._add(connection, next_id, number, event)
                done += 1
        self._size.end(done)
        return done

    def _add(self, connection: sqlite3.Connection, record_id: int, number: int, event: Exported) -> bool:
        """Stage *event* of a file as *record_id*, and tell whether it was not here before."""
        if self._have_arrived[number] or self._is_present(connection, event):
            connection.execute(UNTELL, (event.origin, event.event_id))
            self.present[number] += 1
            return False
        connection.execute(INSERT_IMPORTED, _row(record_id, event, self.batch))
        self.queued[number] += 1
        if self._first_id is None:
            self._first_id = record_id
        return True

    def publish(self) -> None:
        """Queue all that is staged, and remember the batches it came in."""
        with self._store.write() as connection:
            self._check_whole(connection)
            now = time.time()
            for file in self._files:
                header, records, _ = file.checked
                connection.execute(
                    INSERT_ARRIVAL,
                    (header.batch, header.outbox, header.host, header.sequence, header.created_at, now, records),
                )
            connection.execute(COUNT_BATCH, (sum(self.queued), self.batch))
            connection.execute(PUBLISH_BATCH, (self.batch,))

    def _is_present(self, connection: sqlite3.Connection, event: Exported) -> bool:
        # What was queued here has come back through another outbox.
        return event.origin == self._ours or receipts.was_imported(connection, event)

    def _check_whole(self, connection: sqlite3.Connection) -> None:
        """Raise OutboxError if somebody has begun to remove what is staged, the first record first (see `batches`)."""
        is_there = connection.execute(SELECT_UNPUBLISHED, (self.batch,)).fetchone() is not None
        first = connection.execute(FIND_FIRST_STAGED, (self.batch,)).fetchone()
        if not is_there or (first[0] if first else None) != self._first_id:
            raise OutboxError("the batch was swept while it was being written; nothing was imported", "import again")


def _queue(store: Store, files: Sequence[ExportFile], ours: str) -> list[Queued]:
    staging = _Staging(store, files, ours)
    try:
        for chunk in _chunks(_merged(files)):
            staging.stage(chunk)
        staging.publish()
    except BaseException:
        drop_batch(store, staging.batch)
        raise
    hand_over_all(store)
    return [Queued(*counts) for counts in zip(staging.queued, staging.present, strict=True)]


def _merged(files: Sequence[ExportFile]) -> Iterator[tuple[int, Exported]]:
    """Yield the events of all files with the numbers of these, by time; those of one outbox in its own order.

    The outboxes' heads are compared, so that a clock that jumped back delays what stands behind it, and turns nothing
    round. A batch that was written again has fewer records than at first: it comes behind, where all are present.
    """
    chains: dict[str, list[int]] = {}
    for number, file in enumerate(files):
        chains.setdefault(file.checked.header.outbox, []).append(number)

    def chain(numbers: list[int]) -> Iterator[tuple[int, Exported]]:
        for number in sorted(numbers, key=lambda n: (files[n].checked.header.sequence, -files[n].checked.records)):
            for line in files[number].again():
                assert isinstance(line, Exported)  # the header said so
                yield number, line

    return heapq.merge(*map(chain, chains.values()), key=lambda each: each[1].queued_at)


def _chunks(events: Iterator[tuple[int, Exported]]) -> Iterator[list[tuple[int, Exported]]]:
    """Split them into what one transaction takes."""
    chunk: list[tuple[int, Exported]] = []
    size = 0
    for each in events:
        size += len(each[1].payload)
        if len(chunk) == CHUNK or (chunk and size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], len(each[1].payload)
        chunk.append(each)
    if chunk:
        yield chunk


def _row(record_id: int, event: Exported, batch: int | None) -> tuple[Any, ...]:
    names = (event.product_name, event.version, event.environment_name, event.status)
    run = (event.invoke_id, event.run_attempt)
    signed = digest(
        record_id, event.event_id, event.kind, names, run, 0, event.queued_at, event.origin, event.payload
    )  # fmt: skip
    return (
        record_id, event.event_id, event.kind, *names, *run, event.content, event.queued_at, event.queued_by, batch,
        event.origin, signed, event.payload,
    )  # fmt: skip


def _was_whole(connection: sqlite3.Connection, file: ExportFile) -> bool:
    """Tell whether all of *file* was here before: some of it may be pruned by now, and must not be sent again."""
    header, records, _ = file.checked
    return connection.execute(FIND_WHOLE, (header.batch, header.outbox, records)).fetchone() is not None


FIND_UNPUBLISHED = "SELECT id FROM batch WHERE kind = ? AND published = 0 AND waiting = 0"
FIND_ARRIVAL = "SELECT 1 FROM arrival WHERE uid = ?"
# A batch that is written again has fewer records than at first, never others.
FIND_WHOLE = "SELECT 1 FROM arrival WHERE uid = ? AND origin = ? AND records >= ?"
# Who sweeps batches goes by their age.
TOUCH_BATCH = "UPDATE batch SET created_at = ? WHERE id = ?"
# Whoever sends it again waits for a verdict: it is kept until it was told anew.
UNTELL = """
    DELETE FROM told WHERE record_id = (
        SELECT id FROM record INDEXED BY record_origin WHERE origin = ? AND event_id = ?
    )
"""
FIND_FIRST_STAGED = "SELECT id FROM record WHERE batch = ? AND state = 'staged' ORDER BY id LIMIT 1"
INSERT_IMPORTED = """
    INSERT INTO record (
        id, event_id, state, kind, product_name, version, environment_name, status, invoke_id, run_attempt,
        content, queued_at, queued_by, batch, origin, digest, payload
    ) VALUES (?, ?, 'staged', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
INSERT_ARRIVAL = """
    INSERT INTO arrival (uid, origin, host, sequence, created_at, imported_at, records)
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (uid) DO UPDATE SET records = max(records, excluded.records)
"""
