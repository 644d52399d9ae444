"""Talk on stderr."""

from __future__ import annotations

import click

from versioner_agent.text import mask_keys, printable


def warn(text: str) -> None:
    """Say what somebody should look at, in one line."""
    click.echo(mask_keys(printable(f"warning: {text}")), err=True)


def note(text: str) -> None:
    """Say what may help, in one line."""
    click.echo(mask_keys(printable(f"note: {text}")), err=True)
