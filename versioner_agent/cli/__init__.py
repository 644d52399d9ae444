"""The command line: a table of commands, loaded one at a time, and the boundary where errors become exit codes."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click

from versioner_agent import __version__
from versioner_agent.errors import AgentError


class Entry(NamedTuple):
    """Where a command lives and what `--help` says of it, so that help need not import it."""

    module: str
    attribute: str
    summary: str


#: In the order of `--help`.
COMMANDS = {
    "enqueue": Entry("enqueue", "enqueue", "Record an event in the local outbox."),
    "track": Entry("track", "track", "Record an event with the official client's command."),
    "exec": Entry("exec", "execute", "Run a command, and record its start and end."),
    "run": Entry("run", "run", "Deliver in the foreground until told to stop (the agent)."),
    "flush": Entry("flush", "flush", "Deliver what is pending now, then exit."),
    "status": Entry("status", "status", "Show the outbox and its destination at a glance."),
    "list": Entry("records", "list_records", "List records, the newest first."),
    "show": Entry("records", "show", "Show one record with its payload and attempts."),
    "retry": Entry("verdicts", "retry", "Send failed records again."),
    "discard": Entry("verdicts", "discard", "Give up records for good."),
    "amend": Entry("amend", "amend", "Queue corrected copies of failed records."),
    "export": Entry("export", "export", "Write pending records to a file for a connected host."),
    "import": Entry("import_", "import_files", "Import what another host exported."),
    "service": Entry("service", "service", "Run the agent under systemd."),
    "doctor": Entry("doctor", "doctor", "Look for what is wrong and say what to do."),
    "check": Entry("check", "check", "Say how the outbox is, as a monitoring plugin does."),
    "metrics": Entry("metrics", "metrics", "Print metrics of the outbox for Prometheus."),
    "config": Entry("config", "config", "Show every setting and where it comes from, or check a file."),
    "sandbox": Entry("sandbox", "sandbox", "Run a local server that speaks the event API."),
    "demo": Entry("demo", "demo", "See the whole story in ten seconds, without account or network."),
    "completion": Entry("completion", "completion", "Print what makes bash, zsh or fish complete our commands."),
    "version": Entry("version", "version", "Show the version."),
}


#: Options that may stand before a command's name, and whether a value follows.
EARLY = {
    "-v": False, "--verbose": False, "--debug": False, "--json": False,
    "--api-url": True, "--api-key": True, "--config": True, "--db": True, "--ui-url": True,
}  # fmt: skip


class EarlyGroup(click.Group):
    """A group whose commands' options may stand before their names, as the official client's may."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Move them behind the name."""
        return super().parse_args(ctx, _moved(args))


def _moved(args: list[str]) -> list[str]:
    at = 0
    while at < len(args):
        name, equals, _ = args[at].partition("=")
        if name not in EARLY:
            break
        at += 2 if EARLY[name] and not equals else 1
    return [args[at], *args[:at], *args[at + 1 :]] if at < len(args) else args


class LazyGroup(EarlyGroup):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the table's order."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        del ctx
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{entry.module}"), entry.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summaries without importing anything."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from versioner_agent.events import nearest  # noqa: PLC0415  # only for mistyped commands

            close = nearest(args[0], COMMANDS)
            advice = f" Did you mean {close!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{advice}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="versioner-agent")
def root() -> None:
    """Buffer Versioner events on this host and deliver them in order.

    `enqueue` writes an event to a local outbox and returns at once, network or not; `run` (or `flush`) delivers.

    \b
    Try it:  versioner-agent demo
    """


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 outbox or I/O, 2 usage, 3 configuration, 4/5 refused, 75 queued."""
    was_closed = _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name that the terminal's encoding can't show must not end a build.
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _Sturdy(sys.stdout, BrokenPipeError)
    sys.stdout.is_lost = 1 in was_closed
    sys.stderr = _Sturdy(sys.stderr, OSError)
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:
        _silence_stdout()
    # The interpreter's last collection of what ends anyway takes a tenth of an enqueue.
    gc.freeze()
    gc.disable()
    sys.exit(code)


class _Sturdy:
    """A standard stream that may be lost: the command goes on, and exits with its own code.

    A reader that has seen enough is no error, and talk that nobody can hear must not keep an event from being queued.
    """

    def __init__(self, stream: Any, loss: type[OSError], whole: _Sturdy | None = None) -> None:
        self._stream = stream
        self._loss = loss
        self._whole = whole or self  # what these are the bytes of
        self.is_lost = False

    def write(self, text: Any) -> int:
        """Write as the stream does, or to nowhere."""
        try:
            return int(self._stream.write(text))
        except self._loss as exc:
            self._lose(exc)
            return len(text)

    def flush(self) -> None:
        """Flush as the stream does; what it can't write is gone, or is written with the next line."""
        try:
            self._stream.flush()
        except self._loss as exc:
            self._lose(exc)

    @property
    def buffer(self) -> _Sturdy:
        """The bytes below, which click writes to where an encoding is too small."""
        return _Sturdy(self._stream.buffer, self._loss, self._whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, exc: OSError) -> None:
        """Let go of a reader that has left; a disk may have room again by the next line."""
        if isinstance(exc, BrokenPipeError):
            self._whole.is_lost = True
            _to_nowhere(self._stream.fileno())


def _to_nowhere(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)


def _open_closed_streams() -> list[int]:
    """Put /dev/null where the caller closed stdin, stdout or stderr, or the next file opened would take its place.

    Returns which were closed.
    """
    closed = []
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            closed.append(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  # for the rest of the process
    return closed


def _run() -> int:
    try:
        result = root.main(prog_name="versioner-agent", standalone_mode=False)
    except AgentError as exc:
        report(exc)
        return exc.exit_code
    except click.ClickException as exc:
        _show(exc)
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except OSError as exc:
        report(AgentError(exc.strerror or str(exc)))
        return 1
    except Exception as exc:  # noqa: BLE001  # a traceback helps nobody on a build host
        words = f"internal error: {type(exc).__name__}: {exc}"
        report(AgentError(words, "please report this with the command that led to it"))
        return 1
    return result if isinstance(result, int) else 0


def _show(exc: click.ClickException) -> None:
    """Say what is wrong with a call as click does, but for what an argument could do to the terminal."""
    from versioner_agent.text import harmless  # noqa: PLC0415

    if isinstance(exc, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(exc.format_message(), err=True)  # our own help
        return
    context = exc.ctx if isinstance(exc, click.UsageError) else None
    if context is not None:
        click.echo(f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n", err=True)
    # Where click itself breaks a message (to list choices), the next line begins with a tab.
    parts = (harmless(part) for part in exc.format_message().split("\n\t"))
    click.echo("Error: " + "\n\t".join(parts), err=True)


def report(exc: AgentError) -> None:
    """Say an error and the next action on stderr."""
    from versioner_agent.text import harmless  # noqa: PLC0415

    lines = ("error: " + "\n  ".join(harmless(line) for line in exc.lines)).split("\n")
    if exc.hint:
        lines.append(f"hint: {harmless(exc.hint)}")
    if os.environ.get("JOURNAL_STREAM"):
        from versioner_agent.journal import is_journal, with_priority  # noqa: PLC0415

        if is_journal(sys.stderr, os.environ["JOURNAL_STREAM"]):
            lines = [with_priority(line, "error") for line in lines]
    for line in lines:
        click.echo(line, err=True)


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush has nothing to complain about."""
    try:
        _to_nowhere(sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = None
