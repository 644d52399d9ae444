"""What monitoring is told: numbers of an outbox and thresholds -> how bad it is, why, and the line that says so.

Pure. The line, its levels and its performance data are those of the Monitoring Plugins Development Guidelines
(https://www.monitoring-plugins.org/doc/guidelines.html): `VERSIONER OK - words | data`, exit 0 to 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from versioner_agent.snapshot import Snapshot
from versioner_agent.text import bounded, duration, harmless

OK, WARNING, CRITICAL, UNKNOWN = range(4)
LEVELS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
#: Worst first.
_ORDER = (CRITICAL, UNKNOWN, WARNING, OK)
#: States of the destination that a person has to do something about, and those that may pass.
LASTING = frozenset({"unauthorized", "misrouted"})
PASSING = frozenset({"down", "rate_limited", "proxy", "not_authentic"})
OFF = "none"
IDLE_S = 600.0  # so long an agent may try nothing while events wait for it
MOST_CHARS = 300  # of one thing that is wrong
MOST_LINE_CHARS = 900  # of them all: NRPE before version 3 cut a line at 1024 bytes

_UNITS_OF_TIME = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_UNITS_OF_SIZE = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Problem(NamedTuple):
    """One thing that is wrong."""

    level: int
    words: str


def count_of(word: str) -> float | None:
    """Read a number of events, None for `none`; raises ValueError with what is wrong."""
    return _quantity(word, {"": 1}, "a whole number")


def seconds_of(word: str) -> float | None:
    """Read a time: seconds, or 90m, 24h, 7d; None for `none`. Raises ValueError."""
    return _quantity(word, _UNITS_OF_TIME, "a time as 90, 90m, 24h or 7d")


def bytes_of(word: str) -> float | None:
    """Read a size: bytes, or 64K, 500M, 2G (powers of 1024); None for `none`. Raises ValueError."""
    return _quantity(word.strip().lower().removesuffix("ib"), _UNITS_OF_SIZE, "a size as 1000000, 500M or 2G")


def _quantity(word: str, units: dict[str, int], form: str) -> float | None:
    word = word.strip().lower()
    if word == OFF:
        return None
    match = re.fullmatch(r"([0-9]{1,15})([a-z]?)", word, re.ASCII)
    if match is None or match[2] not in units:
        raise ValueError(f"must be {form}, or {OFF}")
    return int(match[1]) * units[match[2]]


class Threshold(NamedTuple):
    """One limit: its key, its default as it would be given, how it is read, and what lies beyond it."""

    key: str
    default: str
    parse: Callable[[str], float | None]
    help: str


THRESHOLDS = (
    Threshold("pending_warning", "1000", count_of, "Warning when more events are pending."),
    Threshold("pending_critical", "10000", count_of, "Critical when more events are pending."),
    Threshold("age_warning", "1h", seconds_of, "Warning when the oldest pending event is older."),
    Threshold("age_critical", "24h", seconds_of, "Critical when the oldest pending event is older."),
    Threshold("failed_warning", "0", count_of, "Warning when more events failed and nobody has acted on them."),
    Threshold("failed_critical", OFF, count_of, "Critical when more events failed and nobody has acted on them."),
    Threshold("free_warning", "500M", bytes_of, "Warning when less space is free beside the outbox."),
    Threshold("free_critical", "64M", bytes_of, "Critical when less space is free beside the outbox."),
    Threshold("trouble_warning", "15m", seconds_of, "Warning when events wait for the API for longer."),
    Threshold("receipt_warning", "30d", seconds_of, "Warning when a batch was exported earlier and has no receipt."),
)

#: Values by the keys of THRESHOLDS; None is off.
Limits = dict[str, float | None]


def defaults() -> Limits:
    """Return the limits that hold where nothing is given."""
    return {each.key: each.parse(each.default) for each in THRESHOLDS}


def judge(view: Snapshot, limits: Limits, now: float, *, wants_agent: bool = True) -> list[Problem]:
    """Return all that is wrong at *now* (seconds since 1970), the worst first; *wants_agent*: one should be running."""
    found = [
        *_of_the_agent(view, now, wants_agent=wants_agent),
        *_of_the_destination(view, limits, now),
        *_of_records(view, limits, now),
        *_of_the_place(view, limits),
        *_of_exports(view, limits, now),
    ]
    return sorted(found, key=lambda problem: _ORDER.index(problem.level))


def _of_the_agent(view: Snapshot, now: float, *, wants_agent: bool) -> Iterator[Problem]:
    if view.has_agent and view.last_sign_at is not None and now - view.last_sign_at > IDLE_S:
        yield Problem(
            CRITICAL, f"the agent has tried nothing for {duration(now - view.last_sign_at)}: it hangs, or is stopped"
        )
    if not wants_agent or not view.is_there or view.has_agent or view.is_delivering:
        return
    if view.counts["pending"]:
        yield Problem(CRITICAL, "events are pending and no agent is running")
    else:
        yield Problem(WARNING, "no agent is running")


def _of_the_destination(view: Snapshot, limits: Limits, now: float) -> Iterator[Problem]:
    lasts_s = max(0.0, now - view.since) if view.since is not None else 0.0
    reason = f": {view.reason}" if view.reason else ""
    words = f"the API is {view.state} since {duration(lasts_s)}{reason}"
    if view.state in LASTING:
        yield Problem(CRITICAL, words)
    elif view.state in PASSING and view.counts["pending"] and _is_over(lasts_s, limits["trouble_warning"]):
        yield Problem(WARNING, words)


def _of_records(view: Snapshot, limits: Limits, now: float) -> Iterator[Problem]:
    pending, failed = view.counts["pending"], view.counts["failed"]
    if (found := _beyond(pending, limits, "pending")) is not None:
        yield found._replace(words=f"{_events(pending)} pending (more than {found.words})")
    age_s = _age_s(view, now) or 0.0
    if (found := _beyond(age_s, limits, "age")) is not None:
        yield found._replace(words=f"the oldest pending event waits for {duration(age_s)}")
    if (found := _beyond(failed, limits, "failed")) is not None:
        yield found._replace(words=f"{_events(failed)} failed (`versioner-agent list --state failed`)")


def _of_the_place(view: Snapshot, limits: Limits) -> Iterator[Problem]:
    if view.damage is not None:
        words = "the outbox was damaged (`versioner-agent doctor --acknowledge` when somebody has looked at it)"
        yield Problem(WARNING, f"{words}: {view.damage}")
    if view.is_read_only:
        yield Problem(CRITICAL, "the outbox lies on a read-only file system: nothing can be queued (see dmesg)")
    if view.free_bytes is None:
        return
    for level, key in ((CRITICAL, "free_critical"), (WARNING, "free_warning")):
        least = limits[key]
        if least is not None and view.free_bytes < least:
            yield Problem(level, f"{view.free_bytes / 2**20:.0f} MiB free beside the outbox")
            return


def _of_exports(view: Snapshot, limits: Limits, now: float) -> Iterator[Problem]:
    if view.oldest_batch_at is None or not _is_over(now - view.oldest_batch_at, limits["receipt_warning"]):
        return
    batches = "1 exported batch has" if view.batches == 1 else f"{view.batches} exported batches have"
    yield Problem(WARNING, f"{batches} no receipt, the oldest for {duration(now - view.oldest_batch_at)}")


def _beyond(value: float, limits: Limits, what: str) -> Problem | None:
    """Return how bad *value* is, with the limit that it is beyond as words."""
    for level, key in ((CRITICAL, f"{what}_critical"), (WARNING, f"{what}_warning")):
        if _is_over(value, limits[key]):
            return Problem(level, f"{limits[key]:.0f}")
    return None


def _is_over(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _events(count: int) -> str:
    return "1 event" if count == 1 else f"{count} events"


def _age_s(view: Snapshot, now: float) -> float | None:
    return None if view.oldest_pending_at is None else max(0.0, now - view.oldest_pending_at)


# --- the line


def line(level: int, words: str, data: str = "") -> str:
    """Return the one line that is told; what stands in *words* can't end it, or pass for data."""
    told = bounded(harmless(words).replace("|", "/"), MOST_LINE_CHARS)
    return f"VERSIONER {LEVELS[level]} - {told}" + (f" | {data}" if data else "")


def report(view: Snapshot, limits: Limits, now: float, *, wants_agent: bool = True) -> tuple[int, str]:
    """Return the exit code and the line."""
    problems = judge(view, limits, now, wants_agent=wants_agent)
    level = problems[0].level if problems else OK
    words = "; ".join(bounded(problem.words, MOST_CHARS) for problem in problems)
    return level, line(level, words or _all_is_well(view), _data(view, limits, now))


def _all_is_well(view: Snapshot) -> str:
    if not view.is_there:
        return "no outbox yet: it is made by the first event"
    return f"{view.counts['pending']} pending, {view.counts['failed']} failed, the API is {view.state}"


def _data(view: Snapshot, limits: Limits, now: float) -> str:
    """Return the performance data: label=value[unit];warning;critical;minimum."""
    age_s = _age_s(view, now)
    figures = [
        ("pending", f"{view.counts['pending']}", _range(limits, "pending"), "0"),
        ("oldest_age", f"{math.floor(age_s or 0)}s", _range(limits, "age"), "0"),
        ("failed", f"{view.counts['failed']}", _range(limits, "failed"), "0"),
        ("delivered", f"{view.deliveries}c", ";", "0"),
        ("exported", f"{view.counts['exported']}", ";", "0"),
    ]
    if view.free_bytes is not None:
        figures.append(("free", f"{view.free_bytes}B", _range(limits, "free", below=True), "0"))
    return " ".join(f"{label}={value};{bounds};{least}" for label, value, bounds, least in figures)


def _range(limits: Limits, what: str, *, below: bool = False) -> str:
    """Return both thresholds in the guidelines' form: `10` alerts above 10, `10:` below."""
    found = [limits[f"{what}_{level}"] for level in ("warning", "critical")]
    return ";".join("" if each is None else f"{each:.0f}{':' if below else ''}" for each in found)
