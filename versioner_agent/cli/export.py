"""`export`: pending records into a file that crosses the air gap."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from versioner_agent.cli import _notes
from versioner_agent.cli._common import echo, echo_json, json_option, load_settings, settings_options
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.text import harmless

if TYPE_CHECKING:
    from versioner_agent.config import Settings
    from versioner_agent.exporting import Exported

STDOUT = "-"


@click.command()
@click.argument("file", required=False, metavar="[FILE]")
@click.option("--product", metavar="NAME", help="Only records of this product.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many, the oldest first.")
@click.option("--mark", metavar="DIGEST", help="Mark as exported what was written to stdout, by its SHA-256.")
@click.option("--again", metavar="BATCH", help="Write a marked batch once more: a number, or its id.")
@click.option("--receipts", is_flag=True, help="Write what became of imported records, for where they come from.")
@settings_options()
@json_option
def export(
    file: str | None, product: str | None, limit: int | None, mark: str | None, again: str | None, receipts: bool,
    as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Write pending records to FILE (compressed if it ends in .gz) and mark them exported once it is synced.

    They are sent by whoever imports the file; until their receipts come back, nothing later of their products is sent
    from here. An agent may run meanwhile. With `-` for FILE, the lines go to stdout and nothing is marked until
    `--mark` says that they have arrived.

    \b
    versioner-agent export /media/stick/events.jsonl.gz
    versioner-agent export - | ssh relay 'cat >events.jsonl'
    versioner-agent export --mark 3f0c1a2b
    versioner-agent export --receipts /media/stick/receipts.jsonl.gz
    """
    from versioner_agent import exporting, logs  # noqa: PLC0415

    _check(file, product, limit, mark, again, as_json=as_json)
    settings = load_settings(options)
    logs.configure(settings.log_format, "debug" if options["verbose"] else "warning")
    with ended_by_signals():
        if receipts:
            _refuse_with_receipts(file, product, limit, mark or again)
            return _tell(settings, file or "", as_json=as_json)
        if mark is not None:
            return _mark(settings, mark, as_json=as_json)
        assert file is not None  # _check
        if file == STDOUT:
            return _stream(settings, product, limit)
        if again is not None:
            _report(exporting.export_again(settings, again, file), as_json=as_json)
            return 0
        report = partial(_report_marked, as_json=as_json)
        if exporting.export(settings, file, product=product, limit=limit, on_marked=report) is None:
            click.echo("nothing is pending; no file was written", err=True)
        return 0


def _check(
    file: str | None, product: str | None, limit: int | None, mark: str | None, again: str | None, *, as_json: bool
) -> None:
    """Refuse what makes no sense together; raises UsageError."""
    try:
        "".join(filter(None, (product, mark, again))).encode()
    except UnicodeEncodeError:
        raise UsageError("no product and no batch has a name that is not UTF-8") from None
    has_choice = product is not None or limit is not None
    if mark is not None and (file is not None or again is not None or has_choice):
        raise UsageError("--mark takes no file and no other choice: the digest says what was written")
    if mark is None and not file:
        raise UsageError("name the file to write", "`-` writes to stdout, and marks nothing")
    if again is not None and has_choice:
        raise UsageError("--again writes what is left of the batch; --product and --limit don't go with it")
    if file == STDOUT and (again is not None or as_json):
        raise UsageError("--again and --json don't go with `-`: stdout is for the lines", "name a file")


def _refuse_with_receipts(file: str | None, product: str | None, limit: int | None, batch: str | None) -> None:
    if file in (None, STDOUT) or product is not None or limit is not None or batch is not None:
        raise UsageError("--receipts takes a file's name and no other choice: it tells all there is to tell")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as SIGINT does, so that what is half written is removed."""
    from versioner_agent.opening import handled_by  # noqa: PLC0415

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    with handled_by(end, signal.SIGTERM, signal.SIGHUP):
        yield


def _stream(settings: Settings, product: str | None, limit: int | None) -> int:
    from versioner_agent import exporting  # noqa: PLC0415

    if getattr(sys.stdout, "is_lost", False):
        raise UsageError("stdout is closed, so there is nowhere to write to; nothing was done", "name a file")
    # Past the wrapper of stdout, for which a reader that leaves is no error.
    stream = os.fdopen(os.dup(1), "wb")
    try:
        done = exporting.export_to(settings, stream, product=product, limit=limit)
    finally:
        with suppress(OSError):  # what was not written has been told
            stream.close()
    if done is None:
        click.echo("nothing is pending", err=True)
        return 0
    tell_damaged(done)
    click.echo(
        f"wrote {_counted(done.records)} (batch {done.batch}, sha256 {done.sha256}); nothing is marked as exported yet",
        err=True,
    )
    click.echo(f"once they have arrived: versioner-agent export --mark {done.sha256}", err=True)
    return 0


def _tell(settings: Settings, file: str, *, as_json: bool) -> int:
    from versioner_agent import receipts  # noqa: PLC0415

    done = receipts.export(settings, file)
    if done is None:
        click.echo("nothing that was imported has a verdict yet; no file was written", err=True)
    elif as_json:
        echo_json({"batch": done.batch, "file": os.path.abspath(file), "records": done.records, "sha256": done.sha256})
    else:
        noun = "verdict" if done.records == 1 else "verdicts"
        echo(harmless(f"wrote {done.records} {noun} to {file} (batch {done.batch}, sha256 {done.sha256})"))
    return 0


def _report(done: Exported, *, as_json: bool) -> None:
    tell_damaged(done)
    if as_json:
        echo_json(exported_json(done))
    else:
        echo(harmless(f"exported {summary(done)}"))


def _report_marked(done: Exported, *, as_json: bool) -> None:
    """Do the same for a batch that counts as exported, whether anybody can be told or not."""
    try:
        _report(done, as_json=as_json)
    except OSError as exc:
        raise AgentError(
            f"can't write to stdout: {exc.strerror or exc}; {done.file} is complete, and its records count as exported",
            "`versioner-agent status` lists the batch",
        ) from exc


def summary(done: Exported) -> str:
    """Say what was written and where to."""
    return f"{_counted(done.records)} to {done.file} (batch {done.batch}, sha256 {done.sha256})"


def exported_json(done: Exported) -> dict[str, Any]:
    """Return *done* with the documented keys."""
    return {key: value for key, value in done._asdict().items() if key != "damaged"}


def tell_damaged(done: Exported) -> None:
    """Warn of what was left out."""
    for record_id in done.damaged:
        _notes.warn(f"record {record_id} is damaged and was left out; queue the event again")


def _mark(settings: Settings, digest: str, *, as_json: bool) -> int:
    from versioner_agent import exporting  # noqa: PLC0415

    done = exporting.mark(settings, digest)
    if as_json:
        echo_json({"batch": done.batch, "records": done.records, "marked": done.marked})
    elif done.was_marked:
        echo(f"batch {done.batch} is marked as exported already")
    else:
        echo(f"marked {done.marked} of {_counted(done.records)} as exported (batch {done.batch})")
    if not done.was_marked and done.marked < done.records:
        others = done.records - done.marked
        click.echo(
            f"{others} of them were settled, or exported in another batch, meanwhile: left as they are", err=True
        )
    return 0


def _counted(count: int) -> str:
    """Return *count* records in words."""
    return "1 record" if count == 1 else f"{count} records"
