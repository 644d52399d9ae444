"""`import`: queue what other hosts exported, and take verdicts home."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import click

from versioner_agent.cli import _notes
from versioner_agent.cli._common import echo, echo_json, json_option, load_settings, settings_options, step_down_for
from versioner_agent.errors import UsageError
from versioner_agent.text import harmless

if TYPE_CHECKING:
    from versioner_agent.importfile import ExportFile
    from versioner_agent.records import Record

SHOWN_REFUSALS = 20  # the rest is counted


@click.command(name="import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--dry-run", is_flag=True, help="Check the files, and import nothing.")
@settings_options("busy_timeout")
@json_option
def import_files(files: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> None:
    """Import files that `export` wrote on other hosts (- is stdin): all of them are checked first, then queued.

    Events are queued all or nothing, those of several hosts by time, each host's in its own order; importing twice
    adds nothing. Verdicts (`export --receipts`) settle what was exported here.

    \b
    versioner-agent import /media/stick/*.jsonl.gz
    """
    from versioner_agent import importfile, importing  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    if files.count(importfile.STDIN) > 1:
        raise UsageError("stdin (-) can be read once only")
    settings = load_settings(options)
    _allow_many_files()
    refused = _Refused()
    with ExitStack() as stack:
        opened = []
        for name in files:  # with the caller's rights
            opened.append(importfile.open_file(name, sys.stdin.buffer))
            stack.callback(opened[-1].close)
        for file in opened:
            file.check()
        if dry_run:
            for file in opened:
                _show(file, {}, as_json=as_json)
            return
        step_down_for(settings)
        if not settings.is_explicit("db") and not os.path.isdir(os.path.dirname(settings.db)):
            from versioner_agent.creation import make_private_directory  # noqa: PLC0415  # once in a user's life

            make_private_directory(settings.db)
        store = Store(settings.db, settings.busy_timeout)
        stack.callback(store.close)
        listener = importing.Listener(_notes.warn, refused.show)
        for result in importing.import_all(store, opened, listener):
            _show(result.file, result.done._asdict(), as_json=as_json)
    refused.count_the_rest()


def _allow_many_files() -> None:
    """Let all files be open at once, which they are: what is imported is what was checked."""
    import resource  # noqa: PLC0415  # POSIX only

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # then it is said which file is one too many
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Refused:
    """Says which of our events were refused on the far side, some of them one by one."""

    def __init__(self) -> None:
        self._count = 0

    def show(self, record: Record) -> None:
        """Say that *record* has failed."""
        self._count += 1
        if self._count <= SHOWN_REFUSALS:
            what = f"{record.kind} {record.product_name} {record.version} {record.status}"
            _say(f"refused {record.id}: {what}: {record.reason}: {record.detail or ''}".rstrip(": "))

    def count_the_rest(self) -> None:
        """Say how many were not shown."""
        if self._count > SHOWN_REFUSALS:
            _say(f"{self._count - SHOWN_REFUSALS} more refused; `versioner-agent list --state failed` shows them")


def _say(line: str) -> None:
    """Say *line* on stderr, to the journal as an error: whoever looks there for refusals finds it."""
    from versioner_agent.journal import is_journal, with_priority  # noqa: PLC0415

    safe = harmless(line)
    is_read_by_journal = is_journal(sys.stderr, os.environ.get("JOURNAL_STREAM"))
    click.echo(with_priority(safe, "error") if is_read_by_journal else safe, err=True)


def _show(file: ExportFile, done: dict[str, int], *, as_json: bool) -> None:
    from versioner_agent.importing import short  # noqa: PLC0415

    header, records, sha256 = file.checked
    if as_json:
        told = {"file": file.name, "content": header.content, "batch": header.batch, "origin": header.outbox}
        echo_json({**told, "host": header.host, "records": records, **done, "sha256": sha256})
        return
    is_events = header.content == "events"
    what = ("event" if is_events else "verdict") + ("" if records == 1 else "s")
    where = f"{'of' if is_events else 'from'} {header.host} (batch {short(header.batch)}, sha256 {sha256})"
    if not done:
        echo(harmless(f"checked {records} {what} {where}: the file is sound"))
    elif is_events:
        echo(
            harmless(f"imported {records} {what} {where}: {done['queued']} queued, {done['present']} were here already")
        )
    else:
        counts = ", ".join(f"{count} {name}" for name, count in done.items() if count) or "nothing in it"
        echo(harmless(f"imported {records} {what} {where}: {counts.replace('others', 'of other outboxes')}"))
