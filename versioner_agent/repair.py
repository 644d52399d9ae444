"""`retry` and `discard` of all records that a filter means: first what would happen, then doing it in small steps.

Each step is one short transaction that looks at its records again: what has changed since the plan was made is judged
as it is then. What the plan did not see, because it came later, is left alone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from typing import NamedTuple

from versioner_agent import review
from versioner_agent.filters import Filter
from versioner_agent.records import Record
from versioner_agent.review import Verdict
from versioner_agent.selecting import select
from versioner_agent.stepping import StepSize
from versioner_agent.storage import Store

STEP = 100  # records of one read or transaction
MOST_GROUPS = 1000  # kept apart in a plan

#: What becomes, or would become, of a record; inside a transaction of the caller's.
Act = Callable[[sqlite3.Connection, int], Verdict]
#: The same looked at only: what stands against it, None where nothing does.
Objection = Callable[[sqlite3.Connection, Record], Verdict | None]


class Way(NamedTuple):
    """What can be done with records that a filter means."""

    do: Act
    objection: Objection
    verb: str
    done: str  # the outcome where it was


class Part(NamedTuple):
    """What a plan says of the records of one product, version, reason and state."""

    state: str
    product_name: str
    version: str
    reason: str | None
    total: int  # of what would be acted on
    first_id: int
    last_id: int
    left_out: dict[str, int]  # outcome -> how many that would not be


class Plan(NamedTuple):
    """What would happen."""

    parts: list[Part]
    total: int  # of what would be acted on, those beyond the parts included
    left_out: int
    first_id: int  # of all that are meant, 0 where there are none
    last_id: int
    is_cut: bool  # there are more parts than are told apart


def plan(store: Store, wanted: Filter, objection: Objection) -> Plan:
    """Return what acting on the records that are *wanted* would do; nothing is written. Raises OutboxError."""
    parts: dict[tuple[str, str, str, str | None], Part] = {}
    total = left_out = first = last = 0
    is_cut = False
    for page in select(store, wanted, oldest_first=True, page=STEP):
        with store.read() as connection:
            objections = [objection(connection, record) for record in page]
        first, last = first or page[0].id, page[-1].id
        for record, against in zip(page, objections, strict=True):
            total += against is None
            left_out += against is not None
            key = (record.state, record.product_name, record.version, record.reason)
            if key not in parts and len(parts) >= MOST_GROUPS:
                is_cut = True
            else:
                parts[key] = _with(parts.get(key) or Part(*key, 0, record.id, record.id, {}), record, against)
    return Plan(list(parts.values()), total, left_out, first, last, is_cut)


def _with(part: Part, record: Record, against: Verdict | None) -> Part:
    if against is None:
        return part._replace(total=part.total + 1, last_id=record.id)
    missed = {**part.left_out, against.outcome: part.left_out.get(against.outcome, 0) + 1}
    return part._replace(last_id=record.id, left_out=missed)


def newest(store: Store) -> int:
    """Return the largest id that there is, 0 without any; raises OutboxError."""
    with store.read() as connection:
        return int(connection.execute("SELECT COALESCE(max(id), 0) FROM record").fetchone()[0])


def act(store: Store, wanted: Filter, last_id: int, do: Act) -> Iterator[list[Verdict]]:
    """Do *do* with all records up to *last_id* that are *wanted*, the oldest first; yields what became of each step."""
    for page in select(store, wanted, oldest_first=True, page=STEP):
        ids = [record.id for record in page if record.id <= last_id]
        if not ids:
            return
        while ids:
            verdicts, ids = _step(store, wanted, ids, do)
            if verdicts:
                yield verdicts


def _step(store: Store, wanted: Filter, ids: list[int], do: Act) -> tuple[list[Verdict], list[int]]:
    """Do *do* with the first of *ids* in one transaction; returns what became of them, and which are left.

    One of a run of thousands takes as long to judge as all of another page.
    """
    size = StepSize()
    verdicts = []
    with store.write() as connection:
        size.start()
        for record in review.find(connection, ids):
            if wanted.matches(record):
                verdicts.append(do(connection, record.id))
            if size.is_over:
                return verdicts, [each for each in ids if each > record.id]
    return verdicts, []
