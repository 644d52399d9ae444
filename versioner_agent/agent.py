"""The agent (`run`) and its short-lived sibling (`flush`): locks, destination, signals, ordered shutdown.

Signal handlers only set flags and wake the loop. The destination is checked before anything is sent: an outbox never
delivers to two places.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from versioner_agent import binding, config, review
from versioner_agent.config import Settings
from versioner_agent.creation import make_private_directory
from versioner_agent.delivery import Sender
from versioner_agent.errors import AgentError, CredentialsMissing, LockHeld, OutboxBusy, OutboxError, OutboxFull
from versioner_agent.flusher import Flusher
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.records import Record
from versioner_agent.storage import OutboxMissing, Store

logger = logging.getLogger(__name__)

GRACE_S = 5.0  # what requests under way get when we are told to stop
HAND_OVER_GRACE_S = 4.0  # what they get when an agent waits: it is promised its turn within 5 s
LOCK_POLL_S = 0.1
RETRY_S = 5.0  # from one try to open the outbox to the next, where the disk is full or others keep it


class Drained(NamedTuple):
    """What a flush came to."""

    refused: list[Record]  # refused while it ran, at most as many as a page
    pending: int
    note: str = ""  # why something is left, for people


class Agent:
    """Delivers from one outbox until it is told to stop."""

    def __init__(self, settings: Settings, env: Mapping[str, str], reload: Callable[[], Settings]) -> None:
        """Use *settings*; *reload* reads them again, raising ConfigError for what can't be used."""
        self._settings = settings
        self._env = env
        self._reload = reload
        self._signals = 0
        self._wants_reload = False
        self._flusher: Flusher | None = None

    def run(self) -> None:
        """Deliver until SIGTERM or SIGINT; raises LockHeld, OtherDestination, ConfigError, OutboxError.

        Requests under way get GRACE_S seconds then, and what was answered is settled. A second signal exits at once.
        """
        if not self._settings.is_explicit("db"):
            make_private_directory(self._settings.db)
        store = Store(self._settings.db, self._settings.busy_timeout)
        lock = FlusherLock(store.path)
        with _handled_by(self._on_signal, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            try:
                ledger = Ledger(store)
                if self._insist(lambda: _open(ledger, create=True)):
                    self._take_over(lock)
                if self._insist(lambda: _migrate(ledger)):
                    self._deliver(ledger, lock)
            finally:
                lock.close()
                store.close()

    def _insist(self, act: Callable[[], None]) -> bool:
        """Do *act* as soon as the disk has room for it and others let us; False if we are told to stop before."""
        is_told = False
        while not self._signals:
            try:
                act()
            except (OutboxFull, OutboxBusy) as exc:
                if not is_told:
                    logger.error("%s; trying again", exc.message, extra={"action": "outbox_error"})  # noqa: TRY400
                    is_told = True
            else:
                return True
            self._pause(RETRY_S)
        return False

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._signals:
            time.sleep(LOCK_POLL_S)

    def _take_over(self, lock: FlusherLock) -> None:
        with _lock_errors(lock):
            if not lock.claim_agent():
                pid = lock.presence().agent_pid
                raise LockHeld(f"another agent (pid {pid or 'unknown'}) delivers from this outbox")
            is_told = False
            while not lock.claim_delivery():
                if not is_told:
                    logger.info("waiting for a flush (pid %s) to hand over", lock.presence().pid)
                    is_told = True
                if self._signals:
                    return
                time.sleep(LOCK_POLL_S)

    def _deliver(self, ledger: Ledger, lock: FlusherLock) -> None:
        account = binding.check(ledger, binding.configured(self._settings, self._env))
        sender, options, here = binding.sending(self._settings, self._env, account)
        if binding.key_or_none(self._settings, self._env) is None:
            logger.warning("there is no API key yet: events wait (VERSIONER_API_KEY, api_key_file)")
        flusher = Flusher(ledger, sender, options, here, on_account=account.bind)
        self._flusher = flusher
        logger.info(
            "agent %d delivers from %s to %s", os.getpid(), ledger.store.path, here.origin, extra={"action": "start"}
        )
        try:
            while not self._signals:
                flusher.run(lambda: self._is_interrupted(lock))
                if self._wants_reload and not self._signals:
                    sender = self._apply_reload(flusher, ledger, sender, account)
            unanswered = flusher.finish(GRACE_S)
            if unanswered:
                logger.warning("stopped with %d requests unanswered; they will be repeated", unanswered)
        finally:
            self._flusher = None
            sender.close()
        logger.info("stopped", extra={"action": "stop"})

    def _is_interrupted(self, lock: FlusherLock) -> bool:
        with _lock_errors(lock):
            if not lock.renew():
                raise LockHeld(f"the lock {lock.path} was removed, and another agent delivers from this outbox now")
        return bool(self._signals) or self._wants_reload

    def _apply_reload(self, flusher: Flusher, ledger: Ledger, sender: Sender, account: binding.Account) -> Sender:
        """Take the configuration as it is now, or keep the old one and say why."""
        self._wants_reload = False
        try:
            settings = self._reload()
            if os.path.realpath(settings.db) != ledger.store.path:
                raise AgentError("another outbox (db) takes a restart")
            bound = binding.check(ledger, binding.configured(settings, self._env))
            fresh, options, here = binding.sending(settings, self._env, account)
        except AgentError as exc:
            logger.error("reload: %s; the old configuration stays", exc.message)  # noqa: TRY400
            return sender
        account.name = bound.name  # an outbox with nothing pending may have moved to another one
        flusher.configure(fresh, options, here)
        self._settings = settings
        logger.info("configuration read again", extra={"action": "reload"})
        return fresh  # the old client lives on in the requests under way

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._wants_reload = True
        else:
            self._signals += 1
            if self._signals > 1:
                os._exit(128 + number)
        if self._flusher is not None:
            self._flusher.wake()


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
        _open(ledger, create=False)
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
        if found.st_uid not in (os.geteuid(), 0):
            return f"{name} belongs to uid {found.st_uid}"
    return ""


def _flush_own(
    ledger: Ledger,
    lock: FlusherLock,
    settings: Settings,
    env: Mapping[str, str],
    span: tuple[float, float],
    on_progress: Callable[[int | None], None],
) -> Drained:
    started, end = span
    with _lock_errors(lock):
        has_lock = not lock.presence().has_agent and lock.claim_delivery()
    if not has_lock:
        return _watch(ledger, lock, started, end, "its agent delivers from it", on_progress)
    if binding.key_or_none(settings, env) is None:
        config.read_key(settings, env)  # says why it can't be read, where there is a reason
        raise CredentialsMissing(
            "there is no API key to deliver with", "set VERSIONER_API_KEY, or api_key_file in the configuration"
        )
    _migrate(ledger)
    account = binding.Account(ledger.destination()[0].account)
    sender, options, here = binding.sending(settings, env, account)
    refused: list[Record] = []

    flusher = Flusher(ledger, sender, options, here, on_failed=refused.append, on_account=account.bind)
    interrupted = _Interrupted(flusher)

    def is_done() -> bool:
        on_progress(_pending_or_none(ledger))
        is_over = time.monotonic() >= end or interrupted.signals > 0 or lock.is_agent_waiting() or not lock.renew()
        return is_over or flusher.is_drained()

    with _handled_by(interrupted.on_signal, signal.SIGTERM, signal.SIGINT):
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


def _open(ledger: Ledger, *, create: bool) -> None:
    mended = ledger.open(create=create)
    if mended is not None:
        logger.error("the outbox was damaged: %s", str(mended), extra={"action": "damage"})


def _migrate(ledger: Ledger) -> None:
    kept = ledger.migrate()
    if kept is not None:
        logger.warning("the outbox was upgraded; the old one is kept as %s", kept, extra={"action": "upgrade"})


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Give signals to *handler* for the block, and back to whoever had them."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


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
    with _lock_errors(lock):
        if lock.presence().has_agent or not lock.claim_delivery():
            raise LockHeld(
                f"somebody delivers from this outbox (pid {lock.presence().pid or 'unknown'})",
                "stop the agent, change its destination, then `flush --new-destination`",
            )
    ledger.unbind()
    lock.close()


@contextmanager
def _lock_errors(lock: FlusherLock) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise OutboxError(
            f"can't use the lock {lock.path}: {exc.strerror or exc}",
            "only who may write the outbox may deliver from it",
        ) from exc
