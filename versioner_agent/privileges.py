"""Root works on an outbox as the owner of its directory does: what others planted there must not reach root's files.

SQLite follows what it finds beside a file; a journal can even name files of other places, to be deleted
(https://sqlite.org/fileformat2.html#the_rollback_journal, super-journals).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

#: What an outbox may need later: the owner may not be able to read our program, where root alone has it.
_LATER = (
    "difflib", "fcntl", "grp", "pwd", "shutil", "threading", "unicodedata",
    *(f"versioner_agent.{name}" for name in ("creation", "mending", "review", "urls")),
)  # fmt: skip


def become_owner_of(directory: str) -> None:
    """Give up root's power for the rest of the process, where *directory* belongs to another user."""
    owner = _other_owner(directory)
    if owner is not None:
        _become(*owner, directory)


@contextmanager
def as_owner_of(directory: str) -> Iterator[None]:
    """Give up root's power for the block, where *directory* belongs to another user."""
    owner = _other_owner(directory)
    gid, groups = os.getegid(), os.getgroups()
    has_stepped_down = owner is not None and _become(*owner, directory)
    try:
        yield
    finally:
        if has_stepped_down:
            _take_back(gid, groups)


def _become(uid: int, gid: int, directory: str) -> bool:
    """Step down; False, with all as it was, where that can't be.

    A namespace or a container without the capability to step down gives its root no power worth giving up. Where the
    owner can't even get to *directory*, nobody else comes that way either.
    """
    for name in _LATER:
        import_module(name)
    before = os.getegid(), os.getgroups()
    try:
        os.setgroups([])
        os.setegid(gid)  # while we still may
        os.seteuid(uid)
        os.stat(directory)
    except OSError:
        _take_back(*before)
        return False
    return True


def _take_back(gid: int, groups: list[int]) -> None:
    with suppress(OSError):  # what could not be given up
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def _other_owner(directory: str) -> tuple[int, int] | None:
    """Return uid and gid to use for *directory*; None where we are not root, or it is root's own."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    try:
        found = os.stat(directory)
    except OSError:
        return None  # whoever opens the outbox says why it can't be used
    return (found.st_uid, found.st_gid) if found.st_uid != 0 else None
