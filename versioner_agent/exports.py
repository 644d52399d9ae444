"""Batches for the far side of an air gap, as the outbox knows them: claimed, marked, awaited, and swept.

A claim is the negative id of the export as the record's `batch`. It changes nothing else: what is claimed is still
pending, and another export takes it over. One update makes all that is claimed count as exported; from then on whoever
comes first turns the records in steps. What was queued or retried meanwhile has no claim, so nothing counts as exported
that was not written.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from versioner_agent.batches import CHUNK_BYTES, FIND_PUBLISHED, keep_pages
from versioner_agent.records import COLUMNS, Record, as_record, is_intact, number, text
from versioner_agent.schema import EXPORTS_SINCE
from versioner_agent.stepping import StepSize
from versioner_agent.storage import Store

PAGE = 500  # records that are read at once
OPEN_KEPT_S = 30 * 86_400.0  # a batch that may still be marked, or whose file may be replaced
ANSWERED_KEPT = 1000  # batches of which nothing is awaited any more, the newest
LOOKED_AT = 2000  # records that one read passes over: some milliseconds
BATCHES_SHOWN = 100
PRODUCTS_COUNTED = 1000  # one seek each


class Export(NamedTuple):
    """A batch for the far side; times are seconds since 1970."""

    id: int
    uid: str
    created_at: float
    state: str  # open | marking | marked
    product_name: str | None
    first_id: int | None
    last_id: int | None
    records: int
    waiting: int
    awaited: int
    marked_to: int
    previous: str | None
    digest: str | None
    file: str | None
    staging: tuple[int, ...] = ()  # batches that were not queued when this one began, which no row tells


class Claimed(NamedTuple):
    """One step of claiming."""

    records: list[tuple[Record, bytes]]
    damaged: list[Record]
    last_id: int
    is_end: bool


class Written(NamedTuple):
    """What a finished file holds."""

    records: int
    first_id: int
    last_id: int
    digest: str


class Overview(NamedTuple):
    """What waits for receipts: batches, the oldest first, and how many products they hold back, both bounded."""

    batches: list[Export]
    held_products: int


def has_tables(store: Store) -> bool:
    """Tell whether the outbox, which is open, is new enough to know of exports."""
    return store.version >= EXPORTS_SINCE


def outbox_uid(store: Store) -> str | None:
    """Return the outbox's own id, None where it is too old to have one; raises OutboxError."""
    with store.read() as connection:
        if not has_tables(store):
            return None
        return str(store.only(connection.execute("SELECT uid FROM outbox WHERE id = 1"))[0])


def has_pending(store: Store, product: str | None) -> bool:
    """Tell whether there is anything to export."""
    with store.read() as connection:
        query = NEXT_OF_PRODUCT if product is not None else NEXT_OF_ALL
        named = {"product": product, "after": 0, "until": MAX_ID, "limit": 1}
        return connection.execute(query.format("id", ""), named).fetchone() is not None


def begin(store: Store, product: str | None, now: float) -> Export | None:
    """Begin a batch of what is queued by now, up to its `last_id`; nothing is claimed yet. Raises OutboxError.

    None while something that was published is not handed over: what was queued after it must not go first.
    """
    with store.write() as connection:
        if connection.execute(FIND_PUBLISHED).fetchone() is not None:
            return None
        values = (os.urandom(16).hex(), now, product)
        export_id = connection.execute(INSERT, values).lastrowid
        staging = tuple(row[0] for row in connection.execute(STAGING).fetchall())
        return _export(connection.execute(SELECT + " WHERE id = ?", (export_id,)).fetchone())._replace(staging=staging)


def claim(store: Store, export: Export, after: int, size: StepSize, most: int, now: float) -> Claimed:
    """Claim up to *most* pending records of the batch behind the id *after*, in one transaction of *size*.

    Damaged ones fail; what was queued since the batch began is left, for others may queue faster than we write.
    """
    with store.write() as connection:
        size.start()
        keep_pages(connection)
        limit = min(size.value, most)
        with closing(_pending(connection, export, f"{COLUMNS}, payload", after, limit)) as cursor:
            rows = _fitting(cursor)
        claimed = connection.executemany(CLAIM, [(-export.id, row[0]) for row in rows]).rowcount
        if rows and claimed != len(rows):
            raise store.suspected("the index of pending records names others")
    size.end(len(rows))
    intact: list[tuple[Record, bytes]] = []
    damaged: list[Record] = []
    for record, payload in map(_as_found, rows):  # outside of the transaction, for others want to write
        if is_intact(record, payload):
            intact.append((record, payload))
        else:
            damaged.append(record)
            _condemn(store, export, record, now)
    return Claimed(intact, damaged, rows[-1][0] if rows else after, not rows)


def _condemn(store: Store, export: Export, record: Record, now: float) -> None:
    with store.write() as connection:
        named = {"now": now, "detail": DAMAGED, "id": record.id, "batch": -export.id}
        if not connection.execute(CONDEMN, named).rowcount and connection.execute(IS_PENDING, (record.id,)).fetchone():
            raise store.suspected(f"the damaged record {record.id} can't be marked as such")


def _fitting(found: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Take as many rows, which end in a payload or its size, as one step takes: large ones are written slowly."""
    rows: list[tuple[Any, ...]] = []
    size = 0
    for row in found:
        size += row[-1] if isinstance(row[-1], int) else len(row[-1]) if isinstance(row[-1], bytes) else 0
        if rows and size > CHUNK_BYTES:
            break
        rows.append(row)
    return rows


def _as_found(row: tuple[Any, ...]) -> tuple[Record, bytes]:
    return as_record(row[:-1]), row[-1] if isinstance(row[-1], bytes) else str(row[-1]).encode()


def close(store: Store, export: Export, written: Written) -> None:
    """Note what was written without marking it: it may be marked by its digest. Raises OutboxError."""
    with store.write() as connection:
        named = {**written._asdict(), "id": export.id}
        if connection.execute(CLOSE, named).rowcount != 1:
            raise store.suspected(f"the batch {export.id} is gone")


def withdraw(store: Store, export: Export) -> None:
    """Forget the digest of what nobody has read to its end: what there is of it may be replaced."""
    with store.write() as connection:
        connection.execute("UPDATE export SET digest = NULL WHERE id = ? AND state = 'open'", (export.id,))


def drop(store: Store, export: Export) -> None:
    """Forget a batch in which nothing was written."""
    with store.write() as connection:
        connection.execute("DELETE FROM export WHERE id = ? AND state = 'open'", (export.id,))


def mark(store: Store, export: Export, written: Written, waiting: int, file: str | None) -> None:
    """Let all that is claimed count as exported, *waiting* records; raises OutboxError."""
    with store.write() as connection:
        named = {**written._asdict(), "id": export.id, "waiting": waiting, "file": file and _storable(file)}
        if connection.execute(MARK, named).rowcount != 1:
            raise store.suspected(f"the batch {export.id} is gone")


def count_claimed(store: Store, export: Export) -> int:
    """Count what is still pending and claimed, in short reads; only while nobody else delivers."""
    count, after = 0, (export.first_id or 0) - 1
    while True:
        with store.read() as connection:
            seen = _window(connection, export, after, LOOKED_AT)
        count += sum(int(batch == -export.id) for _, batch, _ in seen)
        if len(seen) < LOOKED_AT:
            return count
        after = int(seen[-1][0])


def turn(store: Store, size: StepSize) -> bool:
    """Turn one step of a batch that is being marked into exported records; False when there is none left."""
    with store.read() as connection:
        if not has_tables(store) or not is_marking(connection):
            return False
    with store.write() as connection:
        size.start()
        keep_pages(connection)
        row = connection.execute(f"{SELECT} WHERE state = 'marking' ORDER BY id LIMIT 1").fetchone()
        if row is None:
            return True
        export, limit = _export(row), size.value
        found = _window(connection, export, max(export.marked_to, (export.first_id or 0) - 1), limit)
        seen = _fitting(found)
        turned = [(record_id,) for record_id, batch, _ in seen if batch == -export.id]
        connection.executemany(TURN, turned)
        named = {"id": export.id, "turned": len(turned), "marked_to": seen[-1][0] if seen else 0}
        connection.execute(GO_ON if len(seen) == limit or len(seen) < len(found) else END, named)
    size.end(len(seen))
    return True


def turn_all(store: Store) -> None:
    """Turn all that counts as exported: until then it looks as if it were pending. Raises OutboxError."""
    size = StepSize()
    while turn(store, size):
        pass


def _window(connection: sqlite3.Connection, export: Export, after: int, limit: int) -> list[tuple[Any, ...]]:
    """Return id, batch and size of pending records among which those of *export* are."""
    return _pending(connection, export, "id, batch, length(payload)", after, limit).fetchall()


def _pending(connection: sqlite3.Connection, export: Export, columns: str, after: int, limit: int) -> sqlite3.Cursor:
    query = NEXT_OF_PRODUCT if export.product_name is not None else NEXT_OF_ALL
    named = {"product": export.product_name, "after": after, "until": export.last_id or 0, "limit": limit}
    return connection.execute(query.format(columns, ", ".join(map(str, export.staging))), named)


def exported(store: Store, export: Export) -> Iterator[list[tuple[Record, bytes]]]:
    """Yield pages of those records of *export* that have no verdict, in their order; nothing is locked between."""
    after = 0
    while True:
        with store.read() as connection, closing(connection.execute(EXPORTED_OF, (-export.id, after, PAGE))) as cursor:
            rows = _fitting(cursor)
        if not rows:
            return
        after = rows[-1][0]
        yield [_as_found(row) for row in rows]


def rewritten(store: Store, export: Export, digest: str, file: str) -> None:
    """Note where a marked batch was written once more."""
    with store.write() as connection:
        connection.execute("UPDATE export SET digest = ?, file = ? WHERE id = ?", (digest, _storable(file), export.id))


def _storable(path: str) -> str:
    """Return *path* as text, for people: a name of a file may be any bytes."""
    return path.encode("utf-8", "replace").decode()


def by_name(store: Store, name: str) -> list[Export]:
    """Return the batches that *name* can mean: a number, or the beginning of a uid (8 characters or more)."""
    export_id = int(name) if name.isascii() and name.isdigit() and len(name) < 19 else 0
    return _found(store, "id = :id OR (length(:name) >= 8 AND substr(uid, 1, length(:name)) = :name)", name, export_id)


def by_digest(store: Store, digest: str) -> list[Export]:
    """Return the batches whose digest begins with *digest*."""
    return _found(store, "substr(digest, 1, length(:name)) = :name", digest)


def by_uid(store: Store, uid: str) -> Export | None:
    """Return the batch *uid*, None where there is no such one."""
    return next(iter(_found(store, "uid = :name", uid)), None)


def _found(store: Store, condition: str, name: str, export_id: int = 0) -> list[Export]:
    with store.read() as connection:
        if not has_tables(store):
            return []
        rows = connection.execute(f"{SELECT} WHERE {condition}", {"name": name, "id": export_id}).fetchall()
    return [_export(row) for row in rows]


def overview(connection: sqlite3.Connection) -> Overview:
    """Return what waits for receipts, at a cost that does not grow with it."""
    rows = connection.execute(UNANSWERED, (BATCHES_SHOWN,)).fetchall()
    products, after = 0, ""
    while rows and products < PRODUCTS_COUNTED:
        row = connection.execute(NEXT_HELD, (after,)).fetchone()
        if row is None or not isinstance(row[0], str) or row[0] <= after:
            break
        products, after = products + 1, row[0]
    return Overview([_export(row) for row in rows], products)


def is_marking(connection: sqlite3.Connection) -> bool:
    """Tell whether some records count as exported that are not turned yet."""
    return connection.execute(FIND_MARKING).fetchone() is not None


def marking(store: Store, connection: sqlite3.Connection) -> int:
    """Return how many records look as if they were pending, and count as exported."""
    return int(connection.execute(COUNT_MARKING).fetchone()[0]) if has_tables(store) else 0


def holds(connection: sqlite3.Connection, product: str) -> bool:
    """Tell whether something of *product* is exported, so that nothing behind it may go first."""
    return connection.execute(HELD, (product,)).fetchone() is not None


def are_held(store: Store, products: Collection[str]) -> bool:
    """Tell whether each of a few *products* is held; raises OutboxError."""
    with store.read() as connection:
        if not has_tables(store) or not products or connection.execute(ANY_EXPORTED).fetchone() is None:
            return False
        return all(holds(connection, product) for product in products)


def sweep(store: Store, now: float) -> None:
    """Forget batches that nobody will mark any more, and most of those of which nothing is awaited."""
    times = {"open": now - OPEN_KEPT_S, "kept": ANSWERED_KEPT}
    with store.read() as connection:
        if not has_tables(store) or connection.execute(FIND_SWEPT, times).fetchone() is None:
            return
    with store.write() as connection:
        connection.execute(SWEEP, times)


def _export(row: tuple[object, ...]) -> Export:
    """Return *row* as an Export, each of its own type whatever a damaged file holds."""
    whole = [int(number(value) or 0) for value in row]
    words = [text(value) for value in row]
    return Export(
        whole[0], words[1] or "", number(row[2]) or 0.0, words[3] or "", words[4], whole[5] or None, whole[6] or None,
        whole[7], whole[8], whole[9], whole[10], words[11], words[12], words[13],
    )  # fmt: skip


MAX_ID = 2**63 - 1
DAMAGED = "the record's digest does not fit: its content was altered on the disk; it was not exported"
SELECT = f"SELECT {', '.join(Export._fields[:-1])} FROM export"  # noqa: S608  # a constant
INSERT = """
    INSERT INTO export (uid, created_at, state, product_name, previous, last_id) VALUES (?, ?, 'open', ?,
        (SELECT uid FROM export WHERE state IN ('marking', 'marked') ORDER BY id DESC LIMIT 1),
        (SELECT max(id) FROM record)
    )
"""
_NEXT = """
    SELECT {{}} FROM record INDEXED BY {}
    WHERE state = 'pending'{} AND id > :after AND id <= :until AND COALESCE(batch, 0) NOT IN ({{}})
    ORDER BY id LIMIT :limit
"""
NEXT_OF_ALL = _NEXT.format("record_state", "")
NEXT_OF_PRODUCT = _NEXT.format("record_pending", " AND product_name = :product")
# Its records may lie on both sides of what was claimed before it was published: the first ones would go last.
STAGING = "SELECT id FROM batch WHERE published = 0 AND waiting = 0"
CONDEMN = """
    UPDATE record SET state = 'failed', reason = 'damaged', detail = :detail, settled_at = :now, held_since = NULL
    WHERE id = :id AND state = 'pending' AND batch = :batch
"""
IS_PENDING = "SELECT 1 FROM record WHERE id = ? AND state = 'pending'"
CLOSE = """
    UPDATE export SET records = :records, first_id = :first_id, last_id = :last_id, digest = :digest
    WHERE id = :id AND state = 'open'
"""
MARK = """
    UPDATE export SET state = 'marking', records = :records, waiting = :waiting, first_id = :first_id,
        last_id = :last_id, digest = :digest, file = :file
    WHERE id = :id AND state = 'open'
"""
FIND_MARKING = "SELECT 1 FROM export INDEXED BY export_marking WHERE state = 'marking' LIMIT 1"
COUNT_MARKING = "SELECT COALESCE(sum(waiting), 0) FROM export INDEXED BY export_marking WHERE state = 'marking'"
CLAIM = "UPDATE record SET batch = ? WHERE id = ? AND state = 'pending'"
TURN = """
    UPDATE record SET state = 'exported', held_since = NULL, reason = NULL, detail = NULL
    WHERE id = ? AND state = 'pending'
"""
GO_ON = "UPDATE export SET waiting = max(0, waiting - :turned), marked_to = :marked_to WHERE id = :id"
END = "UPDATE export SET state = 'marked', waiting = 0 WHERE id = :id"
EXPORTED_OF = f"""
    SELECT {COLUMNS}, payload FROM record INDEXED BY record_exported
    WHERE state = 'exported' AND batch = ? AND id > ? ORDER BY id LIMIT ?
"""  # noqa: S608  # a constant
UNANSWERED = f"{SELECT} INDEXED BY export_unanswered WHERE awaited + waiting > 0 ORDER BY id LIMIT ?"
NEXT_HELD = """
    SELECT product_name FROM record INDEXED BY record_held_by_export
    WHERE state = 'exported' AND product_name > ? ORDER BY product_name LIMIT 1
"""
HELD = "SELECT 1 FROM record INDEXED BY record_held_by_export WHERE state = 'exported' AND product_name = ? LIMIT 1"
ANY_EXPORTED = "SELECT 1 FROM record INDEXED BY record_held_by_export WHERE state = 'exported' LIMIT 1"
_SWEPT = """
    FROM export WHERE (state = 'open' AND created_at < :open)
        OR (state = 'marked' AND awaited <= 0 AND id < (SELECT max(id) FROM export) - :kept)
"""
FIND_SWEPT = f"SELECT 1 {_SWEPT} LIMIT 1"
SWEEP = f"DELETE {_SWEPT}"
