"""Rows read from bytes are the rows that SQL reads; bytes that are no rows are passed over, never an error."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from versioner_agent.pages import LEAF, PAGE_BYTES, row_at, rows

VALUES = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(max_size=50), st.sampled_from([0, 1, -1, 127, 128, 2**15, 2**23, 2**31, 2**47, b"x" * 4060, b"y" * 9000]),
)  # fmt: skip


def database(values):
    """The bytes of a file with one table, whose rows begin with an event id."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, event_id TEXT, a, b)")
        connection.executemany(
            "INSERT INTO t (event_id, a, b) VALUES (?, ?, ?)", [(str(uuid.uuid4()), *v) for v in values]
        )
        connection.commit()
        return connection.serialize(), connection.execute("SELECT * FROM t").fetchall()


def reader(data):
    return lambda number: data[(number - 1) * PAGE_BYTES : number * PAGE_BYTES]


def read_all(data):
    read = reader(data)
    found = [row for number in range(2, len(data) // PAGE_BYTES + 1) for row in rows(read(number), read)]
    return [(row.rowid, *row.values[1:]) for row in found]


@given(st.lists(st.tuples(VALUES, VALUES), max_size=12))
def test_rows_are_what_sql_reads(values):
    data, expected = database(values)

    assert sorted(map(repr, read_all(data))) == sorted(map(repr, expected))


def leaf_of(data):
    """A leaf page with several rows."""
    read = reader(data)
    for number in range(2, len(data) // PAGE_BYTES + 1):
        if read(number)[0] == LEAF and int.from_bytes(read(number)[3:5]) > 3:
            return bytearray(read(number))
    raise AssertionError("no leaf")


@pytest.mark.parametrize(
    ("at", "content"),
    [(0, b"\x05"), (0, b"\xff"), (3, b"\x00\x01"), (3, b"\x00\x00"), (3, b"\xff\xff"), (8, b"\x00\x00"), (8, b"\xff\xff"),
     (0, b"\x00" * 8), (0, b"\xff" * 24), (1, b"\xff" * 2), (5, b"\x00\x00")],
)  # fmt: skip
def test_a_damaged_header_hides_no_row(at, content):
    data, _ = database([("words" * 20, number) for number in range(60)])
    page = leaf_of(data)
    sound = {row.rowid for row in rows(bytes(page), reader(data))}
    page[at : at + len(content)] = content

    assert {row.rowid for row in rows(bytes(page), reader(data))} >= sound


def test_a_broken_chain_of_overflow_pages_gives_what_stands_before_the_break():
    data, written = database([(b"x" * 20_000, 1)])
    read = reader(data)
    first = next(number for number in range(2, len(data) // PAGE_BYTES + 1) if read(number)[0] == LEAF)

    for rest in (b"", b"\0" * 4 + b"z" * 4092):
        (row,) = rows(read(first), lambda _, rest=rest: rest)
        assert not row.is_whole
        assert row.values == (None, written[0][1])


@given(st.binary(max_size=PAGE_BYTES), st.sampled_from([b"", b"\x0d", b"\x0d\0\0\0\x05\0\x40\0"]))
def test_garbage_is_no_error(garbage, start):
    event_id = str(uuid.UUID(int=7)).encode()
    page = (start + garbage[:2000] + event_id + garbage[2000:])[:PAGE_BYTES]
    for found in rows(page, lambda _: garbage):
        assert isinstance(found.rowid, int)
    for offset in range(0, len(page), 97):
        row_at(page, offset, lambda _: garbage)


def test_pages_that_lead_in_circles_end():
    loop = b"\0\0\0\x02" + b"z" * (PAGE_BYTES - 4)
    data, _ = database([(b"x" * 200_000, 1)])
    number = next(n for n in range(2, len(data) // PAGE_BYTES + 1) if reader(data)(n)[0] == LEAF)

    assert [len(row.values) for row in rows(reader(data)(number), lambda _: loop)] == [4]
