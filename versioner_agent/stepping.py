"""How much of a long piece of work one transaction does: what this disk got done in a moment so far."""

from __future__ import annotations

import time
from collections.abc import Callable

#: What one transaction should take (seconds), its commit included: none may take over 0.1.
AIM_S = 0.04
#: When what can stop half-way goes over to its commit (seconds).
WORK_S = 0.025
FIRST_STEP = 32
MOST_STEP = 1000


def next_step(done: int, taken_s: float, fixed_s: float = 0.0) -> int:
    """Return how much fits into the next transaction, after one that did *done* took *taken_s*; at least 1.

    It is believed at once that the disk has become slower, and doubled at most when it is faster. Of what *fixed_s*
    goes for, whatever is done, smaller steps would only be more: it leaves WORK_S at least.
    """
    work_s = taken_s - fixed_s
    fits = int(done * max(AIM_S - fixed_s, WORK_S) / work_s) if work_s > 0 else MOST_STEP
    return max(1, min(fits, 2 * done, MOST_STEP))


class StepSize:
    """How much one transaction of a kind may do here."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with little; *clock* counts seconds."""
        self.value = FIRST_STEP
        self._clock = clock
        self._started = 0.0
        self._fixed_s = 0.0  # of a transaction: what its syncs take, on some disks more than AIM_S

    def start(self) -> None:
        """Begin a transaction: our turn has come, for waiting for it says nothing about the disk."""
        self._started = self._clock()

    @property
    def is_over(self) -> bool:
        """Whether it is time to commit."""
        return self._clock() - self._started > WORK_S

    def end(self, done: int) -> None:
        """Learn from a transaction that has committed *done*; one that had little to do says nothing."""
        taken_s = self._clock() - self._started
        if done and (done >= self.value or taken_s > WORK_S):
            self._fixed_s = taken_s if done == 1 else min(self._fixed_s, taken_s)
            self.value = next_step(done, taken_s, self._fixed_s)
