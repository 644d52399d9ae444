"""Export files made by hand: from an outbox, whose records count as exported then, or line by line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sqlite3
import uuid

from versioner_agent.exportfile import Header, Writer, event_line
from versioner_agent.records import COLUMNS, as_record

ORIGIN = "0123456789abcdef" * 2
BATCH = "fedcba9876543210" * 2


def sql(path, statement, *values):
    with contextlib.closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def uid_of(path):
    return sql(path, "SELECT uid FROM outbox")[0][0]


def export(path, file, *, host="build-7", limit=1_000_000):
    """Write what is pending in the outbox at *path* to *file* and mark it as exported; returns the header."""
    rows = sql(path, f"SELECT {COLUMNS}, payload FROM record WHERE state = 'pending' ORDER BY id LIMIT {limit}")
    previous = sql(path, "SELECT uid FROM export ORDER BY id DESC LIMIT 1")
    batch = uuid.uuid4().hex
    sql(path, "INSERT INTO export (uid, created_at, state, records) VALUES (?, 1.0, 'marked', ?)", batch, len(rows))
    sequence = sql(path, "SELECT max(id) FROM export")[0][0]
    header = Header(
        "events", uid_of(path), host, batch, sequence, previous[0][0] if previous else None, 1764150000.25, "0"
    )
    with open(file, "wb") as stream:
        writer = Writer(stream, compressed=str(file).endswith(".gz"))
        writer.line(header.line())
        for row in rows:
            writer.line(event_line(as_record(row[:-1]), row[-1], header.outbox))
        writer.finish()
    sql(
        path,
        "UPDATE record SET state = 'exported', batch = ? WHERE state = 'pending' AND id <= ?",
        -sequence,
        rows[-1][0],
    )
    return header


def event(number=1, **changes):
    """A line of an export, as an object; *fields* go into its payload and what is repeated of it."""
    fields = {
        "product_name": "payments", "version": str(number), "status": "completed", **changes.pop("fields", {}),
    }  # fmt: skip
    return {
        "id": number,
        "origin": ORIGIN,
        "event_id": str(uuid.UUID(int=number)),
        "kind": "build",
        "product_name": fields["product_name"],
        "version": fields["version"],
        "environment_name": fields.get("environment_name"),
        "status": fields["status"],
        "invoke_id": fields.get("invoke_id"),
        "run_attempt": None,
        "queued_at": 1764150000.0 + number,
        "queued_by": "uid 0",
        "payload": json.dumps(fields, sort_keys=True, separators=(",", ":")),
        **changes,
    }


def verdict(number=1, state="delivered", **changes):
    return {
        "origin": ORIGIN,
        "event_id": str(uuid.UUID(int=number)),
        "state": state,
        "settled_at": 1764160000.5,
        "attempts": 1,
        "http_status": 200 if state == "delivered" else 409,
        "server_id": "evt-1" if state == "delivered" else None,
        "reason": None if state == "delivered" else "conflict",
        "code": None,
        "rule": None,
        "retry_after": None,
        "late": 0,
        "detail": None if state == "delivered" else "exists with another SHA",
        **changes,
    }


def head(**changes):
    header = Header("events", ORIGIN, "build-7", BATCH, 1, None, 1764150000.0, "0")
    return {**header.line(), **changes}


def file_of(lines, header=None):
    """The bytes of a sound file with these lines: objects, or bytes as they are."""
    return sealed([head() if header is None else header, *lines])


def sealed(lines):
    """The bytes of *lines*, the header first, and the trailer that fits."""
    data = b"".join(line if isinstance(line, bytes) else as_line(line) for line in lines)
    trailer = {"trailer": True, "count": len(lines) - 1, "sha256": hashlib.sha256(data).hexdigest()}
    return data + as_line(trailer)


def as_line(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def written(lines, header):
    """The same by our own writer."""
    stream = io.BytesIO()
    writer = Writer(stream)
    for line in (header, *lines):
        writer.line(line)
    writer.finish()
    return stream.getvalue()
