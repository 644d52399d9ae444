"""Which key goes next: a rotation over all ordering keys, with a bounded window of them in memory.

Every key with pending records is in one of four places: under way (the caller knows), waiting (Pace knows), ready
(here), or not yet seen by the rotation. Fair: a key that was served goes to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from versioner_agent.ledger import Ledger
from versioner_agent.policy import Pace
from versioner_agent.records import Record

WINDOW = 1000  # keys remembered as ready
REFILL = 64  # keys one refill looks for
REFILLS_IN_VAIN = 20  # one after the other, some milliseconds each: exported records may hold very many keys


class Chooser:
    """Finds the next record to send. Belongs to the thread that owns the ledger."""

    def __init__(self, ledger: Ledger, pace: Pace) -> None:
        """Choose from *ledger* what *pace* allows."""
        self._ledger = ledger
        self._pace = pace
        self._ready: dict[str, None] = {}
        self._cursor = ""
        self._ends_to_pass = 2
        self._probe_cursor = ""

    def look_again(self) -> None:
        """Look for keys again: other processes committed, or keys were forgotten."""
        # Two ends passed mean that every key has been seen once since now, wherever the cursor stood.
        self._ends_to_pass = 2

    def make_ready(self, key: str) -> None:
        """Put *key*, whose last event was settled, at the end of the line."""
        if len(self._ready) < WINDOW:
            self._ready[key] = None
        else:
            self.look_again()  # the rotation comes back to it: keys beyond the window get their turn

    def has_ready(self) -> bool:
        """Tell whether something may be sent at once."""
        return bool(self._ready)

    def is_exhausted(self) -> bool:
        """Tell whether every key has been seen and none is ready."""
        return not self._ready and not self._ends_to_pass

    def next(self, now: float, busy: set[str]) -> tuple[Record, bytes] | None:
        """Return the next record to send and its payload, of a key neither in *busy* nor waiting."""
        if self._pace.is_open:
            return self._probe(now)
        retrying = sum(self._pace.is_retrying(key) for key in busy)
        slots = self._pace.max_retrying()
        found = self._next_due(now, busy) if retrying < slots else None
        found = found or self._next_ready(busy)
        if found is None and slots == retrying == 0:
            found = self._next_due(now, busy)
        return found

    def _next_due(self, now: float, busy: set[str]) -> tuple[Record, bytes] | None:
        while (key := self._pace.first_due(now, busy)) is not None:
            found = self._ledger.head(key)
            if found is not None:
                return found
            self._pace.forget(key)
        return None

    def _next_ready(self, busy: set[str]) -> tuple[Record, bytes] | None:
        in_vain = 0
        while self._ready or (in_vain < REFILLS_IN_VAIN and self._refill(busy)):
            if not self._ready:
                in_vain += 1
                continue
            key = next(iter(self._ready))
            del self._ready[key]
            if key in busy or self._pace.is_retrying(key):
                continue
            found = self._ledger.head(key)
            if found is not None:
                if len(self._ready) < WINDOW // 2:
                    self._refill(busy)
                return found
        return None

    def _refill(self, busy: set[str]) -> bool:
        """Look for more keys; False when all have been seen."""
        if not self._ends_to_pass:
            return False
        seek = self._ledger.keys(self._cursor, REFILL, _Known(busy, self._ready, self._pace))
        self._ready.update(dict.fromkeys(seek.keys))
        self._cursor = seek.after
        if seek.is_end:
            self._ends_to_pass -= 1
        return True

    def _probe(self, now: float) -> tuple[Record, bytes] | None:
        """Return the head of a key not tried since the breaker opened, else of the next one in turn.

        A key that was well goes first, then one that has not failed: where only others are in trouble, it shows that
        the API is there.
        """
        for key in self._pace.well():
            found = self._ledger.head(key)
            if found is not None:
                return found
        for is_passed_over in (self._pace.has_failed, self._pace.was_tried, _nobody):
            cursor, ends = self._probe_cursor, 0
            skip = _Waiting(is_passed_over, self._pace, now)
            while ends < 2:
                seek = self._ledger.keys(cursor, 1, skip)
                cursor = seek.after
                ends += seek.is_end
                for key in seek.keys:
                    found = self._ledger.head(key)
                    if found is not None:
                        self._probe_cursor = key  # a search in vain must not move the rotation
                        return found
        self._pace.postpone_probe(now)
        return None


def _nobody(_key: str) -> bool:
    return False


class _Waiting:
    """The keys not to be probed: passed over, or asked to wait."""

    def __init__(self, is_passed_over: Callable[[str], bool], pace: Pace, now: float) -> None:
        self._is_passed_over, self._pace, self._now = is_passed_over, pace, now

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (self._is_passed_over(key) or self._pace.is_asked_to_wait(key, self._now))


class _Known:
    """The keys that need no looking for: under way, ready, or waiting."""

    def __init__(self, busy: Container[str], ready: Container[str], pace: Pace) -> None:
        self._busy, self._ready, self._pace = busy, ready, pace

    def __contains__(self, key: object) -> bool:
        return key in self._busy or key in self._ready or (isinstance(key, str) and self._pace.is_retrying(key))
