"""`flush`: deliver what is pending now, or wait for the agent that does.

Only an outbox that nobody else can write is delivered from: a job's key must not deliver other people's events.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import NamedTuple

from versioner_agent import binding, config, review
from versioner_agent.config import Settings
from versioner_agent.errors import CredentialsMissing, LockHeld, OutboxError
from versioner_agent.flusher import Flusher
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.opening import GRACE_S, LOCK_POLL_S, handled_by, lock_errors, migrate, open_outbox
from versioner_agent.orphans import Orphans
from versioner_agent.records import Record
from versioner_agent.storage import OutboxMissing, Store

HAND_OVER_GRACE_S = 4.0  # what requests under way get when an agent waits: it is promised its turn within 5 s


class Drained(NamedTuple):
    """What a flush came to."""

    refused: list[Record]  # refused while it ran, at most as many as a page
    pending: int
    note: str = ""  # why something is left, for people


def flush(
    settings: Settings,
    env: Mapping[str, str],
    *,
    timeout: float,
    rebind: bool = False,
    on_progress: Callable[[int | None], None] = lambda _: None,
) -> Drained:
    """Deliver what is pending within *timeout* seconds (and what is under way then, within GRACE_S).

    An outbox that others can write is left to its agent, and so is one whose agent is running: then this only waits.
    *on_progress* gets the number still pending, None where it can't be read just then. Raises CredentialsMissing,
    OtherDestination, OutboxError.
    """
    end = time.monotonic() + timeout
    started = time.time()
    store = Store(settings.db, settings.busy_timeout)
    ledger = Ledger(store)
    lock = FlusherLock(store.path)
    try:
        open_outbox(ledger, create=False)
        if not rebind:
            _tell_ends(ledger, lock)
        if ledger.pending() == 0 and not rebind:
            return Drained([], 0)
        if rebind:
            _rebind(ledger, lock)
        binding.check(ledger, binding.configured(settings, env))
        sharing = others_can_write(store.path)
        if sharing:
            note = f"{sharing}: only its agent delivers from it"
            return _watch(ledger, lock, started, end, note, on_progress)
        return _flush_own(ledger, lock, settings, env, (started, end), on_progress)
    except OutboxMissing:
        return Drained([], 0)
    finally:
        lock.close()
        store.close()


def others_can_write(path: str) -> str:
    """Say how somebody else could put events into the outbox at *path*; empty when nobody can (root aside)."""
    directory = os.path.dirname(path)
    for name, found in ((path, os.stat(path)), (directory, os.stat(directory))):
        is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if found.st_mode & 0o022 and not is_sticky:
            return f"others can write {name} (mode {stat.S_IMODE(found.st_mode):04o})"
        if found.st_uid not in (os.getuid(), 0):  # not who we have become
            return f"{name} belongs to uid {found.st_uid}"
    return ""


def _tell_ends(ledger: Ledger, lock: FlusherLock) -> None:
    """Queue the ends of jobs whose wrappers were killed, where delivering is ours: even if nothing else is pending."""
    orphans = Orphans(ledger)
    if not orphans.has_files() or others_can_write(ledger.store.path):
        return
    with lock_errors(lock):
        is_ours = not lock.presence().has_agent and lock.claim_delivery()
    if is_ours:
        migrate(ledger)
        orphans.look(time.monotonic())


def _flush_own(
    ledger: Ledger,
    lock: FlusherLock,
    settings: Settings,
    env: Mapping[str, str],
    span: tuple[float, float],
    on_progress: Callable[[int | None], None],
) -> Drained:
    started, end = span
    with lock_errors(lock):
        has_lock = not lock.presence().has_agent and lock.claim_delivery()
    if not has_lock:
        return _watch(ledger, lock, started, end, "its agent delivers from it", on_progress)
    if binding.key_or_none(settings, env) is None:
        config.read_key(settings, env)  # says why it can't be read, where there is a reason
        raise CredentialsMissing(
            "there is no API key to deliver with", "set VERSIONER_API_KEY, or api_key_file in the configuration"
        )
    migrate(ledger)
    account = binding.Account(ledger.destination()[0].account)
    sender, options, here = binding.sending(settings, env, account)
    refused: list[Record] = []

    flusher = Flusher(ledger, sender, options, here, on_failed=refused.append, on_account=account.bind)
    interrupted = _Interrupted(flusher)

    def is_done() -> bool:
        on_progress(_pending_or_none(ledger))
        is_over = time.monotonic() >= end or interrupted.signals > 0 or lock.is_agent_waiting() or not lock.renew()
        return is_over or flusher.is_drained()

    with handled_by(interrupted.on_signal, signal.SIGTERM, signal.SIGINT):
        flusher.run(is_done)
        unanswered = flusher.finish(HAND_OVER_GRACE_S if lock.is_agent_waiting() else GRACE_S)
    sender.close()
    if lock.is_agent_waiting():
        lock.close()
        rest = _watch(ledger, lock, time.time(), end, "its agent has taken over", on_progress)
        return rest._replace(refused=refused + rest.refused)
    pending = ledger.pending()
    _, health, _ = ledger.destination()
    why = f"the API is {health.state}: {health.reason}" if health.reason and health.state != "up" else ""
    if unanswered and not why:
        why = f"{here.origin} has not answered in time"
    return Drained(refused, pending, why if pending else "")


def _pending_or_none(ledger: Ledger) -> int | None:
    try:
        return ledger.pending()
    except OutboxError:
        return None  # the flusher meets the same error and says so


class _Interrupted:
    """SIGINT and SIGTERM during a flush: settle what is under way, then leave; a second one leaves at once."""

    def __init__(self, flusher: Flusher) -> None:
        self.signals = 0
        self._flusher = flusher

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Count it; the loop looks at the count."""
        self.signals += 1
        if self.signals > 1:
            os._exit(128 + number)
        self._flusher.wake()


def _watch(
    ledger: Ledger, lock: FlusherLock, started: float, end: float, note: str, on_progress: Callable[[int | None], None]
) -> Drained:
    """Wait for whoever delivers until nothing is pending or *end* (monotonic seconds)."""
    while True:
        pending = ledger.pending()
        on_progress(pending)
        if pending == 0 or time.monotonic() >= end:
            break
        time.sleep(min(LOCK_POLL_S, max(0.0, end - time.monotonic())))
    refused = review.failed_since(ledger.store, started)
    if pending and not lock.presence().is_delivering:
        note += ", and none is running"
    return Drained(refused, pending, note if pending else "")


def _rebind(ledger: Ledger, lock: FlusherLock) -> None:
    with lock_errors(lock):
        if lock.presence().has_agent or not lock.claim_delivery():
            raise LockHeld(
                f"somebody delivers from this outbox (pid {lock.presence().pid or 'unknown'})",
                "stop the agent, change its destination, then `flush --new-destination`",
            )
    ledger.unbind()
    lock.close()
