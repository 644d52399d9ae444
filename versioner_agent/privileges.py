"""Root works on an outbox as the owner of its directory does: what others planted there must not reach root's files.

SQLite follows what it finds beside a file; a journal can even name files of other places, to be deleted
(https://sqlite.org/fileformat2.html#the_rollback_journal, super-journals).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def become_owner_of(directory: str) -> None:
    """Give up root's power for the rest of the process, where *directory* belongs to another user."""
    owner = _other_owner(directory)
    if owner is not None:
        _become(*owner)


@contextmanager
def as_owner_of(directory: str) -> Iterator[None]:
    """Give up root's power for the block, where *directory* belongs to another user."""
    owner = _other_owner(directory)
    if owner is None:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    _become(*owner)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def _become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setegid(gid)  # while we still may
    os.seteuid(uid)


def _other_owner(directory: str) -> tuple[int, int] | None:
    """Return uid and gid to use for *directory*; None where we are not root, or it is root's own."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    try:
        found = os.stat(directory)
    except OSError:
        return None  # whoever opens the outbox says why it can't be used
    return (found.st_uid, found.st_gid) if found.st_uid != 0 else None
