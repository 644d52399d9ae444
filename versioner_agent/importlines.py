"""What each line of an export file must be: exact keys, exact types, and an event that the API would take. Pure.

Strict, so that a line means one thing only, whoever reads it. What an event's line repeats of its payload must be the
same there; the payload itself is kept to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from versioner_agent.bodies import strict_decoder
from versioner_agent.errors import ValidationError
from versioner_agent.events import KINDS, MAX_BODY_BYTES, STATUSES, Event, content_digest, validate
from versioner_agent.exportfile import CONTENTS, EVENT_KEYS, FORMAT, FORMAT_VERSION, VERDICT_KEYS
from versioner_agent.values import shorten, shown, string_problem

MAX_TIME = 253_402_300_800.0  # the year 10000
MAX_ID = 2**63 - 1
MAX_NUMBER = 1e300  # 1e999 is infinity for `json`
MAX_NAME_CHARS = 255  # of a host or of our version; a host's name has 64 at most (gethostname(2))
#: What came to its end elsewhere.
VERDICTS = ("delivered", "failed", "discarded")

_UID = re.compile("[0-9a-f]{32}")
_EVENT_ID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_SHA256 = re.compile("[0-9a-f]{64}")
_WORD = re.compile("[a-z][a-z_]{0,39}")


class Exported(NamedTuple):
    """An event in a file; times are seconds since 1970."""

    origin: str  # the outbox it was queued in
    event_id: str
    kind: str
    product_name: str
    version: str
    environment_name: str | None
    status: str
    invoke_id: str | None
    run_attempt: str | None
    queued_at: float
    queued_by: str
    payload: bytes
    content: bytes  # see `events.content_digest`


class Verdict(NamedTuple):
    """What became of an event on the far side, as the file has it: its texts are of any length, and anybody's."""

    origin: str
    event_id: str
    state: str  # one of VERDICTS
    settled_at: float | None
    attempts: int
    http_status: int | None
    server_id: str | None
    reason: str | None
    code: str | None
    rule: str | None
    retry_after: str | None
    late: int
    detail: str | None


class Problem(Exception):
    """What is wrong with a line."""


class EventReader:
    """Reads the lines of a file of events."""

    def __init__(self) -> None:
        self._decoder = strict_decoder()
        self._last_id = 0

    def read(self, found: dict[str, Any]) -> Exported:
        """Return a checked line; raises Problem."""
        match(found, _EVENT)
        if found["id"] <= self._last_id:
            raise Problem(f"id {found['id']} does not come after {self._last_id}")
        self._last_id = found["id"]
        payload = found["payload"].encode()
        event = self._event(found["kind"], payload, found)
        # -0.0 is read back from SQLite as 0.0, which a record's digest tells apart.
        values = found | {"queued_at": float(found["queued_at"]) + 0.0, "payload": payload}
        del values["id"]
        return Exported(**values, content=content_digest(event))

    def _event(self, kind: str, payload: bytes, found: Mapping[str, Any]) -> Event:
        """Return the event in *payload*, which the API would take and whose line says the same of it."""
        if len(payload) > MAX_BODY_BYTES:
            raise Problem(f"its payload is larger than {MAX_BODY_BYTES} bytes")
        try:
            fields = self._decoder.decode(payload.decode())
        except (ValueError, RecursionError) as exc:
            raise Problem(f"its payload is not valid JSON: {getattr(exc, 'msg', exc)}") from exc
        if not isinstance(fields, dict):
            raise Problem("its payload is not a JSON object")
        try:
            event = validate(kind, fields, allow_unknown=True)
        except ValidationError as exc:
            raise Problem(f"its payload is no valid {kind}: {exc.problems[0]}") from exc
        for name in _IN_PAYLOAD:
            if not fields.get(name) == event.fields.get(name) == found[name]:
                raise Problem(f"its payload says something else of {name} than the line does")
        return event


class VerdictReader:
    """Reads the lines of a file of receipts."""

    def read(self, found: dict[str, Any]) -> Verdict:
        """Return a checked line; raises Problem."""
        match(found, _VERDICT)
        return Verdict(**found)


def verdict_problem(line: Mapping[str, Any]) -> str:
    """Say what would have a reader refuse *line* as a verdict; empty where nothing would."""
    try:
        match(line, _VERDICT)
    except Problem as exc:
        return str(exc)
    return ""


class _Rule(NamedTuple):
    """What a value must be."""

    words: str
    holds: Callable[[Any], bool]
    is_optional: bool = False


def match(found: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    """Raise Problem unless *found* has the keys of *rules* and no other, each with what it must be."""
    if found.keys() != rules.keys():
        missing, unknown = sorted(rules.keys() - found.keys()), sorted(found.keys() - rules.keys())
        told = [f"{missing[0]} is missing"] if missing else [f"{shorten(shown(unknown[0]))} is not known here"]
        raise Problem(", ".join(told))
    for name, rule in rules.items():
        value = found[name]
        if not (rule.is_optional if value is None else rule.holds(value)):
            raise Problem(f"{name} must be {rule.words}, not {shown(value)}")


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < MAX_TIME


def _is_text(value: Any) -> bool:
    return type(value) is str and not string_problem(value)


def _is_name(value: Any) -> bool:
    return _is_text(value) and len(value) <= MAX_NAME_CHARS


def _like(words: str, pattern: re.Pattern[str], *, is_optional: bool = False) -> _Rule:
    return _Rule(words, lambda value: type(value) is str and pattern.fullmatch(value) is not None, is_optional)


def _one_of(*known: Any) -> _Rule:
    return _Rule(
        " or ".join(map(str, known)), lambda value: any(type(value) is type(each) and value == each for each in known)
    )


def _between(lowest: int, highest: int, *, is_optional: bool = False) -> _Rule:
    words = f"a whole number from {lowest}" + (f" to {highest}" if highest < MAX_ID else "")
    return _Rule(words, lambda value: type(value) is int and lowest <= value <= highest, is_optional)


_TEXT = _Rule("text", _is_text)
_TEXT_OR_NONE = _TEXT._replace(is_optional=True)
_NAME = _Rule(f"text of up to {MAX_NAME_CHARS} characters", _is_name)
_TIME = _Rule("seconds since 1970", _is_time)
_ANY_TIME = _Rule("a number", lambda value: type(value) in (int, float) and abs(value) < MAX_NUMBER, is_optional=True)
_UID_RULE = _like("32 hexadecimal digits", _UID)

HEADER = {
    "format": _one_of(FORMAT),
    "format_version": _one_of(FORMAT_VERSION),
    "content": _one_of(*CONTENTS),
    "outbox": _UID_RULE,
    "host": _NAME,
    "batch": _UID_RULE,
    "sequence": _between(0, MAX_ID),
    "previous": _UID_RULE._replace(is_optional=True),
    "created_at": _TIME,
    "agent_version": _NAME,
}
_EVENT = {
    "id": _between(1, MAX_ID),
    "origin": _UID_RULE,
    "event_id": _like("a UUID in lower case", _EVENT_ID),
    "kind": _one_of(*KINDS),
    "product_name": _TEXT,
    "version": _TEXT,
    "environment_name": _TEXT_OR_NONE,
    "status": _one_of(*STATUSES),
    "invoke_id": _TEXT_OR_NONE,
    "run_attempt": _TEXT_OR_NONE,
    "queued_at": _TIME,
    "queued_by": _TEXT,
    "payload": _TEXT,
}
_VERDICT = {
    "origin": _UID_RULE,
    "event_id": _EVENT["event_id"],
    "state": _one_of(*VERDICTS),
    "settled_at": _ANY_TIME,
    "attempts": _between(0, MAX_ID),
    "http_status": _between(100, 999, is_optional=True),
    "server_id": _TEXT_OR_NONE,
    "reason": _like("a word", _WORD, is_optional=True),
    "code": _TEXT_OR_NONE,
    "rule": _TEXT_OR_NONE,
    "retry_after": _TEXT_OR_NONE,
    "late": _between(0, 1),
    "detail": _TEXT_OR_NONE,
}
TRAILER = {
    "trailer": _one_of(True),
    "count": _between(0, MAX_ID),
    "sha256": _like("64 hexadecimal digits", _SHA256),
}
assert (tuple(_EVENT), tuple(_VERDICT)) == (EVENT_KEYS, VERDICT_KEYS)
#: What a line repeats of its payload.
_IN_PAYLOAD = ("product_name", "version", "environment_name", "status", "invoke_id")
