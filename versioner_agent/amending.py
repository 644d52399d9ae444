"""Corrected copies of refused events: `amend`.

A copy is a new event with the old one's times and metadata, queued behind what its product has waiting, and refers to
the record it amends, which is discarded in the same transaction. Nothing is written while one of the events would be
invalid, so that a correction that fits only some of them is noticed first.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from versioner_agent import __version__, events, review
from versioner_agent.errors import OutboxOutdated, ValidationError
from versioner_agent.filters import Filter
from versioner_agent.groups import fields_of
from versioner_agent.integrity import digest
from versioner_agent.outbox import LIVE_STATES, SELECT_NEXT_ID, Outbox
from versioner_agent.records import Record, as_record, is_intact
from versioner_agent.schema import EXPORTS_SINCE
from versioner_agent.selecting import select
from versioner_agent.storage import Store, placeholders
from versioner_agent.values import shown

PAGE = 100  # records one read looks at
MOST_PROBLEMS = 100
AMENDABLE = ("failed", "pending")
METADATA = "extra_metadata"
_EVENT_ID = f"{events.AGENT_PREFIX}event_id"
_TIMES = ("started_at", "completed_at")
_TRUTH = {"true": True, "false": False}

#: Field, or `extra_metadata.KEY`, -> what it was and what it becomes; None where there is nothing.
Changes = dict[str, tuple[Any, Any]]


class Correction(NamedTuple):
    """What is to be changed: names of fields, or `extra_metadata.KEY`."""

    changed: dict[str, Any]
    unset: tuple[str, ...]


class Amendment(NamedTuple):
    """What became, or would become, of one record."""

    id: int
    outcome: str  # planned | amended | unchanged | superseded | refused | not_found
    amended_by: int | None = None
    changes: Changes = {}  # noqa: RUF012  # never changed
    detail: str = ""
    record: Record | None = None


class _Copy(NamedTuple):
    """The corrected event, ready to be inserted."""

    event: events.Event
    event_id: str
    payload: bytes
    content: bytes
    identity: bytes | None


def correction(assignments: Iterable[str], unset: Iterable[str]) -> Correction:
    """Return what `field=value` words and names of fields ask for, values of the field's type.

    Raises ValidationError with all that is wrong with them.
    """
    problems: list[str] = []
    changed: dict[str, Any] = {}
    for words in assignments:
        name, equals, value = words.partition("=")
        name = name.strip()
        problem = "" if equals else f"--set {shown(words)}: must be FIELD=VALUE"
        problem = problem or _unknown(name)
        if not problem:
            changed[name], problem = _typed(name, value)
        problems += [problem] if problem else []
    names = tuple(name.strip() for name in unset)
    problems += [f"{name}: is both set and unset" for name in names if name in changed]
    if problems:
        raise ValidationError(problems)
    return Correction(changed, names)


def _unknown(name: str) -> str:
    field, dot, key = name.partition(".")
    if name in events.ALL_NAMES or (field == METADATA and dot and key):
        return ""
    close = events.nearest(name, events.ALL_NAMES)
    return f"{shown(name)}: unknown field; " + (
        f"did you mean {close!r}?" if close else "extra_metadata.KEY names a text in extra_metadata"
    )


def _typed(name: str, value: str) -> tuple[Any, str]:
    """Return *value* as the field *name* holds it, and what is wrong with it."""
    kind = next((field.type for field in events.FIELDS if field.name == name), "string")
    if kind == "boolean":
        return _TRUTH.get(value.lower()), "" if value.lower() in _TRUTH else f"{name}: must be true or false"
    if kind == "object":
        from versioner_agent import bodies  # noqa: PLC0415  # only where there is JSON to read

        try:
            return bodies.parse_object(value, name), ""
        except ValidationError as exc:
            return None, exc.problems[0]
    return value, ""


def planned(
    outbox: Outbox, chosen: Filter | Sequence[int], wanted: Correction, *, out_of_order: bool = False
) -> Iterator[Amendment]:
    """Yield what amending the *chosen* records would do, the oldest first; nothing is written.

    Raises ValidationError, when all were looked at, with the problems of those that would be invalid; OutboxError.
    """
    problems: list[str] = []
    for page in _pages(outbox.store, chosen):
        found = []
        with outbox.store.read() as connection:
            for record_id in page:
                try:
                    found.append(_judge(connection, record_id, wanted, out_of_order=out_of_order)[0])
                except ValidationError as exc:
                    problems += [f"record {record_id}: {problem}" for problem in exc.problems][:MOST_PROBLEMS]
        yield from found
        if len(problems) > MOST_PROBLEMS:
            break
    if problems:
        raise ValidationError(problems, "nothing was done: choose others, or another correction")


def amend(
    outbox: Outbox, chosen: Filter | Sequence[int], wanted: Correction, *, out_of_order: bool = False
) -> Iterator[Amendment]:
    """Queue corrected copies of the *chosen* records and discard these, each pair in one transaction, the oldest first.

    Raises ValidationError, with nothing done, where one of the copies would be invalid; OutboxError.
    """
    for _ in planned(outbox, chosen, wanted, out_of_order=out_of_order):
        pass
    for page in _pages(outbox.store, chosen):
        for record_id in page:
            try:
                yield _amend(outbox, record_id, wanted, out_of_order=out_of_order)
            except ValidationError as exc:  # it came to be meant after all were looked at
                yield Amendment(record_id, "refused", detail="; ".join(exc.problems))


def _pages(store: Store, chosen: Filter | Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield ids in pages, in the order in which they were queued, for so go their copies.

    Of a filter's, those that were there in the beginning: a copy may fit it too.
    """
    with store.read() as connection:
        if store.version < EXPORTS_SINCE:
            raise OutboxOutdated
        last = connection.execute("SELECT COALESCE(max(id), 0) FROM record").fetchone()[0]
    if not isinstance(chosen, Filter):
        ids = sorted(set(chosen))
        yield from (ids[start : start + PAGE] for start in range(0, len(ids), PAGE))
        return
    for page in select(store, chosen, oldest_first=True, page=PAGE):
        ids = [record.id for record in page if record.id <= last]
        if not ids:
            return
        yield ids


def _amend(outbox: Outbox, record_id: int, wanted: Correction, *, out_of_order: bool) -> Amendment:
    with outbox.store.write() as connection:
        found, copy = _judge(connection, record_id, wanted, out_of_order=out_of_order)
        if copy is None or found.record is None:
            return found
        outbox._check(connection, None)  # noqa: SLF001  # what is queued takes space, whoever queues it
        connection.execute(review.DISCARD, (time.time(), record_id))
        new_id = _insert(connection, found.record, copy, outbox.queued_by)
        return found._replace(outcome="amended", amended_by=new_id)


def _judge(
    connection: sqlite3.Connection, record_id: int, wanted: Correction, *, out_of_order: bool
) -> tuple[Amendment, _Copy | None]:
    """Return what is to become of a record, and its corrected copy where there is to be one; raises ValidationError."""
    row = connection.execute(review.SHOW, (record_id,)).fetchone()
    if row is None:
        return Amendment(record_id, "not_found", detail="there is no such record"), None
    record = as_record(row[:-1])
    payload = row[-1] if isinstance(row[-1], bytes) else str(row[-1]).encode()
    again = connection.execute(review.AMENDED_BY, (record_id,)).fetchone()
    against = f"it was amended as {again[0]}" if again else _objection(record, payload)
    after = None if against or out_of_order else review.overtaken_by(connection, record)
    if after is not None:
        against = f"{after} of the same run was delivered since; --out-of-order amends it all the same"
    if against:
        return Amendment(record_id, "refused", again and again[0], detail=against, record=record), None
    old = fields_of(payload)
    copy = _corrected(record, old, wanted)
    changes = _changes(old, json.loads(copy.payload))
    if not changes:
        return Amendment(record_id, "unchanged", record=record), None
    other = _same(connection, record, copy)
    if other is not None:
        words = f"the corrected event was queued before as {other}"
        return Amendment(record_id, "superseded", changes=changes, detail=words, record=record), None
    first = review.waiting_after(connection, record)
    waits = [f"{first} of the same run waits, and goes first"] if first is not None else []
    detail = "; ".join(filter(None, [*waits, review.sent_still(record)]))
    return Amendment(record_id, "planned", changes=changes, detail=detail, record=record), copy


def _objection(record: Record, payload: bytes) -> str:
    if record.state == "exported":
        return "it is exported, and the far side has it; `retry` takes it back, `discard` gives it up"
    if record.state not in AMENDABLE:
        return f"it is {record.state}; only failed and pending ones are amended"
    if not is_intact(record, payload):
        return "its content is damaged; queue the event again"
    if not payload:
        return "its payload was let go; queue the event again"
    return "" if fields_of(payload) else "its payload is no event; queue the event again"


def _corrected(record: Record, old: Mapping[str, Any], wanted: Correction) -> _Copy:
    """Return the corrected event; raises ValidationError."""
    fields = _applied(old, record, wanted)
    known = events.FIELDS_OF[record.kind]
    problems = [
        f"{name}: is not a field of a {record.kind}" for name in wanted.changed if name.partition(".")[0] not in known
    ]
    problems += [problem for name in wanted.unset if name not in old for problem in [_unknown(name)] if problem]
    try:
        event = events.validate(record.kind, fields, allow_unknown=True)
    except ValidationError as exc:
        raise ValidationError([*problems, *exc.problems]) from exc
    if problems:
        raise ValidationError(problems)
    event_id = str(uuid.uuid4())
    stamp = events.Stamp(event_id, record.queued_at, os.uname().nodename, __version__)
    body = events.payload(event, stamp)
    content = events.content_digest(event)
    identity = events.identity(record.kind, event.fields.get("invoke_id"), record.run_attempt, content)
    return _Copy(event, event_id, body, content, identity)


def _applied(old: Mapping[str, Any], record: Record, wanted: Correction) -> dict[str, Any]:
    """Return the fields of the *old* payload as they are *wanted*, without the old event's id and automatic times."""
    moment = events.rfc3339(record.queued_at)
    old = {name: value for name, value in old.items() if not (name in _TIMES and value == moment)}
    ours = {key: value for key, value in _metadata(old).items() if key.startswith(events.AGENT_PREFIX)}
    fields = {**old, **{name: value for name, value in wanted.changed.items() if "." not in name}}
    for name in wanted.unset:
        fields.pop(name, None)
    metadata = ours | _metadata(fields)
    for name, value in wanted.changed.items():
        if "." in name:
            metadata[name.partition(".")[2]] = value
    for name in wanted.unset:
        if "." in name:
            metadata.pop(name.partition(".")[2], None)
    if metadata.get(_EVENT_ID) == record.event_id:
        del metadata[_EVENT_ID]  # the copy gets one of its own
    return {**fields, METADATA: metadata}


def _metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = fields.get(METADATA)
    return dict(found) if isinstance(found, dict) else {}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    before, after = _flat(old), _flat(new)
    names = dict.fromkeys([*before, *after])
    return {
        name: (before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name) and name != f"{METADATA}.{_EVENT_ID}"
    }


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return *fields* with those of the metadata beside them."""
    top = {name: value for name, value in fields.items() if name != METADATA}
    return top | {f"{METADATA}.{key}": value for key, value in _metadata(fields).items()}


def _same(connection: sqlite3.Connection, record: Record, copy: _Copy) -> int | None:
    """Return the live record, another than *record*, that *copy* would repeat (see `outbox`); None without one."""
    if copy.identity is None:
        return None
    row = connection.execute(FIND_LIVE, (copy.identity, record.id, *LIVE_STATES)).fetchone()
    if row is None or record.kind == "build":
        return int(row[0]) if row else None
    fields = copy.event.fields
    named = (fields["invoke_id"], fields["product_name"], fields["environment_name"], record.id)
    newest = connection.execute(FIND_NEWEST_OF_RUN, named).fetchone()
    return int(row[0]) if newest == row else None


def _insert(connection: sqlite3.Connection, old: Record, copy: _Copy, queued_by: str) -> int:
    kind, fields = copy.event
    new_id = int(connection.execute(SELECT_NEXT_ID).fetchone()[0])
    occurrence = 0
    if copy.identity is not None:
        occurrence = connection.execute(NEXT_OCCURRENCE, (copy.identity,)).fetchone()[0]
    names = (fields["product_name"], fields["version"], fields.get("environment_name"), fields["status"])
    run = (fields.get("invoke_id"), old.run_attempt)
    signed = digest(new_id, copy.event_id, kind, names, run, occurrence, old.queued_at, None, copy.payload)
    row = (
        new_id, copy.event_id, kind, *names, *run, copy.content, copy.identity, occurrence, old.queued_at, queued_by,
        old.id, signed, copy.payload,
    )  # fmt: skip
    connection.execute(INSERT_COPY, row)
    return new_id


_PUBLISHED = "(state = 'staged' AND batch IN (SELECT id FROM batch WHERE published = 1))"
FIND_LIVE = f"""
    SELECT id FROM record
    WHERE identity = ? AND id <> ? AND (state IN ({placeholders(list(LIVE_STATES))}) OR {_PUBLISHED})
    ORDER BY id DESC LIMIT 1
"""  # noqa: S608  # a constant
FIND_NEWEST_OF_RUN = f"""
    SELECT id FROM record
    WHERE invoke_id = ? AND product_name = ? AND environment_name = ? AND id <> ?
        AND kind = 'deployment' AND origin IS NULL AND (state <> 'staged' OR {_PUBLISHED})
    ORDER BY id DESC LIMIT 1
"""  # noqa: S608  # a constant
NEXT_OCCURRENCE = "SELECT COALESCE(max(occurrence) + 1, 0) FROM record WHERE identity = ?"
INSERT_COPY = """
    INSERT INTO record (
        id, event_id, state, kind, product_name, version, environment_name, status, invoke_id, run_attempt,
        content, identity, occurrence, queued_at, queued_by, amends, digest, payload
    ) VALUES (?, ?, 'pending', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
