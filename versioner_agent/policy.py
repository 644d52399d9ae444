"""What to do about an outcome, and when to send next: pure, with `now` and the roll of the dice passed in.

`decide` speaks of one record. `Pace` speaks of the destination: a delay per ordering key, a breaker with a rotating
probe, a slow start. Due times are the monotonic clock's seconds and live only in the process, so that no step of the
wall clock can stall or flood anything. Full jitter: uniform(0, min(cap, base·2ⁿ)).
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple, TypeVar

from versioner_agent.outcomes import Outcome

BASE_S = 1.0
MAX_TRACKED_KEYS = 1000
LATE_AFTER_S = 600.0
MAX_GAP_S = 600.0  # between two tries of an event, as it counts towards giving it up
OPEN_AFTER = 3  # failures in a row
_MAX_EXPONENT = 30  # 2**30 s is past every cap; more would only overflow


Kept = TypeVar("Kept", None, int)


class Counters(NamedTuple):
    """What a record remembers of the answers that may have been about itself."""

    counted: int = 0
    counted_since: float | None = None  # seconds since 1970
    counted_mark: int | None = None  # deliveries of the outbox when the last one was counted


class Limits(NamedTuple):
    """When one event has had enough tries (settings max_event_attempts, give_up_after)."""

    max_event_attempts: int = 20
    give_up_after: float = 3600.0  # seconds


class Decision(NamedTuple):
    """What to write about the record."""

    state: str  # delivered | failed | pending
    reason: str
    detail: str
    counters: Counters
    is_late: bool = False


def decide(  # everything it may know, and nothing else
    outcome: Outcome,
    counters: Counters,
    limits: Limits,
    *,
    queued_at: float,
    deliveries: int,
    had_unanswered: bool,
    now: float,
    last_attempt_at: float | None = None,
) -> Decision:
    """Return the decision for a record; *queued_at*, *last_attempt_at* and *now* are seconds since 1970.

    *deliveries* counts what this outbox delivered so far; *had_unanswered* says that an earlier attempt of the record
    got no answer.
    """
    if outcome.reason == "delivered":
        return Decision("delivered", "delivered", "", counters)
    if outcome.is_verdict:
        detail = outcome.detail
        if outcome.reason == "blocked" and outcome.http_status == 409 and had_unanswered:
            detail += " (an earlier attempt got no answer: this may be the echo of our own request)"
        is_late = outcome.reason == "blocked" and now - queued_at > LATE_AFTER_S
        return Decision("failed", outcome.reason, detail, counters, is_late)
    counters = _count(outcome, _without_steps(counters, last_attempt_at, now), deliveries, now)
    since = counters.counted_since
    if (
        outcome.counts
        and counters.counted >= limits.max_event_attempts
        and since is not None
        and now - since >= limits.give_up_after
    ):
        detail = f"gave up after {counters.counted} answers while other events were delivered: {outcome.detail}"
        return Decision("failed", "gave_up", detail, counters)
    return Decision("pending", outcome.reason, outcome.detail, counters)


def backoff_s(failures: int, roll: float, cap: float, base: float = BASE_S) -> float:
    """Return the delay in seconds after *failures* (≥ 1) in a row, *roll* in [0, 1); capped at *cap*."""
    exponent = min(max(failures - 1, 0), _MAX_EXPONENT)
    return roll * min(cap, base * float(2**exponent))


class _Delay(NamedTuple):
    failures: int
    due: float
    asked_until: float  # until when the API asked to leave this key alone


class Pace:
    """Who may be sent when. Remembers at most MAX_TRACKED_KEYS keys; all times are monotonic seconds."""

    def __init__(self, concurrency: int, max_backoff: float, paused_until: float = 0.0) -> None:
        """Start closed at full speed; *paused_until* is a Retry-After from before that still runs."""
        self.concurrency = concurrency
        self.max_backoff = max_backoff
        self.is_open = False
        self.paused_until = paused_until
        self._limit = concurrency
        self._delays: dict[str, _Delay] = {}
        self._streak: list[tuple[str, bool]] = []  # (key, answered) since the last verdict, the newest OPEN_AFTER
        self._open_failures = 0
        self._probe_due = 0.0
        self._tried: dict[str, None] = {}  # keys probed since it opened, oldest first
        self._well: dict[str, None] = {}  # keys by their last verdict, oldest first
        self._forgiven: dict[str, int] = {}  # failures of keys whose delay was cleared, oldest first

    @property
    def failures_in_a_row(self) -> int:
        """Failures since the last verdict, counted up to OPEN_AFTER."""
        return len(self._streak)

    def limit(self, now: float) -> int:
        """Return how many requests may be under way at *now*."""
        if now < self.paused_until:
            return 0
        if self.is_open:
            return 1 if now >= self._probe_due else 0
        return self._limit

    def is_retrying(self, key: str) -> bool:
        """Tell whether the last try of *key* failed."""
        return key in self._delays

    def has_failed(self, key: str) -> bool:
        """Tell whether *key* has failed, or was tried in vain since the breaker opened, and had no verdict since."""
        return key in self._delays or key in self._forgiven or key in self._tried

    def was_tried(self, key: str) -> bool:
        """Tell whether *key* was tried since the breaker opened."""
        return key in self._tried

    def max_retrying(self) -> int:
        """Return how many slots failing keys may fill: slow ones must leave room for the healthy.

        None in the first step of a slow start, or those that fail on would open the breaker again at once.
        """
        return max(1, self.concurrency // 2) if self._limit == self.concurrency else self._limit // 2

    def well(self) -> list[str]:
        """Return the keys that had a verdict and were not tried since the breaker opened, the latest first."""
        return [key for key in reversed(self._well) if key not in self._tried]

    def is_asked_to_wait(self, key: str, now: float) -> bool:
        """Tell whether a Retry-After for *key* still runs."""
        delay = self._delays.get(key)
        return delay is not None and delay.asked_until > now

    def postpone_probe(self, now: float) -> None:
        """Come back when the first Retry-After ends, or for a key that is new by then: there is nothing to probe."""
        ends = [delay.asked_until for delay in self._delays.values() if delay.asked_until > now]
        self._probe_due = min([*ends, now + self.max_backoff])

    def first_due(self, now: float, skip: Container[str]) -> str | None:
        """Return the failing key, not in *skip*, that has been due the longest."""
        due = [(delay.due, key) for key, delay in self._delays.items() if delay.due <= now and key not in skip]
        return min(due)[1] if due else None

    def forget(self, key: str) -> None:
        """Drop what is remembered of *key*: nothing of it waits any more."""
        self._delays.pop(key, None)

    def next_due(self, now: float) -> float | None:
        """Return when waiting may bring something new to send; None while no timer runs."""
        if now < self.paused_until:
            return self.paused_until
        if self.is_open:
            return self._probe_due
        waiting = [delay.due for delay in self._delays.values() if delay.due > now]
        return min(waiting, default=None)

    def failed(self, key: str, outcome: Outcome, now: float, roll: float, took: float = 0.0) -> bool:
        """Take a failure that says nothing final about the event; True if another key had to be forgotten for it.

        *took* is what the attempt lasted, in seconds: it is part of the interval between probes, so that an event that
        makes the API hang does not keep others waiting for longer than `max_backoff`.
        """
        wait = outcome.wait_s or 0.0
        if outcome.reason == "rate_limited" and wait:
            self.paused_until = max(self.paused_until, now + wait)
        previous = self._delays.get(key)
        failures = 1 + (previous.failures if previous else self._forgiven.get(key, 0))
        due = now + max(backoff_s(failures, roll, self.max_backoff), wait)
        has_forgotten = self._remember(key, _Delay(failures, due, now + wait))
        self._streak = [*self._streak, (key, outcome.is_answered)][-OPEN_AFTER:]
        if self.is_open:
            # A 5xx may come from one part of an API: others, not tried yet, are found before the pauses grow.
            self._open_failures += outcome.reason != "unavailable" or key in self._tried
        elif self._is_the_destination():
            self.is_open = True
            self._open_failures = OPEN_AFTER
            self._tried = {name: None for name, _ in self._streak}
        if self.is_open:
            _put_last(self._tried, key, None)
            # What one key is asked to wait is its own business: only a 429 pauses the others.
            self._probe_due = now + max(0.0, backoff_s(self._open_failures, roll, self.max_backoff) - took)
        return has_forgotten

    def verdict(self, key: str, now: float) -> None:
        """Take the API's word on an event: it is there and answers."""
        self._delays.pop(key, None)
        self._forgiven.pop(key, None)
        _put_last(self._well, key, None)
        self._streak = []
        if self.is_open:
            self.is_open = False
            self._forgive(now)
            self._tried.clear()
            self._limit = 1
        else:
            self._limit = min(self.concurrency, self._limit * 2)

    def _forgive(self, now: float) -> None:
        """Clear the delays of the outage that is over.

        Once a key, until it has a verdict of its own: some parts of an API may stay away for hours beside others that
        answer, and must not be tried anew each time one of these does.
        """
        for key, delay in list(self._delays.items()):
            if key not in self._forgiven and delay.asked_until <= now:
                _put_last(self._forgiven, key, delay.failures)
                del self._delays[key]

    def _is_the_destination(self) -> bool:
        if len(self._streak) < OPEN_AFTER:
            return False
        return len({key for key, _ in self._streak}) > 1 or not any(answered for _, answered in self._streak)

    def _remember(self, key: str, delay: _Delay) -> bool:
        self._delays[key] = delay
        if len(self._delays) <= MAX_TRACKED_KEYS:
            return False
        # Forgetting one only means that it is tried again early.
        del self._delays[min(self._delays, key=lambda name: self._delays[name].due)]
        return True


def _put_last(known: dict[str, Kept], key: str, value: Kept) -> None:
    """Remember *key* as the newest, and not too many."""
    known.pop(key, None)
    known[key] = value
    if len(known) > MAX_TRACKED_KEYS:
        del known[next(iter(known))]


def _without_steps(counters: Counters, last_attempt_at: float | None, now: float) -> Counters:
    """Move the start of the span along with a step of the wall clock, and with the time when nobody tried."""
    if counters.counted_since is None or last_attempt_at is None:
        return counters
    gap = now - last_attempt_at
    return counters._replace(counted_since=counters.counted_since + gap - min(max(gap, 0.0), MAX_GAP_S))


def _count(outcome: Outcome, counters: Counters, deliveries: int, now: float) -> Counters:
    """Count an answer against the event only where a delivery since the last one proves the API well."""
    if not outcome.counts:
        return counters
    if counters.counted_mark is not None and deliveries <= counters.counted_mark:
        return counters
    since = now if counters.counted_since is None else counters.counted_since
    return Counters(counters.counted + 1, since, deliveries)
