"""The agent (`run`): lock, destination, signals, ordered shutdown.

Signal handlers only set flags and wake the loop. The destination is checked before anything is sent: an outbox never
delivers to two places.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType

from versioner_agent import binding
from versioner_agent.config import Settings
from versioner_agent.creation import make_private_directory
from versioner_agent.delivery import Sender
from versioner_agent.errors import AgentError, LockHeld, OutboxBusy, OutboxFull
from versioner_agent.flusher import Flusher
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.opening import GRACE_S, LOCK_POLL_S, handled_by, lock_errors, migrate, open_outbox
from versioner_agent.storage import Store

logger = logging.getLogger(__name__)

RETRY_S = 5.0  # from one try to open the outbox to the next, where the disk is full or others keep it


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
        with handled_by(self._on_signal, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            try:
                ledger = Ledger(store)
                if self._insist(lambda: open_outbox(ledger, create=True)):
                    self._take_over(lock)
                if self._insist(lambda: migrate(ledger)):
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
        with lock_errors(lock):
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
        with lock_errors(lock):
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
