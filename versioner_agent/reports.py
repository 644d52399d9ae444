"""What is said of deliveries: log lines for a settlement and a new state of the destination, and how things are."""

from __future__ import annotations

import logging
import time

from versioner_agent.ledger import Health, Standing
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import ADVICE
from versioner_agent.settling import Settlement
from versioner_agent.text import duration

logger = logging.getLogger(__name__)

#: What keeps events waiting, by the destination's state, in a few words.
TROUBLE = {
    "down": "API unreachable",
    "rate_limited": "API asks to slow down",
    "proxy": "proxy refuses",
    "unauthorized": "API key refused",
    "misrouted": "api_url leads elsewhere",
    "not_authentic": "answers are not the API's",
}
DAY_S = 86_400.0


def headline(standing: Standing, now: float, *, has_key: bool = True) -> str:
    """Return how things are in one line, as at *now* (seconds since 1970); times are the host's own."""
    pending, failed, health = standing
    if not has_key:
        return f"no API key, events wait for one: {pending} pending, {failed} failed"
    if health.state not in TROUBLE:
        return f"up: {pending} pending, {failed} failed{'' if health.state == 'up' else ' (API not asked yet)'}"
    words = TROUBLE[health.state]
    if health.since is not None:
        words += f" since {_clock(health.since, now)}"
    words += f", {pending} pending"
    if failed:
        words += f", {failed} failed"
    if pending and health.next_attempt_at is not None:
        left = health.next_attempt_at - now
        words += f", next try in {duration(left)}" if left >= 1 else ", trying now"
    return words


def in_trouble(health: Health) -> str:
    """Say what keeps events from the API, as it was seen last; empty where nothing is known to."""
    if health.state not in TROUBLE:
        return ""
    return f"the API is {health.state}: {health.reason}" if health.reason else f"the API is {health.state}"


def _clock(then: float, now: float) -> str:
    is_long_ago = abs(now - then) > DAY_S
    return time.strftime("%Y-%m-%d %H:%M" if is_long_ago else "%H:%M", time.localtime(min(max(then, 0.0), 253e9)))


def log_settlement(settlement: Settlement) -> None:
    """Say what became of one attempt; a refusal is an error, an event that goes on waiting a detail."""
    record, outcome, decision, _, duration_s = settlement
    what = f"{record.kind} {record.product_name} {record.version} {record.status}"
    extra = {"action": decision.state, "record": record.id, "product": record.product_name}
    if decision.state == "delivered":
        logger.info("delivered %d: %s (%.2f s)", record.id, what, duration_s, extra=extra)
    elif decision.state == "failed":
        words = decision.detail
        logger.error("refused %d: %s: %s: %s", record.id, what, decision.reason, words, extra=extra)
    else:
        logger.debug("waiting %d: %s: %s", record.id, what, outcome.detail, extra=extra)


def log_destination(health: Health, here: Destination) -> None:
    """Say that the destination's state changed, why, and what to do."""
    where = str(here.origin)
    extra = {"action": "destination", "state": health.state}
    if health.state == "up":
        logger.info("the API is up: %s", where, extra=extra)
    else:
        words, advice = health.reason or "", ADVICE.get(health.state, "")
        logger.warning("the API is %s (%s): %s; %s", health.state, where, words, advice, extra=extra)
