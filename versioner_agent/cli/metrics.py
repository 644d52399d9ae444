"""`metrics`: the outbox in numbers, for Prometheus."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any

import click

from versioner_agent.cli._common import load_settings, settings_options


@click.command()
@click.option("--textfile", metavar="PATH", help="Replace this file instead, for node_exporter's textfile collector.")
@settings_options()
def metrics(textfile: str | None, **options: Any) -> None:
    """Print the outbox's metrics in Prometheus' text format, or replace a file of them.

    Of an outbox that can't be read no more than that is told, and the exit code is 1.

    \b
    versioner-agent metrics --textfile /var/lib/prometheus/node-exporter/versioner-agent.prom
    """
    from versioner_agent import gauges  # noqa: PLC0415
    from versioner_agent.errors import AgentError, OutboxError  # noqa: PLC0415
    from versioner_agent.metrics import families, render  # noqa: PLC0415
    from versioner_agent.metrics_file import replace  # noqa: PLC0415
    from versioner_agent.privileges import as_owner_of  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    settings = load_settings(options)
    view, problem = None, None
    # Root writes where root may, and reads an outbox with no more rights than its owner has.
    directory = os.path.dirname(os.path.realpath(settings.db))
    with as_owner_of(directory), closing(Store(settings.db, settings.busy_timeout)) as store:
        try:
            view = gauges.look(store, is_named=settings.is_explicit("db"))
        except OutboxError as exc:
            problem = exc
    text = render(families(view, gauges.build()))
    if textfile is None:
        click.echo(text, nl=False)
    else:
        try:
            replace(textfile, text, outbox=settings.db, synced=True)
        except (OSError, ValueError) as exc:  # a name with a NUL is a ValueError
            words = getattr(exc, "strerror", None) or str(exc)
            raise AgentError(
                f"can't write {textfile}: {words}", "name a file in a directory that you may write"
            ) from exc
    if problem is not None:
        raise problem
