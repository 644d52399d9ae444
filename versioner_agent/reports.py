"""What is said of deliveries: log lines for a settlement and a new state of the destination, and how things are."""

from __future__ import annotations

import json
import logging
import re
import time

from versioner_agent.events import rfc3339
from versioner_agent.groups import link_of
from versioner_agent.ledger import Health, Standing
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import ADVICE
from versioner_agent.records import Record
from versioner_agent.settling import Settlement
from versioner_agent.text import bounded, duration

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
MOST_CHARS = 200  # of what somebody else has named, in a log line
DETAIL_CHARS = 2000
#: What a failure is called where the API did not refuse the event.
_FAILED = {"gave_up": "gave up", "damaged": "damaged"}
#: What stands behind the words of a failure; the rest is in them.
_IN_BRACKETS = (
    "event_id", "environment", "invoke_id", "queued_at", "queued_by", "http_status", "code", "rule", "retry_after",
    "late", "build_url",
)  # fmt: skip


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
    record, outcome, decision, _, duration_s, payload = settlement
    if decision.state == "failed":
        log_failure(settlement.settled, payload)
        return
    what = f"{record.kind} {record.product_name} {record.version} {record.status}"
    extra = {"action": decision.state, "record": record.id, "product": record.product_name}
    if decision.state == "delivered":
        logger.info("delivered %d: %s (%.2f s)", record.id, what, duration_s, extra=extra)
    else:
        logger.debug("waiting %d: %s: %s", record.id, what, outcome.detail, extra=extra)


def log_failure(record: Record, payload: bytes) -> None:
    """Say that *record* failed for good, with all that a person needs to find its author: one line, one error."""
    word = _FAILED.get(record.reason or "", "refused")
    names = (record.kind, record.product_name, record.version, record.status)
    what = " ".join(bounded(name, MOST_CHARS) for name in names)
    why = f"{record.reason}: {record.detail}" if record.detail else f"{record.reason}"
    facts = _facts(record, payload)
    told = " ".join(f"{name}={_quoted(value)}" for name, value in facts.items() if name in _IN_BRACKETS)
    action = "damaged" if record.reason == "damaged" else "failed"
    extra = {"action": action, "record": record.id, "product": record.product_name, "fields": facts}
    logger.error("%s %d: %s: %s [%s]", word, record.id, what, why, told, extra=extra)


def _facts(record: Record, payload: bytes) -> dict[str, str | int | bool]:
    """Return what is known of a failed record, each text bounded."""
    found: dict[str, str | int | bool | None] = {
        "event_id": record.event_id,
        "kind": record.kind,
        "version": record.version,
        "status": record.status,
        "environment": record.environment_name,
        "invoke_id": record.invoke_id,
        "queued_at": rfc3339(record.queued_at),
        "queued_by": record.queued_by,
        "http_status": record.http_status,
        "reason": record.reason,
        "code": record.code,
        "rule": record.rule,
        "retry_after": record.retry_after,
        "late": bool(record.late) or None,
        "detail": record.detail,
        "build_url": link_of(payload),
    }
    return {
        name: bounded(value, DETAIL_CHARS if name == "detail" else MOST_CHARS) if isinstance(value, str) else value
        for name, value in found.items()
        if value is not None
    }


def _quoted(value: str | int | bool) -> str:
    """Return *value* as it may stand behind a name and an equals sign: what could pass for another one is quoted."""
    words = "true" if value is True else str(value)
    return words if re.fullmatch(r"""[^\s"'=\[\]]+""", words) else json.dumps(words, ensure_ascii=False)


def log_destination(health: Health, here: Destination) -> None:
    """Say that the destination's state changed, why, and what to do."""
    where = str(here.origin)
    extra = {"action": "destination", "state": health.state}
    if health.state == "up":
        logger.info("the API is up: %s", where, extra=extra)
    else:
        words, advice = health.reason or "", ADVICE.get(health.state, "")
        logger.warning("the API is %s (%s): %s; %s", health.state, where, words, advice, extra=extra)
