"""Rows read from the bytes of a SQLite file, where SQL can't: after truncation, or behind a broken header.

The published file format (https://sqlite.org/fileformat2.html), and of it only the leaves of tables. What is returned
looks like rows; whether it is what was once written, only the caller's digest can tell. Pure.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

PAGE_BYTES = 4096  # as every outbox is made
LEAF = 0x0D
MAX_ROW_BYTES = 4 * 1024 * 1024  # several times what an event may have

#: Where a record's first text begins: its event_id.
EVENT_ID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
#: The longest head of a record's row whose length is one byte: its own length, and a type for each column.
MAX_HEAD_BYTES = 127
MAX_VARINT_BYTES = 9

_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}

#: Returns the bytes of a page by its number from 1 on; fewer than a page's where the file ends.
Pages = Callable[[int], bytes]


class Row(NamedTuple):
    """A cell's rowid and columns, and where in its page it lies."""

    rowid: int
    values: tuple[int | float | str | bytes | None, ...]
    start: int
    end: int
    is_whole: bool = True  # False: its overflow pages are gone, and the last values with them
    is_free: bool = False  # True: it lies where its page says that nothing is, as old copies do


def rows(page: bytes, read: Pages) -> Iterator[Row]:
    """Yield the rows of one page: by its pointers, then those that no pointer leads to.

    The second search is for pages whose own header is damaged, or from before the row was written. Old copies of rows
    may lie in what a page says is free; freed cells and pages hold none, for connections use `secure_delete`.
    """
    found = list(_by_pointers(page, read)) if page[:1] == bytes((LEAF,)) else []
    yield from found
    yield from _by_text(page, read, found)


def _cell_count(page: bytes) -> int:
    return int.from_bytes(page[3:5])


def _by_pointers(page: bytes, read: Pages) -> Iterator[Row]:
    for at in range(8, min(8 + 2 * _cell_count(page), len(page) - 1), 2):
        row = row_at(page, int.from_bytes(page[at : at + 2]), read)
        if row is not None:
            yield row


def _by_text(page: bytes, read: Pages, known: list[Row]) -> Iterator[Row]:
    starts = {row.start for row in known}
    texts = {row.values[1] for row in known if len(row.values) > 1}
    free_until = int.from_bytes(page[5:7])
    if not 8 + 2 * _cell_count(page) <= free_until <= PAGE_BYTES:
        free_until = 0
    for match in EVENT_ID.finditer(page):
        text = match.start()
        if match.group().decode() in texts and any(row.start <= text < row.end for row in known):
            continue  # spares the search; what else lies within a row may be another's, of which a part is overwritten
        for start in _starts(page, text):
            if (row := row_at(page, start, read, body_at=text)) is not None:
                if start not in starts:
                    yield row._replace(is_free=start < free_until)
                break


def _starts(page: bytes, text: int) -> Iterator[int]:
    """Yield where a cell may begin whose first text is at *text*: before a head that is as long as it says."""
    for head in range(max(10, text - MAX_HEAD_BYTES), text):
        if page[head] == text - head:
            yield from range(max(8, head - 2 * MAX_VARINT_BYTES), head - 1)


def row_at(page: bytes, start: int, read: Pages, *, body_at: int | None = None) -> Row | None:
    """Return the row whose cell begins at *start* of *page*, None where there can't be one.

    With *body_at*, only one whose first stored value begins there.
    """
    try:
        size, at = _varint(page, start)
        rowid, at = _varint(page, at)
        head_size, types_at = _varint(page, at)
        if not 1 < head_size <= size <= MAX_ROW_BYTES or (body_at is not None and at + head_size != body_at):
            return None
        local = _local_size(size)
        if at + local > len(page):
            return None
        content = page[at : at + local]
        end = at + local
        if local < size:
            content += _overflow(int.from_bytes(page[end : end + 4]), size - local, read)
            end += 4
        is_whole = len(content) == size
        values = _values(content, types_at - at, head_size, is_whole=is_whole)
    except (IndexError, struct.error, ValueError):
        return None
    signed = rowid - (1 << 64) if rowid >= 1 << 63 else rowid
    return Row(signed, values, start, end, is_whole)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a variable-length integer and the offset behind it (section 1.6 of the format)."""
    value = 0
    for index in range(8):
        byte = data[at + index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + index + 1
    return value << 8 | data[at + 8], at + 9


def _local_size(size: int) -> int:
    """Return how many of a row's *size* bytes lie in the leaf itself (same section: cell payload overflow)."""
    most = PAGE_BYTES - 35
    if size <= most:
        return size
    least = (PAGE_BYTES - 12) * 32 // 255 - 23
    local = least + (size - least) % (PAGE_BYTES - 4)
    return local if local <= most else least


def _overflow(number: int, left: int, read: Pages) -> bytes:
    """Return *left* bytes of a chain of overflow pages, fewer where it breaks off."""
    parts = []
    while left > 0:
        page = read(number) if number > 1 else b""
        part = page[4 : 4 + min(left, PAGE_BYTES - 4)]
        if not part:
            break
        parts.append(part)
        left -= len(part)
        number = int.from_bytes(page[:4])
    return b"".join(parts)


def _values(
    content: bytes, types_at: int, head_size: int, *, is_whole: bool
) -> tuple[int | float | str | bytes | None, ...]:
    values: list[int | float | str | bytes | None] = []
    at = head_size
    while types_at < head_size:
        kind, types_at = _varint(content, types_at)
        value, at = _value(content, kind, at)
        if at > len(content) and not is_whole:
            return tuple(values)
        values.append(value)
    if types_at != head_size or at != len(content):
        raise ValueError("the types do not fill the row")
    return tuple(values)


def _value(content: bytes, kind: int, at: int) -> tuple[int | float | str | bytes | None, int]:
    """Return the value of serial type *kind* at an offset, and the offset behind it."""
    if kind == 0:
        return None, at
    if kind in _INTEGER_BYTES:
        size = _INTEGER_BYTES[kind]
        return int.from_bytes(content[at : at + size], signed=True), at + size
    if kind == 7:
        return struct.unpack_from(">d", content, at)[0], at + 8
    if kind in (8, 9):
        return kind - 8, at
    if kind < 12:
        raise ValueError("no such type")
    size = (kind - 12) // 2
    data = content[at : at + size]
    return (data.decode("utf-8", "replace") if kind % 2 else data), at + size
