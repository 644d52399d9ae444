"""`amend`: corrected copies of events that the API refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from versioner_agent.cli._common import RECORD_ID, echo, echo_json, json_option, outbox_settings, settings_options
from versioner_agent.cli._filters import filter_of, filter_options, is_given
from versioner_agent.errors import UsageError
from versioner_agent.text import bounded, harmless

if TYPE_CHECKING:
    from versioner_agent.amending import Amendment

_REFUSED = ("not_found", "refused")
VALUE_CHARS = 300


@click.command()
@click.argument("ids", type=RECORD_ID, nargs=-1, metavar="[ID...]")
@filter_options("failed", "pending")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Change a field, or extra_metadata.KEY; repeatable.",
)
@click.option("--unset", multiple=True, metavar="FIELD", help="Leave a field out, or extra_metadata.KEY; repeatable.")
@click.option("--out-of-order", is_flag=True, help="Also what a later event of its run has overtaken.")
@click.option("--yes", is_flag=True, help="Do it, else only show what would change.")
@settings_options()
@json_option
def amend(
    ids: tuple[int, ...],
    assignments: tuple[str, ...],
    unset: tuple[str, ...],
    out_of_order: bool,
    yes: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Queue corrected copies of failed records (or pending ones) and discard these; first without --yes, to see.

    A copy goes behind what its product has waiting. It is a new event with the times and metadata of the old one.

    \b
    versioner-agent amend 42 --set version=1.2.4
    versioner-agent amend --product my-service --version 1.2.3 --set scm_sha=abc123 --unset extra_metadata.note --yes
    """
    from versioner_agent import amending, exports  # noqa: PLC0415
    from versioner_agent.cli._events import user  # noqa: PLC0415
    from versioner_agent.outbox import Outbox  # noqa: PLC0415

    if bool(ids) == is_given(options):
        raise UsageError("give record ids, or what they have in common (--product, --version …)")
    if not assignments and not unset:
        raise UsageError("say what is to change: --set FIELD=VALUE, --unset FIELD")
    wanted = amending.correction(assignments, unset)
    chosen = ids or filter_of(options, default_state="failed")
    settings = outbox_settings(options)
    counts: dict[str, int] = {}
    do = amending.amend if yes else amending.planned
    with Outbox(settings.db, busy_timeout=settings.busy_timeout, queued_by=user()) as outbox:
        exports.turn_all(outbox.store)
        for amendment in do(outbox, chosen, wanted, out_of_order=out_of_order):
            counts[amendment.outcome] = counts.get(amendment.outcome, 0) + 1
            _show(amendment, as_json=as_json)
    _conclude(counts)
    return 2 if ids and any(outcome in _REFUSED for outcome in counts) else 0


def _show(amendment: Amendment, *, as_json: bool) -> None:
    if as_json:
        echo_json({key: value for key, value in amendment._asdict().items() if key != "record"})
        return
    record = amendment.record
    what = f" {bounded(record.product_name, 100)} {bounded(record.version, 100)}" if record else ""
    outcome = f"amended as {amendment.amended_by}" if amendment.outcome == "amended" else amendment.outcome
    detail = f": {amendment.detail}" if amendment.detail else ""
    line = f"{amendment.id}{what}: {outcome.replace('_', ' ')}{detail}"
    click.echo(harmless(line), err=amendment.outcome in _REFUSED)
    for name, (old, new) in amendment.changes.items():
        echo(harmless(f"  {name}: {_value(old)} -> {_value(new)}"))


def _value(value: Any) -> str:
    """Return a field's value as a difference shows it."""
    if value is None:
        return "(none)"
    return bounded(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), VALUE_CHARS)


def _conclude(counts: dict[str, int]) -> None:
    if counts.get("planned"):
        words = "nothing was done; --yes queues each copy behind what its product has waiting, and discards the old one"
        click.echo(words, err=True)
    elif not counts:
        click.echo("nothing to do", err=True)
