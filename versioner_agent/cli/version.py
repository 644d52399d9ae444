"""`version`: which versioner-agent this is."""

from __future__ import annotations

import click

from versioner_agent import __version__


@click.command()
def version() -> None:
    """Show the version, as `--version` does."""
    click.echo(f"versioner-agent, version {__version__}")
