"""SHA-256, and the digest that every record carries over what must never change once it is queued. Pure."""

from __future__ import annotations

try:  # The interpreter's own SHA-256, as its module random uses it: hashlib loads OpenSSL, 3 ms of each enqueue.
    from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore]  # Python 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256  # type: ignore[import-not-found,unused-ignore]  # Python 3.11
    except ImportError:
        from hashlib import sha256


def hash_of(data: bytes) -> bytes:
    """SHA-256 (32 bytes) of *data*."""
    return bytes(sha256(data).digest())


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
    return hash_of(head + b"\0" + payload)
