"""Failures grouped by product, version and reason: how many, whose they were first, and where to look.

Late refusals by a rule are counted apart: nobody waited for their verdict any more. The groups are walked along an
index in short reads, so that a million failures are only a matter of time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from versioner_agent.errors import OutboxOutdated
from versioner_agent.filters import Filter
from versioner_agent.records import number, text
from versioner_agent.schema import EXPORTS_SINCE
from versioner_agent.storage import Store

PAGE = 200  # failures one read looks at
MOST_ROWS = 5000  # failures a summary looks at
MOST_PAYLOAD = 256 * 1024  # bytes; no event is larger
_PEOPLE = ("built_by_name", "built_by", "deployed_by_name", "deployed_by")
_LINKS = ("build_url", "deploy_url")


class Group(NamedTuple):
    """Failures that a person looks at together."""

    product_name: str
    version: str
    reason: str
    late: bool
    total: int
    first_id: int
    first_by: str
    link: str | None


def group_json(group: Group) -> dict[str, Any]:
    """Return *group* with the documented keys."""
    found = group._asdict()
    return {"count" if name == "total" else name: value for name, value in found.items()}


class Summary(NamedTuple):
    """The largest groups, and whether there is more than was looked at."""

    groups: list[Group]
    left: int  # groups found and not listed
    is_cut: bool  # there are more failures, of these groups and others


class _Tally(NamedTuple):
    total: int
    first_id: int


_Key = tuple[str, str, str, bool]


def groups(store: Store, wanted: Filter) -> Iterator[Group]:
    """Yield the groups of the failed records that are *wanted*, by product, version and reason; raises OutboxError."""
    tallies: dict[_Key, _Tally] = {}
    for rows in _pages(store, wanted):
        for row in rows:
            key, record_id = _key(row), row[3]
            if tallies and next(iter(tallies))[:2] != key[:2]:
                yield from _completed(store, sorted(tallies.items()))
                tallies = {}
            if _is_meant(wanted, row):
                _count(tallies, key, record_id)
    yield from _completed(store, sorted(tallies.items()))


def summary(store: Store, most_groups: int) -> Summary:
    """Return the *most_groups* largest groups among the first MOST_ROWS failures; none of an outbox of old schema."""
    tallies: dict[_Key, _Tally] = {}
    looked_at = 0
    with store.read():
        if store.version < EXPORTS_SINCE:
            return Summary([], 0, is_cut=False)
    for rows in _pages(store, Filter()):
        for row in rows:
            _count(tallies, _key(row), row[3])
        looked_at += len(rows)
        if looked_at >= MOST_ROWS:
            break
    largest = sorted(tallies.items(), key=lambda item: -item[1].total)
    shown = _completed(store, largest[:most_groups])
    return Summary(list(shown), max(0, len(largest) - most_groups), is_cut=looked_at >= MOST_ROWS)


def _count(tallies: dict[_Key, _Tally], key: _Key, record_id: int) -> None:
    before = tallies.get(key, _Tally(0, record_id))
    tallies[key] = _Tally(before.total + 1, min(before.first_id, record_id))


def _pages(store: Store, wanted: Filter) -> Iterator[list[tuple[Any, ...]]]:
    """Yield product, version, reason, id, late and time of queuing of failed records, in the order of the index."""
    after = {"p": wanted.product or "", "v": "", "i": 0}
    if wanted.product is not None and wanted.version is not None:
        after["v"] = wanted.version
    while True:
        with store.read() as connection:
            if store.version < EXPORTS_SINCE:
                raise OutboxOutdated
            rows = connection.execute(WALK_VERSION, after | {"page": PAGE}).fetchall()
            rows += connection.execute(WALK, after | {"page": PAGE - len(rows)}).fetchall()
        if not rows:
            return
        yield rows
        product, version, last = rows[-1][0], rows[-1][1], rows[-1][3]
        if wanted.product is not None and product != wanted.product:
            return
        after = {"p": product, "v": version, "i": last}


def _key(row: tuple[Any, ...]) -> _Key:
    return text(row[0]) or "", text(row[1]) or "", text(row[2]) or "", bool(row[4])


def _is_meant(wanted: Filter, row: tuple[Any, ...]) -> bool:
    queued_at = number(row[5]) or 0.0
    reason = "late" if wanted.reason == "late" and row[4] else row[2]
    pairs = ((wanted.product, row[0]), (wanted.version, row[1]), (wanted.reason, reason))
    return (
        all(meant is None or meant == found for meant, found in pairs)
        and (wanted.since is None or queued_at >= wanted.since)
        and (wanted.until is None or queued_at < wanted.until)
    )


def _completed(store: Store, tallies: Iterable[tuple[_Key, _Tally]]) -> Iterator[Group]:
    """Yield groups with what their first events say of who and where."""
    for key, tally in tallies:
        with store.read() as connection:
            row = connection.execute(FIRST, (tally.first_id, MOST_PAYLOAD)).fetchone()
        queued_by, payload = row or ("", b"")
        fields = fields_of(payload)
        by = _first_text(fields, _PEOPLE) or text(queued_by) or ""
        yield Group(*key, *tally, by, _first_text(fields, _LINKS))


def link_of(payload: bytes) -> str | None:
    """Return where the event *payload* says that people can look, None where it does not."""
    return _first_text(fields_of(payload), _LINKS)


def fields_of(payload: Any) -> dict[str, Any]:
    """Return what *payload* says, nothing where it is no event: not only we write to an outbox that others share."""
    try:
        found = json.loads(payload)
    except (TypeError, ValueError, RecursionError):  # damaged, or let go
        return {}
    return found if isinstance(found, dict) else {}


def _first_text(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((fields[name] for name in names if isinstance(fields.get(name), str)), None)


_WALK = """
    SELECT product_name, version, reason, id, late, queued_at FROM record INDEXED BY record_refused
    WHERE state = 'failed' AND {behind} ORDER BY product_name, version, id LIMIT :page
"""
# Two, for SQLite does not seek to the id in a row value: a million failures of one version were read from its first.
WALK_VERSION = _WALK.format(behind="product_name = :p AND version = :v AND id > :i")
WALK = _WALK.format(behind="(product_name, version) > (:p, :v)")
FIRST = "SELECT queued_by, payload FROM record WHERE id = ? AND length(payload) <= ?"
