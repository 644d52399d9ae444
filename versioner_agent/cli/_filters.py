"""The options by which records are chosen, for all commands that choose some."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from versioner_agent.schema import STATES

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_NAMES = ("state", "product", "version", "reason", "since", "until")


def _as_moment(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Return what an option says as seconds since 1970; None where it is not given."""
    if value is None:
        return None
    from versioner_agent.filters import moment  # noqa: PLC0415  # only for who asks

    try:
        return moment(value, time.time())
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx=ctx, param=param) from exc


def _as_reason(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return one of the reasons that records have."""
    if value is None:
        return None
    from versioner_agent.filters import REASONS  # noqa: PLC0415  # only for who asks

    if value not in REASONS:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(REASONS)}", ctx=ctx, param=param)
    return value


def _as_text(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return what a record's name can be: bytes that are not UTF-8 are in none."""
    if value is None:
        return None
    from versioner_agent.values import string_problem  # noqa: PLC0415  # only for who asks

    problem = string_problem(value)
    if problem:
        raise click.BadParameter(problem, ctx=ctx, param=param)
    return value


def filter_options(*states: str) -> Callable[[Decorated], Decorated]:
    """Offer to choose records, by one of *states* among others; `filter_of` takes what was said."""

    def decorate(function: Decorated) -> Decorated:
        for option in (
            click.option("--until", callback=_as_moment, metavar="TIME", help="Only records queued before; likewise."),
            click.option(
                "--since",
                callback=_as_moment,
                metavar="TIME",
                help="Only records queued since: a time, a date, or an age like 90m, 24h, 7d.",
            ),
            click.option(
                "--reason",
                callback=_as_reason,
                metavar="WORD",
                help="Only records with this reason: conflict, invalid, late …",
            ),
            click.option("--version", callback=_as_text, metavar="TEXT", help="Only records of this version."),
            click.option("--product", callback=_as_text, metavar="NAME", help="Only records of this product."),
            click.option("--state", type=click.Choice(states or STATES), help="Only records in this state."),
        ):
            function = option(function)
        return function

    return decorate


def is_given(options: dict[str, Any]) -> bool:
    """Tell whether any of the options by which records are chosen was."""
    return any(options[name] is not None for name in _NAMES)


def filter_of(options: dict[str, Any], *, default_state: str | None = None) -> Any:
    """Return the Filter that *options* ask for, of records in *default_state* unless they name one."""
    from versioner_agent.filters import Filter  # noqa: PLC0415  # not for who only asks for help

    return Filter(**{name: options[name] for name in _NAMES} | {"state": options["state"] or default_state})
