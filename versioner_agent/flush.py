"""`flush`: deliver what is pending now, or wait for the agent that does; and a turn at delivering, for who is no agent.

Only an outbox that nobody else can write is delivered from: a job's key must not deliver other people's events.
"""

from __future__ import annotations

import math
import os
import signal
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import closing
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
from versioner_agent.reports import in_trouble
from versioner_agent.storage import OutboxMissing, Store

#: Why nothing is sent though something is pending.
HELD = "exported records of the same products go first: a receipt, `retry` or `discard` of those lets them go"
LENT = "the outbox was lent to an export"
TIDY_S = 1.0  # that a flush goes on forgetting what is old when all is delivered
HAND_OVER_GRACE_S = 4.0  # what requests under way get when an agent waits: it is promised its turn within 5 s


class Turn(NamedTuple):
    """How our turn at delivering ended."""

    signal: int  # that told us to leave, 0 if none did
    is_handed_over: bool  # somebody else delivers from now on
    why: str  # what was in the way in the end, for people


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
    is_hurried: bool = True,
) -> Drained:
    """Deliver what is pending within *timeout* seconds (and what is under way then, within GRACE_S).

    An outbox that others can write is left to its agent, and so is one whose agent is running: then this only waits.
    *on_progress* gets the number still pending, None where it can't be read just then. With *is_hurried* a second
    signal ends the process. Raises CredentialsMissing, OtherDestination, OutboxError.
    """
    end = time.monotonic() + timeout
    store = Store(settings.db, settings.busy_timeout)
    ledger = Ledger(store)
    lock = FlusherLock(store.path)
    try:
        open_outbox(ledger, create=False)
        if not rebind:
            _tell_ends(ledger, lock)
        if ledger.pending() == 0 and not rebind:
            return Drained([], 0)
        if not rebind and ledger.holds_all():
            return Drained([], ledger.pending(), HELD)
        if rebind:
            _rebind(ledger, lock)
        binding.check(ledger, binding.configured(settings, env))
        return _drain(ledger, lock, settings, env, end, on_progress, is_hurried=is_hurried)
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
    if take_turn(lock):
        migrate(ledger)
        orphans.look(time.monotonic())
        lock.close()  # an agent may have come meanwhile


def _drain(
    ledger: Ledger,
    lock: FlusherLock,
    settings: Settings,
    env: Mapping[str, str],
    end: float,
    on_progress: Callable[[int | None], None],
    *,
    is_hurried: bool,
) -> Drained:
    """Deliver when it is our turn, and watch whoever delivers when it is not."""
    sharing = others_can_write(ledger.store.path)
    why = f"{sharing}: only its agent delivers from it" if sharing else "its agent delivers from it"
    refused: dict[int, Record] = {}
    started = time.time()
    is_done = _until_drained(ledger, end, on_progress)

    def keep(record: Record) -> None:
        refused.setdefault(record.id, record)

    while True:
        if not sharing and take_turn(lock):
            turn = deliver(ledger, lock, settings, env, end, is_done, on_failed=keep, is_hurried=is_hurried)
            if turn.signal or not turn.is_handed_over:
                why = (HELD if _are_all_held(ledger) else "") or in_trouble(ledger.destination()[1]) or turn.why
                break
            why = "its agent has taken over" if lock.presence().has_agent else LENT
        is_free = _watch(ledger, lock, end, on_progress, may_deliver=not sharing)
        for record in review.failed_since(ledger.store, started):
            keep(record)
        if not is_free:
            why = _why_left(ledger, lock, why)
            break
    pending = ledger.pending()
    return Drained(list(refused.values()), pending, why if pending else "")


def _until_drained(ledger: Ledger, end: float, on_progress: Callable[[int | None], None]) -> Callable[[Flusher], bool]:
    """Return what tells whether a flusher is done: all is delivered and tidied up for TIDY_S, or is held."""
    tidy_until = end

    def is_done(flusher: Flusher) -> bool:
        nonlocal tidy_until
        on_progress(_pending_or_none(ledger))
        if flusher.is_drained():
            # Where no agent runs, nobody else forgets what is old.
            tidy_until = min(tidy_until, time.monotonic() + TIDY_S)
            return not flusher.is_tidying() or time.monotonic() >= tidy_until
        return not flusher.is_busy() and _are_all_held(ledger)

    return is_done


def _why_left(ledger: Ledger, lock: FlusherLock, why: str) -> str:
    """Say why something is left where others deliver; *why* says that they do."""
    presence = lock.presence()
    if _are_all_held(ledger):
        return HELD
    if not presence.is_delivering:
        return why if why == LENT else f"{why}, and none is running"
    return why if presence.has_agent else f"pid {presence.pid or 'unknown'} has its turn at delivering"


def take_turn(lock: FlusherLock) -> bool:
    """Become the one who delivers, unless somebody else is, or an agent or a borrower waits; raises OutboxError."""
    with lock_errors(lock):
        presence = lock.presence()
        return not presence.has_agent and not presence.has_borrower and lock.claim_delivery()


def deliver(
    ledger: Ledger,
    lock: FlusherLock,
    settings: Settings,
    env: Mapping[str, str],
    end: float,
    is_done: Callable[[Flusher], bool],
    *,
    on_failed: Callable[[Record], None] = lambda _: None,
    is_strict: bool = False,
    is_hurried: bool = True,
) -> Turn:
    """Deliver what *ledger* shows while it is our turn, until *is_done* or *end* (monotonic seconds).

    Then, or after SIGINT or SIGTERM, requests under way get GRACE_S; less when an agent waits for its turn, all
    that they may take when somebody wants to borrow the outbox, and nothing beyond *end* where that *is_strict*. A
    second signal ends the process where that *is_hurried*. The turn is over and *lock* free when this returns.
    Raises CredentialsMissing, OtherDestination, ConfigError, OutboxError.
    """
    if binding.key_or_none(settings, env) is None:
        config.read_key(settings, env)  # says why it can't be read, where there is a reason
        raise CredentialsMissing(
            "there is no API key to deliver with", "set VERSIONER_API_KEY, or api_key_file in the configuration"
        )
    account = binding.check(ledger, binding.configured(settings, env))
    migrate(ledger)
    sender, options, here = binding.sending(settings, env, account)
    sender.end = end if is_strict else math.inf
    # A longer pause would last beyond the end.
    options = options._replace(max_backoff=min(options.max_backoff, max(0.0, end - time.monotonic())))
    flusher = Flusher(ledger, sender, options, here, on_failed=on_failed, on_account=account.bind)
    ours = _Ours(flusher, lock, is_hurried=is_hurried)
    with closing(sender), handled_by(ours.on_signal, signal.SIGTERM, signal.SIGINT):
        flusher.run(lambda: is_done(flusher) or time.monotonic() >= end or ours.is_over())
        unanswered = flusher.finish(ours.grace_s(settings.timeout))
        if unanswered and lock.is_borrower_waiting():  # since then
            unanswered = flusher.finish(ours.grace_s(settings.timeout))
    is_handed_over = ours.is_wanted_by_others()
    lock.close()
    why = f"{here.origin} has not answered in time" if unanswered else ""
    return Turn(ours.signal, is_handed_over, flusher.trouble or why)


class _Ours:
    """What ends our turn before its time: an agent or a borrower that waits, a lock that was taken away, a signal.

    At SIGINT and SIGTERM what is under way is settled before we leave; a second one leaves at once, if *is_hurried*.
    """

    def __init__(self, flusher: Flusher, lock: FlusherLock, *, is_hurried: bool) -> None:
        self.signal = 0
        self._is_hurried = is_hurried
        self._flusher = flusher
        self._lock = lock
        self._is_lost = False

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Remember it; the loop looks."""
        if self.signal and self._is_hurried:
            os._exit(128 + number)
        self.signal = number
        self._flusher.wake()

    def is_wanted_by_others(self) -> bool:
        """Tell whether somebody else delivers now, or is to."""
        with lock_errors(self._lock):
            self._is_lost = self._is_lost or not self._lock.renew()
            return self._is_lost or self._lock.is_agent_waiting() or self._lock.is_borrower_waiting()

    def grace_s(self, timeout_s: float) -> float:
        """Return what requests under way get, each of which may take *timeout_s*."""
        if self._lock.is_borrower_waiting():
            return timeout_s + GRACE_S
        return HAND_OVER_GRACE_S if self.is_wanted_by_others() else GRACE_S

    def is_over(self) -> bool:
        """Tell whether to leave."""
        return self.is_wanted_by_others() or self.signal > 0


def _are_all_held(ledger: Ledger) -> bool:
    try:
        return ledger.holds_all()
    except OutboxError:
        return False  # whoever delivers meets the same error and says so


def _pending_or_none(ledger: Ledger) -> int | None:
    try:
        return ledger.pending()
    except OutboxError:
        return None  # the flusher meets the same error and says so


def _watch(
    ledger: Ledger, lock: FlusherLock, end: float, on_progress: Callable[[int | None], None], *, may_deliver: bool
) -> bool:
    """Wait for whoever delivers until nothing is pending or *end*; True if it left before and we may go on."""
    while True:
        pending = ledger.pending()
        on_progress(pending)
        if pending == 0 or time.monotonic() >= end or ledger.holds_all():
            return False
        presence = lock.presence()
        if may_deliver and not (presence.is_delivering or presence.has_agent or presence.has_borrower):
            return True
        time.sleep(min(LOCK_POLL_S, max(0.0, end - time.monotonic())))


def _rebind(ledger: Ledger, lock: FlusherLock) -> None:
    with lock_errors(lock):
        if lock.presence().has_agent or not lock.claim_delivery():
            raise LockHeld(
                f"somebody delivers from this outbox (pid {lock.presence().pid or 'unknown'})",
                "stop the agent, change its destination, then `flush --new-destination`",
            )
    ledger.unbind()
    lock.close()
