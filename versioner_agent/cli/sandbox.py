"""`sandbox`: the documented API on this machine, to try scripts and outages against."""

from __future__ import annotations

import contextlib
import signal

import click

from versioner_agent.errors import AgentError
from versioner_agent.text import printable

SAMPLE_KEY = "sk_sandbox_k1_local"


@click.command(name="sandbox")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8765, show_default=True, help="Port on 127.0.0.1; 0 takes any."
)
@click.option("--key", metavar="KEY", help="The only API key to accept. Without it, any key will do.")
@click.option(
    "--fail",
    metavar="CODE",
    type=click.IntRange(200, 599),
    multiple=True,
    help="Answer events with this HTTP status; repeat it and the codes take turns.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0.0, 1.0),
    default=1.0,
    show_default=True,
    help="With --fail: the share of requests that fail.",
)
@click.option(
    "--latency", metavar="SECONDS", type=click.FloatRange(0.0, 3600.0), default=0.0, help="Wait before every answer."
)
@click.option("--retry-after", metavar="VALUE", help="With --fail: send this Retry-After header (seconds or a date).")
@click.option(
    "--blocked",
    metavar="ENVIRONMENT",
    multiple=True,
    help="Refuse deployments to this environment, as a no-deploy window does (423); repeatable.",
)
def sandbox(
    *,
    port: int,
    key: str | None,
    fail: tuple[int, ...],
    rate: float,
    latency: float,
    retry_after: str | None,
    blocked: tuple[str, ...],
) -> None:
    """Serve the documented Versioner API on this machine.

    Accepts builds and deployments as the API's documentation says, keeps them in memory and lists them under /events.
    Nothing leaves this machine. One line per request goes to stderr. Stop it with Ctrl-C.

    \b
    Examples:
      versioner-agent sandbox
      versioner-agent sandbox --fail 503 --rate 0.3        a shaky API
      versioner-agent sandbox --fail 429 --retry-after 20  a rate limit
      versioner-agent sandbox --blocked production         a no-deploy window
      curl http://127.0.0.1:8765/events?product=my-service what has arrived
    """
    from versioner_agent.sandbox import Misbehaviour, Sandbox  # noqa: PLC0415  # a server costs the other commands time

    misbehaviour = Misbehaviour(fail, rate, latency, blocked, retry_after)
    try:
        server = Sandbox(port, key, misbehaviour, log=_show)
    except OSError as exc:
        hint = "another program listens there: choose another --port, or --port 0 for any free one"
        raise AgentError(f"cannot listen on 127.0.0.1:{port}: {exc.strerror or exc}", hint) from exc
    # SIGTERM ends the loop as Ctrl-C does; nobody can be waiting for what a sandbox would still have to do.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        accepted = "any key accepted" if key is None else "only the given key accepted"
        click.echo(f"sandbox listening on {server.url} ({accepted})")
        click.echo(f"  export VERSIONER_API_URL={server.url}")
        shown = SAMPLE_KEY if key is None else "...  # the key given with --key"
        click.echo(f"  export VERSIONER_API_KEY={shown}")
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo("sandbox stopped", err=True)
    finally:
        server.stop()
        signal.signal(signal.SIGTERM, before)


def _show(line: str) -> None:
    # A closed stderr is no reason to leave a request unanswered.
    with contextlib.suppress(OSError, ValueError):
        click.echo(printable(line), err=True)
