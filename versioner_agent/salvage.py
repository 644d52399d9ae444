"""What can be saved of a damaged outbox: rows of its bytes in, proven records into a new file.

A record is kept where its digest proves it; with it its state, for which there is no proof and which is read
forgivingly. Of the other tables only what matters is kept: which outbox it is and where it delivers to, batches that
were queued, exported or imported, the last id given.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Container, Iterator, Sequence
from typing import Any

from versioner_agent import events, schema
from versioner_agent.files import open_plain
from versioner_agent.pages import EVENT_ID, PAGE_BYTES, Row, rows
from versioner_agent.records import Record, is_intact

MAX_TIME = 253_402_300_800.0  # the year 10000
#: Ids that a damaged counter may be ahead of the last record found, to be believed.
MAX_PRUNED = 10_000_000
#: What `batch` holds batches of.
BATCH_KINDS = ("enqueue", "import")


def rows_of(path: str) -> Iterator[Row]:
    """Yield what looks like a row in the file at *path*; raises OSError where the disk can't be read.

    What was passed over would be lost, and a disk may come back: whether it does is for a person to judge.
    """
    fd = open_plain(path)
    try:
        count = -(-os.fstat(fd).st_size // PAGE_BYTES)

        def read(number: int) -> bytes:
            return os.pread(fd, PAGE_BYTES, (number - 1) * PAGE_BYTES)

        for number in range(2, count + 1):  # the first page holds the schema
            yield from rows(read(number), read)
    finally:
        os.close(fd)


class Salvage:
    """Takes rows of any table and keeps the records that prove themselves, and the few other rows that matter."""

    def __init__(self, connection: sqlite3.Connection, live: Container[int] = frozenset()) -> None:
        """Fill the tables behind *connection*, which are as new; *live* are the ids that an index still names."""
        self._connection = connection
        self._live = live
        info = connection.execute("SELECT name, type, \"notnull\" FROM pragma_table_info('record')").fetchall()
        self._columns = {name: (_TYPES[kind], bool(needed)) for name, kind, needed in info}
        names = ", ".join(self._columns)
        marks = ", ".join("?" * len(self._columns))
        self._insert = f"INSERT INTO record ({names}) VALUES ({marks})"  # noqa: S608  # our own column names
        self._unreadable: set[int] = set()
        self._others: list[tuple[str, tuple[Any, ...]]] = []
        self._sequence = 0

    def take(self, row: Row) -> None:
        """Keep *row* where it is worth it; tables are told apart by their number of columns."""
        width = len(row.values)
        if row.is_free and (width != len(self._columns) or row.rowid not in self._live):
            return  # an old copy, of what may have been pruned
        if not row.is_whole:
            if width > 1 and isinstance(row.values[1], str) and EVENT_ID.fullmatch(row.values[1].encode()):
                self._unreadable.add(row.rowid)
        elif width == len(self._columns):
            self._take_record(row)
        elif width in _OTHER_TABLES and _is_plausible(row.values):
            self._others.append((_OTHER_TABLES[width], (row.rowid, *row.values[1:])))
        elif width == 10 and row.rowid == 1:
            self._take_destination(row)
        elif width == 2 and row.values[0] == "record" and isinstance(row.values[1], int):
            self._sequence = row.values[1]

    def finish(self) -> tuple[dict[str, int], list[int]]:
        """Write what belongs to all rows; returns records by state, and the ids seen whose digest fails."""
        run = self._connection.execute
        for statement, values in self._others:
            with contextlib.suppress(sqlite3.Error):
                run(statement, values)
        # A staged record whose batch is gone may have been acknowledged: better sent than lost.
        run("UPDATE record SET state = 'pending' WHERE state = 'staged' AND batch NOT IN (SELECT id FROM batch)")
        self._finish_exports()
        last = run("SELECT COALESCE(max(id), 0) FROM record").fetchone()[0]
        if last < self._sequence < last + MAX_PRUNED:  # ids of pruned records are not given again
            last = self._sequence
        run("DELETE FROM sqlite_sequence WHERE name = 'record'")
        run("INSERT INTO sqlite_sequence (name, seq) VALUES ('record', ?)", (last,))
        counts = dict(run("SELECT state, n FROM tally WHERE n > 0 ORDER BY state").fetchall())
        return counts, sorted(self._unreadable - {row[0] for row in run("SELECT id FROM record").fetchall()})

    def _finish_exports(self) -> None:
        """Let no batch to come take what an earlier one had claimed or exported, and find those that are lost again."""
        run = self._connection.execute
        run(
            """
            UPDATE record SET batch = NULL
            WHERE state = 'pending' AND batch < 0 AND -batch NOT IN (SELECT id FROM export)
            """
        )
        last = run(LAST_EXPORT, (MAX_PRUNED,)).fetchone()[0]
        # Without a batch, no receipt would find them, and nobody could write them again.
        run(CLAIM_STRAYS, (-last - 1, MAX_PRUNED))
        run(REMAKE_EXPORTS)
        run(
            """
            UPDATE export SET awaited = (SELECT count(*) FROM record WHERE state = 'exported' AND batch = -export.id)
            """
        )
        last = run(LAST_EXPORT, (MAX_PRUNED,)).fetchone()[0]
        if 0 < last < MAX_PRUNED:
            run("DELETE FROM sqlite_sequence WHERE name = 'export'")
            run("INSERT INTO sqlite_sequence (name, seq) VALUES ('export', ?)", (last,))

    def proven(self, row: Row) -> tuple[Record, dict[str, Any]] | None:
        """Return the record that *row* is, and all its columns, where its digest proves it."""
        if not row.is_whole or len(row.values) != len(self._columns):
            return None
        found: dict[str, Any] = {
            name: _as_stored(value, kind)
            for (name, (kind, _)), value in zip(self._columns.items(), row.values, strict=True)
        }
        found["id"] = row.rowid
        record = Record(**{name: found[name] for name in Record._fields})
        is_proven = isinstance(found["payload"], bytes) and is_intact(record, found["payload"])
        return (record, found) if is_proven else None

    def _take_record(self, row: Row) -> None:
        proven = self.proven(row)
        if proven is None:
            if isinstance(row.values[1], str) and row.values[3] in events.KINDS:
                self._unreadable.add(row.rowid)
            return
        record, found = proven
        found |= _true_identity(record, found["payload"])
        fitting = {name: _fitting(name, found[name], *column) for name, column in self._columns.items()}
        fitting["state"] = _nearest_state(found["state"])
        if fitting["settled_at"] is not None and fitting["settled_at"] < record.queued_at:
            fitting["settled_at"] = time.time()  # which no digest covers: pruning must not take it at once
        if not self._is_latest(fitting):
            return
        try:
            self._connection.execute(self._insert, tuple(fitting.values()))
        except sqlite3.IntegrityError:  # an identity that is not its own: without one nothing is a repeat
            with contextlib.suppress(sqlite3.IntegrityError):
                self._connection.execute(self._insert, tuple((fitting | {"identity": None}).values()))

    def _is_latest(self, found: dict[str, Any]) -> bool:
        """Make room for *found* unless a later state of the same record is kept: a half-done change leaves two."""
        before = self._connection.execute(
            "SELECT retries, attempts, state FROM record WHERE id = ?", (found["id"],)
        ).fetchone()
        if before is None:
            return True
        if (*before[:2], _AGE[before[2]]) >= (found["retries"], found["attempts"], _AGE[found["state"]]):
            return False
        self._connection.execute("DELETE FROM record WHERE id = ?", (found["id"],))
        return True

    def _take_destination(self, row: Row) -> None:
        origin, account, deliveries, last_delivered_at = (row.values[at] for at in (1, 2, 8, 9))
        if not isinstance(origin, str) or not origin.isprintable() or "://" not in origin:
            return
        is_account = isinstance(account, str) and account.isprintable()
        self._connection.execute(
            """
            UPDATE destination SET origin = ?, account = ?, deliveries = ?, last_delivered_at = ? WHERE id = 1
            """,
            (
                origin,
                account if is_account else None,
                deliveries if isinstance(deliveries, int) and deliveries >= 0 else 0,
                last_delivered_at if isinstance(last_delivered_at, float) else None,
            ),
        )


LAST_EXPORT = """
    SELECT max(
        (SELECT COALESCE(max(id), 0) FROM export),
        (SELECT COALESCE(max(-batch), 0) FROM record WHERE state = 'exported' AND batch > -?)
    )
"""
CLAIM_STRAYS = """
    UPDATE record SET batch = ?1 WHERE state = 'exported' AND (batch IS NULL OR batch >= 0 OR batch <= -?2)
"""
# Under other uids: who has imported them knows the records.
REMAKE_EXPORTS = """
    INSERT OR IGNORE INTO export (id, uid, created_at, state, first_id, last_id, records, file)
    SELECT -batch, lower(hex(randomblob(16))), max(queued_at), 'marked', min(id), max(id), count(*),
        '(where to was lost in a damage)'
    FROM record WHERE state = 'exported' GROUP BY batch
"""


def _is_plausible(values: Sequence[Any]) -> bool:
    """Tell whether a row that is no record begins as those of its table do."""
    second = values[1]
    if not isinstance(second, str):
        return False
    return second in BATCH_KINDS if len(values) == 5 else UID.fullmatch(second) is not None


#: What is written of other tables, by their number of columns.
_OTHER_TABLES = {
    3: "UPDATE outbox SET id = ?, uid = ?, machine = ?",
    5: "INSERT OR REPLACE INTO batch VALUES (?, ?, ?, ?, ?)",
    8: "INSERT OR REPLACE INTO arrival VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    14: "INSERT OR REPLACE INTO export VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
}
#: Of outboxes and of exports.
UID = re.compile("[0-9a-f]{32}")
_TYPES: dict[str, type[int | float | str | bytes]] = {
    "INTEGER": int,
    "REAL": float,
    "TEXT": str,
    "BLOB": bytes,
}
#: States in the order in which a record can come to them.
_AGE = {state: age for age, state in enumerate(("staged", "pending", "failed", "exported", "delivered", "discarded"))}


def _true_identity(record: Record, payload: bytes) -> dict[str, bytes | None]:
    """Return `content` and `identity`, which the digest does not cover, as they must have been."""
    if record.origin is not None:
        return {"identity": None}  # it was imported: nothing that is queued here repeats it
    run = (record.kind, record.invoke_id, record.run_attempt)
    if isinstance(record.content, bytes) and record.identity == events.identity(*run, record.content):
        return {}
    # What was delivered on a full disk has no payload any more.
    contents = events.contents_of(record.kind, payload, record.queued_at) if payload else [record.content]
    known = [c for c in contents if c == record.content or events.identity(*run, c) == record.identity]
    content = (known or contents)[0]
    return {"content": content, "identity": events.identity(*run, content)}


def _as_stored(value: Any, kind: type[int | float | str | bytes]) -> Any:
    """Return *value* as its column stores it: one bit tells text from bytes."""
    if kind is str and isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.encode() if kind is bytes and isinstance(value, str) else value


def _fitting(name: str, value: Any, kind: type[int | float | str | bytes], needed: bool) -> Any:
    """Return *value* where it can be one of its column, else none, or an empty one where one is needed."""
    if kind is float:
        if isinstance(value, int | float) and 0 <= value < MAX_TIME:
            return value
        # Settled, but when? Now: pruning must neither take it at once nor leave it for ever.
        return time.time() if name == "settled_at" and value is not None else None
    if isinstance(value, kind):
        return value
    return kind() if needed else None


def _nearest_state(word: Any) -> str:
    """Return the state that *word* is, or was before a bit of it flipped; what can't be told is sent again."""
    if not isinstance(word, str):
        return "pending"
    alike = [state for state in schema.ALL_STATES if len(state) == len(word)]
    return max(alike, key=lambda state: sum(a == b for a, b in zip(state, word, strict=True)), default="pending")
