"""Having delivering lent: nothing is under way meanwhile, and whoever does it goes on afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from versioner_agent.config import Settings
from versioner_agent.errors import LockHeld
from versioner_agent.files import inode_of
from versioner_agent.locks import FlusherLock, Presence
from versioner_agent.opening import LOCK_POLL_S, lock_errors
from versioner_agent.privileges import as_owner_of
from versioner_agent.storage import Store

#: What handing over may take an agent on top of the requests it has under way (seconds).
LENDING_S = 15.0


@contextmanager
def borrowed(store: Store, settings: Settings) -> Iterator[FlusherLock]:
    """Have delivering lent for the block by whoever does it, once all that it has under way is settled."""
    lock = FlusherLock(store.path)
    try:
        with owned(store), lock_errors(lock):
            if inode_of(store.path) is not None:  # else there is nothing to deliver, and no place for a lock perhaps
                _borrow(lock, time.monotonic() + settings.timeout + LENDING_S)
        yield lock
    finally:
        lock.close()


@contextmanager
def owned(store: Store) -> Iterator[None]:
    """Use the outbox with no more rights than its owner has."""
    with as_owner_of(os.path.dirname(store.path)):
        yield


def _borrow(lock: FlusherLock, end: float) -> None:
    for claim in (lock.claim_borrow, lock.claim_delivery):
        while not claim():
            if time.monotonic() >= end:
                raise _not_lent(lock.presence(), is_first=claim == lock.claim_delivery)
            time.sleep(LOCK_POLL_S)


def _not_lent(presence: Presence, *, is_first: bool) -> LockHeld:
    if not is_first:
        pid = presence.borrower_pid or "unknown"
        return LockHeld(f"another export (pid {pid}) is under way; nothing was done", "try again when it is over")
    return LockHeld(
        f"pid {presence.pid or 'unknown'} delivers from this outbox and did not let us in; nothing was done",
        "try again; an agent of an older version never lets others in: restart it after an upgrade",
    )
