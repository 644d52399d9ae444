"""`flush`: deliver now, for hosts without an agent and for the last step of a job."""

from __future__ import annotations

from typing import Any, Self

import click

from versioner_agent.cli._common import (
    DELIVERY_KEYS,
    Seconds,
    echo_json,
    json_option,
    outbox_settings,
    settings_options,
)
from versioner_agent.text import printable


@click.command()
@click.option("--timeout", "wait_s", type=Seconds(min=0), default=60.0, show_default=True, metavar="SECONDS")
@click.option(
    "--new-destination", is_flag=True, help="Deliver to the configured API from now on, wherever it was before."
)
@settings_options(*DELIVERY_KEYS)
@json_option
def flush(wait_s: float, new_destination: bool, as_json: bool, **options: Any) -> int:
    """Deliver what is pending, waiting for backoff within --timeout; requests under way then get 5 s more.

    Where an agent delivers from this outbox, or others can write it, this waits for its agent instead. Exits 0 when
    nothing is pending, 4 if the API refused an event meanwhile, 5 if a rule did, 75 if events are still queued.

    \b
    versioner-agent flush --timeout 30
    """
    import os  # noqa: PLC0415

    from versioner_agent import flush as flushing  # noqa: PLC0415
    from versioner_agent import logs  # noqa: PLC0415
    from versioner_agent.waiting import STILL_QUEUED, exit_code  # noqa: PLC0415

    settings = outbox_settings(options)
    logs.configure(settings.log_format, "debug" if options["verbose"] else "warning")
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
