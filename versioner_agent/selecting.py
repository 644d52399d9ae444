"""Records by filter, in pages, in the order of their ids: a rare match among a million keeps nobody waiting.

A reader blocks every commit, so each read looks at a window of records and is done. Where the product is known, an
index often tells all ids at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

from versioner_agent.filters import Filter
from versioner_agent.records import COLUMNS, Record, as_record
from versioner_agent.schema import EXPORTS_SINCE
from versioner_agent.storage import Store

PAGE = 500  # records one read returns at most
WINDOW = 1000  # records one read looks at
MOST_KNOWN = 5000  # ids that one read may take from an index
#: The schema from which on there is an index by product and version.
INDEXED_SINCE = 2
LAST_ID = 2**63 - 1
ALL = Filter()


def select(
    store: Store, wanted: Filter = ALL, *, limit: int | None = None, oldest_first: bool = False, page: int = PAGE
) -> Iterator[list[Record]]:
    """Yield pages of the records that are *wanted*, the newest first unless *oldest_first*; none of them is empty.

    Nothing is locked between pages. Raises OutboxMissing, OutboxError.
    """
    left = LAST_ID if limit is None else limit
    for found in _windows(store, wanted, oldest_first=oldest_first):
        for start in range(0, len(found), page):
            if left <= 0:
                return
            part = found[start : start + min(page, left)]
            left -= len(part)
            yield part
        if left <= 0:
            return


def _windows(store: Store, wanted: Filter, *, oldest_first: bool) -> Iterator[list[Record]]:
    with store.read() as connection:
        known = _known_ids(connection, store.version, wanted)
    if known is not None:
        yield from _by_ids(store, wanted, sorted(known, reverse=not oldest_first), oldest_first=oldest_first)
        return
    where, values = wanted.conditions()
    source = "record INDEXED BY record_state" if wanted.state else "record NOT INDEXED"
    of_state = "state = :state" if wanted.state else "TRUE"
    order = "ASC" if oldest_first else "DESC"
    bounds = f"""
        SELECT id FROM {source} WHERE {of_state} AND id > :after AND id < :before ORDER BY id {order} LIMIT {WINDOW}
    """  # noqa: S608  # words of our own
    look = f"""
        SELECT {COLUMNS} FROM {source}
        WHERE {of_state} AND id BETWEEN :first AND :last AND state <> 'staged'{where} ORDER BY id {order}
    """  # noqa: S608  # words of our own
    span = {"after": 0, "before": LAST_ID}
    while True:
        with store.read() as connection:
            ids = connection.execute(bounds, values | span).fetchall()
            if not ids:
                return
            ends = sorted((ids[0][0], ids[-1][0]))
            rows = connection.execute(look, values | {"first": ends[0], "last": ends[1]}).fetchall()
        span |= {"after": ends[1]} if oldest_first else {"before": ends[0]}
        if rows:
            yield [as_record(row) for row in rows]


def _known_ids(connection: sqlite3.Connection, version: int, wanted: Filter) -> list[int] | None:
    """Return the ids of all that can be meant, from an index; None where it has none, or there are many."""
    if wanted.product is None or version < INDEXED_SINCE:
        return None
    index, where = "record_version", "product_name = :product"
    if wanted.state == "failed" and version >= EXPORTS_SINCE:
        index, where = "record_refused", "state = 'failed' AND product_name = :product"
    if wanted.version is not None:
        where += " AND version = :version"
    query = f"SELECT id FROM record INDEXED BY {index} WHERE {where} LIMIT :most"  # noqa: S608  # words of our own
    values: dict[str, Any] = wanted._asdict() | {"most": MOST_KNOWN + 1}
    ids = [row[0] for row in connection.execute(query, values).fetchall()]
    return ids if len(ids) <= MOST_KNOWN else None


def _by_ids(store: Store, wanted: Filter, ids: list[int], *, oldest_first: bool) -> Iterator[list[Record]]:
    where, values = wanted.conditions()
    for start in range(0, len(ids), PAGE):
        part = {f"id{number}": each for number, each in enumerate(ids[start : start + PAGE])}
        query = f"""
            SELECT {COLUMNS} FROM record NOT INDEXED
            WHERE id IN ({", ".join(f":{name}" for name in part)}) AND state <> 'staged'{where}
        """  # noqa: S608  # words of our own
        with store.read() as connection:
            rows = connection.execute(query, values | part).fetchall()
        found = sorted(map(as_record, rows), key=lambda record: record.id, reverse=not oldest_first)
        if found:
            yield found
