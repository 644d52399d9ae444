"""An outbox with a life behind it, where each of its records lies in the file, and what can happen to its bytes."""

from __future__ import annotations

import contextlib
import os
import random
from typing import NamedTuple

from versioner_agent import events, schema
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import Destination, Outbox
from versioner_agent.pages import PAGE_BYTES, row_at, rows
from versioner_agent.records import Record, is_intact
from versioner_agent.storage import Store

HERE = Destination("https://api.example", "acme")
PRODUCTS = 7
COLUMNS = (
    "id", "event_id", "state", "kind", "product_name", "version", "environment_name", "status", "invoke_id",
    "run_attempt", "content", "identity", "occurrence", "queued_at", "queued_by", "batch", "origin", "amends",
    "digest", "attempts", "retries", "unanswered", "counted", "counted_since", "counted_mark", "held_since",
    "last_attempt_at", "settled_at", "http_status", "server_id", "reason", "code", "rule", "retry_after", "late",
    "detail", "payload",
)  # fmt: skip
SETTLE = "UPDATE record SET state = ?, settled_at = ?, attempts = 1, detail = ?, server_id = ? WHERE id = ?"


def make_tables(connection, version):
    """Make an outbox of an older schema, as programs of then did."""
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    for statement in schema.statements(version):
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {version}")


class Kept(NamedTuple):
    """What must survive of a record."""

    id: int
    event_id: str
    state: str
    product_name: str
    identity: bytes
    occurrence: int
    queued_at: float
    payload: bytes


class Specimen:
    """Pending, delivered, failed, discarded and pruned records; `kept` by id, `places` by page and offset."""

    def __init__(self, directory, size, seed):
        path = os.path.join(directory, "outbox.db")
        dice = random.Random(seed)
        with Outbox(path) as outbox:
            ledger = Ledger(outbox.store)
            ledger.open(create=True)
            ledger.keep_reserve()
            _live(outbox, size, dice)
        self.files = {}
        for name in os.listdir(directory):
            with open(os.path.join(directory, name), "rb") as file:
                self.files[name] = file.read()
        self.kept = records_of(path)
        self.places = _places(self.files["outbox.db"])
        assert self.kept.keys() == {row.rowid for row in self.places.values()}
        assert len(self.kept) > 100

    def copy_to(self, directory):
        """Write all files into *directory*; returns the outbox's path."""
        for name, content in self.files.items():
            with open(os.path.join(directory, name), "wb") as file:
                file.write(content)
        return os.path.join(directory, "outbox.db")

    def provable(self, path):
        """The ids of the records that their bytes in the file at *path* still prove."""
        if not os.path.exists(path):
            return set()
        with open(path, "rb") as file:
            data = file.read()

        def read(number):
            return data[(number - 1) * PAGE_BYTES : number * PAGE_BYTES]

        found = set()
        for (number, start), row in self.places.items():
            here = row_at(read(number), start, read)
            if here is not None and here.rowid == row.rowid and _is_proven(here):
                found.add(row.rowid)
        return found


def records_of(path):
    """All records of the outbox at *path*, by id."""
    with contextlib.closing(Store(path)) as store, store.read() as connection:
        found = connection.execute(f"SELECT {', '.join(Kept._fields)} FROM record").fetchall()
    return {row[0]: Kept(*row) for row in found}


def _live(outbox, size, dice):
    count = 0
    while not os.path.exists(outbox.store.path) or os.path.getsize(outbox.store.path) < size:
        outbox.enqueue_all([_event(count + number, dice) for number in range(1, 201)])
        count += 200
    with outbox.store.write() as connection:
        connection.execute("UPDATE destination SET origin = ?, account = ?, deliveries = 9", HERE)
        for record_id in range(1, count + 1):
            state = dice.choice(("pending", "pending", "delivered", "delivered", "failed", "discarded"))
            if state != "pending":
                words = "words " * dice.randrange(9)
                connection.execute(SETTLE, (state, 1.8e9 + record_id, words, "srv", record_id))
    with outbox.store.write() as connection:
        connection.execute("DELETE FROM record WHERE id % 10 = 3 AND state <> 'pending'")
        connection.execute("PRAGMA incremental_vacuum(8)").fetchall()


def _event(number, dice):
    return events.validate("build", {
        "product_name": f"product-{dice.randrange(PRODUCTS)}", "version": str(number), "status": "completed",
        "invoke_id": str(number),
        "extra_metadata": {"notes": "n" * dice.choice((5, 50, 400, 400, 900, 6000))},
    })  # fmt: skip


def _places(data):
    count = len(data) // PAGE_BYTES

    def read(number):
        return data[(number - 1) * PAGE_BYTES : number * PAGE_BYTES]

    return {
        (number, row.start): row
        for number in range(2, count + 1)
        for row in rows(read(number), read)
        if not row.is_free and _is_proven(row)
    }


def _is_proven(row):
    if len(row.values) != len(COLUMNS):
        return False
    columns = dict(zip(COLUMNS, row.values, strict=True)) | {"id": row.rowid}
    return is_intact(Record(**{name: columns[name] for name in Record._fields}), columns["payload"])


# --- what can happen to a file


def _flip(path, dice, count):
    with open(path, "r+b") as file:
        size = os.path.getsize(path)
        for _ in range(count):
            at = dice.randrange(size)
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes((byte ^ 1 << dice.randrange(8),)))


def _overwrite(path, page, content):
    with open(path, "r+b") as file:
        file.seek(page * PAGE_BYTES)
        file.write(content)


def _pages(path):
    return os.path.getsize(path) // PAGE_BYTES


def one_bit(path, dice):
    _flip(path, dice, 1)


def many_bits(path, dice):
    _flip(path, dice, dice.choice((10, 100, 1000)))


def truncated(path, dice):
    os.truncate(path, dice.randrange(1, os.path.getsize(path)))


def zeroed_pages(path, dice):
    for _ in range(dice.choice((1, 3, 30))):
        _overwrite(path, dice.randrange(_pages(path)), bytes(PAGE_BYTES))


def garbage_page(path, dice):
    _overwrite(path, dice.randrange(_pages(path)), dice.randbytes(PAGE_BYTES))


def garbage_header(path, dice):
    _overwrite(path, 0, dice.randbytes(dice.choice((16, 100, PAGE_BYTES))))


def garbage_journal(path, dice):
    with open(f"{path}-journal", "wb") as file:
        file.write(dice.randbytes(dice.choice((1, 512, 100_000))))


def empty(path, _):
    os.truncate(path, 0)


def missing(path, _):
    os.remove(path)


MUTATIONS = (
    one_bit, many_bits, truncated, zeroed_pages, garbage_page, garbage_header, garbage_journal, empty, missing,
)  # fmt: skip
