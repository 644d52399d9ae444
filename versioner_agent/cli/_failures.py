"""Failures as people are told of them: once to each cursor, and in groups."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import click

from versioner_agent.cli._common import echo, echo_json
from versioner_agent.text import bounded, harmless

if TYPE_CHECKING:
    from versioner_agent.filters import Filter
    from versioner_agent.groups import Group
    from versioner_agent.records import Record
    from versioner_agent.storage import Store

NAME_CHARS = 100
LINK_CHARS = 500
#: What became of the failures of a group, by its reason.
_WORDS = {"gave_up": "given up", "damaged": "damaged"}


def cursor_name(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return the name of a cursor, if it can be one."""
    if value is not None and not (0 < len(value) <= NAME_CHARS and value.isprintable() and value.strip()):
        raise click.BadParameter(f"must be 1 to {NAME_CHARS} printable characters", param=param)
    return value


def show_new(
    store: Store, name: str, wanted: Filter, limit: int | None, show: Callable[[list[Record], bool], None]
) -> None:
    """Show what the cursor *name* has not seen, and move it; *show* gets records, and whether they are the first.

    The cursor is moved when they were written, to a file with a sync as its own commit has one: what a closed pipe, a
    full disk or a power cut has kept from that is shown again.
    """
    from versioner_agent import cursors  # noqa: PLC0415

    is_first = True
    with cursors.held(store, name):
        for step in cursors.unseen(store, name, wanted, limit):
            if step.records:
                show(step.records, is_first)
                is_first = False
                sys.stdout.flush()
                _sync_stdout()
            if getattr(sys.stdout, "is_lost", False):
                return
            cursors.move(store, name, step)


def _sync_stdout() -> None:
    """Have what was written to stdout on its disk, if that is a file; raises OSError."""
    try:
        fd = sys.stdout.fileno()
    except (OSError, ValueError):  # none of the system's
        return
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.fsync(fd)


def show_groups(store: Store, wanted: Filter, limit: int | None, *, as_json: bool) -> bool:
    """Show failures in groups; returns whether there were any."""
    from versioner_agent import groups  # noqa: PLC0415

    has_any = False
    most = sys.maxsize if limit is None else min(limit, sys.maxsize)
    for group in islice(groups.groups(store, wanted), most):
        has_any = True
        if as_json:
            echo_json(groups.group_json(group))
        else:
            echo(group_line(group))
        if getattr(sys.stdout, "is_lost", False):
            break
    return has_any


def group_line(group: Group) -> str:
    """Return one group in a line."""
    what = bounded(f"{group.product_name} {group.version}", 2 * NAME_CHARS)
    words = "refused late by a rule" if group.late else _WORDS.get(group.reason, "refused")
    link = f" {bounded(group.link, LINK_CHARS)}" if group.link else ""
    by = bounded(group.first_by, NAME_CHARS)
    return harmless(f"{what}: {group.total} {words} ({group.reason}), first by {by} (record {group.first_id}){link}")
