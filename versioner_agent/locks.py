"""Operating-system locks beside the outbox: the queue of writers, who delivers, and who imports.

The kernel frees them on any death, so nothing ever has to be rescued. Lock files are never removed (that would let two
processes hold "the same" lock) and never opened through a symbolic link.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from versioner_agent.files import inode_of, open_beside, open_plain

QUEUE_SUFFIX = ".queue"
FLUSHER_SUFFIX = ".flusher"
IMPORT_SUFFIX = ".import"

# Bytes of the flusher file: who delivers, and whether an agent is there (delivering, or waiting for a flush to end).
_DELIVERING = 0
_AGENT = 1
# Behind them the pids of both, right-aligned in ten bytes each, and what may be shown of the agent's API key.
_NOTES_AT = 2
_NOTE_BYTES = 10
_KEY_AT = _NOTES_AT + 2 * _NOTE_BYTES
_KEY_BYTES = 96
# And behind that: somebody wants to borrow delivering, and gives it back; his pid follows.
_BORROWING = _KEY_AT + _KEY_BYTES
# struct flock on 64-bit and large-file Linux: type, whence, start, length, pid (fcntl_locking(2)).
_FLOCK = "hhqqi4x"


class WriteQueue:
    """First come, first served among writers: SQLite's busy handler is no queue."""

    def __init__(self, path: str) -> None:
        """Queue on the file *path*; nothing is opened yet."""
        self._path = path
        self._fd: int | None = None

    def acquire(
        self, timeout: float, *, most: float | None = None, progress: Callable[[], object] = lambda: None
    ) -> bool:
        """Wait for our turn, up to *timeout* seconds without a change of *progress*, and up to *most* in all.

        Fifty writers on a slow disk take longer than anybody should wait for one that hangs. Raises OSError where the
        file can't be opened.
        """
        import fcntl  # noqa: PLC0415  # POSIX only

        while True:
            if self._fd is None:
                self._fd = open_beside(self._path)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not self._wait(timeout, timeout if most is None else most, progress):
                    return False
            if inode_of(self._path) == inode_of(self._fd):
                return True
            self.close()  # it was removed, or hidden by a mount: those who came after that queue on another one

    def release(self) -> None:
        """Let the next writer in."""
        import fcntl  # noqa: PLC0415

        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def remember(self, note: bytes) -> None:
        """Write *note* into the file: an outbox was made here. Only while holding it."""
        if self._fd is not None and os.fstat(self._fd).st_size == 0:
            with suppress(OSError):  # a full disk: the next writer notes it
                os.pwrite(self._fd, note, 0)
                os.fsync(self._fd)

    def close(self) -> None:
        """Give the file back; a lock held on it is freed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _wait(self, timeout: float, most: float, progress: Callable[[], object]) -> bool:
        """Block in the kernel's own queue, in a thread, for flock(2) has no timeout."""
        import fcntl  # noqa: PLC0415
        import threading  # noqa: PLC0415
        import time  # noqa: PLC0415

        fd = self._fd
        assert fd is not None  # acquire opened it
        guard = threading.Lock()
        done = threading.Event()
        is_abandoned = False

        def block() -> None:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with guard:
                if is_abandoned:
                    os.close(fd)  # frees the lock that nobody waits for any more
                done.set()

        threading.Thread(target=block, daemon=True).start()
        try:
            end = time.monotonic() + most
            seen = progress()
            while not done.wait(min(timeout, max(0.0, end - time.monotonic()))):
                before, seen = seen, progress()
                if seen == before or time.monotonic() >= end:
                    break
        finally:
            with guard:
                if not done.is_set():
                    is_abandoned = True
                    self._fd = None
        return not is_abandoned


class Presence(NamedTuple):
    """Who is at the outbox."""

    is_delivering: bool
    has_agent: bool
    pid: int | None  # of whoever delivers, as it saw itself
    agent_pid: int | None
    agent_key: str | None = None  # what may be shown of it
    has_borrower: bool = False  # there is one who has delivering lent to him, or waits for that
    borrower_pid: int | None = None


class FlusherLock:
    """Who may deliver from an outbox; one process at a time, by open-file-description locks (fcntl_locking(2))."""

    def __init__(self, outbox_path: str) -> None:
        """Guard the outbox at *outbox_path*."""
        self.path = outbox_path + FLUSHER_SUFFIX
        self._fd: int | None = None
        self._claimed: tuple[int, ...] = ()
        self._shown: str | None = None

    def claim_agent(self) -> bool:
        """Become the agent of this outbox; False if there is one. Raises OSError."""
        return self._claim(_AGENT)

    def claim_delivery(self) -> bool:
        """Become the one who delivers; False if somebody else does. Raises OSError."""
        return self._claim(_DELIVERING)

    def claim_borrow(self) -> bool:
        """Become the one to whom delivering is lent, once `claim_delivery` succeeds; False if somebody else is."""
        return self._claim(_BORROWING)

    def release_delivery(self) -> None:
        """Let somebody else deliver; whatever else is held stays."""
        import fcntl  # noqa: PLC0415

        self._claimed = tuple(byte for byte in self._claimed if byte != _DELIVERING)
        if self._fd is not None:
            request = struct.pack(_FLOCK, fcntl.F_UNLCK, os.SEEK_SET, _DELIVERING, 1, 0)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)

    def is_borrower_waiting(self) -> bool:
        """Tell whoever delivers whether somebody wants that lent."""
        return self._fd is not None and _is_locked(self._fd, _BORROWING)

    def is_agent_waiting(self) -> bool:
        """Tell a holder that is no agent whether one waits for it."""
        return self._fd is not None and _is_locked(self._fd, _AGENT)

    def presence(self) -> Presence:
        """Look without touching: taking the lock to test it could turn an agent away."""
        try:
            fd = open_plain(self.path, follow=False)
        except OSError:
            return Presence(is_delivering=False, has_agent=False, pid=None, agent_pid=None)
        try:
            is_delivering, has_agent = _is_locked(fd, _DELIVERING), _is_locked(fd, _AGENT)
            pid = _noted(fd, _DELIVERING) if is_delivering else None
            agent_pid = _noted(fd, _AGENT) if has_agent else None
            has_borrower = _is_locked(fd, _BORROWING)
            borrower_pid = _noted(fd, _BORROWING) if has_borrower else None
            key = os.pread(fd, _KEY_BYTES, _KEY_AT).decode("utf-8", "replace").strip() if has_agent else ""
        finally:
            os.close(fd)
        return Presence(is_delivering, has_agent, pid, agent_pid, key or None, has_borrower, borrower_pid)

    def note_key(self, shown: str) -> None:
        """Note what may be shown of the key that this agent uses, for `status` of those who can't read it."""
        self._shown = shown
        self._note(_KEY_AT, shown.encode().ljust(_KEY_BYTES)[:_KEY_BYTES])

    def is_hidden(self) -> bool:
        """Tell whether another place lies over ours by now, for something was mounted there."""
        if self._fd is None or not os.fstat(self._fd).st_nlink or not os.path.isdir(os.path.dirname(self.path)):
            return False
        return inode_of(self.path) != inode_of(self._fd)

    def renew(self) -> bool:
        """Hold the file that is at the path: somebody may have removed ours. False if another has the new one."""
        if self._fd is None or os.fstat(self._fd).st_nlink:
            return True
        held, self._claimed = self._claimed, ()
        self.close()
        return all(self._claim(byte) for byte in held)

    def close(self) -> None:
        """Free what is held."""
        self._claimed = ()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _claim(self, byte: int) -> bool:
        """Lock *byte* and note our pid beside it, for people; False if somebody else holds it."""
        if self._fd is None:
            self._fd = open_beside(self.path)
        if not lock_byte(self._fd, byte):
            return False
        self._claimed = (*self._claimed, byte)
        self._note(_note_at(byte), str(os.getpid()).rjust(_NOTE_BYTES).encode())
        if byte == _AGENT and self._shown is not None:
            self.note_key(self._shown)
        return True

    def _note(self, at: int, words: bytes) -> None:
        if self._fd is None or os.fstat(self._fd).st_nlink > 1:
            return  # a hard link: what it shares may be somebody's file
        with suppress(OSError):  # a full disk must not keep anybody from delivering
            os.pwrite(self._fd, words, at)


def lock_byte(fd: int, byte: int) -> bool:
    """Lock one *byte* of an open file until that is closed; False if somebody else holds it. Raises OSError."""
    import fcntl  # noqa: PLC0415

    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _note_at(byte: int) -> int:
    return byte + 1 if byte == _BORROWING else _NOTES_AT + byte * _NOTE_BYTES


def _noted(fd: int, byte: int) -> int | None:
    text = os.pread(fd, _NOTE_BYTES, _note_at(byte)).strip()
    return int(text) if text.isdigit() else None


def _is_locked(fd: int, byte: int) -> bool:
    import fcntl  # noqa: PLC0415

    request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
