"""What the flusher says in the log: a line per settlement, and one for each change of the destination."""

from __future__ import annotations

import logging

from versioner_agent.ledger import Health
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import ADVICE
from versioner_agent.settling import Settlement

logger = logging.getLogger(__name__)


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
