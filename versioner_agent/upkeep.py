"""When an outbox is looked after: everything once a minute, and pruning step by step for as long as there is more.

Between two steps the outbox is free for at least as long as the last one took, so nobody who queues waits for more than
one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from versioner_agent.ledger import Ledger

MAINTENANCE_S = 60.0
MAX_CLOCK_SKEW_S = 86_400.0
SHORTEST_REST_S = 0.005  # between two steps
DAY_S = 86_400.0


class Retention(Protocol):
    """For how many days what is over is kept, and what was exported without a word from the far side (0: for ever)."""

    @property
    def retention_days(self) -> float:
        """Of what was delivered or discarded."""

    @property
    def exported_retention_days(self) -> float:
        """Of what was exported."""


class Upkeep:
    """Looks after one outbox; called only while nothing is to be sent. Times are monotonic seconds."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        """Look after the outbox of *ledger*; due at once."""
        self._ledger = ledger
        self._clock = clock
        self._look_at = 0.0
        self.step_at = 0.0  # when the next step is due
        self.is_more = False  # the last step was not the last one

    def look(self, now: float) -> bool:
        """See that the outbox is as it should be, where that is due at *now*; tells whether it was."""
        if now < self._look_at:
            return False
        self._look_at = self.step_at = now + MAINTENANCE_S
        self._ledger.store.keep_rollback_journal()
        self._ledger.sweep_batches(time.time())
        self._ledger.keep_reserve()
        self._ledger.check()
        self.step_at = now
        return True

    def step(self, now: float, began: float, server_ahead_s: float | None, retention: Retention) -> None:
        """Forget a little of what has been over for long enough, or give some space back, where that is due.

        *began* is what the clock said at *now*; *server_ahead_s* is the API's clock less *now*, None: not known.
        """
        if now < self.step_at:
            return
        started = self._clock()
        self.is_more = self._prune(now, server_ahead_s, retention) or self._ledger.give_space_back()
        ended = self._clock()
        rest_s = max(SHORTEST_REST_S, ended - started)
        self.step_at = now + (ended - began) + rest_s if self.is_more else self._look_at

    def _prune(self, now: float, server_ahead_s: float | None, retention: Retention) -> bool:
        wall = time.time()
        if server_ahead_s is not None and abs(wall - now - server_ahead_s) > MAX_CLOCK_SKEW_S:
            return False  # a host that boots a year ahead must not lose its window
        pruned = 0
        if server_ahead_s is not None:
            pruned = self._ledger.prune(wall - retention.retention_days * DAY_S)
        if retention.exported_retention_days:  # where nothing is ever heard from the API, our clock has to do
            pruned += self._ledger.prune_exported(wall - retention.exported_retention_days * DAY_S)
        return pruned > 0
