"""`retry` and `discard`: a person's word on records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from versioner_agent.cli._common import RECORD_ID, echo_json, json_option, outbox_settings, settings_options
from versioner_agent.errors import UsageError

if TYPE_CHECKING:
    from versioner_agent.review import Verdict

#: Outcomes that mean the command did not do what was asked: a wrong call.
_REFUSED = ("not_found", "refused", "out_of_order")


@click.command()
@click.argument("ids", type=RECORD_ID, nargs=-1, metavar="ID...")
@click.option("--all-failed", is_flag=True, help="All failed records.")
@click.option("--out-of-order", is_flag=True, help="Also what a later event of its run has overtaken.")
@settings_options()
@json_option
def retry(ids: tuple[int, ...], all_failed: bool, out_of_order: bool, as_json: bool, **options: Any) -> int:
    """Send failed (or exported) records again, as new requests; what was queued again since is skipped.

    \b
    versioner-agent retry 42 43
    versioner-agent retry --all-failed
    """
    from versioner_agent import review  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    if bool(ids) == all_failed:
        raise UsageError("give record ids, or --all-failed")
    settings = outbox_settings(options)
    store = Store(settings.db, settings.busy_timeout)
    try:
        chosen = review.failed_ids(store) if all_failed else list(dict.fromkeys(ids))
        return _report(review.retry(store, chosen, out_of_order=out_of_order), as_json=as_json)
    finally:
        store.close()


@click.command()
@click.argument("ids", type=RECORD_ID, nargs=-1, required=True, metavar="ID...")
@click.option("--yes", is_flag=True, help="Discard pending records too: they will never be delivered.")
@settings_options()
@json_option
def discard(ids: tuple[int, ...], yes: bool, as_json: bool, **options: Any) -> int:
    """Give up records for good; they stay visible as discarded.

    \b
    versioner-agent discard 42
    """
    from versioner_agent import review  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    settings = outbox_settings(options)
    store = Store(settings.db, settings.busy_timeout)
    try:
        return _report(review.discard(store, list(dict.fromkeys(ids)), pending_too=yes), as_json=as_json)
    finally:
        store.close()


def _report(verdicts: list[Verdict], *, as_json: bool) -> int:
    for verdict in verdicts:
        if as_json:
            echo_json(verdict._asdict())
        else:
            words = f": {verdict.detail}" if verdict.detail else ""
            click.echo(f"{verdict.id} {verdict.outcome.replace('_', ' ')}{words}", err=verdict.outcome in _REFUSED)
    if not verdicts and not as_json:
        click.echo("nothing to do", err=True)
    return 2 if any(verdict.outcome in _REFUSED for verdict in verdicts) else 0
