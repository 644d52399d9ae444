"""`status`: what a person at 3 a.m. needs to see first."""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from versioner_agent.cli._common import (
    echo,
    echo_json,
    json_option,
    load_settings,
    settings_options,
    step_down_for,
    styled,
    warn_of_lost_place,
)
from versioner_agent.cli._failures import group_line
from versioner_agent.premises import is_stopped
from versioner_agent.text import printable

if TYPE_CHECKING:
    from versioner_agent.config import Settings
    from versioner_agent.groups import Summary
    from versioner_agent.locks import Presence
    from versioner_agent.review import Stats

HELD_LINES = 10
BATCH_LINES = 10
GROUPS = 20  # of failures, in JSON
GROUP_LINES = 5


@click.command()
@settings_options()
@json_option
def status(as_json: bool, **options: Any) -> None:
    """Show counts, the destination and why it is as it is, the agent, and what holds a product's events back.

    \b
    versioner-agent status
    versioner-agent status --json
    """
    from versioner_agent import groups, review  # noqa: PLC0415
    from versioner_agent.locks import FlusherLock  # noqa: PLC0415
    from versioner_agent.storage import OutboxMissing, Store  # noqa: PLC0415

    settings = load_settings(options)
    warning = _stranded(settings)
    step_down_for(settings)
    store = Store(settings.db, settings.busy_timeout)
    presence = FlusherLock(store.path).presence()
    try:
        stats = review.stats(store)
        failures = groups.summary(store, GROUPS)
    except OutboxMissing:
        warn_of_lost_place(settings)
        stats = review.EMPTY
        failures = groups.Summary([], 0, is_cut=False)
    finally:
        store.close()
    if as_json:
        echo_json(status_json(store.path, stats, failures, presence, settings.api_url))
    else:
        for line in _lines(store.path, stats, failures, presence, settings.api_url):
            echo(line)
    if warning:
        click.echo(printable(f"warning: {warning}"), err=True)


def _stranded(settings: Settings) -> str:
    """Say that events wait in the user's own outbox, which nobody empties where the host has one for all."""
    from versioner_agent import review  # noqa: PLC0415
    from versioner_agent.config import OWN_OUTBOX, user_directory  # noqa: PLC0415
    from versioner_agent.errors import OutboxError  # noqa: PLC0415
    from versioner_agent.privileges import as_owner_of  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    own = os.path.join(user_directory("state", os.environ), OWN_OUTBOX)
    if not settings.is_explicit("db") or not os.path.isfile(own) or os.path.realpath(own) == settings.db:
        return ""
    with as_owner_of(os.path.dirname(own)), closing(Store(own, settings.busy_timeout)) as store:
        try:
            pending = review.stats(store).counts["pending"]
        except OutboxError:
            return ""
    if not pending:
        return ""
    wait = "1 event waits" if pending == 1 else f"{pending} events wait"
    return f"{wait} in your own outbox; with a key, `versioner-agent flush --db {own}` delivers"


def status_json(path: str, stats: Stats, failures: Summary, presence: Presence, api_url: str) -> dict[str, Any]:
    """Return the documented keys."""
    from versioner_agent.damage import damage_json  # noqa: PLC0415
    from versioner_agent.groups import group_json  # noqa: PLC0415
    from versioner_agent.records import time_json  # noqa: PLC0415

    now = time.time()
    failure, health = stats.last_failure, stats.health
    oldest = stats.oldest_pending_at
    return {
        "outbox": {"path": path, "bytes": stats.bytes, "other_machine": stats.other_machine},
        "counts": stats.counts,
        "oldest_pending_age_s": None if oldest is None else round(max(0.0, now - oldest), 1),
        "last_delivered_at": time_json(stats.last_delivered_at),
        "last_failure": None
        if failure is None
        else {key: getattr(failure, key) for key in ("id", "product_name", "version", "reason", "detail")},
        "failures": [group_json(group) for group in failures.groups],
        "held": [
            {"product_name": held.product_name, "id": held.id, "since": time_json(held.since), "reason": held.reason}
            for held in stats.held
        ],
        "exports": _exports_json(stats, now),
        "damage": damage_json(stats.damage),
        "destination": {
            "url": stats.destination.origin or api_url,
            "account": stats.destination.account,
            "state": health.state,
            "reason": health.reason,
            "since": time_json(health.since),
            "next_attempt_at": time_json(health.next_attempt_at),
        },
        "agent": {"running": presence.has_agent, "pid": presence.agent_pid, "key": presence.agent_key},
    }


def _exports_json(stats: Stats, now: float) -> dict[str, Any]:
    from versioner_agent.records import time_json  # noqa: PLC0415

    batches = [
        {
            "number": each.id,
            "batch": each.uid,
            "created_at": time_json(each.created_at),
            "age_s": round(max(0.0, now - each.created_at), 1),
            "records": each.records,
            "left": each.awaited + each.waiting,
            "file": each.file,
        }
        for each in stats.exports.batches
    ]
    return {"batches": batches, "held_products": stats.exports.held_products}


def _lines(path: str, stats: Stats, failures: Summary, presence: Presence, api_url: str) -> list[str]:
    from versioner_agent.text import age  # noqa: PLC0415

    now = time.time()
    notes = {
        "pending": f"oldest {age(stats.oldest_pending_at, now)}" if stats.oldest_pending_at else "",
        "delivered": f"last {age(stats.last_delivered_at, now)}" if stats.last_delivered_at else "",
        "exported": _exported_note(stats, now),
    }
    if stats.last_failure:
        last = stats.last_failure
        words = f"{last.product_name} {last.version}: {last.reason}: {last.detail or ''}"
        notes["failed"] = f"last {last.id}: {printable(words)}"
    lines = [f"outbox       {printable(path)} ({stats.bytes / 1024:.0f} KiB)"]
    if stats.other_machine:
        lines.append("             made on another machine: `versioner-agent doctor` says what to do")
    if stats.damage:
        lines.append(f"DAMAGED      {age(stats.damage.at, now)}: {printable(str(stats.damage))}")
        lines.append("             `versioner-agent doctor --acknowledge` when somebody has looked at it")
    for state, count in stats.counts.items():
        if count or state in ("pending", "delivered", "failed"):
            name = styled(state, 11) if count else state.ljust(11)
            lines.append(f"{name}  {count:<6}  {notes.get(state, '')}".rstrip())
        if state == "failed":
            lines += [f"{' ' * 13}{line}" for line in _failure_lines(failures)]
    lines += _batch_lines(stats, now)
    lines += _destination_lines(stats, api_url, now)
    lines.append(f"agent        {_agent_words(presence, has_pending=stats.counts['pending'] > 0)}")
    for held in stats.held[:HELD_LINES]:
        words = printable(f"{held.product_name} waits for record {held.id} ({held.reason})")
        lines.append(f"held         {words} since {age(held.since, now)}")
    if len(stats.held) > HELD_LINES:
        lines.append(f"             and more: {len(stats.held) - HELD_LINES} other products at least")
    return lines


def _agent_words(presence: Presence, *, has_pending: bool) -> str:
    if not presence.has_agent:
        waiting = "; `versioner-agent run` or `flush` delivers what is pending" if has_pending else ""
        return f"{'a flush is running' if presence.is_delivering else 'not running'}{waiting}"
    pid = presence.agent_pid
    if pid is not None and is_stopped(pid):
        return f"STOPPED by a signal (pid {pid}): `kill -CONT {pid}`"
    key = f", key {printable(presence.agent_key)}" if presence.agent_key else ""
    return f"running (pid {pid or 'unknown'}){key}"


def _exported_note(stats: Stats, now: float) -> str:
    from versioner_agent.exports import BATCHES_SHOWN, PRODUCTS_COUNTED  # noqa: PLC0415
    from versioner_agent.text import age  # noqa: PLC0415

    batches, held = stats.exports
    if not batches:
        return ""
    written = _at_least(len(batches), BATCHES_SHOWN, "batch", "batches")
    products = _at_least(held, PRODUCTS_COUNTED, "product", "products")
    return f"without a receipt: {written}, the oldest {age(batches[0].created_at, now)}; {products} held"


def _at_least(count: int, most: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}{' or more' if count >= most else ''}"


def _batch_lines(stats: Stats, now: float) -> list[str]:
    from versioner_agent.text import age  # noqa: PLC0415

    batches = stats.exports.batches
    lines = [
        f"batch        {each.id}  {printable(each.uid[:8])}  {age(each.created_at, now)}  "
        f"{each.awaited + each.waiting} of {each.records} left  {printable(each.file or 'written to stdout')}"
        for each in batches[:BATCH_LINES]
    ]
    if len(batches) > BATCH_LINES:
        lines.append(f"             and more: {len(batches) - BATCH_LINES} other batches at least")
    return lines


def _failure_lines(failures: Summary) -> list[str]:
    from versioner_agent.groups import MOST_ROWS  # noqa: PLC0415

    lines = [group_line(group) for group in failures.groups[:GROUP_LINES]]
    left = failures.left + len(failures.groups) - len(lines)
    if failures.is_cut:
        lines.append(
            f"… and more: only {MOST_ROWS} failures were looked at, `versioner-agent list --groups` counts all"
        )
    elif left:
        lines.append(f"… and {left} groups: `versioner-agent list --groups`")
    return lines


def _destination_lines(stats: Stats, api_url: str, now: float) -> list[str]:
    from versioner_agent.outcomes import ADVICE  # noqa: PLC0415
    from versioner_agent.text import age  # noqa: PLC0415

    health = stats.health
    account = f" (account {stats.destination.account})" if stats.destination.account else ""
    since = f" since {age(health.since, now)}" if health.since else ""
    url = printable(stats.destination.origin or api_url)
    lines = [f"destination  {url}{printable(account)}: {styled(health.state)}{since}"]
    if health.reason:
        lines.append(f"             why: {printable(health.reason)}")
    if health.state in ADVICE:
        lines.append(f"             {ADVICE[health.state]}")
    if health.next_attempt_at and stats.counts["pending"] and health.next_attempt_at > now:
        lines.append(f"             next try {age(health.next_attempt_at, now)}")
    return lines
