"""Receipts: verdicts on imported records, written for the outboxes they come from, and applied there.

What is told is what the records say when they are read, all that are kept, told before or not: sticks get lost. A
verdict applies to a record that is exported, or has failed and was delivered after all, and to nothing else, so that
applying twice changes nothing.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO, NamedTuple

from versioner_agent import __version__, exports
from versioner_agent.batches import CHUNK, CHUNK_BYTES, keep_pages
from versioner_agent.config import Settings
from versioner_agent.errors import UsageError
from versioner_agent.exportfile import Header, Writer, is_compressed, verdict_line
from versioner_agent.importfile import ExportFile
from versioner_agent.importlines import Exported, Verdict, verdict_problem
from versioner_agent.newfile import NewFile, open_old, taken
from versioner_agent.outcomes import MAX_DETAIL_CHARS, MAX_WORDS_CHARS
from versioner_agent.privileges import as_owner_of
from versioner_agent.records import COLUMNS, Record, as_record
from versioner_agent.stepping import StepSize
from versioner_agent.storage import OutboxMissing, Store
from versioner_agent.text import bounded, mask_keys

#: In this order: what failed and is delivered while this is written, is told as delivered last.
TOLD = ("failed", "delivered", "discarded")


class Written(NamedTuple):
    """What a file of receipts holds."""

    records: int
    sha256: str
    batch: str
    final: array[int]  # ids of those that nothing changes any more, 8 bytes each


class Applied(NamedTuple):
    """What became of a file's verdicts, by the state that records came to."""

    delivered: int = 0
    failed: int = 0
    discarded: int = 0
    unchanged: int = 0  # of ours, but settled already, pending again, or pruned
    others: int = 0  # about events of other outboxes


def export(settings: Settings, path: str) -> Written | None:
    """Write all verdicts to the new file *path*, and note that they were told; None where there is nothing to tell.

    The file is made with the caller's rights. Raises UsageError where something lies at *path*, AgentError.
    """
    with closing(Store(settings.db, settings.busy_timeout)) as store:
        fd = open_old(path)
        if fd is not None:
            os.close(fd)
            raise taken(path)
        with NewFile(path) as new:
            with as_owner_of(os.path.dirname(store.path)):
                try:
                    written = write(store, new.file, compressed=is_compressed(new.path))
                except OutboxMissing:
                    return None
                except OSError as exc:
                    raise new.error(exc) from exc
            if not written.records:
                return None
            new.place()
            with as_owner_of(os.path.dirname(store.path)):
                mark_told(store, written)
            return written


def write(store: Store, file: BinaryIO, *, compressed: bool = False) -> Written:
    """Write all verdicts on imported records into *file*, which stays open; syncing it is the caller's.

    `records` is 0 where there is nothing to tell. Raises OSError, OutboxError.
    """
    batch = uuid.uuid4().hex
    ours = exports.outbox_uid(store)
    if ours is None:  # of an older schema: nothing was ever imported
        return Written(0, "", batch, array("q"))
    writer = Writer(file, compressed=compressed)
    writer.line(Header("receipts", ours, os.uname().nodename, batch, 0, None, time.time(), __version__).line())
    final = array("q")
    for record in _settled(store):
        line = verdict_line(record)
        if verdict_problem(line):
            continue  # a damaged row: its reader would refuse the whole file
        writer.line(line)
        if record.state != "failed":
            final.append(record.id)
    summed = writer.finish()
    return Written(summed.lines, summed.sha256, batch, final)


def mark_told(store: Store, written: Written) -> None:
    """Note, in steps, that the verdicts in a file that is safe by now were told: from then on they may be pruned.

    The first time counts, or telling often would keep them for ever. Raises OutboxError.
    """
    now = time.time()
    for start in range(0, len(written.final), CHUNK):
        with store.write() as connection:
            connection.executemany(MARK_TOLD, ((now, each) for each in written.final[start : start + CHUNK]))


def refuse_others(store: Store, file: ExportFile, ours: str) -> None:
    """Raise UsageError for a file without any verdict on events of this outbox, or that came through it."""
    for chunk in _chunks(file):
        if any(verdict.origin == ours for verdict in chunk):
            return
        with store.read() as connection:
            if any(was_imported(connection, verdict) for verdict in chunk):
                return
    if file.checked.records:
        raise UsageError(
            f"none of the verdicts in {file.name} is about events of this outbox; nothing was imported",
            "import them on the host that exported the events, or name its outbox with --db",
        )


def apply(store: Store, file: ExportFile, ours: str, on_failed: Callable[[Record], None]) -> Applied:
    """Apply the verdicts in *file*, in steps; *on_failed* gets each record that has failed by one.

    Raises Changed, OutboxError; what was applied until then stays, and applying the file again goes on.
    """
    counts = dict.fromkeys(Applied._fields, 0)
    size = StepSize()
    for chunk in _chunks(file):
        start = 0
        while start < len(chunk):
            became, failed = _apply_step(store, chunk[start : start + size.value], ours, size)
            start += len(became)
            for state in became:
                counts[state] += 1
            for record in failed:
                on_failed(record)
    return Applied(**counts)


def _apply_step(store: Store, verdicts: list[Verdict], ours: str, size: StepSize) -> tuple[list[str], list[Record]]:
    """Apply as many of *verdicts* as one transaction has time for; returns what counts each, and what has failed."""
    counted: list[str] = []
    failed: list[Record] = []
    with store.write() as connection:
        size.start()
        keep_pages(connection)
        written = 0
        for verdict in verdicts:
            if counted and (written > CHUNK_BYTES or size.is_over):
                break
            became, record, length = _apply(connection, verdict, ours)
            counted.append(became)
            written += length  # a row is written as a whole, its payload too
            if became == "failed" and record is not None:
                failed.append(record)
    size.end(len(counted))
    return counted, failed


def _apply(connection: sqlite3.Connection, verdict: Verdict, ours: str) -> tuple[str, Record | None, int]:
    """Apply one verdict; returns which field of Applied counts it, the record as it is now, and its size (bytes)."""
    origin = None if verdict.origin == ours else verdict.origin
    row = connection.execute(FIND_AWAITING, (verdict.event_id, origin)).fetchone()
    if row is None:
        is_ours = origin is None or was_imported(connection, verdict)
        return ("unchanged" if is_ours else "others"), None, 0
    record = as_record(row[:-1])
    if record.state == "failed" and verdict.state != "delivered":
        return "unchanged", None, 0
    values = _bounded(verdict, record, time.time())
    connection.execute(APPLY, {**values, "id": record.id})
    return verdict.state, record._replace(**values, held_since=None), row[-1]


def _bounded(verdict: Verdict, record: Record, now: float) -> dict[str, Any]:
    """Return the columns that *verdict* sets: texts as long, and keys as masked, as the API's own words are here."""
    found = verdict._asdict()
    del found["origin"], found["event_id"]
    for name in ("server_id", "code", "rule", "retry_after"):
        found[name] = found[name] and mask_keys(bounded(found[name], MAX_WORDS_CHARS))
    found["detail"] = verdict.detail and mask_keys(bounded(verdict.detail, MAX_DETAIL_CHARS))
    at = verdict.settled_at
    # Two hosts' clocks: pruning goes by ours, and must not take it at once for what another one said.
    found["settled_at"] = float(at) if at is not None and record.queued_at <= at <= now else now
    return found


def was_imported(connection: sqlite3.Connection, event: Exported | Verdict) -> bool:
    """Tell whether the *event*, or the one that a verdict is about, was imported here."""
    return connection.execute(FIND_IMPORTED, (event.origin, event.event_id)).fetchone() is not None


def _chunks(file: ExportFile) -> Iterator[list[Verdict]]:
    chunk: list[Verdict] = []
    for line in file.again():
        assert isinstance(line, Verdict)  # the header said so
        chunk.append(line)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _settled(store: Store) -> Iterator[Record]:
    """Yield imported records that have come to their end, in pages; nothing is locked in between."""
    for state in TOLD:
        after = 0
        while True:
            with store.read() as connection:
                rows = connection.execute(PAGE_OF_SETTLED, (state, after, CHUNK)).fetchall()
            if not rows:
                break
            after = rows[-1][0]
            yield from map(as_record, rows)


PAGE_OF_SETTLED = f"""
    SELECT {COLUMNS} FROM record INDEXED BY record_imported
    WHERE origin IS NOT NULL AND state = ? AND id > ? ORDER BY id LIMIT ?
"""  # noqa: S608  # a constant
MARK_TOLD = """
    INSERT OR IGNORE INTO told (record_id, at) SELECT id, ? FROM record WHERE id = ?
"""
FIND_AWAITING = f"""
    SELECT {COLUMNS}, length(payload) FROM record INDEXED BY record_awaiting
    WHERE event_id = ? AND state IN ('exported', 'failed') AND origin IS ?
        AND (batch < 0 OR retries > 0) LIMIT 1
"""  # noqa: S608
FIND_IMPORTED = "SELECT 1 FROM record INDEXED BY record_origin WHERE origin = ? AND event_id = ?"
APPLY = """
    UPDATE record SET
        state = :state, settled_at = :settled_at, attempts = :attempts, http_status = :http_status,
        server_id = :server_id, reason = :reason, code = :code, rule = :rule, retry_after = :retry_after,
        late = :late, detail = :detail, held_since = NULL
    WHERE id = :id
"""
