"""What `run` and `flush` share: opening the outbox, upgrading it, and signals given back to whoever had them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from versioner_agent import birthplace
from versioner_agent.errors import OutboxBusy, OutboxFull
from versioner_agent.files import unusable
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock

logger = logging.getLogger(__name__)

GRACE_S = 5.0  # what requests under way get when we are told to stop
LOCK_POLL_S = 0.1


def open_outbox(ledger: Ledger, *, create: bool) -> None:
    """Open the outbox, make it if it is missing and *create*, and say what was mended; raises OutboxError."""
    mended = ledger.open(create=create)
    if mended is not None:
        logger.error("the outbox was damaged: %s", str(mended), extra={"action": "damage"})


def migrate(ledger: Ledger) -> None:
    """Bring the outbox to this program's schema; only while holding the flusher lock. Raises OutboxError."""
    kept = ledger.migrate()
    if kept is not None:
        logger.warning("the outbox was upgraded; the old one is kept as %s", kept, extra={"action": "upgrade"})
    with suppress(OutboxFull, OutboxBusy):  # no reason not to deliver
        birthplace.settle_in(ledger.store)  # an older schema did not note it


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Give signals to *handler* for the block, and back to whoever had them."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def lock_errors(lock: FlusherLock) -> Iterator[None]:
    """Say what keeps us from using the lock."""
    try:
        yield
    except OSError as exc:
        raise unusable(lock.path, exc) from exc
