"""The agent's signs of life: to systemd's watchdog and status line, and beside the lock for `status`."""

from __future__ import annotations

import time
from collections.abc import Callable

from versioner_agent.errors import OutboxError
from versioner_agent.installed import Watch
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.reports import headline
from versioner_agent.sdnotify import Notifier
from versioner_agent.text import key_public_part

TELL_S = 1.0
#: How often the lock's file becomes newer while nothing is to be done: what waits then has not been waiting since long.
NOTE_S = 60.0


class Vitals:
    """Says how the agent is while it delivers; one step of its main loop at a time."""

    def __init__(
        self,
        notifier: Notifier,
        ledger: Ledger,
        lock: FlusherLock,
        files: Watch,
        read_key: Callable[[], str | None],
        trouble: Callable[[], str],
        is_idle: Callable[[float], bool],
    ) -> None:
        """Speak through *notifier* of what *ledger* holds; *read_key* gives the key as it is now.

        *trouble* gives what keeps the outcome of deliveries from being recorded, empty where nothing does. *is_idle*
        tells whether nothing is to be sent: then this alone shows that we would.
        """
        self.reload_problem = ""
        self._notifier = notifier
        self._ledger = ledger
        self._lock = lock
        self._files = files
        self._read_key = read_key
        self._trouble = trouble
        self._is_idle = is_idle
        self._due = self._note_due = 0.0
        self._noted: str | None = None

    def tell(self, now: float) -> None:
        """Give the signs that are due at *now* (monotonic seconds)."""
        self._notifier.alive(now)
        if now < self._due:
            return
        self._due = now + TELL_S
        key = self._read_key()
        shown = key_public_part(key) if key else ""
        if shown != self._noted or (now >= self._note_due and self._is_idle(now)):
            self._noted, self._note_due = shown, now + NOTE_S
            self._lock.note_key(shown)
        if self._notifier.is_heard:
            self._notifier.status(self.line())

    def line(self) -> str:
        """Say in one line how things are, and what a person has to do about it."""
        trouble = self._trouble()
        try:
            words = headline(self._ledger.standing(), time.time(), has_key=self._read_key() is not None)
        except OutboxError as exc:
            words = f"{exc.message}; trying again"
        else:
            words += f"; {trouble}; trying again" if trouble else ""
        change = self._files.change()
        if change:
            words += f"; restart due: {change}"
        if self.reload_problem:
            words += f"; reload failed, the old configuration stays: {self.reload_problem}"
        return words
