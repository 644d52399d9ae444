"""`export`: what is pending goes into a file, is claimed as it is written, and marked when the file is safe.

The flusher's lock is borrowed until the file is marked, or what goes to stdout lies in a temporary one, so that nothing
under way is exported. The file is opened, synced and named with the caller's rights, the outbox is used with those of
its owner.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple

from versioner_agent import __version__, exports
from versioner_agent.borrowing import borrowed, owned
from versioner_agent.config import Settings
from versioner_agent.errors import AgentError, LockHeld, OutboxError, UsageError
from versioner_agent.exportfile import FORMAT, MAX_LINE_BYTES, Header, Writer, event_line, is_compressed
from versioner_agent.exports import Export, Written
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.newfile import NewFile, open_old
from versioner_agent.opening import lock_errors, migrate, open_outbox
from versioner_agent.records import Record, is_intact
from versioner_agent.storage import OutboxMissing, Store

#: Of a digest or a batch, so many characters must be given, and are shown.
SHORTEST_NAME = 8
MOST = 2**63 - 1  # records, where no limit is given
IDS_SHOWN = 20
OLD_STEPS = 50  # of old batches that an export removes


class Exported(NamedTuple):
    """A batch that was written; *damaged* records were left out, and are failed."""

    batch: str
    file: str | None  # None for a stream
    records: int
    sha256: str
    first_id: int
    last_id: int
    damaged: tuple[int, ...] = ()


class Marked(NamedTuple):
    """What marking a batch came to: *marked* of its records count as exported now."""

    batch: str
    records: int
    marked: int
    was_marked: bool  # before, so that nothing was done


def export(
    settings: Settings,
    path: str,
    *,
    product: str | None = None,
    limit: int | None = None,
    on_marked: Callable[[Exported], None] = lambda _: None,
) -> Exported | None:
    """Write what is pending, of *product* only and up to *limit*, to the new file *path*, and mark it as exported.

    *on_marked* is called when all is done but for turning the records, which takes longer than writing them. None where
    nothing is pending. Raises UsageError for a *path* that is taken, LockHeld, OutboxError, AgentError; then nothing is
    marked.
    """
    with closing(Store(settings.db, settings.busy_timeout)) as store:
        check_free(store, path)
        ledger = Ledger(store)
        with NewFile(path) as new, borrowed(store, settings) as lock:
            with owned(store):
                batch = _write(ledger, new.file, product, limit, new.error, compressed=is_compressed(new.path))
            if batch is None:
                return None
            new.place(replaces=check_free(store, new.path))
            done = batch.exported(new.path)
            with owned(store):
                _mark(ledger, lock, batch, new.path)
            try:
                on_marked(done)
            finally:
                with owned(store):
                    _turn(ledger)
                    _give_up_old(ledger, settings.exported_retention_days)
            return done


def export_to(
    settings: Settings, stream: BinaryIO, *, product: str | None = None, limit: int | None = None
) -> Exported | None:
    """Write the same to *stream* and mark nothing: `mark` does that by the digest.

    Delivering is borrowed until all is in a temporary file: a reader that hangs keeps nothing else from being sent. The
    digest is noted before the first byte goes out: who has read it can mark the batch, whatever becomes of us.
    """
    with closing(Store(settings.db, settings.busy_timeout)) as store, _spooled() as spool:
        ledger = Ledger(store)
        with borrowed(store, settings), owned(store):
            batch = _write(ledger, spool, product, limit, _spool_error, compressed=False)
            if batch is None:
                return None
            spool.seek(0)  # nothing is left that its disk may have no room for
            ledger.with_room(lambda: exports.close(store, batch.export, batch.written))
        try:
            shutil.copyfileobj(spool, stream)
            stream.flush()
        except OSError as exc:
            with owned(store), suppress(OutboxError):
                exports.withdraw(store, batch.export)
            raise _stream_error(exc) from exc
        return batch.exported(None)


def mark(settings: Settings, digest: str) -> Marked:
    """Mark those records of the batch with *digest* (or one that begins so) that are still pending as exported.

    Raises UsageError where no batch, or more than one, has such a digest, LockHeld, OutboxError.
    """
    with closing(Store(settings.db, settings.busy_timeout)) as store, owned(store):
        those = exports.by_digest(store, digest.lower()) if len(digest) >= SHORTEST_NAME else []
        found = _the_one(those, "digest", digest, "it is in the last line that was written")
        if found.state == "open":
            with borrowed(store, settings):
                found = exports.by_uid(store, found.uid) or found  # somebody may have been faster
                if found.state == "open":
                    return _mark_open(Ledger(store), found)
        return Marked(found.uid, found.records, 0, was_marked=True)


def _mark_open(ledger: Ledger, found: Export) -> Marked:
    while ledger.hand_over():
        pass
    waiting = exports.count_claimed(ledger.store, found)
    written = Written(found.records, found.first_id or 0, found.last_id or 0, found.digest or "")
    ledger.mark(found, written, waiting, None)
    _turn(ledger)
    return Marked(found.uid, found.records, waiting, was_marked=False)


def export_again(settings: Settings, name: str, path: str) -> Exported:
    """Write those records of the marked batch *name* that have no verdict yet to the new file *path*.

    *name* is a number, or a uid or its beginning. Raises UsageError where there is no such batch, or nothing is left in
    it.
    """
    with closing(Store(settings.db, settings.busy_timeout)) as store:
        with owned(store):
            found = _the_one(
                exports.by_name(store, name.lower()), "number or id", name, "`versioner-agent status` lists batches"
            )
            exports.turn_all(store)
            found = exports.by_uid(store, found.uid) or found
        if found.state == "open":
            raise UsageError(f"the batch {name} was not marked; nothing was done", "`export` writes its records anew")
        check_free(store, path, found.uid)
        with NewFile(path) as new, borrowed(store, settings):
            with owned(store):
                batch = _rewrite(store, found, new)
            new.place(replaces=check_free(store, new.path, found.uid))
            with owned(store):
                exports.rewritten(store, found, batch.written.digest, new.path)
            return batch.exported(new.path)


def check_free(store: Store, path: str, batch: str | None = None) -> bool:
    """Tell whether something lies at *path* that is ours to replace; raises UsageError for what is not.

    Ours are exports of this outbox that are of no more use: cut short before they were marked, or with a verdict for
    every record; and the very *batch* that is to be written. That holds only for as long as delivering is borrowed:
    what another export is about to mark looks as if it had been cut short.
    """
    header = _header_of(path)
    if header is None:
        return False
    with owned(store):
        try:
            is_ours = exports.outbox_uid(store) == header.get("outbox")
            found = exports.by_uid(store, str(header.get("batch")))
        except OutboxError:
            is_ours, found = False, None
    if not is_ours or header.get("content") != "events":
        raise UsageError(f"{path} is there already, and no export of this outbox; nothing was done", _ANOTHER)
    if found is None:  # it may be of a clone, or of a time after the backup that this one was restored from
        raise UsageError(f"{path} holds a batch that this outbox does not know; nothing was done", _ANOTHER)
    is_of_no_use = found.digest is None if found.state == "open" else found.awaited + found.waiting <= 0
    if not is_of_no_use and found.uid != batch:
        raise UsageError(
            f"{path} holds the batch {found.uid[:SHORTEST_NAME]}, which is still of use; nothing was done", _ANOTHER
        )
    return True


_ANOTHER = "name a file that is not there"


class _Batch(NamedTuple):
    export: Export
    written: Written
    damaged: list[int]

    def exported(self, file: str | None) -> Exported:
        records, first_id, last_id, digest = self.written
        return Exported(self.export.uid, file, records, digest, first_id, last_id, tuple(self.damaged))


class _Lines:
    """The lines of one batch, header first; what keeps them from being written is said in the words of *error*."""

    def __init__(
        self, store: Store, export: Export, file: BinaryIO, error: Callable[[OSError], AgentError], *, compressed: bool
    ) -> None:
        self._error = error
        self._outbox = exports.outbox_uid(store) or ""
        self._writer = Writer(file, compressed=compressed)
        self._first_id = self.last_id = 0
        host = os.uname().nodename
        batch = (export.uid, export.id, export.previous)
        header = Header("events", self._outbox, host, *batch, export.created_at, __version__)
        with self._in_words():
            self._writer.line(header.line())

    def write(self, records: list[tuple[Record, bytes]]) -> None:
        with self._in_words():
            for record, payload in records:
                self._writer.line(event_line(record, payload, self._outbox))
                self._first_id = self._first_id or record.id
                self.last_id = record.id

    def finish(self) -> Written:
        with self._in_words():
            lines, digest = self._writer.finish()
        return Written(lines, self._first_id, self.last_id, digest)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise self._error(exc) from exc


def _write(
    ledger: Ledger,
    file: BinaryIO,
    product: str | None,
    limit: int | None,
    error: Callable[[OSError], AgentError],
    *,
    compressed: bool,
) -> _Batch | None:
    """Claim what is pending and write it, step by step; None where there is nothing."""
    store = ledger.store
    try:
        open_outbox(ledger, create=False)
    except OutboxMissing:
        return None
    migrate(ledger)
    export = None
    while export is None:
        while ledger.hand_over():
            pass
        if not exports.has_pending(store, product):
            return None
        export = ledger.with_room(lambda: exports.begin(store, product, time.time()))
    lines = _Lines(store, export, file, error, compressed=compressed)
    damaged: list[int] = []
    after, left, is_end = 0, limit or MOST, False
    while left and not is_end:
        step = ledger.claim(export, after, left, time.time())
        after, is_end, left = step.last_id, step.is_end, left - len(step.records)
        damaged += [record.id for record in step.damaged]
        lines.write(step.records)
    if not lines.last_id:
        exports.drop(store, export)
        if not damaged:
            return None  # it was discarded meanwhile
        raise OutboxError(
            f"nothing was exported: all that was pending is damaged and has failed ({_some(damaged)})",
            "`versioner-agent show ID` tells more; queue these events again",
        )
    return _Batch(export, lines.finish(), damaged)


def _rewrite(store: Store, export: Export, new: NewFile) -> _Batch:
    """Write what has no verdict yet, in its order."""
    lines = _Lines(store, export, new.file, new.error, compressed=is_compressed(new.path))
    damaged: list[int] = []
    for page in exports.exported(store, export):
        intact = [(record, payload) for record, payload in page if is_intact(record, payload)]
        damaged += [record.id for record, payload in page if not is_intact(record, payload)]
        lines.write(intact)
    if not lines.last_id:
        raise UsageError(
            f"nothing of the batch {export.uid[:SHORTEST_NAME]} waits for a verdict any more; nothing was written",
            "`versioner-agent list` shows what became of its records",
        )
    return _Batch(export, lines.finish(), damaged)


def _mark(ledger: Ledger, lock: FlusherLock, batch: _Batch, path: str) -> None:
    """Let the records count as exported, now that the file is safe."""
    try:
        with lock_errors(lock):
            if not lock.renew():
                raise LockHeld("the lock was removed meanwhile, and somebody else delivers from this outbox")
        ledger.mark(batch.export, batch.written, batch.written.records, path)
    except AgentError as exc:
        exc.message += (
            f"; {path} is complete, but nothing was marked as exported: its records will be sent from here too"
        )
        exc.hint = (
            "delete it and export again: carried all the same, it sends them twice, with the same Idempotency-Key"
        )
        raise


def _turn(ledger: Ledger) -> None:
    """Turn what counts as exported, as far as that goes: others turn the rest."""
    with suppress(OutboxError):
        while ledger.hand_over():
            pass


def _give_up_old(ledger: Ledger, days: float) -> None:
    """Remove old batches whose fate nobody will tell, a part of them at a time: here there may be no agent."""
    before = time.time() - days * 86_400
    with suppress(OutboxError):  # the export is done
        for _ in range(OLD_STEPS):
            if not days or not ledger.prune_exported(before):
                return


def _the_one(found: list[Export], what: str, name: str, where: str) -> Export:
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{len(found)} batches have a {what} that begins with {name}", f"give more of it; {where}")
    raise UsageError(
        f"no batch of this outbox has the {what} {name}",
        f"give it whole, or its first {SHORTEST_NAME} characters at least; {where}",
    )


def _header_of(path: str) -> dict[str, Any] | None:
    """Return the header of the export at *path*, an empty one where it is none; None where there is no file."""
    fd = open_old(path)
    if fd is None:
        return None
    with os.fdopen(fd, "rb") as file:
        try:
            lines = gzip.GzipFile(fileobj=file) if is_compressed(path) else file
            found = json.loads(lines.readline(MAX_LINE_BYTES))
        except (OSError, EOFError, zlib.error, ValueError, RecursionError):
            return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


@contextmanager
def _spooled() -> Iterator[BinaryIO]:
    """Have a temporary file for the block, and what keeps it from being written said in our words."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as exc:  # closing it says once more that its disk is full
        raise _spool_error(exc) from exc


def _spool_error(exc: OSError) -> AgentError:
    return AgentError(
        f"can't write what is to go to stdout into {tempfile.tempdir or 'a file'} first: {exc.strerror or exc}",
        "nothing was written and nothing marked; free some space there, or set TMPDIR",
    )


def _stream_error(exc: OSError) -> AgentError:
    return AgentError(
        f"can't write to stdout: {exc.strerror or exc}; the export is incomplete", "nothing was marked: export again"
    )


def _some(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:IDS_SHOWN]))
    return shown if len(ids) <= IDS_SHOWN else f"{shown} and {len(ids) - IDS_SHOWN} more"
