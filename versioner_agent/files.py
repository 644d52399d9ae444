"""Files of an outbox: looked at, opened and made, but for what SQLite does itself."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from contextlib import suppress

from versioner_agent.errors import OutboxError

#: What only recording deliveries may use, in the file and in its journal (bytes).
RESERVE_BYTES = 384 * 1024
#: Below this much free space nothing new is accepted (bytes).
FLOOR_BYTES = 256 * 1024
#: Free space that is needed to set the reserve aside (bytes).
ROOM_BYTES = 2 * RESERVE_BYTES + FLOOR_BYTES
#: Larger files are not read as a whole when an agent starts, and not mended by an enqueue (bytes).
CHECKED_BYTES = 50 * 1024 * 1024

#: What a disk that fails loses is for a person to judge: it may come back.
_DISK_HINT = (
    "nothing was changed: look at the disk (dmesg); if it is broken, put a copy of what can be read in its place"
)

#: The system's words for these would send people to the wrong place.
_WORDS = {
    errno.ELOOP: "a symbolic link is in its place",
    errno.ENOENT: "there is no such directory",
    errno.ENOTDIR: "it would lie in a file, not in a directory",
}

_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")

#: Time of the last change (nanoseconds since 1970), size (bytes), and which file it is.
Times = tuple[int, int, tuple[int, int]]

_SAFELY = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_UNLINKED = getattr(os, "O_NOFOLLOW", 0)
_BESIDE = os.O_RDWR | _SAFELY | _UNLINKED


def inode_of(path: str | int) -> tuple[int, int] | None:
    """Return what tells the file at *path* (or open as it) from one that takes its place; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def size_of(path: str) -> int:
    """Return the size in bytes, 0 where there is no file."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def changed_at(path: str) -> int | None:
    """Return when the content last changed (nanoseconds since 1970); None where there is no file."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None


def times_of(path: str) -> Times | None:
    """Return what changes with every commit, and when another file takes its place; None where it can't be seen."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, (found.st_dev, found.st_ino)


def open_plain(path: str, *, follow: bool = True) -> int:
    """Open a file for reading past SQLite; raises OSError, also for what is no file: a pipe could keep us for ever."""
    fd = os.open(path, os.O_RDONLY | _SAFELY | (0 if follow else _UNLINKED))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return fd


def has_hot_journal(path: str) -> bool:
    """Tell whether the journal of *path* is of a transaction under way, or cut short.

    Raises OSError for what is no file, and OutboxError for one that names another file, which SQLite would delete
    (https://sqlite.org/fileformat2.html#the_rollback_journal): no transaction of ours spans two files.
    """
    journal = path + "-journal"
    try:
        fd = open_plain(journal, follow=False)
    except FileNotFoundError:
        return False
    try:
        is_hot = any(os.read(fd, 8))  # zero, once the transaction is over
        end = os.pread(fd, 8, max(0, os.fstat(fd).st_size - 8))
    finally:
        os.close(fd)
    if is_hot and end == _JOURNAL_MAGIC:
        raise OutboxError(
            f"{journal} was not written by versioner-agent; nothing was touched",
            "look who may write there, and move it away",
        )
    return is_hot


def open_beside(path: str) -> int:
    """Open *path* read-write, made with the mode of its place if it is missing; raises OSError."""
    try:
        return os.open(path, _BESIDE)
    except FileNotFoundError:
        pass
    try:
        return create_beside(path)
    except FileExistsError:
        return os.open(path, _BESIDE)


def create_beside(path: str) -> int:
    """Make the file *path* and open it read-write; raises FileExistsError where there is one, OSError.

    `open` applies the umask, so a group member with umask 077 would lock the others out: hence fchmod. What root makes
    belongs to the owner of the directory, who could not use it otherwise.
    """
    place = os.stat(os.path.dirname(path))
    mode = _file_mode(place.st_mode)
    fd = os.open(path, _BESIDE | os.O_CREAT | os.O_EXCL, mode)
    os.fchmod(fd, mode)
    if os.geteuid() == 0:
        with suppress(OSError):  # a file system without owners
            os.fchown(fd, place.st_uid, place.st_gid)
    return fd


def _file_mode(mode: int) -> int:
    """Return the mode of files made in a directory of *mode*: 0660 where a group shares it (setgid), else 0600."""
    return 0o660 if mode & stat.S_ISGID and mode & stat.S_IWGRP else 0o600


def require_place(path: str) -> None:
    """Raise OutboxError where the directory of the outbox at *path*, which somebody has named, is not there."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise OutboxError(f"there is no directory {directory}: is its disk mounted?", "else correct db")


def unusable(path: str, exc: OSError) -> OutboxError:
    """Say that the outbox at *path* can't be used, and what to do: above all, which group is to be joined."""
    outside = _outside_of_group(path, exc)
    if outside:
        return OutboxError(f"can't use the outbox {path}: {outside}")
    words = _WORDS.get(exc.errno or 0, exc.strerror or str(exc))
    return OutboxError(f"can't use the outbox {exc.filename or path}: {words}", access_hint(path, exc))


def access_hint(path: str, exc: Exception | None) -> str | None:
    """Say what to do about what keeps us from the outbox at *path*."""
    code = getattr(exc, "errno", 0)
    if code == errno.EIO or getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR:
        return _DISK_HINT
    if os.path.isdir(path):
        return "that is a directory: name a file in it with --db or VERSIONER_AGENT_DB"
    directory = os.path.dirname(path)
    if isinstance(exc, PermissionError) and _has_stepped_down() and os.access(directory, os.W_OK, effective_ids=True):
        return f"root works here as uid {os.geteuid()}, which owns {directory} and must own what is in it too (chown)"
    if code == errno.ENOTDIR:
        return "name a file in a directory with --db or VERSIONER_AGENT_DB"
    if code == errno.EROFS:
        return f"{directory} is read-only here: a systemd unit with ProtectSystem= needs ReadWritePaths={directory}"
    try:
        os.stat(directory)
    except OSError:
        return f"check that {directory} exists and that you may use it"
    is_denied = isinstance(exc, PermissionError) or not os.access(directory, os.W_OK | os.X_OK)
    return f"check the permissions of {directory}" if is_denied else None


def _has_stepped_down() -> bool:
    return os.getuid() == 0 != os.geteuid()  # see `privileges`


def _outside_of_group(path: str, exc: OSError) -> str | None:
    """Say how to join the group that shares the outbox's directory, where that is what is missing."""
    directory = os.path.dirname(path)
    try:
        found = os.stat(directory)
        import grp  # noqa: PLC0415  # POSIX only, and only for a message
        import pwd  # noqa: PLC0415

        group = grp.getgrgid(found.st_gid)
        user = pwd.getpwuid(os.geteuid()).pw_name
    except (OSError, ImportError, KeyError):
        return None
    is_member = found.st_gid in (*os.getgroups(), os.getegid())
    if not isinstance(exc, PermissionError) or not found.st_mode & stat.S_IWGRP or is_member:
        return None
    again = "log in again, or restart the CI runner"
    if user in group.gr_mem:
        return f"{user} is in the group {group.gr_name} since this session began: {again}"
    return f"{user} is not in the group {group.gr_name}: `sudo usermod -aG {group.gr_name} {user}`, then {again}"
