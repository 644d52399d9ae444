"""Which records are meant: a filter as a value, and the moments that people name. Pure: what time it is comes in."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, NamedTuple

from versioner_agent.outcomes import STATE_OF
from versioner_agent.records import Record

#: Why records failed, and `late`: a rule's refusal of what had been queued long before.
FAILED_FOR = ("conflict", "blocked", "late", "invalid", "gave_up", "damaged")
#: What a filter takes as a reason: also what pending records wait for.
REASONS = (*FAILED_FOR, *STATE_OF)

_AGE_UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
#: RFC 3339 section 5.6, with an offset.
_TIME = r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?([Zz]|[+-]\d\d:\d\d)"


class Filter(NamedTuple):
    """What all must be true of a record; None says nothing. Times are seconds since 1970 and compare `queued_at`."""

    state: str | None = None
    product: str | None = None
    version: str | None = None
    reason: str | None = None
    since: float | None = None  # at or after
    until: float | None = None  # before

    def matches(self, record: Record) -> bool:
        """Tell whether *record* is meant."""
        pairs = (
            (self.state, record.state),
            (self.product, record.product_name),
            (self.version, record.version),
            (self.reason, "late" if self.reason == "late" and record.late else record.reason),
        )
        return (
            all(wanted is None or wanted == found for wanted, found in pairs)
            and (self.since is None or record.queued_at >= self.since)
            and (self.until is None or record.queued_at < self.until)
        )

    def conditions(self) -> tuple[str, dict[str, Any]]:
        """Return the same as SQL on `record`, ` AND …` for each, with the values that it names."""
        words = {
            "state": "state = :state",
            "product": "product_name = :product",
            "version": "version = :version",
            "reason": "late <> 0" if self.reason == "late" else "reason = :reason",
            "since": "queued_at >= :since",
            "until": "queued_at < :until",
        }
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return "".join(f" AND {words[name]}" for name in given), given


def moment(words: str, now: float) -> float:
    """Return the moment (seconds since 1970) that *words* name, seen from *now*.

    An RFC 3339 time with an offset, a date (its midnight, local time), or an age: `90m`, `24h`, `7d`. Raises ValueError
    for anything else.
    """
    age = re.fullmatch(r"(\d{1,9})([smhdw])", words, re.ASCII)
    if age:
        return now - int(age[1]) * _AGE_UNITS[age[2]]
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", words, re.ASCII):
            return _first_moment_of(datetime.fromisoformat(words))
        if re.fullmatch(_TIME, words, re.ASCII):
            return datetime.fromisoformat(words.upper()).timestamp()
    except (ValueError, OverflowError, OSError):
        pass
    raise ValueError("must be a time like 2026-11-06T15:30:00Z, a date like 2026-11-06, or an age like 90m, 24h or 7d")


def _first_moment_of(day: datetime) -> float:
    """Return when *day*, a date, begins here: at midnight, or where clocks pass over that, with the time after it."""
    both = (day.replace(fold=0).timestamp(), day.replace(fold=1).timestamp())
    return min(each for each in both if datetime.fromtimestamp(each) >= day)  # noqa: DTZ006  # local time is meant
