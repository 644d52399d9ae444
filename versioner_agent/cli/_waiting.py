"""What `--wait` and a gate say of the API's verdicts, and what they exit with."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

import click

from versioner_agent import installed, logs, waiting
from versioner_agent.cli import _notes
from versioner_agent.cli._common import echo_json
from versioner_agent.config import Settings
from versioner_agent.outbox import Receipt
from versioner_agent.records import Record, record_json
from versioner_agent.text import harmless
from versioner_agent.waiting import STILL_QUEUED, Waited, is_by_rule

SHOWN_DELIVERIES = 20  # more than these are summed up in text output

#: What a person does about a rule, by its code (Event Tracking API documentation, preflight checks).
_RULES = {
    "NO_DEPLOY_WINDOW": "wait until the window has ended",
    "CONCURRENT_DEPLOYMENT": "wait until the other deployment has ended",
    "APPROVAL_REQUIRED": "get the approval",
    "QUALITY_APPROVAL_REQUIRED": "get the quality approval",
    "FLOW_VIOLATION": "deploy it to the environments before this one",
    "INSUFFICIENT_SOAK_TIME": "wait until it has been long enough in the environment before this one",
}
#: What a person does about another refusal, by its reason.
_REFUSALS = {
    "conflict": "`versioner-agent amend {id} --set …` queues it corrected: versions are immutable",
    "invalid": "`versioner-agent amend {id} --set …` queues it corrected",
    "gave_up": "`versioner-agent retry {id}` sends it again",
    "damaged": "queue it again; `versioner-agent doctor` looks at the outbox",
}


def load() -> None:
    """Load all that waiting may ever need, while we may read it: root is about to step down (see `privileges`)."""
    installed.load_all()


def wait_and_report(
    settings: Settings,
    env: Mapping[str, str],
    receipts: Sequence[Receipt],
    timeout: float,
    *,
    as_json: bool,
    is_gate: bool = False,
    fails_unchecked: bool = False,
    verbose: bool = False,
) -> int:
    """Wait up to *timeout* seconds for the verdicts on what was queued, say them, and return the exit code.

    With *as_json*, each record goes to stdout as one object; talk goes to stderr. A gate lets go on (0) what the API
    could not be asked about, and says so loudly; with *fails_unchecked* it does not (75), nor after a signal (128 + its
    number). See `waiting.exit_code` for the rest.
    """
    _quieten(settings, receipts, verbose=verbose)
    ids = [receipt.id for receipt in receipts]
    waited = waiting.await_verdicts(settings, env, ids, timeout, is_gate=is_gate)
    _say_verdicts(waited.records, is_gate=is_gate)
    if as_json:
        _print(waited.records)
    code = waiting.exit_code(waited.records)
    if code in (0, STILL_QUEUED) and waited.gone:
        code = 1
    queued = _without_verdict(waited, receipts)
    if not queued:
        if waited.gone:
            _say(f"error: {waited.note}")
        return code
    code = code or STILL_QUEUED
    if not is_gate:
        events = "1 event is" if len(queued) == 1 else f"{len(queued)} events are"
        _say(f"{events} still queued: {waited.note}")
        return code
    for each in queued:
        _notes.warn(f"{_what(each)} was NOT checked against the rules: {waited.note}; it is queued ({each.id})")
    if code == STILL_QUEUED and waited.signal:
        return 128 + waited.signal
    return 0 if code == STILL_QUEUED and not fails_unchecked else code


def _quieten(settings: Settings, receipts: Sequence[Receipt], *, verbose: bool) -> None:
    """Let delivering say what is wrong, but not what we say ourselves."""
    ours = {receipt.id for receipt in receipts}
    logs.configure(settings.log_format, "debug" if verbose else "error")
    for handler in logging.getLogger("versioner_agent").handlers:
        handler.addFilter(
            lambda line: (
                getattr(line, "action", "") not in ("failed", "damaged") or getattr(line, "record", 0) not in ours
            )
        )


def _without_verdict(waited: Waited, receipts: Sequence[Receipt]) -> list[Receipt]:
    """Return, once each, the events that wait, or that could not be looked at."""
    settled = {record.id for record in waited.records if record.state not in ("pending", "exported")}
    return list({each.id: each for each in receipts if each.id not in settled | set(waited.gone)}.values())


def _print(records: Sequence[Record]) -> None:
    try:
        for record in records:
            echo_json(record_json(record))
        sys.stdout.flush()
    except OSError as exc:
        # The verdict must not change with whoever reads it.
        from versioner_agent.cli import _silence_stdout  # noqa: PLC0415

        _silence_stdout()
        _notes.warn(f"the verdict can't be printed: {exc.strerror}")


def _say_verdicts(records: Sequence[Record], *, is_gate: bool) -> None:
    delivered = [record for record in records if record.state == "delivered"]
    if len(delivered) > SHOWN_DELIVERIES:
        _say(f"delivered {len(delivered)} events")
    else:
        for record in delivered:
            server_id = f" (id {record.server_id})" if record.server_id else ""
            _say(f"delivered {record.id}: {_what(record)}{server_id}{': allowed' if is_gate else ''}")
    for record in records:
        if record.state == "failed":
            _say_refusal(record)
        elif record.state == "discarded":
            _say(f"discarded {record.id}: {_what(record)}: a person gave it up, it will not be delivered")


def _say_refusal(record: Record) -> None:
    title, *rest = lines = _blocked(record) if record.reason == "blocked" else _refused(record)
    for line in lines:
        _say(line)
    if _notes.is_github():
        _notes.problem(title, "; ".join(line.strip() for line in rest) or title)


def _blocked(record: Record) -> list[str]:
    rule = f"{record.rule} ({record.code})" if record.rule and record.code else record.rule or record.code
    facts = [
        rule and f"rule: {rule}",
        record.detail and f"message: {record.detail}",  # a line that began with it could be a command to a CI system
        record.retry_after and f"retry after: {record.retry_after}",
        record.late and "late: it was queued over 10 minutes before the API judged it",
    ]
    action = _RULES.get(record.code or "") or ("wait until then" if record.retry_after else "ask whoever set the rule")
    next_action = f"next: {action}, then run this again or `versioner-agent retry {record.id}`"
    return [f"blocked {record.id}: {_what(record)}", *(f"  {fact}" for fact in facts if fact), f"  {next_action}"]


def _refused(record: Record) -> list[str]:
    words = f"{record.reason}: {record.detail}" if record.detail else f"{record.reason}"
    if is_by_rule(record):
        action = "settle what it conflicts with, then run this again or `versioner-agent retry {id}`"
    else:
        action = _REFUSALS.get(record.reason or "", "`versioner-agent show {id}` tells more")
    return [f"refused {record.id}: {_what(record)}: {words}", f"  next: {action.format(id=record.id)}"]


def _what(event: Record | Receipt) -> str:
    names = (event.kind, event.product_name, event.version, event.environment_name, event.status)
    return " ".join(name for name in names if name)


def _say(line: str) -> None:
    click.echo(harmless(line), err=True)
