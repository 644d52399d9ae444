"""Records as values: what a row of the outbox says, whether it is intact, and its form in JSON. No queries here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from versioner_agent.events import rfc3339
from versioner_agent.integrity import digest


class Record(NamedTuple):
    """A row of the outbox, all columns but the payload; times are seconds since 1970."""

    id: int
    event_id: str
    state: str
    kind: str
    product_name: str
    version: str
    environment_name: str | None
    status: str
    invoke_id: str | None
    run_attempt: str | None
    content: bytes
    identity: bytes | None
    occurrence: int
    queued_at: float
    queued_by: str
    origin: str | None
    digest: bytes
    attempts: int
    retries: int
    unanswered: int
    counted: int
    counted_since: float | None
    counted_mark: int | None
    held_since: float | None
    last_attempt_at: float | None
    settled_at: float | None
    http_status: int | None
    server_id: str | None
    reason: str | None
    code: str | None
    rule: str | None
    retry_after: str | None
    late: int
    detail: str | None
    batch: int | None = None  # it was queued in; the negative id of the export it is in
    amends: int | None = None  # the record it is a corrected copy of

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt; a person's retry is a new request.

        What was never tried can't have been retried, whatever a damaged row says.
        """
        return f"{self.event_id}.{self.retries}" if self.retries and self.attempts else self.event_id


def number(value: Any) -> float | None:
    """Return *value* where it is a number: in a damaged row it may have become something else."""
    return value if isinstance(value, int | float) else None


def text(value: Any) -> str | None:
    """Return *value* as text, None as it is: one bit tells text from bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if value is None or isinstance(value, str) else str(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "str": lambda value: text(value) or "",
    "str | None": text,
    "int": lambda value: value if isinstance(value, int) else 0,
    "int | None": lambda value: value if isinstance(value, int) else None,
    "float": lambda value: number(value) or 0.0,
    "float | None": number,
    "bytes": lambda value: value if isinstance(value, bytes) else b"",
    "bytes | None": lambda value: value if isinstance(value, bytes) else None,
}
_COLUMN_KINDS = tuple(kind.__forward_arg__ for kind in Record.__annotations__.values())
_COLUMN_READERS = tuple(_READERS[kind] for kind in _COLUMN_KINDS)
_SOUND: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "bytes": (bytes,)}


@lru_cache(maxsize=256)  # there are few: what is not set yet is None
def _are_sound(kinds: tuple[type, ...]) -> bool:
    """Tell whether values of these types are what the columns of a sound outbox hold, so that no reader changes one."""
    return all(
        kind in _SOUND[word.removesuffix(" | None")] or (kind is type(None) and word.endswith(" | None"))
        for kind, word in zip(kinds, _COLUMN_KINDS, strict=True)
    )


def as_record(row: Sequence[Any]) -> Record:
    """Return the columns of *row* as a Record, each of its own type whatever a damaged file holds."""
    if _are_sound(tuple(map(type, row))):
        return Record._make(row)
    return Record(*(read(value) for read, value in zip(_COLUMN_READERS, row, strict=True)))


#: The columns of a Record, for SELECT.
COLUMNS = ", ".join(Record._fields)

_JSON_KEYS = (
    "id", "event_id", "state", "kind", "product_name", "version", "environment_name", "status", "invoke_id",
    "queued_at", "queued_by", "attempts", "last_attempt_at", "settled_at", "http_status", "server_id", "reason",
    "code", "rule", "retry_after", "late", "detail",
)  # fmt: skip


def record_json(record: Record) -> dict[str, Any]:
    """Return *record* with the documented keys."""
    found = record._asdict()
    shown = {key: found[key] for key in _JSON_KEYS}
    for key in ("queued_at", "last_attempt_at", "settled_at"):
        shown[key] = time_json(shown[key])
    shown["late"] = bool(shown["late"])
    return shown


def time_json(seconds: float | None) -> str | None:
    """Return seconds since 1970 as RFC 3339, None as it is."""
    return None if seconds is None else rfc3339(seconds)


def digest_of(record: Record, payload: bytes) -> bytes:
    """Return the digest that *record* must carry with *payload*."""
    return digest(
        record.id,
        record.event_id,
        record.kind,
        (record.product_name, record.version, record.environment_name, record.status),
        (record.invoke_id, record.run_attempt),
        record.occurrence,
        record.queued_at,
        record.origin,
        payload,
    )


def is_intact(record: Record, payload: bytes) -> bool:
    """Tell whether *record* and *payload* are as they were queued."""
    try:
        return digest_of(record, payload) == record.digest
    except (TypeError, ValueError):  # a column that has become another type
        return False
