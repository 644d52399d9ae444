"""`version`: which versioner-agent this is."""

from __future__ import annotations

import click

from versioner_agent import __version__
from versioner_agent.cli._common import verbose_option


@click.command()
@verbose_option
def version(verbose: bool) -> None:
    """Show the version, as `--version` does.

    \b
    versioner-agent version
    """
    del verbose  # the official client takes it
    click.echo(f"versioner-agent, version {__version__}")
