"""Failures told once to each cursor, the oldest first: what `list --new NAME` reads, and how far it has got.

A failure has a number that grows with each of them (see `schema`), whatever the clock says. A cursor is moved after its
failures were written out, so that one that is killed tells them again and loses none. An OS lock keeps two runs of one
cursor apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from versioner_agent.errors import OutboxBusy, OutboxError, OutboxOutdated
from versioner_agent.files import inode_of, open_beside, unusable
from versioner_agent.filters import Filter
from versioner_agent.integrity import hash_of
from versioner_agent.locks import lock_byte
from versioner_agent.records import Record, as_record
from versioner_agent.schema import EXPORTS_SINCE
from versioner_agent.storage import Store

PAGE = 500  # failures one read looks at
POLL_S = 0.05
#: The file of the locks: each name has a byte of it, so that cursors don't wait for each other.
CURSORS_SUFFIX = ".cursors"


class Step(NamedTuple):
    """Failures that a cursor has not seen, and where it stands once they were told."""

    records: list[Record]
    seq: int
    file: tuple[int, int] | None  # the one they were read from


def unseen(store: Store, name: str, wanted: Filter, limit: int | None = None) -> Iterator[Step]:
    """Yield what the cursor *name*, which is held, has not seen of the failed records that are *wanted*.

    At most *limit* of them; what *wanted* leaves out counts as seen. What has been retried, discarded or pruned since
    is passed over, and so is an earlier failure of a record that has failed again. Nothing is locked between steps.
    Raises OutboxError.
    """
    with store.read() as connection:
        row = connection.execute("SELECT seq FROM cursor WHERE name = ?", (name,)).fetchone()
    seq = row[0] if row else 0
    left = limit
    while left is None or left > 0:
        with store.read() as connection:
            file = inode_of(store.path)
            bounds = connection.execute(WINDOW, (seq, PAGE)).fetchall()
            rows = connection.execute(FAILURES, (seq, bounds[-1][0])).fetchall() if bounds else []
        if not bounds:
            return
        found = [(row[0], record) for row in rows if wanted.matches(record := as_record(row[1:]))][:left]
        is_cut = left is not None and len(found) == left
        seq = found[-1][0] if is_cut else bounds[-1][0]
        left = None if left is None else left - len(found)
        yield Step([record for _, record in found], seq, file)


def move(store: Store, name: str, step: Step) -> None:
    """Note that the cursor *name* has seen all up to *step*.

    Raises OutboxError, also where the outbox was mended or restored since: there the numbers are other failures'.
    """
    with store.write() as connection:
        if inode_of(store.path) != step.file:
            raise OutboxError("the outbox was replaced while its failures were listed", "list them again")
        connection.execute(MOVE, (name, step.seq, time.time()))


@contextmanager
def held(store: Store, name: str) -> Iterator[None]:
    """Let nobody else read by the cursor *name* for the block.

    Raises OutboxBusy after `busy_timeout` seconds, OutboxMissing, OutboxOutdated, OutboxError.
    """
    with store.read():
        if store.version < EXPORTS_SINCE:
            raise OutboxOutdated
    path = store.path + CURSORS_SUFFIX
    at = int.from_bytes(hash_of(name.encode())[:6], "big")
    end = time.monotonic() + store.busy_timeout
    try:
        fd = open_beside(path)
    except OSError as exc:
        raise unusable(path, exc) from exc
    try:
        while not lock_byte(fd, at):
            if time.monotonic() >= end:
                raise OutboxBusy(
                    f"another `list --new` of this name has been running for {store.busy_timeout:g} s",
                    "look what its output waits for; its cursor has not moved",
                )
            time.sleep(POLL_S)
        yield
    finally:
        os.close(fd)  # frees the lock


WINDOW = "SELECT seq FROM failure WHERE seq > ? ORDER BY seq LIMIT ?"
FAILURES = f"""
    SELECT seq, {", ".join(f"record.{name}" for name in Record._fields)} FROM failure CROSS JOIN record
    WHERE seq > ? AND seq <= ? AND record.id = failure.record_id AND record.state = 'failed' ORDER BY seq
"""  # noqa: S608  # a constant
MOVE = """
    INSERT INTO cursor (name, seq, used_at) VALUES (?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET seq = max(seq, excluded.seq), used_at = excluded.used_at
"""
