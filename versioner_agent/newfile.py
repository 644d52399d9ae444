"""A file that appears under its name whole and synced, or not at all."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from types import TracebackType
from typing import Self

from versioner_agent.errors import AgentError, UsageError

_NAME_CHARS = 40  # of the name, in that of the unfinished file: a name may have 255 bytes


class NewFile:
    """A new file beside *path*, mode 0600, until `place` gives it the name; gone unless it was placed.

    The directory and the file are opened here, with the rights that we have now. Raises AgentError.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        directory, self._name = os.path.split(self.path)
        self._unfinished: str | None = f".{self._name[:_NAME_CHARS]}.{os.urandom(6).hex()}.part"
        try:
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise self.error(exc) from exc
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._unfinished, flags, 0o600, dir_fd=self._directory)
        except OSError as exc:
            os.close(self._directory)
            raise self.error(exc) from exc
        self.file = os.fdopen(fd, "wb")

    def __enter__(self) -> Self:
        """Remove the file at the end of the block, unless it was placed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back."""
        if self._unfinished is not None:
            with suppress(OSError):
                os.unlink(self._unfinished, dir_fd=self._directory)
        with suppress(OSError):  # what a full disk did not take
            self.file.close()
        os.close(self._directory)

    def place(self, *, replaces: bool = False) -> None:
        """Sync the file, give it its name, and sync that; raises UsageError where the name is taken, AgentError.

        With *replaces*, the file takes the place of what has the name.
        """
        assert self._unfinished is not None  # placed once
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self._name_it(self._unfinished, replaces=replaces)
            self._unfinished = None
            self._sync_directory()
        except OSError as exc:
            raise self.error(exc) from exc

    def _name_it(self, unfinished: str, *, replaces: bool) -> None:
        """Give the file its name. Others may write to the same place: what they wrote since we looked is theirs."""
        places = {"src_dir_fd": self._directory, "dst_dir_fd": self._directory}
        if not replaces:
            try:
                os.link(unfinished, self._name, **places, follow_symlinks=False)
            except FileExistsError as exc:
                raise taken(self.path) from exc
            except OSError as exc:  # sticks have no links
                with suppress(FileNotFoundError):
                    os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
                    raise taken(self.path) from exc
            else:
                os.unlink(unfinished, dir_fd=self._directory)
                return
        os.rename(unfinished, self._name, **places)

    def _sync_directory(self) -> None:
        try:
            os.fsync(self._directory)
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems of sticks and shares can't
                raise

    def error(self, exc: OSError) -> AgentError:
        """Say that the file can't be written."""
        return AgentError(f"can't write {self.path}: {exc.strerror or exc}", "choose another place, and try again")


def taken(path: str) -> UsageError:
    """Say that something lies at *path*."""
    return UsageError(f"{path} is there already; nothing was done", "name a file that is not there")


def open_old(path: str) -> int | None:
    """Open what lies at *path* for reading, None where nothing does; raises UsageError for what is no plain file.

    Links are not followed: a new file would take their place.
    """
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is no regular file; nothing was done", "name a new file, or `-` for stdout")
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise UsageError(f"{path} can't be looked at: {exc.strerror}; nothing was done", "name another file") from exc
