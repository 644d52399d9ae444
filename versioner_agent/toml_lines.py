"""TOML with the lines of its keys, and where a text is not TOML.

The standard library's parser keeps no positions; a scan of the words finds them again, in text that this parser took.
Knows nothing of settings. A line is given only where it is certain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

#: More parts of a dotted key than any has; the parser's time grows with their square, to hours for a megabyte.
MAX_KEY_PARTS = 200
MAX_WORDS = 200  # characters; the parser repeats a key, which may be as long as the file


class NotToml(ValueError):
    """Text that is not TOML: what is wrong, and in which line, counted from 1."""

    def __init__(self, words: str, line: int | None = None) -> None:
        """Keep both."""
        super().__init__(words)
        self.words = words if len(words) <= MAX_WORDS else words[:MAX_WORDS] + "…"
        self.line = line


def parse(data: bytes) -> tuple[dict[str, Any], str]:
    """Return content and text of a TOML file, which may begin with a byte order mark; raises NotToml."""
    import tomllib  # 3 ms, only where there is a file

    try:
        # A file that does not end its last line is told where the line ends, not that the file does.
        text = data.decode("utf-8-sig") + "\n"
    except UnicodeDecodeError as exc:
        line = exc.object.count(b"\n", 0, exc.start) + 1
        raise NotToml(f"byte 0x{exc.object[exc.start]:02x} is not UTF-8", line) from exc
    if text.count(".") >= MAX_KEY_PARTS:
        _refuse_long_keys(text)
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as exc:
        raise _located(str(exc), text.replace("\r\n", "\n")) from exc
    except RecursionError as exc:
        raise NotToml("nested too deeply") from exc
    except ValueError as exc:
        raise NotToml("a number has thousands of digits") from exc


@lru_cache(maxsize=2)
def key_lines(text: str) -> dict[str, int]:
    """Return the line in which each key at the top of valid TOML comes first: itself, its header or its dotted key."""
    lines: dict[str, int] = {}
    for key, line in _statements(text):
        if key is not None:
            lines.setdefault(key, line)
    return lines


def _statements(text: str) -> Iterator[tuple[str | None, int]]:
    """Yield for each statement of valid TOML the key at the top that it names (None inside a table) and its line."""
    line, depth = 1, 0
    is_start, is_in_table = True, False
    for match in re.finditer(_WORD, text, re.DOTALL):
        word = match[0]
        if word == "\n":
            line += 1
            is_start = is_start or depth == 0
        elif word in ("[", "{"):
            # What begins with a bracket is a table's header.
            is_in_table = is_in_table or is_start
            depth += 1
        elif word in ("]", "}"):
            depth -= 1
        elif match["key"]:
            if is_start:
                yield (_decoded(word) if depth or not is_in_table else None), line
                is_start = False
            line += word.count("\n")


#: What matters in valid TOML. Strings and comments come whole: what looks like a key inside of them is none. No group
#: is repeated possessively: Python before 3.11.5 goes wrong there (https://github.com/python/cpython/issues/101955).
_WORD = (
    r'(?P<key>"""(?:\\.|(?!""")[^\\])*"{3,5}'
    r"|'''(?:(?!''').)*'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*+'"
    r"|[A-Za-z0-9_-]++)"
    r"|\#[^\n]*+|[\n\[\]{}]|[^\n\[\]{}\#\"'A-Za-z0-9_-]++"
)


def _decoded(key: str) -> str:
    if key[0] not in "\"'":
        return key
    if key[0] == "'" or "\\" not in key:
        return key[1:-1]
    import tomllib

    return next(iter(tomllib.loads(f"{key} = 0")))


def _located(problem: str, text: str) -> NotToml:
    """Take the place from the parser's words; a key that is set twice is named, which the parser does not do."""
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", problem, re.DOTALL)
    if match is None:
        return NotToml(problem)
    words, line, column = match[1], int(match[2]), int(match[3])
    if words == "Cannot overwrite a value":
        lines = text.split("\n")[:line]
        lines[-1] = lines[-1][: column - 1]  # so far the text is valid
        *before, (key, second) = _statements("\n".join(lines))
        first = next((at for name, at in before if name == key), None)
        if key is not None and first is not None:
            return NotToml(f"{key!r} is set twice, first in line {first}", second)
    return NotToml(f"{words} (column {column})", line)


def _refuse_long_keys(text: str) -> None:
    part = r"(?:[A-Za-z0-9_-]++|\"(?:\\.|[^\"\\\n]){0,250}+\"|'[^'\n]{0,250}+')"
    found = re.search(rf"(?<![A-Za-z0-9_-]){part}(?:[ \t]*+\.[ \t]*+{part}){{{MAX_KEY_PARTS}}}", text)
    if found:
        raise NotToml(f"a key of over {MAX_KEY_PARTS} parts", text.count("\n", 0, found.start()) + 1)
