"""The agent (`run`): lock, destination, signals, ordered shutdown.

Signal handlers only set flags and wake the loop. The destination is checked before anything is sent: an outbox never
delivers to two places.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

from versioner_agent import binding, birthplace, installed
from versioner_agent.config import Settings
from versioner_agent.creation import make_private_directory
from versioner_agent.delivery import Sender
from versioner_agent.errors import AgentError, LockHeld, OutboxBusy, OutboxError, OutboxFull
from versioner_agent.files import size_of
from versioner_agent.flusher import Flusher
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.metrics_file import MetricsFile
from versioner_agent.opening import GRACE_S, LOCK_POLL_S, handled_by, lock_errors, migrate, open_outbox
from versioner_agent.orphans import Orphans
from versioner_agent.sdnotify import Notifier
from versioner_agent.storage import PATIENCE, Store
from versioner_agent.text import bounded, duration
from versioner_agent.vitals import Vitals

logger = logging.getLogger(__name__)

STEP_S = 60.0  # what looking through an outbox, mending or upgrading it may take
SLOWEST_BYTES_S = 0.5e6  # and in addition for its size
SLEPT_S = 5.0  # a shorter sleep breaks no connection
PROBLEM_CHARS = 400  # of what is wrong with a configuration, in a line for people
RETRY_S = 5.0  # from one try to open the outbox to the next, where the disk is full or others keep it


class Agent:
    """Delivers from one outbox until it is told to stop."""

    def __init__(
        self,
        settings: Settings,
        env: Mapping[str, str],
        reload: Callable[[], Settings],
        on_settings: Callable[[Settings], None] = lambda _: None,
    ) -> None:
        """Use *settings*; *reload* reads them again, raising ConfigError for what can't be used.

        *on_settings* is told of those that were read again and are in force.
        """
        self._settings = settings
        self._env = env
        self._reload = reload
        self._on_settings = on_settings
        self._notifier = Notifier(env)
        self._files = installed.Watch()
        self._signals = 0
        self._wants_reload = False
        self._slept_s = 0.0
        self._awake = _Awake()
        self._flusher: Flusher | None = None
        self._metrics = MetricsFile(settings.db, self._patience_s())

    def run(self) -> None:
        """Deliver until SIGTERM or SIGINT; raises LockHeld, OtherDestination, ConfigError, OutboxError.

        Requests under way get GRACE_S seconds then, and what was answered is settled. A second signal exits at once.
        """
        installed.load_all()
        with handled_by(self._on_signal, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            while self._serve():
                logger.warning("another place lies at %s now: starting again there", self._settings.db)

    def _serve(self) -> bool:
        """Deliver from what lies at the outbox's path; True if something was mounted over it meanwhile."""
        if not self._settings.is_explicit("db"):
            make_private_directory(self._settings.db)
        store = Store(self._settings.db, self._patience_s())
        lock = FlusherLock(store.path)
        ledger = Ledger(store)
        ledger.at_length = partial(self._at_length, store)
        self._notifier.status(f"opening the outbox {store.path}")
        try:
            self._await_directory(os.path.dirname(store.path))
            if self._insist(lambda: open_outbox(ledger, create=True)):
                self._take_over(lock)
            return self._insist(lambda: migrate(ledger)) and self._deliver(ledger, lock)
        finally:
            self._metrics.name(None)  # while we hold the lock: the next agent writes its own
            lock.close()
            store.close()

    def _patience_s(self) -> float:
        """Return how long to wait for other writers; a watchdog must not take that for a hang."""
        given: float = self._settings.busy_timeout
        return min(given, self._notifier.watchdog_s / (2 * PATIENCE) or given)

    @contextmanager
    def _at_length(self, store: Store, what: str) -> Iterator[None]:
        """Let something take long, but for a signal that ends it."""
        self._notifier.status(what)
        size = 0
        with suppress(OSError):  # whoever opens it says why it can't be used
            size = size_of(store.path)
        before, store.is_told_to_stop = store.is_told_to_stop, self._is_told_to_stop
        try:
            with self._notifier.allowing(STEP_S + size / SLOWEST_BYTES_S):
                yield
        except OutboxError as exc:
            if self._signals:
                raise OutboxBusy(f"{what}: ended by a signal") from exc
            raise
        finally:
            store.is_told_to_stop = before

    def _is_told_to_stop(self) -> bool:
        return self._signals > 0

    def _await_directory(self, directory: str) -> None:
        """Wait for a directory whose disk may be mounted after we are started."""
        if _is_missing(directory):
            logger.error("there is no directory %s; waiting for it (is its disk mounted?)", directory)
            self._notifier.status(f"waiting for the directory {directory}: is its disk mounted?")
        while _is_missing(directory) and not self._signals:
            self._pause(LOCK_POLL_S)

    def _insist(self, act: Callable[[], None]) -> bool:
        """Do *act* as soon as the disk has room for it and others let us; False if we are told to stop before."""
        is_told = False
        while not self._signals:
            try:
                act()
            except (OutboxFull, OutboxBusy) as exc:
                if self._is_told_to_stop():
                    return False
                if not is_told:
                    logger.error("%s; trying again", exc.message, extra={"action": "outbox_error"})  # noqa: TRY400
                    is_told = True
                self._notifier.status(f"{exc.message}; trying again")
            else:
                return True
            self._pause(RETRY_S)
        return False

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._signals:
            self._notifier.alive(time.monotonic())
            self._metrics.tell(time.monotonic())
            time.sleep(LOCK_POLL_S)

    def _take_over(self, lock: FlusherLock) -> None:
        with lock_errors(lock):
            if not lock.claim_agent():
                pid = lock.presence().agent_pid
                raise LockHeld(
                    f"another agent (pid {pid or 'unknown'}) delivers from this outbox", "stop it, or leave it to it"
                )
            self._metrics.name(self._settings.metrics_file)
            is_told = False
            while not lock.claim_delivery():
                if not is_told:
                    words = f"waiting for a flush (pid {lock.presence().pid or 'unknown'}) to hand over"
                    logger.info("%s", words)
                    self._notifier.status(words)
                    is_told = True
                if self._signals:
                    return
                self._pause(LOCK_POLL_S)

    def _deliver(self, ledger: Ledger, lock: FlusherLock) -> bool:
        account = binding.check(ledger, binding.configured(self._settings, self._env))
        sender, options, here = binding.sending(self._settings, self._env, account)
        if self._key() is None:
            logger.warning("there is no API key yet: events wait (VERSIONER_API_KEY, api_key_file)")
        flusher = Flusher(ledger, sender, options, here, on_account=account.bind)
        self._flusher = flusher
        orphans = Orphans(ledger)
        vitals = Vitals(self._notifier, ledger, lock, self._files, self._key, lambda: flusher.trouble, flusher.is_idle)
        logger.info(
            "agent %d delivers from %s to %s", os.getpid(), ledger.store.path, here.origin, extra={"action": "start"}
        )
        self._notifier.ready(vitals.line())
        _warn_of_other_machine(ledger.store)
        try:
            while not self._signals and not lock.is_hidden():
                flusher.run(lambda: self._is_interrupted(lock, vitals, orphans))
                if self._wants_reload and not self._signals:
                    self._notifier.reloading()
                    sender = self._apply_reload(flusher, ledger, sender, account, vitals)
                    self._notifier.ready(vitals.line())
                elif self._slept_s:
                    sender = self._resume(flusher, sender, account)
                else:
                    with lock_errors(lock):
                        self._lend(flusher, lock, vitals)
            if self._signals:
                self._notifier.stopping("stopping: waiting for requests under way")
            unanswered = flusher.finish(GRACE_S)
            if unanswered:
                logger.warning("stopped with %d requests unanswered; they will be repeated", unanswered)
        finally:
            self._flusher = None
            sender.close()
        if self._signals:
            logger.info("stopped", extra={"action": "stop"})
        return not self._signals

    def _key(self) -> str | None:
        return binding.key_or_none(self._settings, self._env)

    def _is_interrupted(self, lock: FlusherLock, vitals: Vitals, orphans: Orphans) -> bool:
        vitals.tell(time.monotonic())
        self._metrics.tell(time.monotonic())
        orphans.look(time.monotonic())
        self._slept_s += self._awake.slept_s()
        with lock_errors(lock):
            if lock.is_hidden():
                return True
            if not lock.renew():
                raise LockHeld(f"the lock {lock.path} was removed, and another agent delivers from this outbox now")
            is_wanted = lock.is_borrower_waiting()
        return bool(self._signals) or self._wants_reload or self._slept_s > 0 or is_wanted

    def _lend(self, flusher: Flusher, lock: FlusherLock, vitals: Vitals) -> None:
        """Let somebody else have the outbox, if he wants it, with nothing under way. We stay its agent."""
        flusher.rest(is_resting=True)
        try:
            flusher.run(lambda: not flusher.is_busy() or self._keeps(lock, vitals))
            if flusher.is_busy() or self._keeps(lock, vitals):
                return
            lock.release_delivery()
            words = f"lent to pid {lock.presence().borrower_pid or 'unknown'}"
            logger.info("the outbox is %s", words, extra={"action": "lent"})
            self._notifier.status(words)
            while not (self._signals or lock.is_hidden()) and (lock.is_borrower_waiting() or not lock.claim_delivery()):
                self._pause(LOCK_POLL_S)
            if not self._signals:
                logger.info("delivering again", extra={"action": "lent"})
        finally:
            flusher.rest(is_resting=False)

    def _keeps(self, lock: FlusherLock, vitals: Vitals) -> bool:
        """Tell whether something has come between, or nobody wants to borrow any more."""
        vitals.tell(time.monotonic())
        return self._signals > 0 or lock.is_hidden() or not lock.is_borrower_waiting()

    def _resume(self, flusher: Flusher, sender: Sender, account: binding.Account) -> Sender:
        """Ask at once after the host was suspended, on new connections: the old ones lead nowhere."""
        slept_s, self._slept_s = self._slept_s, 0.0
        logger.info("the host was suspended for %s", duration(slept_s), extra={"action": "resume"})
        try:
            fresh, options, here = binding.sending(self._settings, self._env, account)
        except AgentError as exc:
            logger.error("%s; the old connections stay", exc.message)  # noqa: TRY400
            return sender
        flusher.configure(fresh, options, here, slept_s)
        sender.close()
        return fresh

    def _apply_reload(
        self, flusher: Flusher, ledger: Ledger, sender: Sender, account: binding.Account, vitals: Vitals
    ) -> Sender:
        """Take the configuration as it is now, or keep the old one and say why."""
        self._wants_reload = False
        vitals.reload_problem = ""
        try:
            settings = self._reload()
            if os.path.realpath(settings.db) != ledger.store.path:
                raise AgentError("another outbox (db) takes a restart")
            bound = binding.check(ledger, binding.configured(settings, self._env))
            fresh, options, here = binding.sending(settings, self._env, account)
        except AgentError as exc:
            vitals.reload_problem = bounded(" ".join(exc.message.split()), PROBLEM_CHARS)
            logger.error("reload: %s; the old configuration stays", " ".join(exc.message.split()))  # noqa: TRY400
            return sender
        account.name = bound.name  # an outbox with nothing pending may have moved to another one
        flusher.configure(fresh, options, here)
        self._settings = settings
        self._metrics.name(settings.metrics_file)
        self._on_settings(settings)
        logger.info("configuration read again", extra={"action": "reload"})
        return fresh  # the old client lives on in the requests under way

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._wants_reload = True
        else:
            self._signals += 1
            if self._signals > 1:
                self._metrics.remove()
                os._exit(128 + number)
        if self._flusher is not None:
            self._flusher.wake()


def _warn_of_other_machine(store: Store) -> None:
    with store.read() as connection:
        is_elsewhere = birthplace.is_elsewhere(store, connection)
    if is_elsewhere:
        words = (
            "the outbox %s was made on another machine: a copy delivers what the original delivers too; see `doctor`"
        )
        logger.warning(words, store.path, extra={"action": "other_machine"})


def _is_missing(directory: str) -> bool:
    """Tell whether *directory* is not there, which is something else than to be no directory, or closed to us."""
    try:
        os.stat(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # whoever opens the outbox says why not
    return False


class _Awake:
    """Notices that the host was suspended: time goes on then, and the monotonic clock does not (clock_gettime(2))."""

    def __init__(self) -> None:
        self._ahead_s = _boot_clock_ahead_s()

    def slept_s(self) -> float:
        """Return for how many seconds the host slept since this was asked last."""
        before, self._ahead_s = self._ahead_s, _boot_clock_ahead_s()
        slept_s = self._ahead_s - before
        return slept_s if slept_s >= SLEPT_S else 0.0


def _boot_clock_ahead_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic() if hasattr(time, "CLOCK_BOOTTIME") else 0.0
