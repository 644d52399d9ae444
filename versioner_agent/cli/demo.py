"""`demo`: the whole story in one command."""

from __future__ import annotations

import click


@click.command()
def demo() -> None:
    """See an outage, buffering, delivery in order and a 409, on loopback with a private temporary outbox.

    Exits 0 only if every step really happened as told.

    \b
    versioner-agent demo
    """
    from versioner_agent.demo import play  # noqa: PLC0415

    play(click.echo)
