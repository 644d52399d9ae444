"""`list` and `show`: records as rows, or one of them whole."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from versioner_agent.cli._common import (
    RECORD_ID,
    echo,
    echo_json,
    json_option,
    outbox_settings,
    settings_options,
    styled,
    table,
)
from versioner_agent.errors import UsageError
from versioner_agent.schema import STATES
from versioner_agent.text import age, printable, utc_time

if TYPE_CHECKING:
    from versioner_agent.records import Record
    from versioner_agent.review import Attempt
    from versioner_agent.storage import Store

HEADER = ("ID", "STATE", "KIND", "PRODUCT", "VERSION", "ENVIRONMENT", "STATUS", "QUEUED", "WHY")


@click.command(name="list")
@click.option("--state", type=click.Choice(STATES), help="Only records in this state.")
@click.option("--product", metavar="NAME", help="Only records of this product.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many records.")
@settings_options()
@json_option
def list_records(state: str | None, product: str | None, limit: int, as_json: bool, **options: Any) -> None:
    """List records, the newest first.

    \b
    versioner-agent list --state failed
    """
    from versioner_agent import review  # noqa: PLC0415
    from versioner_agent.records import record_json  # noqa: PLC0415
    from versioner_agent.storage import OutboxMissing  # noqa: PLC0415

    store = _store(options)
    is_empty = True
    try:
        # A page is read and the file let go before anything is printed: the reader may be in no hurry.
        for page in review.select(store, state=state, product=product, limit=limit):
            if as_json:
                for record in page:
                    echo_json(record_json(record))
            else:
                _print_page(page, with_header=is_empty)
            is_empty = False
            if getattr(sys.stdout, "is_lost", False):
                break  # whoever read has seen enough
    except OutboxMissing:
        pass
    finally:
        store.close()
    if is_empty and not as_json:
        click.echo("no records", err=True)


@click.command()
@click.argument("record_id", type=RECORD_ID, metavar="ID")
@settings_options()
@json_option
def show(record_id: int, as_json: bool, **options: Any) -> None:
    """Show one record with its payload and attempts."""
    import json  # noqa: PLC0415

    from versioner_agent import review  # noqa: PLC0415
    from versioner_agent.records import record_json, time_json  # noqa: PLC0415

    store = _store(options)
    try:
        found = review.show(store, record_id)
        host = review.host_of(store, found[0]) if found else None
    finally:
        store.close()
    if found is None:
        raise UsageError(f"there is no record {record_id}", "`versioner-agent list` shows what there is")
    record, payload, attempts = found
    try:
        body = json.loads(payload) if payload else None  # let go when it was delivered on a full disk
    except (ValueError, RecursionError):
        body = payload.decode("utf-8", "replace")  # a damaged record is shown as what it is
    if as_json:
        log = [{**attempt._asdict(), "at": time_json(attempt.at)} for attempt in attempts]
        echo_json({**record_json(record), "payload": body, "attempt_log": log, "origin_host": host})
        return
    for line in _whole(record, host, attempts, json.dumps(body, ensure_ascii=False, indent=2)):
        echo(line)


def _store(options: dict[str, Any]) -> Store:
    from versioner_agent.storage import Store  # noqa: PLC0415

    settings = outbox_settings(options)
    return Store(settings.db, settings.busy_timeout)


def _print_page(page: list[Record], *, with_header: bool) -> None:
    now = time.time()
    rows = [
        (
            str(record.id),
            record.state,
            record.kind,
            _short(record.product_name, 40),
            _short(record.version, 30),
            _short(record.environment_name or "", 20),
            record.status,
            age(record.queued_at, now),
            _short(_why(record), 100),
        )
        for record in page
    ]
    lines = table(rows, HEADER)
    if with_header:
        echo(click.style(lines[0], bold=True))
    width = max(len(row[1]) for row in (*rows, HEADER))
    start = max(len(row[0]) for row in (*rows, HEADER)) + 2
    for row, line in zip(rows, lines[1:], strict=True):
        echo(line[:start] + styled(row[1], width) + line[start + width :])


def _why(record: Record) -> str:
    if record.reason is None:
        return ""
    late = "late, " if record.late else ""
    return f"{late}{record.reason}: {record.detail or ''}".rstrip(": ")


def _whole(record: Record, host: str | None, attempts: list[Attempt], body: str) -> list[str]:
    facts = [
        ("record", f"{record.id} ({record.event_id})"),
        ("state", record.state),
        ("event", " ".join(n for n in (record.kind, record.product_name, record.version) if n)),
        ("environment", record.environment_name),
        ("status", record.status),
        ("run", record.invoke_id),
        ("queued", f"{utc_time(record.queued_at)} by {record.queued_by}"),
        ("from", f"{host or 'another host'} (outbox {record.origin})" if record.origin else None),
        ("settled", utc_time(record.settled_at) if record.settled_at else None),
        ("server id", record.server_id),
        ("why", _why(record)),
        ("rule", " ".join(part for part in (record.rule, record.code) if part)),
        ("come back", record.retry_after),
    ]
    lines = [f"{name:<12} {printable(value)}" for name, value in facts if value]
    lines += ["payload", *(f"  {printable(line)}" for line in body.split("\n"))]
    lines.append(f"attempts     {record.attempts}" + (", the newest:" if record.attempts > len(attempts) else ""))
    for attempt in attempts:
        status = f"HTTP {attempt.http_status}" if attempt.http_status else "no answer"
        words = printable(f"{attempt.outcome}: {attempt.detail}" if attempt.detail else attempt.outcome)
        lines.append(f"  {utc_time(attempt.at)}  {status}  {attempt.duration_s:.2f} s  {words}")
    return lines


def _short(value: str, limit: int) -> str:
    safe = printable(value)
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
