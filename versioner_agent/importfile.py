"""Reading export files: a stream of checked lines, or a clear word on what is wrong. Knows no outbox.

Nothing in a file is believed before its last byte is read: `check` goes through all of it, `again` yields its lines
and ends in an error unless they are those that were checked. Strict JSON, exact keys and types, so that a line means
one thing only; memory holds one line. The format is in `exportfile`.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from versioner_agent.bodies import strict_decoder
from versioner_agent.errors import AgentError, UsageError, ValidationError
from versioner_agent.events import KINDS, MAX_BODY_BYTES, STATUSES, Event, content_digest, validate
from versioner_agent.exportfile import (
    CONTENTS,
    EVENT_KEYS,
    FORMAT,
    FORMAT_VERSION,
    MAX_LINE_BYTES,
    VERDICT_KEYS,
    Header,
)
from versioner_agent.files import open_plain
from versioner_agent.values import shorten, shown, string_problem

MAX_TIME = 253_402_300_800.0  # the year 10000
MAX_ID = 2**63 - 1
MAX_NUMBER = 1e300  # 1e999 is infinity for `json`
MAX_NAME_CHARS = 255  # of a host, a version or a batch's author; a host's name has 64 at most (gethostname(2))
#: What came to its end elsewhere.
VERDICTS = ("delivered", "failed", "discarded")
STDIN = "-"

_GZIP_MAGIC = b"\x1f\x8b"
_UID = re.compile("[0-9a-f]{32}")
_EVENT_ID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_SHA256 = re.compile("[0-9a-f]{64}")
_WORD = re.compile("[a-z][a-z_]{0,39}")
_AGAIN = "nothing was imported: copy the file again, or write it again with `versioner-agent export --again`"
_FOREIGN = "name a file that `versioner-agent export` wrote"


class BadFile(UsageError):
    """A file that is no complete, unaltered export; nothing of it is imported."""


class Changed(AgentError):
    """A file that is not what it was when it was checked: somebody wrote to it, or its medium is failing."""


class Exported(NamedTuple):
    """An event in a file; times are seconds since 1970."""

    origin: str  # the outbox it was queued in
    event_id: str
    kind: str
    product_name: str
    version: str
    environment_name: str | None
    status: str
    invoke_id: str | None
    run_attempt: str | None
    queued_at: float
    queued_by: str
    payload: bytes
    content: bytes  # see `events.content_digest`


class Verdict(NamedTuple):
    """What became of an event on the far side, as the file has it: its texts are of any length, and anybody's."""

    origin: str
    event_id: str
    state: str  # one of VERDICTS
    settled_at: float | None
    attempts: int
    http_status: int | None
    server_id: str | None
    reason: str | None
    code: str | None
    rule: str | None
    retry_after: str | None
    late: int
    detail: str | None


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
            raise UsageError(f"there is no file {shown(name)}") from exc
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
        reader = _EventReader() if header.content == "events" else _VerdictReader()
        count = 0
        while True:
            self._sum.update(self._line)
            found = self._value()
            if "trailer" in found:
                break
            try:
                line = reader.read(found)
            except _Problem as exc:
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
            _match(found, _HEADER)
        except _Problem as exc:
            raise self._bad(str(exc)) from exc
        return Header(**{name: found[name] for name in Header._fields})

    def _trailer(self, found: dict[str, Any], count: int) -> str:
        """Check the last line; returns the digest in it."""
        try:
            _match(found, _TRAILER)
        except _Problem as exc:
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


class _Problem(Exception):
    """What is wrong with a line."""


class _EventReader:
    """Reads the lines of a file of events."""

    def __init__(self) -> None:
        self._decoder = strict_decoder()
        self._last_id = 0

    def read(self, found: dict[str, Any]) -> Exported:
        """Return a checked line; raises _Problem."""
        _match(found, _EVENT)
        if found["id"] <= self._last_id:
            raise _Problem(f"id {found['id']} does not come after {self._last_id}")
        self._last_id = found["id"]
        payload = found["payload"].encode()
        event = self._event(found["kind"], payload, found)
        # -0.0 is read back from SQLite as 0.0, which a record's digest tells apart.
        values = found | {"queued_at": float(found["queued_at"]) + 0.0, "payload": payload}
        del values["id"]
        return Exported(**values, content=content_digest(event))

    def _event(self, kind: str, payload: bytes, found: Mapping[str, Any]) -> Event:
        """Return the event in *payload*, which the API would take and whose line says the same of it."""
        if len(payload) > MAX_BODY_BYTES:
            raise _Problem(f"its payload is larger than {MAX_BODY_BYTES} bytes")
        try:
            fields = self._decoder.decode(payload.decode())
        except (ValueError, RecursionError) as exc:
            raise _Problem(f"its payload is not valid JSON: {getattr(exc, 'msg', exc)}") from exc
        if not isinstance(fields, dict):
            raise _Problem("its payload is not a JSON object")
        try:
            event = validate(kind, fields, allow_unknown=True)
        except ValidationError as exc:
            raise _Problem(f"its payload is no valid {kind}: {exc.problems[0]}") from exc
        for name in _IN_PAYLOAD:
            if not fields.get(name) == event.fields.get(name) == found[name]:
                raise _Problem(f"its payload says something else of {name} than the line does")
        return event


class _VerdictReader:
    """Reads the lines of a file of receipts."""

    def read(self, found: dict[str, Any]) -> Verdict:
        """Return a checked line; raises _Problem."""
        _match(found, _VERDICT)
        return Verdict(**found)


def verdict_problem(line: Mapping[str, Any]) -> str:
    """Say what would have a reader refuse *line* as a verdict; empty where nothing would."""
    try:
        _match(line, _VERDICT)
    except _Problem as exc:
        return str(exc)
    return ""


class _Rule(NamedTuple):
    """What a value must be."""

    words: str
    holds: Callable[[Any], bool]
    is_optional: bool = False


def _match(found: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    """Raise _Problem unless *found* has the keys of *rules* and no other, each with what it must be."""
    if found.keys() != rules.keys():
        missing, unknown = sorted(rules.keys() - found.keys()), sorted(found.keys() - rules.keys())
        told = [f"{missing[0]} is missing"] if missing else [f"{shorten(shown(unknown[0]))} is not known here"]
        raise _Problem(", ".join(told))
    for name, rule in rules.items():
        value = found[name]
        if not (rule.is_optional if value is None else rule.holds(value)):
            raise _Problem(f"{name} must be {rule.words}, not {shown(value)}")


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < MAX_TIME


def _is_text(value: Any) -> bool:
    return type(value) is str and not string_problem(value)


def _is_name(value: Any) -> bool:
    return _is_text(value) and len(value) <= MAX_NAME_CHARS


def _like(words: str, pattern: re.Pattern[str], *, is_optional: bool = False) -> _Rule:
    return _Rule(words, lambda value: type(value) is str and pattern.fullmatch(value) is not None, is_optional)


def _one_of(*known: Any) -> _Rule:
    return _Rule(
        " or ".join(map(str, known)), lambda value: any(type(value) is type(each) and value == each for each in known)
    )


def _between(lowest: int, highest: int, *, is_optional: bool = False) -> _Rule:
    words = f"a whole number from {lowest}" + (f" to {highest}" if highest < MAX_ID else "")
    return _Rule(words, lambda value: type(value) is int and lowest <= value <= highest, is_optional)


_TEXT = _Rule("text", _is_text)
_TEXT_OR_NONE = _TEXT._replace(is_optional=True)
_NAME = _Rule(f"text of up to {MAX_NAME_CHARS} characters", _is_name)
_TIME = _Rule("seconds since 1970", _is_time)
_ANY_TIME = _Rule("a number", lambda value: type(value) in (int, float) and abs(value) < MAX_NUMBER, is_optional=True)
_UID_RULE = _like("32 hexadecimal digits", _UID)

_HEADER = {
    "format": _one_of(FORMAT),
    "format_version": _one_of(FORMAT_VERSION),
    "content": _one_of(*CONTENTS),
    "outbox": _UID_RULE,
    "host": _NAME,
    "batch": _UID_RULE,
    "sequence": _between(0, MAX_ID),
    "previous": _UID_RULE._replace(is_optional=True),
    "created_at": _TIME,
    "agent_version": _NAME,
}
_EVENT = {
    "id": _between(1, MAX_ID),
    "origin": _UID_RULE,
    "event_id": _like("a UUID in lower case", _EVENT_ID),
    "kind": _one_of(*KINDS),
    "product_name": _TEXT,
    "version": _TEXT,
    "environment_name": _TEXT_OR_NONE,
    "status": _one_of(*STATUSES),
    "invoke_id": _TEXT_OR_NONE,
    "run_attempt": _TEXT_OR_NONE,
    "queued_at": _TIME,
    "queued_by": _TEXT,
    "payload": _TEXT,
}
_VERDICT = {
    "origin": _UID_RULE,
    "event_id": _EVENT["event_id"],
    "state": _one_of(*VERDICTS),
    "settled_at": _ANY_TIME,
    "attempts": _between(0, MAX_ID),
    "http_status": _between(100, 999, is_optional=True),
    "server_id": _TEXT_OR_NONE,
    "reason": _like("a word", _WORD, is_optional=True),
    "code": _TEXT_OR_NONE,
    "rule": _TEXT_OR_NONE,
    "retry_after": _TEXT_OR_NONE,
    "late": _between(0, 1),
    "detail": _TEXT_OR_NONE,
}
_TRAILER = {
    "trailer": _one_of(True),
    "count": _between(0, MAX_ID),
    "sha256": _like("64 hexadecimal digits", _SHA256),
}
assert (tuple(_EVENT), tuple(_VERDICT)) == (EVENT_KEYS, VERDICT_KEYS)
#: What a line repeats of its payload.
_IN_PAYLOAD = ("product_name", "version", "environment_name", "status", "invoke_id")
