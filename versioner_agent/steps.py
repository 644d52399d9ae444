"""Steps of an installation: each knows whether it would change something, does it unless told not to, and is reported.

Files are replaced atomically: a temporary one in the same directory, with its mode from the start, synced, renamed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from versioner_agent.creation import sync_directory
from versioner_agent.errors import AgentError
from versioner_agent.files import open_plain

#: Actions -> (done, would do).
WORDS = {
    "write": ("wrote", "would write"),
    "directory": ("made", "would make"),
    "account": ("added", "would add"),
    "key": ("stored key", "would store key"),
    "link": ("linked", "would link"),
    "enable": ("enabled", "would enable"),
    "reload": ("reloaded", "would reload"),
    "start": ("started", "would start"),
    "restart": ("restarted", "would restart"),
    "stop": ("stopped", "would stop"),
    "disable": ("disabled", "would disable"),
    "remove": ("removed", "would remove"),
    "label": ("labelled", "would label"),
    "keep": ("kept", "would keep"),
}
_VERBS = {action: would.removeprefix("would ") for action, (_, would) in WORDS.items()}


class Step(NamedTuple):
    """What one step did; in a dry run, what it would do."""

    action: str  # a key of WORDS
    target: str
    changed: bool
    detail: str = ""


class Work:
    """The steps of one command, in their order."""

    def __init__(self, *, dry_run: bool = False, on_step: Callable[[Step], None] = lambda _: None) -> None:
        """Do nothing but look if *dry_run*; *on_step* hears of each step when it is done."""
        self.dry_run = dry_run
        self.steps: list[Step] = []
        self.warnings: list[str] = []
        self._on_step = on_step

    @property
    def changed(self) -> bool:
        """Whether any step changed something, or would."""
        return any(step.changed for step in self.steps)

    def step(self, action: str, target: str, needed: bool, act: Callable[[], object], detail: str = "") -> bool:
        """Do *act* if *needed*; returns *needed*. Raises AgentError for what the system refuses."""
        if needed and not self.dry_run:
            try:
                act()
            except OSError as exc:
                where = f" ({exc.filename})" if exc.filename not in (None, target) else ""
                raise AgentError(f"can't {_VERBS[action]} {target}: {exc.strerror or exc}{where}", _hint(exc)) from exc
        step = Step(action, target, needed, detail)
        self.steps.append(step)
        self._on_step(step)
        return needed

    def warn(self, text: str) -> None:
        """Say what is not as it should be, and is left to a person."""
        self.warnings.append(text)

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return {
            "changed": self.changed,
            "steps": [step._asdict() for step in self.steps],
            "warnings": self.warnings,
        }

    def write(self, path: str, content: bytes, mode: int, *, action: str = "write", detail: str = "") -> bool:
        """Make *path* a file with *content* and *mode*."""
        needed = content_of(path) != content or mode_of(path) != mode
        return self.step(action, path, needed, lambda: replace(path, content, mode), detail)

    def link(self, path: str, target: str, *, action: str = "link") -> bool:
        """Make *path* a symbolic link to *target*, in place of another link."""
        needed = link_of(path) != target
        return self.step(action, path, needed, lambda: _link(path, target), target)

    def remove(self, path: str, *, action: str = "remove") -> bool:
        """Remove a file or a link."""
        return self.step(action, path, os.path.lexists(path), lambda: os.unlink(path))

    def directory(self, path: str, mode: int, owner: tuple[int, int] | None, detail: str = "") -> bool:
        """Make *path* a directory of *mode* and *owner* (uid and gid; None: whoever makes it)."""
        needed = not _is_directory_as(path, mode, owner)
        return self.step("directory", path, needed, lambda: _make_directory(path, mode, owner), detail)


def content_of(path: str) -> bytes | None:
    """Return what is in a file; None where there is no file, or none that we may read."""
    with suppress(OSError), open(open_plain(path), "rb") as file:
        return file.read()
    return None


def mode_of(path: str) -> int | None:
    """Return the mode of a file that is no link; None where there is none."""
    with suppress(FileNotFoundError, PermissionError, NotADirectoryError):
        found = os.lstat(path)
        return stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None
    return None


def link_of(path: str) -> str | None:
    """Return where a symbolic link leads; None for anything else."""
    with suppress(OSError):
        return os.readlink(path)
    return None


def replace(path: str, content: bytes, mode: int) -> None:
    """Put a file in the place of *path*, which has the old content or the new one at any moment; raises OSError."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=directory)  # mode 0600
    try:
        with open(fd, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def _link(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.symlink(target, path)


def _is_directory_as(path: str, mode: int, owner: tuple[int, int] | None) -> bool:
    try:
        found = os.stat(path)
    except (FileNotFoundError, PermissionError):
        return False
    is_owned = owner is None or (found.st_uid, found.st_gid) == owner
    return stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == mode and is_owned


def _make_directory(path: str, mode: int, owner: tuple[int, int] | None) -> None:
    os.makedirs(path, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if owner is not None:
            os.fchown(fd, *owner)
        os.fchmod(fd, mode)  # behind the change of owner, which clears setgid
    finally:
        os.close(fd)


def _hint(exc: OSError) -> str | None:
    return "run it with sudo" if isinstance(exc, PermissionError) and os.geteuid() != 0 else None
