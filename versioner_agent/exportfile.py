"""The export file: JSON lines that carry records, or verdicts on them, across an air gap. Knows neither SQL nor paths.

A header, a line for each record, and a trailer with their count and the SHA-256 of all before it, decompressed.
Times are seconds since 1970, written so that they read back as they were; a payload is a string, so that its bytes do.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, BinaryIO, NamedTuple, Protocol

from versioner_agent.records import Record

FORMAT = "versioner-agent export"
FORMAT_VERSION = 1
#: What a file may hold.
CONTENTS = ("events", "receipts")
#: No line is longer (bytes, decompressed): a payload of 256 KiB, doubled by escapes, and names.
MAX_LINE_BYTES = 2 * 1024 * 1024
#: Names that end so are compressed.
COMPRESSED_SUFFIX = ".gz"

#: A line's keys, each under the name of a record's column; `queued_at` and `settled_at` are numbers.
EVENT_KEYS = (
    "id", "origin", "event_id", "kind", "product_name", "version", "environment_name", "status", "invoke_id",
    "run_attempt", "queued_at", "queued_by", "payload",
)  # fmt: skip
VERDICT_KEYS = (
    "origin", "event_id", "state", "settled_at", "attempts", "http_status", "server_id", "reason", "code", "rule",
    "retry_after", "late", "detail",
)  # fmt: skip


class Header(NamedTuple):
    """What the first line says, behind the format's name and version."""

    content: str  # one of CONTENTS
    outbox: str  # uid of the outbox that wrote the file
    host: str
    batch: str  # 32 hexadecimal digits
    sequence: int  # grows from batch to batch of an outbox; 0 for receipts
    previous: str | None  # the batch of this outbox that was marked before it
    created_at: float
    agent_version: str

    def line(self) -> dict[str, Any]:
        """Return the first line's object."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **self._asdict()}


def event_line(record: Record, payload: bytes, outbox: str) -> dict[str, Any]:
    """Return the object for *record*, whose digest was checked; it comes from *outbox* unless it was imported there."""
    line: dict[str, Any] = dict(zip(EVENT_KEYS, _EVENT_VALUES(record), strict=False))
    line["origin"] = record.origin or outbox
    line["payload"] = payload.decode()
    return line


_EVENT_VALUES = attrgetter(*EVENT_KEYS[:-1])


def verdict_line(record: Record) -> dict[str, Any]:
    """Return the object for the verdict on *record*, which was imported."""
    found = record._asdict()
    return {key: found[key] for key in VERDICT_KEYS}


def is_compressed(name: str) -> bool:
    """Tell whether the file *name* is written and read through gzip."""
    return name.endswith(COMPRESSED_SUFFIX)


class Summed(NamedTuple):
    """What the trailer says."""

    lines: int  # behind the header
    sha256: str  # 64 hexadecimal digits


class _Sink(Protocol):
    def write(self, data: bytes, /) -> object: ...


class Writer:
    """Writes one export into a binary file, header first; memory holds a line."""

    def __init__(self, file: BinaryIO, *, compressed: bool = False) -> None:
        """Write into *file*, which stays open, through gzip where *compressed*: the same lines give the same bytes."""
        self._gzip = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if compressed else None
        self._sink: _Sink = self._gzip or file
        self._sum = hashlib.sha256()
        self._lines = 0

    def line(self, value: Mapping[str, Any]) -> None:
        """Write *value* as the next line; raises OSError."""
        line = _as_line(value)
        self._sum.update(line)
        self._lines += 1
        self._sink.write(line)

    def finish(self) -> Summed:
        """Write the trailer; flushing and syncing the file is the caller's. Raises OSError."""
        summed = Summed(self._lines - 1, self._sum.hexdigest())
        self._sink.write(_as_line({"trailer": True, "count": summed.lines, "sha256": summed.sha256}))
        if self._gzip is not None:
            self._gzip.close()
        return summed


def _as_line(value: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(value).encode() + b"\n"


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
