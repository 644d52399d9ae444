"""`check`: one line and an exit code for Nagios, Icinga, and whatever else runs monitoring plugins."""

from __future__ import annotations

import os
import time
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from versioner_agent.checking import CRITICAL, THRESHOLDS, UNKNOWN, Threshold, line, report
from versioner_agent.cli._common import outbox_settings, settings_options
from versioner_agent.errors import AgentError, OutboxBusy, OutboxError

if TYPE_CHECKING:
    from versioner_agent.config import Settings

#: A monitoring system waits for few seconds, and takes no answer for an answer.
MOST_BUSY_S = 2.0


class Plugin(click.Command):
    """A command that says everything by its convention: what is wrong with the call, too, is UNKNOWN, exit 3."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the options."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as exc:
            _tell(UNKNOWN, exc.format_message())
            raise click.exceptions.Exit(UNKNOWN) from exc

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and come to an end in the convention's terms."""
        try:
            return super().invoke(ctx)
        except AgentError as exc:
            _tell(UNKNOWN, "; ".join(filter(None, [*exc.lines, exc.hint])))
        except OSError as exc:
            _tell(UNKNOWN, exc.strerror or str(exc))
        except click.exceptions.Exit:
            raise
        except Exception as exc:  # noqa: BLE001  # exit 1 would say that all is known and is no more than a warning
            _tell(UNKNOWN, f"internal error: {type(exc).__name__}: {exc}")
        return UNKNOWN


def _limit_options(function: Any) -> Any:
    """Offer an option for each of THRESHOLDS; they arrive under its key, as it is read."""
    for each in reversed(THRESHOLDS):
        function = click.option(
            f"--{each.key.replace('_', '-')}",
            callback=partial(_read, each),
            default=each.default,
            show_default=True,
            metavar="LIMIT",
            help=each.help,
        )(function)
    return function


def _read(threshold: Threshold, _ctx: click.Context, _param: click.Parameter, value: str) -> float | None:
    try:
        return threshold.parse(value)
    except ValueError as exc:
        raise click.BadParameter(f"{value!r}: {exc}") from exc


@click.command(cls=Plugin)
@_limit_options
@click.option("--no-agent", is_flag=True, help="Expect no agent: jobs of this host deliver by themselves (`flush`).")
@settings_options()
def check(no_agent: bool, **options: Any) -> int:
    """Say in one line how the outbox is, for monitoring: exit 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.

    A limit is a number of events, a time (seconds, or 90m, 24h, 7d), a size (bytes, or 500M, 2G), or none.

    \b
    versioner-agent check --age-warning 4h --failed-critical 10
    """
    settings = outbox_settings(options)
    limits = {each.key: options[each.key] for each in THRESHOLDS}
    try:
        level, told = _look(settings, limits, wants_agent=not no_agent)
    except OutboxError as exc:
        level, words = _unreadable(exc, settings)
        told = line(level, words)
    click.echo(told)
    return level


def _look(settings: Settings, limits: dict[str, float | None], *, wants_agent: bool) -> tuple[int, str]:
    from versioner_agent import gauges, premises  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    with closing(Store(settings.db, min(settings.busy_timeout, MOST_BUSY_S))) as store:
        view = gauges.look(store, is_named=settings.is_explicit("db"), max_backoff=settings.max_backoff)
        view = view._replace(is_read_only=premises.is_read_only(os.path.dirname(store.path)))
    return report(view, limits, time.time(), wants_agent=wants_agent)


def _unreadable(exc: OutboxError, settings: Settings) -> tuple[int, str]:
    """Tell an outbox that is broken from one that only we can't read."""
    words = "; ".join(filter(None, [exc.message, exc.hint]))
    is_closed = isinstance(exc.__cause__, PermissionError) or not _is_open_to_us(os.path.realpath(settings.db))
    return (UNKNOWN if is_closed or isinstance(exc, OutboxBusy) else CRITICAL), words


def _is_open_to_us(path: str) -> bool:
    return not os.path.lexists(path) or os.access(path, os.R_OK, effective_ids=True)


def _tell(level: int, words: str) -> None:
    with suppress(OSError):  # nobody listens: then the exit code says it
        click.echo(line(level, words))
