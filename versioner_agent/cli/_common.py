"""What commands share: options made from the tables, settings, and how results are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from versioner_agent import config
from versioner_agent.cli import _notes
from versioner_agent.config import Settings
from versioner_agent.text import harmless, json_line

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

verbose_option = click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")


#: Settings that name a file, which shells complete.
FILE_KEYS = ("db", "api_key_file", "ca_bundle", "metrics_file")


def settings_options(*keys: str) -> Callable[[Decorated], Decorated]:
    """Offer `--config`, `--verbose` and the flags of the given settings; they arrive under the settings' keys."""

    def decorate(function: Decorated) -> Decorated:
        for key in reversed(("db", *keys)):
            option = config.BY_KEY[key]
            metavar = "PATH" if key in FILE_KEYS else "VALUE"
            function = click.option(option.flag, key, metavar=metavar, help=option.help)(function)
        function = click.option("--config", metavar="PATH", help="Configuration file; replaces both standard ones.")(
            function
        )
        return verbose_option(function)

    return decorate


class Seconds(click.FloatRange):
    """So many seconds; "nan" is no number of them, and would never be over."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        found = super().convert(value, param, ctx)
        if found != found:  # noqa: PLR0124  # only NaN is not what it is
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return found


#: What a record's id can be: SQLite's integers from 1 on.
RECORD_ID = click.IntRange(1, 2**63 - 1)
#: Settings that bear only on who queues.
QUEUING_KEYS = ("gate_timeout", "best_effort")
#: The settings that `run` and `flush` take as flags: all others that have one.
DELIVERY_KEYS = tuple(
    option.key for option in config.OPTIONS if option.flag and option.key not in ("db", *QUEUING_KEYS)
)


def load_settings(options: dict[str, Any]) -> Settings:
    """Resolve settings from a command's keyword arguments; with --verbose, say where the outbox comes from."""
    settings = config.load(given_flags(options), os.environ, options.get("config"))
    if options.get("verbose"):
        words = f"outbox {settings.db} (from {settings.sources['db']})"
        click.echo(harmless(words), err=True)
    return settings


def outbox_settings(options: dict[str, Any]) -> Settings:
    """Do the same for a command that opens the outbox: from here on root is no more than the outbox's owner."""
    settings = load_settings(options)
    step_down_for(settings)
    return settings


def warn_of_lost_place(settings: Settings) -> None:
    """Say that the directory which somebody has named is not there: else its outbox would pass for an empty one."""
    from versioner_agent.errors import OutboxError  # noqa: PLC0415
    from versioner_agent.files import require_place  # noqa: PLC0415

    if settings.is_explicit("db"):
        try:
            require_place(os.path.realpath(settings.db))
        except OutboxError as exc:
            _notes.warn(exc.message)


def step_down_for(settings: Settings) -> None:
    """Give up root's power where the outbox lies in somebody else's directory."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        from versioner_agent.privileges import become_owner_of  # noqa: PLC0415  # only for root

        become_owner_of(os.path.dirname(os.path.realpath(settings.db)))


def given_flags(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings among a command's keyword arguments."""
    return {key: options[key] for key in config.BY_KEY if options.get(key) is not None}


def echo_json(value: Any) -> None:
    """Print one JSON object on one line."""
    click.echo(json_line(value, sys.stdout))


def wants_color() -> bool | None:
    """Return False where NO_COLOR is set (https://no-color.org), else None: click colours terminals only."""
    return False if os.environ.get("NO_COLOR") else None


def echo(text: str) -> None:
    """Print a line of a human-readable result."""
    click.echo(text, color=wants_color())


STATE_COLORS = {"delivered": "green", "failed": "red", "pending": "yellow", "up": "green"}


def styled(word: str, width: int = 0) -> str:
    """Return a state's name padded to *width* and coloured by what it means."""
    return click.style(word.ljust(width), fg=STATE_COLORS.get(word))


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    """Align *rows* under *header*; the last column is left as long as it is."""
    everything = [header, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    lines = []
    for row in everything:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
