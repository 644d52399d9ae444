"""Reading the API's own JSON bodies: one object, an array or JSON lines, of a kind that may be inferred. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from versioner_agent.errors import ValidationError
from versioner_agent.events import ALL_NAMES, FIELDS_OF, KINDS, STATUSES, Event, validate
from versioner_agent.values import json_type, shown


def parse_json(data: bytes, source: str = "input") -> list[tuple[str, Any]]:
    """Read one object, an array or JSON lines as [(where, value)]; raises ValidationError, never anything else.

    Stricter than `json`: NaN, Infinity and duplicate keys are refused. Several documents may follow one another.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        message = f"{source}: byte {exc.start} (0x{data[exc.start]:02x}) is not UTF-8"
        raise ValidationError([message]) from exc
    decoder = strict_decoder()
    values: list[tuple[str, Any]] = []
    position = _skip_space(text, 0)
    if position == len(text):
        raise ValidationError([f"{source}: empty, expected a JSON object, an array or JSON lines"])
    while position < len(text):
        # Lines are counted for errors only; a message about the fifth of ten objects must say where it is.
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as exc:
            message = f"{source}: line {exc.lineno} column {exc.colno}: not valid JSON: {exc.msg}"
            raise ValidationError([message]) from exc
        except RecursionError as exc:
            raise ValidationError([f"{source}: nested too deeply"]) from exc
        except ValueError as exc:
            line = text.count("\n", 0, position) + 1
            raise ValidationError([f"{source}: in the object at line {line}: {exc}"]) from exc
        values.append((f"event {len(values) + 1}", value))
        position = _skip_space(text, end)
    if len(values) == 1:
        only = values[0][1]
        if isinstance(only, list):
            if not only:
                raise ValidationError([f"{source}: an empty array holds no event"])
            return [(f"event {number}", value) for number, value in enumerate(only, 1)]
        return [("", only)]
    return values


def strict_decoder() -> json.JSONDecoder:
    """Return what reads JSON but for NaN, Infinity and duplicate keys; it raises ValueError and RecursionError."""
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def parse_object(text: str, name: str) -> dict[str, Any]:
    """Read *text* as one JSON object for the field *name*; raises ValidationError."""
    try:
        data = text.encode()
    except UnicodeEncodeError as exc:
        raise ValidationError([f"{name}: holds bytes that are not UTF-8"]) from exc
    values = parse_json(data, name)
    if len(values) != 1 or values[0][0] or not isinstance(values[0][1], dict):
        raise ValidationError([f"{name}: must be one JSON object"])
    return values[0][1]


#: Adds to the fields of an event of a kind what else is known of it.
Completion = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def validate_all(
    items: Iterable[tuple[str, Any]],
    kind: str | None = None,
    *,
    allow_unknown: bool = False,
    complete: Completion = lambda _, fields: fields,
) -> list[Event]:
    """Validate [(where, fields)] whose kind may have to be inferred; raises ValidationError with all problems."""
    events: list[Event] = []
    problems: list[str] = []
    for where, fields in items:
        prefix = f"{where}: " if where else ""
        try:
            if not isinstance(fields, dict):
                raise ValidationError([f"must be a JSON object, not {json_type(fields)}"])
            chosen, rest = _infer(fields, kind)
            events.append(validate(chosen, complete(chosen, rest), allow_unknown=allow_unknown))
        except ValidationError as exc:
            problems += [prefix + problem for problem in exc.problems]
    if problems:
        raise ValidationError(problems)
    return events


def _infer(fields: dict[str, Any], kind: str | None) -> tuple[str, dict[str, Any]]:
    """Return the kind of an event and its fields without it; raises ValidationError."""
    named = fields.get("kind")
    rest = {name: value for name, value in fields.items() if name != "kind"}
    if named is not None and named not in KINDS:
        raise ValidationError([f'kind: must be "build" or "deployment", not {shown(named)}'])
    if named is not None and kind is not None and named != kind:
        raise ValidationError([f"kind: the event says {named}, the command says {kind}"])
    chosen = kind or named
    if chosen is None:
        chosen = "deployment" if rest.get("environment_name") is not None else "build"
        if chosen == "build":
            _refuse_half_a_deployment(rest)
    return chosen, rest


def _refuse_half_a_deployment(fields: dict[str, Any]) -> None:
    only = [name for name in fields if name in ALL_NAMES and name not in FIELDS_OF["build"]]
    status = fields.get("status")
    if isinstance(status, str) and status.strip().lower() in STATUSES["completed"][1] + STATUSES["started"][1]:
        only.append(f"status {status.strip()}")
    only = [name for name in only if name != "environment_name"]
    if only:
        raise ValidationError(
            [f"{', '.join(only)}: belongs to a deployment; add environment_name, or say which with --kind"]
        )


def _skip_space(text: str, position: int) -> int:
    """Return where the next JSON value starts; JSON's white space only (RFC 8259 section 2)."""
    end = len(text)
    while position < end and text[position] in " \t\r\n":
        position += 1
    return position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} is given twice")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
