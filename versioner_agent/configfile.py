"""Configuration files as they are found, with what is wrong with them: opened, never tested, and never an exception.

Knows TOML and permissions, no settings. On the path of `enqueue`: what only a file's content needs is imported then.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

MAX_FILE_BYTES = 1024 * 1024
PLAIN_DOTS = 100  # in a file of more, a dotted key may be longer than the parser is good for


class Problem(NamedTuple):
    """What is wrong, and in which line of which file, where it is in one and the line is known."""

    words: str
    file: str = ""
    line: int | None = None
    hint: str | None = None
    key: str = ""  # of the setting, where it is about one

    def __str__(self) -> str:
        """Say it as editors and compilers do: FILE:LINE: words."""
        if not self.file:
            return self.words
        return f"{self.file}:{self.line}: {self.words}" if self.line else f"{self.file}: {self.words}"


class File(NamedTuple):
    """A configuration file as it was found; the text is kept for the lines of its keys."""

    name: str
    content: Mapping[str, Any] = MappingProxyType({})
    text: str = ""
    state: Literal["read", "not there", "another user's", "closed", "unusable"] = "read"
    problem: Problem | None = None

    def line_of(self, key: str) -> int | None:
        """Return the line of *key*, None where it can't be told."""
        from versioner_agent.toml_lines import key_lines  # noqa: PLC0415  # only for people who ask, or erred

        return key_lines(self.text).get(key)


def read_file(path: str) -> File:
    """Return a configuration file, what is wrong with it included."""
    try:
        data, mode = contents(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        return File(path, state="not there")
    except OSError as exc:
        return File(path, state="closed", problem=Problem(f"can't read {path}: {exc.strerror or exc}"))
    return file_of(path, data, mode)


def file_of(name: str, data: bytes, mode: int = 0o600) -> File:
    """Return the configuration file with this name, content and mode."""
    if len(data) > MAX_FILE_BYTES:
        words = f"over {MAX_FILE_BYTES} bytes, which is no configuration file"
        return File(name, state="unusable", problem=Problem(words, name))
    if not data.strip():
        return File(name)
    parsed = _plainly_parsed(data)
    if parsed is None:
        from versioner_agent import toml_lines  # noqa: PLC0415  # only for files with something wrong or strange

        try:
            parsed = toml_lines.parse(data)
        except toml_lines.NotToml as exc:
            return File(name, state="unusable", problem=Problem(f"not valid TOML: {exc.words}", name, exc.line))
    content, text = parsed
    file = File(name, content, text)
    if "api_key" not in content or not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return file
    hint = f"chmod 600 {name}, or put the key into a file of its own named by api_key_file"
    words = "holds api_key but others can read the file"
    return file._replace(problem=Problem(words, name, file.line_of("api_key"), hint))


def _plainly_parsed(data: bytes) -> tuple[dict[str, Any], str] | None:
    """Return content and text of an ordinary file; None where a closer look is needed, which takes a millisecond."""
    if data.count(b".") > PLAIN_DOTS:
        return None
    import tomllib  # 3 ms, only where there is a file

    try:
        text = data.decode("utf-8")
        return tomllib.loads(text), text
    except (ValueError, RecursionError):
        return None


def contents(path: str, most: int) -> tuple[bytes, int]:
    """Return the content, of which at most one byte more than *most*, and the mode of a file; raises OSError.

    A pipe is refused: its writer may never come, which must not hold up a build, or the agent.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode):
            raise OSError(errno.ESPIPE, "it is a pipe, not a file")
        with open(fd, "rb", closefd=False) as file:  # refuses a directory, and leaves its descriptor open
            data = file.read(most + 1)
        if data is None:
            raise OSError(errno.EAGAIN, "it is a terminal, not a file")
        return data, mode
    finally:
        os.close(fd)
