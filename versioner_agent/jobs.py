"""Job files: what `exec` keeps beside the outbox, so that no job stays in progress for ever when its wrapper is killed.

The wrapper holds an OS lock (flock(2)) on its file from before `started` is queued until after the last event. The
kernel frees it on any death, and whoever finds it free has to tell the end. A name appears only with its content
complete and its lock held. Any member of a group that shares the directory may plant such files: what is read is held
against the same rules as an event from a script.
"""

from __future__ import annotations

import json
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Self

from versioner_agent import bodies, events
from versioner_agent.creation import sync_directory
from versioner_agent.errors import ValidationError
from versioner_agent.files import create_beside, inode_of, open_plain
from versioner_agent.values import string_problem

FORMAT = 1
MAX_BYTES = 512 * 1024
UNFINISHED_S = 60.0  # how old a file must be that was never finished, to be removed
MAX_NAME_CHARS = 200  # of a command or a user
MAX_SECONDS = 1e12

_INFIX = ".job-"
_UNFINISHED = ".new"
_NAME = r"[0-9a-f]{32}(\.new)?"
_UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


class Garbage(Exception):
    """What lies under a job file's name is none."""


class Job(NamedTuple):
    """What has to be known to tell the end of a job."""

    kind: str
    fields: dict[str, Any]  #: of its events, valid, without the status; there is an invoke_id
    run_attempt: str | None
    started_id: str  #: the event_id of `started`, and that of the last event: decided before either is queued
    last_id: str
    started_at: float  #: seconds since 1970
    queued_by: str
    command: str  #: its base name: arguments may hold secrets

    def event(self, status: str, added: Mapping[str, Any] | None = None, **fields: str) -> events.Event:
        """Return the job's event of *status*; *added* goes into extra_metadata, and *fields* beside it.

        The user's own keys and fields win. What is added is left out where it alone would make the event invalid.
        Raises ValidationError.
        """
        plain = {**fields, **self.fields, "status": status}
        if added:
            metadata = {**added, **plain.get("extra_metadata", {})}
            with suppress(ValidationError):
                return events.validate(self.kind, plain | {"extra_metadata": metadata})
        return events.validate(self.kind, plain)


class End(NamedTuple):
    """How a job ended, as its wrapper knew it."""

    status: str
    added: dict[str, Any]  #: to its extra_metadata
    completed_at: str  #: RFC 3339


class Found(NamedTuple):
    """A job whose wrapper is dead: whether it knew that `started` is queued, and how the job ended."""

    job: Job
    is_started: bool
    end: End | None


class JobFile:
    """The file of a living wrapper."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def create(cls, outbox_path: str, job: Job) -> Self:
        """Make it for *job* beside the outbox, locked, and with its name on the disk; raises OSError."""
        import fcntl  # noqa: PLC0415  # POSIX only

        path = f"{outbox_path}{_INFIX}{uuid.uuid4().hex}"
        fd = create_beside(path + _UNFINISHED)
        try:
            # Nobody else wants the lock of a file this young but to do harm.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(fd, "wb", closefd=False) as file:
                file.write(_line({"format": FORMAT, **job._asdict()}))
            os.fsync(fd)
            os.rename(path + _UNFINISHED, path)
            sync_directory(os.path.dirname(path))
        except BaseException:
            for name in (path + _UNFINISHED, path):
                with suppress(OSError):
                    os.unlink(name)
            os.close(fd)
            raise
        return cls(path, fd)

    def note_started(self) -> None:
        """Note that `started` is queued: its record may be gone from the outbox before a long job ends. Raises OSError.

        Nothing is synced: after a power failure the record itself tells.
        """
        self._note({"started": True})

    def note_end(self, end: End) -> None:
        """Note how the job ended, in case it can't be queued by us; raises OSError."""
        self._note(end._asdict())

    def remove(self) -> None:
        """Remove it, for there is nothing left to tell; what can't be removed is given back. Raises OSError."""
        try:
            os.unlink(self.path)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the telling to others."""
        os.close(self._fd)

    def _note(self, note: dict[str, Any]) -> None:
        line = b"\n" + _line(note)  # behind a note that a full disk cut short
        if os.write(self._fd, line) != len(line):
            raise OSError("the note was cut short")


def names(outbox_path: str) -> list[str]:
    """Return the names of the job files beside the outbox, finished or not; raises OSError."""
    directory, base = os.path.split(outbox_path)
    prefix = base + _INFIX
    found = [name for name in os.listdir(directory) if name.startswith(prefix)]
    return sorted(name for name in found if re.fullmatch(_NAME, name[len(prefix) :]))


def is_unfinished(name: str) -> bool:
    """Tell whether a job file of this *name* was never finished."""
    return name.endswith(_UNFINISHED)


def is_abandoned(path: str, now: float) -> bool:
    """Tell whether the unfinished file at *path* can be removed at *now* (seconds since 1970).

    Its wrapper died before anything was queued. The lock of a young one is not tried: its wrapper is about to take it.
    Raises Garbage, OSError.
    """
    try:
        if now - os.lstat(path).st_mtime <= UNFINISHED_S:
            return False
    except FileNotFoundError:
        return False
    with _locked(path) as fd:
        return fd is not None


@contextmanager
def taken(path: str) -> Iterator[Found | None]:
    """Lend the job in the file at *path* for the block, in which nobody else can take it.

    None where its wrapper lives, the file is gone, or it was written by a later version. Raises Garbage, OSError.
    """
    with _locked(path) as fd:
        yield None if fd is None else _read(fd)


@contextmanager
def _locked(path: str) -> Iterator[int | None]:
    """Open and lock the file at *path* for the block; None where somebody holds its lock, or it is gone."""
    import fcntl  # noqa: PLC0415  # POSIX only

    try:
        seen = os.lstat(path)
        if not stat.S_ISREG(seen.st_mode):
            raise Garbage("it is not a regular file")
        if seen.st_nlink > 1:
            # A link to the outbox, whose locks closing it would drop; or a living wrapper's file and a backup of it.
            raise OSError("it has other names (hard links)")
        fd = open_plain(path, follow=False)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = inode_of(path) == inode_of(fd)  # else somebody else has just told this end
        except BlockingIOError:
            is_ours = False
        yield fd if is_ours else None
    finally:
        os.close(fd)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _read(fd: int) -> Found | None:
    """Return what is in the file *fd*; None where a later version wrote it: it may be there again. Raises Garbage."""
    with open(fd, "rb", closefd=False) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise Garbage("it is too large")
    first, *rest = content.split(b"\n")
    given = _object(first)
    version = None if given is None else given.get("format")
    if isinstance(version, int) and version > FORMAT:
        return None
    job = _job(given) if given is not None and version == FORMAT else None
    if job is None:
        raise Garbage("its content is not that of a job")
    notes = [note for note in map(_object, rest[:-1]) if note]  # behind the last line break: a note cut short
    ends = [end for end in (_end(job, note) for note in notes) if end is not None]
    return Found(job, {"started": True} in notes, ends[-1] if ends else None)


def _object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in *line*; None where there is none."""
    try:
        return bodies.parse_object(line.decode("utf-8", "surrogateescape"), "job")
    except ValidationError:
        return None


def _job(given: dict[str, Any]) -> Job | None:
    """Return the job that *given* describes; None unless all of it is as a wrapper writes it."""
    if given.keys() != {"format", *Job._fields}:
        return None
    job = Job(**{name: given[name] for name in Job._fields})
    is_right = (
        isinstance(job.fields, dict)
        and (job.run_attempt is None or _is_text(job.run_attempt, MAX_BYTES))
        and all(_is_text(word, MAX_NAME_CHARS) and word.isprintable() for word in (job.queued_by, job.command))
        and all(isinstance(each, str) and re.fullmatch(_UUID, each) for each in (job.started_id, job.last_id))
        and job.started_id != job.last_id
        and isinstance(job.started_at, int | float)
        and abs(job.started_at) < MAX_SECONDS
    )
    if not is_right:
        return None
    try:
        fields = events.validate(job.kind, {**job.fields, "status": "aborted"}).fields
    except ValidationError:
        return None
    del fields["status"]
    return job._replace(fields=fields) if "invoke_id" in fields else None


def _is_text(value: Any, limit: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit and not string_problem(value)


def _end(job: Job, note: dict[str, Any]) -> End | None:
    """Return the end that *note* tells of; None where it tells of something else."""
    if note.keys() != set(End._fields) or note["status"] not in events.ENDED or not isinstance(note["added"], dict):
        return None
    end = End(**note)
    try:
        job.event(end.status, end.added, completed_at=end.completed_at)
    except ValidationError:
        return None
    return end
