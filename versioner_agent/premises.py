"""Where an outbox lies: permissions, file system, free space, and who else is at its files. Changes none of it."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from versioner_agent import mounts
from versioner_agent.files import ROOM_BYTES, unusable
from versioner_agent.findings import Finding, not_looked_at, ok
from versioner_agent.locks import FLUSHER_SUFFIX, QUEUE_SUFFIX

MOUNTS = "/proc/self/mountinfo"
LOCKS = "/proc/locks"
LOW_BYTES = 100 * 1024 * 1024
LOW_SHARE = 0.05
LOW_INODES = 100
_SUFFIXES = ("", "-journal", QUEUE_SUFFIX, FLUSHER_SUFFIX)


def examine(path: str, *, is_named: bool) -> list[Finding]:
    """Look at the place of the outbox at *path* (without links); *is_named* where somebody chose it."""
    directory = os.path.dirname(path)
    try:
        place = os.stat(directory)
    except FileNotFoundError:
        if not is_named:
            return [ok("permissions", f"{directory} is made by the first enqueue")]
        action = "make it, mount its disk, or name another place (db)"
        return [Finding("permissions", "error", f"there is no directory {directory}", action)]
    except OSError as exc:
        return [_closed(path, exc)]
    try:
        found = _permissions(path, place)
    except OSError as exc:  # a disk that is failing
        found = [_closed(path, exc)]
    return [*found, file_system(directory, _text(MOUNTS)), _space(directory)]


# --- permissions


def _permissions(path: str, place: os.stat_result) -> list[Finding]:
    directory = os.path.dirname(path)
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return [_closed(path, OSError(errno.EROFS, os.strerror(errno.EROFS), directory))]
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        return [_closed(path, PermissionError(errno.EACCES, "Permission denied", directory))]
    found = _directory(directory, place.st_mode)
    for suffix in _SUFFIXES:
        with suppress(FileNotFoundError):
            found += _file(path + suffix, place)
    mode = f"{stat.S_IMODE(place.st_mode):04o}"
    return found or [ok("permissions", f"{directory} ({mode}, uid {place.st_uid}, gid {place.st_gid})")]


def _closed(path: str, exc: OSError) -> Finding:
    told = unusable(path, exc)
    return Finding("permissions", "error", told.message, told.hint or "")


def _directory(directory: str, mode: int) -> list[Finding]:
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        words = f"anybody can delete or replace what is in {directory} (mode {stat.S_IMODE(mode):04o})"
        return [Finding("permissions", "warning", words, f"chmod o-w {directory}")]
    if mode & stat.S_IWGRP and not mode & stat.S_ISGID:
        words = f"a group can write {directory}, but what one member makes there is closed to the others"
        return [Finding("permissions", "warning", words, f"chmod g+s {directory}")]
    return []


def _file(path: str, place: os.stat_result) -> list[Finding]:
    found = os.lstat(path)
    mode = f"mode {stat.S_IMODE(found.st_mode):04o}"
    if not stat.S_ISREG(found.st_mode):
        action = "look who may write there, and move it away"
        return [Finding("permissions", "error", f"{path} is not a regular file", action)]
    is_shared = place.st_mode & stat.S_ISGID and place.st_mode & stat.S_IWGRP
    if is_shared and (found.st_gid != place.st_gid or not found.st_mode & stat.S_IWGRP):
        words = f"{path} is closed to the group that shares its directory ({mode}, gid {found.st_gid})"
        return [Finding("permissions", "error", words, f"chgrp {place.st_gid} {path} && chmod 660 {path}")]
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        words = f"{path} belongs to uid {found.st_uid} ({mode}) and can't be written"
        return [Finding("permissions", "error", words, f"chown {place.st_uid}:{place.st_gid} {path}")]
    if found.st_mode & stat.S_IRWXO:
        words = f"anybody on this host can read or write {path} ({mode})"
        return [Finding("permissions", "warning", words, f"chmod o= {path}")]
    return []


# --- the disk


def is_read_only(directory: str) -> bool:
    """Tell whether nobody can write to the file system of *directory*.

    That we alone can't, who watch it from a service with a read-only view of the host, keeps nothing from being queued.
    """
    mount = mounts.mount_of(_text(MOUNTS), directory)
    return mount is not None and mount.is_read_only


def file_system(directory: str, table: str) -> Finding:
    """Look what *directory* lies on, by the kernel's *table* of mounts."""
    mount = mounts.mount_of(table, directory)
    if mount is None:
        return not_looked_at("file_system", f"{MOUNTS} does not tell")
    where = f"{directory} is on {mount.kind} (mounted at {mount.point})"
    move = "move the outbox to a disk of this host (see Runbooks in README)"
    if mount.kind in mounts.NETWORK:
        words = f"{where}, a network file system: its locks and syncs are not to be relied on"
        return Finding("file_system", "warning", words, move)
    if mount.kind in mounts.IN_MEMORY:
        return Finding("file_system", "warning", f"{where}, in memory: events are lost with a reboot", move)
    if mount.kind in mounts.OVERLAY:
        words = f"{where}, a layer over an image: events are lost with the container"
        return Finding("file_system", "warning", words, "put the outbox on a volume (VERSIONER_AGENT_DB)")
    return ok("file_system", where)


def _space(directory: str) -> Finding:
    try:
        found = os.statvfs(directory)
    except OSError as exc:
        return not_looked_at("free_space", exc.strerror or str(exc))
    return space(
        found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, found.f_favail if found.f_files else None
    )


def space(free: int, total: int, inodes: int | None) -> Finding:
    """Judge bytes that are *free* of *total*, and free *inodes* (None where the file system counts none)."""
    words = f"{free / 1024**2:.0f} MiB free of {total / 1024**2:.0f} MiB"
    if free < ROOM_BYTES or inodes == 0:
        words += " and no inode" if inodes == 0 else ""
        return Finding("free_space", "error", f"{words}: new events are refused", "free some space")
    if inodes is not None and inodes < LOW_INODES:
        return Finding("free_space", "warning", f"{words}, but only {inodes} inodes", "remove some files")
    if free < LOW_BYTES or free < total * LOW_SHARE:
        return Finding("free_space", "warning", words, "free some space; when it is full, new events are refused")
    return ok("free_space", words)


# --- other processes


def holders(path: str) -> str:
    """Name the processes that have the outbox or its queue locked; empty where the kernel does not tell."""
    files = set()
    for name in (path, path + QUEUE_SUFFIX):
        with suppress(OSError):
            found = os.stat(name)
            files.add(f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}")
    pids = {pid for pid in lockers(_text(LOCKS), files) if pid != os.getpid()}
    return ", ".join(f"pid {pid} ({_text(f'/proc/{pid}/comm').strip() or 'unknown'})" for pid in sorted(pids))


def lockers(table: str, files: set[str]) -> set[int]:
    """Return who holds a lock on *files* (MAJOR:MINOR:INODE) by the kernel's *table* of locks (proc_locks(5))."""
    rows = (line.split() for line in table.splitlines())
    held = [row for row in rows if len(row) > 5 and row[1] != "->" and row[5] in files]  # `->` waits
    return {int(row[4]) for row in held if row[4].isdigit() and row[4] != "0"}


def is_stopped(pid: int) -> bool:
    """Tell whether a signal, or a debugger, has stopped the process."""
    return _text(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] in (["T"], ["t"])


def _text(path: str) -> str:
    """Return what the kernel tells; empty where it does not."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
