"""`flush`: deliver now, for hosts without an agent and for the last step of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import click

from versioner_agent.cli._common import (
    DELIVERY_KEYS,
    Seconds,
    echo_json,
    json_option,
    outbox_settings,
    settings_options,
)
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.text import harmless, printable

if TYPE_CHECKING:
    from versioner_agent.config import Settings


@click.command()
@click.option(
    "--timeout",
    "wait_s",
    type=Seconds(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to go on.",
)
@click.option(
    "--new-destination", is_flag=True, help="Deliver to the configured API from now on, wherever it was before."
)
@click.option("--spill", metavar="FILE", help="Export what is left then, whatever became of the flush (see `export`).")
@settings_options(*DELIVERY_KEYS)
@json_option
def flush(wait_s: float, new_destination: bool, spill: str | None, as_json: bool, **options: Any) -> int:
    """Deliver what is pending, waiting for backoff within --timeout; requests under way then get 5 s more.

    Where an agent delivers from this outbox, or others can write it, this waits for its agent instead. Exits 0 when
    nothing is pending, 4 if the API refused an event meanwhile, 5 if a rule did, 75 if events are still queued.

    \b
    versioner-agent flush --timeout 30
    versioner-agent flush --timeout 30 --spill "$CARRIED/events.jsonl.gz"
    """
    import os  # noqa: PLC0415

    from versioner_agent import flush as flushing  # noqa: PLC0415
    from versioner_agent import logs  # noqa: PLC0415
    from versioner_agent.waiting import STILL_QUEUED, exit_code  # noqa: PLC0415

    settings = outbox_settings(options)
    logs.configure(settings.log_format, "debug" if options["verbose"] else "warning")
    if spill is not None:
        return _spill(settings, spill, wait_s, rebind=new_destination, as_json=as_json)
    with _Progress() as progress:
        drained = flushing.flush(
            settings, os.environ, timeout=wait_s, rebind=new_destination, on_progress=progress.show
        )
    if as_json:
        refused = [record.id for record in drained.refused]
        echo_json({"pending": drained.pending, "refused": refused, "note": drained.note or None})
    if drained.pending:
        why = f": {drained.note}" if drained.note else ""
        events = "1 event is" if drained.pending == 1 else f"{drained.pending} events are"
        click.echo(printable(f"{events} still queued{why}"), err=True)
    return exit_code(drained.refused) or (STILL_QUEUED if drained.pending else 0)


def _spill(settings: Settings, path: str, wait_s: float, *, rebind: bool, as_json: bool) -> int:
    import os  # noqa: PLC0415

    from versioner_agent import spilling  # noqa: PLC0415
    from versioner_agent.cli.export import ended_by_signals, exported_json, summary, tell_damaged  # noqa: PLC0415
    from versioner_agent.waiting import exit_code  # noqa: PLC0415

    spilling.check(settings, path)
    try:
        with ended_by_signals(), _Progress() as progress:
            done = spilling.flush_and_spill(
                settings, os.environ, path, timeout=wait_s, rebind=rebind, on_progress=progress.show
            )
    except UsageError as exc:  # somebody was faster
        raise AgentError(exc.message, exc.hint) from exc
    if done.exported is not None:
        tell_damaged(done.exported)
    if as_json:
        refused = [record.id for record in done.drained.refused]
        spilled = None if done.exported is None else exported_json(done.exported)
        echo_json(
            {"pending": 0, "refused": refused, "note": done.trouble or done.drained.note or None, "spilled": spilled}
        )
    if done.exported is not None:
        why = done.trouble or done.drained.note
        click.echo(harmless(f"spilled {summary(done.exported)}{f': {why}' if why else ''}"), err=True)
    return exit_code(done.drained.refused)


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._total = 0
        self._left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def show(self, pending: int | None) -> None:
        """Draw how many of those seen first are done."""
        import sys  # noqa: PLC0415

        if pending is None or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._total = self._left = max(pending, 1)
            self._bar = click.progressbar(length=self._total, label="delivering", file=sys.stderr).__enter__()
        done = max(0, self._left - pending)
        self._left = min(self._left, pending)
        self._bar.update(done)
