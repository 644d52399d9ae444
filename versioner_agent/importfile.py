"""Reading export files: a stream of checked lines, or a clear word on what is wrong. Knows no outbox.

Nothing in a file is believed before its last byte is read: `check` goes through all of it, `again` yields its lines
and ends in an error unless they are those that were checked. Memory holds one line. The format is in `exportfile`, what
each line must be in `importlines`.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from versioner_agent.bodies import strict_decoder
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.exportfile import FORMAT, FORMAT_VERSION, MAX_LINE_BYTES, Header
from versioner_agent.files import open_plain
from versioner_agent.importlines import HEADER, TRAILER, EventReader, Exported, Problem, Verdict, VerdictReader, match
from versioner_agent.values import shorten, shown

STDIN = "-"

_GZIP_MAGIC = b"\x1f\x8b"
_AGAIN = "nothing was imported: copy the file again, or write it again with `versioner-agent export --again`"
_FOREIGN = "name a file that `versioner-agent export` wrote"


class BadFile(UsageError):
    """A file that is no complete, unaltered export; nothing of it is imported."""


class Changed(AgentError):
    """A file that is not what it was when it was checked: somebody wrote to it, or its medium is failing."""


class Checked(NamedTuple):
    """What a file turned out to hold."""

    header: Header
    records: int
    sha256: str  # 64 hexadecimal digits


class ExportFile:
    """A file that is open for reading, as often as wanted."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        """Read *file*, which can be sought in; *name* is for people."""
        self.name = name
        self._file = file
        self._checked: Checked | None = None

    @property
    def checked(self) -> Checked:
        """What `check` found."""
        assert self._checked is not None  # nobody uses a file unchecked
        return self._checked

    def check(self) -> Checked:
        """Read everything; raises BadFile for what is no sound export, AgentError where it can't be read."""
        reading = _Reading(self.name, self._file)
        for _ in reading.lines():
            pass
        self._checked = reading.checked
        return self._checked

    def again(self) -> Iterator[Exported | Verdict]:
        """Yield the lines of a checked file; raises Changed, at the latest behind the last, unless it is the same."""
        reading = _Reading(self.name, self._file)
        try:
            yield from reading.lines()
        except AgentError as exc:
            raise self._changed() from exc
        if reading.checked != self._checked:
            raise self._changed()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _changed(self) -> Changed:
        return Changed(
            f"{self.name} changed while it was being imported, or can't be read any more",
            "look at it, and import it again",
        )


def open_file(name: str, stdin: BinaryIO) -> ExportFile:
    """Open the file *name*; *stdin*, for `-`, is copied to a file without a name first.

    Raises UsageError for what is no file, AgentError where it can't be read.
    """
    with _reading(name):
        if name == STDIN:
            return ExportFile("stdin", _spooled(stdin))
        try:
            return ExportFile(name, open(open_plain(name), "rb"))
        except (FileNotFoundError, NotADirectoryError, ValueError) as exc:
            raise UsageError(f"there is no file {shown(name)}", _FOREIGN) from exc
        except OSError as exc:
            if exc.strerror == "it is not a regular file":
                raise UsageError(
                    f"can't import {name}: {exc.strerror}", "pipe it in: `… | versioner-agent import -`"
                ) from exc
            raise


def _spooled(stream: BinaryIO) -> BinaryIO:
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115  # the caller's to close
    try:
        while chunk := stream.read(MAX_LINE_BYTES):
            file.write(chunk)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say in our words what the system has to say of reading *name*."""
    try:
        yield
    except OSError as exc:
        raise AgentError(f"can't read {name}: {exc.strerror or exc}", "nothing was imported") from exc


class _Reading:
    """One way through a file."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.checked: Checked
        self._name = name
        self._stream = _plain(name, file)
        self._number = 0
        self._line = b""
        self._sum = hashlib.sha256()
        self._decoder = strict_decoder()

    def lines(self) -> Iterator[Exported | Verdict]:
        """Yield what is between header and trailer, then set `checked`; raises BadFile."""
        header = self._header()
        reader = EventReader() if header.content == "events" else VerdictReader()
        count = 0
        while True:
            self._sum.update(self._line)
            found = self._value()
            if "trailer" in found:
                break
            try:
                line = reader.read(found)
            except Problem as exc:
                raise self._bad(str(exc)) from exc
            count += 1
            yield line
        self.checked = Checked(header, count, self._trailer(found, count))

    def _header(self) -> Header:
        try:
            found = self._value()
        except BadFile as exc:
            raise BadFile(
                f"{self._name} is no export of versioner-agent ({exc.message.removeprefix(f'{self._name}: ')})",
                _FOREIGN,
            ) from exc
        if found.get("format") != FORMAT:
            raise BadFile(f"{self._name} is no export of versioner-agent: its first line does not say so", _FOREIGN)
        version = found.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise BadFile(
                f"{self._name} was written by a newer versioner-agent (format {shorten(str(version))})",
                "upgrade this one; nothing was imported",
            )
        try:
            match(found, HEADER)
        except Problem as exc:
            raise self._bad(str(exc)) from exc
        return Header(**{name: found[name] for name in Header._fields})

    def _trailer(self, found: dict[str, Any], count: int) -> str:
        """Check the last line; returns the digest in it."""
        try:
            match(found, TRAILER)
        except Problem as exc:
            raise self._bad(str(exc)) from exc
        if found["count"] != count:
            raise self._bad(f"its trailer counts {found['count']} lines, there are {count}")
        if found["sha256"] != self._sum.hexdigest():
            raise self._bad("its content does not have the SHA-256 that the trailer says: it was altered on its way")
        if self._read(1):
            raise self._bad("something follows the trailer")
        return str(found["sha256"])

    def _value(self) -> dict[str, Any]:
        """Read the next line; returns its object."""
        self._line = line = self._read(MAX_LINE_BYTES + 1)
        if not line:
            where = f"it ends after line {self._number}, without its trailer: it was cut short"
            raise self._bad(where if self._number else "it is empty")
        self._number += 1
        if not line.endswith(b"\n"):
            too_long = f"it is longer than {MAX_LINE_BYTES} bytes"
            raise self._bad(too_long if len(line) > MAX_LINE_BYTES else "it has no end: the file was cut short")
        try:
            found = self._decoder.decode(line.decode())
        except UnicodeDecodeError as exc:
            raise self._bad(f"byte {exc.start} is not UTF-8") from exc
        except RecursionError as exc:
            raise self._bad("nested too deeply") from exc
        except ValueError as exc:
            raise self._bad(f"not valid JSON: {getattr(exc, 'msg', exc)}") from exc
        if not isinstance(found, dict):
            raise self._bad("not a JSON object")
        return found

    def _read(self, size: int) -> bytes:
        try:
            with _reading(self._name):
                return bytes(self._stream.readline(size))
        except AgentError as exc:
            if isinstance(exc.__cause__, gzip.BadGzipFile):
                raise self._bad(f"its compression is damaged: {exc.__cause__}") from exc
            raise
        except EOFError as exc:
            raise self._bad("its compressed content ends too early: it was cut short") from exc
        except zlib.error as exc:
            raise self._bad(f"its compression is damaged: {exc}") from exc

    def _bad(self, what: str) -> BadFile:
        where = f" line {self._number}:" if self._number else ""
        return BadFile(f"{self._name}:{where} {what}", _AGAIN)


def _plain(name: str, file: BinaryIO) -> Any:
    """Return what reads *file* from its start, decompressed where its first bytes say that it is."""
    with _reading(name):
        file.seek(0)
        is_compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
    return gzip.GzipFile(fileobj=file, mode="rb") if is_compressed else file
