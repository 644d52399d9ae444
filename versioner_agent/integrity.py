"""The digest that every record carries, over what must never change once it is queued. Pure."""

from __future__ import annotations

import hashlib


def digest(  # exactly what must not change
    record_id: int,
    event_id: str,
    kind: str,
    names: tuple[str, str, str | None, str],
    run: tuple[str | None, str | None],
    occurrence: int,
    queued_at: float,
    origin: str | None,
    payload: bytes,
) -> bytes:
    """SHA-256 (32 bytes) over identity, order and payload; *names* and *run* are the columns derived from it.

    A flipped bit in a payload is valid SQLite: only this notices it.
    """
    parts = [str(record_id), event_id, kind, *names, *run, str(occurrence), repr(queued_at), origin]
    head = "\0".join("\1" if part is None else part for part in parts).encode()
    return hashlib.sha256(head + b"\0" + payload).digest()
