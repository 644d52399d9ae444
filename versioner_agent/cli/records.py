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
    warn_of_lost_place,
)
from versioner_agent.cli._failures import cursor_name, show_groups, show_new
from versioner_agent.cli._filters import filter_of, filter_options
from versioner_agent.errors import UsageError
from versioner_agent.text import age, printable, utc_time

if TYPE_CHECKING:
    from versioner_agent.config import Settings
    from versioner_agent.filters import Filter
    from versioner_agent.records import Record
    from versioner_agent.review import Attempt
    from versioner_agent.storage import Store

LIMIT = 50  # records, unless another one is given
#: So much of a name, and of the API's words, is in a row; and where it has to be complete.
NAME_CHARS, WHY_CHARS = 40, 100
WHOLE_NAME_CHARS, WHOLE_WHY_CHARS = 200, 4000
HEADER = ("ID", "STATE", "KIND", "PRODUCT", "VERSION", "ENVIRONMENT", "STATUS", "QUEUED", "WHY")


@click.command(name="list")
@filter_options()
@click.option("--groups", is_flag=True, help="Failed records by product, version and reason: how many, and whose.")
@click.option(
    "--new",
    "cursor",
    metavar="NAME",
    callback=cursor_name,
    help="Failed records that were not listed yet under this name, the oldest first.",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many; 50, with --groups or --new all.")
@settings_options()
@json_option
def list_records(groups: bool, cursor: str | None, limit: int | None, as_json: bool, **options: Any) -> None:
    """List records, the newest first.

    \b
    versioner-agent list --state failed --since 24h
    versioner-agent list --product my-service --version 1.2.3
    versioner-agent list --groups
    versioner-agent list --new mail
    """
    # While root may still read them:
    import versioner_agent.cursors  # noqa: PLC0415
    import versioner_agent.groups  # noqa: PLC0415
    import versioner_agent.selecting  # noqa: F401, PLC0415
    from versioner_agent.storage import OutboxMissing  # noqa: PLC0415

    wanted = _wanted(options, groups=groups, cursor=cursor)
    settings = outbox_settings(options)
    store = _store(settings)
    has_any = False
    try:
        if cursor is not None:
            show_new(
                store, cursor, wanted, limit, lambda page, is_first: _show_page(page, is_first, as_json, whole=True)
            )
            has_any = True  # nothing new is nothing to talk of: a mail would be sent for it
        elif groups:
            has_any = show_groups(store, wanted, limit, as_json=as_json)
        else:
            has_any = _show_all(store, wanted, limit or LIMIT, as_json=as_json)
    except OutboxMissing:
        warn_of_lost_place(settings)
        has_any = cursor is not None
    finally:
        store.close()
    if not has_any and not as_json:
        click.echo("no records", err=True)


def _wanted(options: dict[str, Any], *, groups: bool, cursor: str | None) -> Filter:
    if groups and cursor is not None:
        raise UsageError("give --groups or --new, not both")
    is_of_failures = groups or cursor is not None
    if is_of_failures and options["state"] not in (None, "failed"):
        raise UsageError(f"{'--groups' if groups else '--new'} is for failed records, not for {options['state']} ones")
    found: Filter = filter_of(options, default_state="failed" if is_of_failures else None)
    return found


def _show_all(store: Store, wanted: Filter, limit: int, *, as_json: bool) -> bool:
    """Show pages of records; returns whether there were any."""
    from versioner_agent import selecting  # noqa: PLC0415

    has_any = False
    # A page is read and the file let go before anything is printed: the reader may be in no hurry.
    for page in selecting.select(store, wanted, limit=limit):
        _show_page(page, not has_any, as_json)
        has_any = True
        if getattr(sys.stdout, "is_lost", False):
            break  # whoever read has seen enough
    return has_any


def _show_page(page: list[Record], is_first: bool, as_json: bool, *, whole: bool = False) -> None:
    from versioner_agent.records import record_json  # noqa: PLC0415

    if not as_json:
        _print_page(page, with_header=is_first, whole=whole)
        return
    for record in page:
        echo_json(record_json(record))


@click.command()
@click.argument("record_id", type=RECORD_ID, metavar="ID")
@settings_options()
@json_option
def show(record_id: int, as_json: bool, **options: Any) -> None:
    """Show one record with its payload and attempts.

    \b
    versioner-agent show 42
    """
    import json  # noqa: PLC0415

    from versioner_agent import review  # noqa: PLC0415
    from versioner_agent.records import record_json, time_json  # noqa: PLC0415

    store = _store(outbox_settings(options))
    try:
        found = review.show(store, record_id)
        host = review.host_of(store, found[0]) if found else None
        amended_by = review.amended_by(store, record_id) if found else None
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
        more = {"origin": record.origin, "origin_host": host, "amends": record.amends, "amended_by": amended_by}
        echo_json({**record_json(record), "payload": body, "attempt_log": log, **more})
        return
    for line in _whole(record, host, amended_by, attempts, json.dumps(body, ensure_ascii=False, indent=2)):
        echo(line)


def _store(settings: Settings) -> Store:
    from versioner_agent.storage import Store  # noqa: PLC0415

    return Store(settings.db, settings.busy_timeout)


def _print_page(page: list[Record], *, with_header: bool, whole: bool) -> None:
    """Print a table; *whole* is for a reader who can't look again, and gets all the API's words."""
    now = time.time()
    name_chars, why_chars = (WHOLE_NAME_CHARS, WHOLE_WHY_CHARS) if whole else (NAME_CHARS, WHY_CHARS)
    rows = [
        (
            str(record.id),
            record.state,
            record.kind,
            _short(record.product_name, name_chars),
            _short(record.version, name_chars),
            _short(record.environment_name or "", name_chars),
            record.status,
            age(record.queued_at, now),
            _short(_why(record), why_chars),
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


def _whole(record: Record, host: str | None, amended_by: int | None, attempts: list[Attempt], body: str) -> list[str]:
    facts = [
        ("record", f"{record.id} ({record.event_id})"),
        ("state", record.state),
        ("event", " ".join(n for n in (record.kind, record.product_name, record.version) if n)),
        ("environment", record.environment_name),
        ("status", record.status),
        ("run", record.invoke_id),
        ("queued", f"{utc_time(record.queued_at)} by {record.queued_by}"),
        ("from", f"{host or 'another host'} (outbox {record.origin})" if record.origin else None),
        ("amends", str(record.amends) if record.amends else None),
        ("amended as", str(amended_by) if amended_by else None),
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
