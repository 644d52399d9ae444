"""What commands that queue share: an event from options, environment, CI and git; queuing it; saying so."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import click

from versioner_agent import events, sources
from versioner_agent.cli import EarlyGroup, _notes
from versioner_agent.cli._common import Seconds, echo_json, json_option, load_settings, settings_options, step_down_for
from versioner_agent.cli._spelling import Bare, as_truth, truth_of
from versioner_agent.config import Settings
from versioner_agent.errors import AgentError, UsageError, ValidationError
from versioner_agent.outbox import Destination, Outbox, Receipt
from versioner_agent.text import bounded, key_account, printable

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

SHOWN_RECEIPTS = 20  # more than these are summed up in text output
WAIT_S = 60.0  # of a `--wait` without a number
MAX_ERROR_CHARS = 10_000
ENV_BEST_EFFORT = "VERSIONER_AGENT_BEST_EFFORT"


class Kinds(EarlyGroup):
    """Makes a subcommand when it is asked for: a kind's thirty options take a millisecond."""

    def __init__(self, *args: Any, makers: Mapping[str, Callable[[], click.Command]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._makers = makers

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the makers' order."""
        del ctx
        return list(self._makers)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Make the command, once."""
        if cmd_name in self._makers and cmd_name not in self.commands:
            self.add_command(self._makers[cmd_name](), cmd_name)
        return super().get_command(ctx, cmd_name)


def event_options(kind: str, *, but: tuple[str, ...] = ()) -> Callable[[Decorated], Decorated]:
    """Offer the fields of *kind*, and what adds to its metadata; they arrive under the fields' names."""

    def decorate(function: Decorated) -> Decorated:
        function = click.option("--error", metavar="TEXT", help="What went wrong; becomes extra_metadata.error.")(
            click.option("--meta", multiple=True, metavar="KEY=VALUE", help="Add one text to extra_metadata.")(function)
        )
        for field in reversed(events.FIELDS):
            if kind in field.kinds and field.name not in but:
                function = _option(field)(function)
        return function

    return decorate


_MARKS = {
    "product_name": " [required outside CI]",
    "version": " [required outside CI]",
    "environment_name": " [required]",
}


def _option(field: events.Field) -> Callable[[Decorated], Decorated]:
    if field.type == "boolean":
        return truth_option(field.option, field.name, help=field.help)
    default = "completed" if field.type == "status" else None
    metavar = {"timestamp": "TIME", "object": "JSON|@FILE|-", "status": "WORD|auto"}.get(field.type, "TEXT")
    return click.option(
        field.option,
        field.name,
        default=default,
        show_default=default is not None,
        metavar=metavar,
        help=field.help + _MARKS.get(field.name, ""),
    )


def truth_option(*names: str, **how: Any) -> Callable[[Decorated], Decorated]:
    """Offer a flag that can also be given as `--flag=false`; None where nothing is said."""
    return click.option(*names, cls=Bare, bare="true", callback=as_truth, metavar="[=false]", **how)


def detection_option(function: Decorated) -> Decorated:
    """Offer to look at nothing but the call."""
    return click.option("--no-detect", is_flag=True, help="Take nothing from the CI system or git.")(function)


def queue_options(*keys: str) -> Callable[[Decorated], Decorated]:
    """Offer what bears on queuing and waiting, the settings *keys* among it."""

    def decorate(function: Decorated) -> Decorated:
        function = json_option(function)
        function = settings_options("busy_timeout", "api_url", *keys)(function)
        function = truth_option("--best-effort", help="Exit 0 with a warning where the outbox can't be used.")(function)
        function = detection_option(function)
        function = click.option(
            "--wait",
            "wait_s",
            cls=Bare,
            bare=f"{WAIT_S:g}",
            type=Seconds(min=0, max=86_400),
            metavar="[=SECONDS]",
            help=f"Wait for the API's verdict, {WAIT_S:g} s unless SECONDS are given.",
        )(function)
        return click.option("--new", is_flag=True, help="Queue it even if it repeats an event of its run.")(function)

    return decorate


class Prepared(NamedTuple):
    """A valid event, and the attempt of the CI run it belongs to."""

    event: events.Event
    run_attempt: str | None


def detected(options: dict[str, Any]) -> sources.Detected:
    """Return what the CI system tells, unless told not to look."""
    if options["no_detect"] or not any(map(os.environ.get, sources.SIGNS)):
        return sources.NOTHING
    from versioner_agent.ci import detect  # noqa: PLC0415  # a table of a millisecond

    return detect(os.environ)


def prepare(kind: str, options: dict[str, Any]) -> Prepared:
    """Return the event that *options*, environment, CI and git describe; raises ValidationError with all problems."""
    found = detected(options)
    given = {name: options.get(name) for name in events.FIELDS_OF[kind] if options.get(name) is not None}
    problems: list[str] = []
    given.pop("extra_metadata", None)
    if metadata := _tried(problems, lambda: _metadata(options)):
        given["extra_metadata"] = metadata
    if str(given.get("status", "")).strip().lower() == "auto":
        given["status"] = _tried(problems, lambda: _job_status(found)) or "completed"
    filled = sources.Filler(kind, os.environ, found).fill(given, checkout(kind, found, options))
    fields = filled.fields
    if fields.get("skip_preflight_checks") is False:
        del fields["skip_preflight_checks"]  # the official client sends it only where it is true
    event = _tried(problems, lambda: events.validate(kind, fields))
    if problems or event is None:
        raise ValidationError(problems)
    if options["verbose"]:
        tell_sources(found, event, filled.sources)
    return Prepared(event, found.run_attempt)


Result = TypeVar("Result")


def _tried(problems: list[str], act: Callable[[], Result]) -> Result | None:
    """Return what *act* returns, or add what is wrong to *problems*."""
    try:
        return act()
    except ValidationError as exc:
        problems += exc.problems
        return None


def _job_status(found: sources.Detected) -> str:
    from versioner_agent.ci import job_status  # noqa: PLC0415  # only for who asks

    return job_status(os.environ, found)


def checkout(kind: str, found: sources.Detected, options: dict[str, Any]) -> Mapping[str, str]:
    """Return what git tells of a build outside CI.

    A deployment does not deploy the directory it runs in: a wrong SHA would be refused with 409, or bound for good.
    """
    if kind != "build" or found.system or options["no_detect"]:
        return {}
    from versioner_agent.checkout import describe  # noqa: PLC0415  # only outside CI

    try:
        return describe(os.getcwd(), os.environ)
    except OSError:  # the directory is gone
        return {}


def tell_sources(found: sources.Detected, event: events.Event, origin: Mapping[str, str]) -> None:
    """Say what was detected, and from where."""
    talk = [f"detected CI system: {found.system}" if found.system else "detected no CI system"]
    for name, source in origin.items():
        value = event.fields.get(name)
        if value is not None:
            talk.append(f"{name} = {value if isinstance(value, str) else json.dumps(value)} (from {source})")
    if found.run_attempt:
        talk.append(f"run attempt = {found.run_attempt}")
    for line in talk:
        _notes.note(line)


def _metadata(options: dict[str, Any]) -> dict[str, Any]:
    """Return extra_metadata from --extra-metadata, --meta over it, and --error over both; raises ValidationError."""
    given = options["extra_metadata"]
    metadata: dict[str, Any] = {}
    if given is not None and given.strip():
        if given == "-" or given.startswith("@"):
            text = read_input("-" if given == "-" else given[1:]).decode("utf-8", "surrogateescape")
        else:
            text = given
        from versioner_agent import bodies  # noqa: PLC0415  # only where there is JSON to read

        metadata = bodies.parse_object(text, "extra_metadata")
    for pair in options["meta"]:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValidationError([f"--meta {printable(pair)}: must be KEY=VALUE"])
        metadata[key.strip()] = value
    if options["error"] is not None:
        # A log's last lines may hold any bytes, and are no reason to lose the report of a failure.
        metadata["error"] = bounded(options["error"], MAX_ERROR_CHARS)
    return metadata


def read_input(name: str) -> bytes:
    """Return the content of a file, `-` for stdin; raises UsageError."""
    try:
        if name == "-":
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            return file.read()
    except OSError as exc:
        raise UsageError(f"can't read {printable(name)}: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise UsageError(f"can't read {printable(name)}: {exc}") from exc


class Queued(NamedTuple):
    """What was queued, and the settings that held."""

    receipts: list[Receipt]
    settings: Settings


def queue(
    valid: list[events.Event], run_attempt: str | None, options: dict[str, Any], *, waits: bool = False
) -> Queued | None:
    """Queue events and print their receipts; None where that failed and is not to fail the job."""
    waits = waits or options["wait_s"] is not None
    queued = None
    with _best_effort(is_wanted=_wants_best_effort(options)):
        settings = load_settings(options)
        with _best_effort(is_wanted=settings.best_effort):
            if waits and os.geteuid() == 0:
                from versioner_agent.cli._waiting import load  # noqa: PLC0415  # only for root, and who waits

                load()
            step_down_for(settings)
            queued = Queued(_queue(valid, run_attempt, options, settings), settings)
    return queued


def _queue(
    valid: list[events.Event], run_attempt: str | None, options: dict[str, Any], settings: Settings
) -> list[Receipt]:
    with open_outbox(settings) as outbox:
        receipts = outbox.enqueue_all(
            valid,
            run_attempt=run_attempt,
            new=options["new"],
            destination=destination(settings, options.get("call_key")),
        )
    # From here on the events are safe: whatever becomes of stdout, the script did its part.
    try:
        _show(receipts, as_json=options["as_json"])
        sys.stdout.flush()
    except OSError as exc:
        from versioner_agent.cli import _silence_stdout  # noqa: PLC0415

        _silence_stdout()
        _notes.warn(f"queued, but the receipt can't be printed: {exc.strerror}")
    for warning in dict.fromkeys(warning for receipt in receipts for warning in receipt.warnings):
        _notes.warn(warning)
    return receipts


def open_outbox(settings: Settings) -> Outbox:
    """Return the outbox that settings name; the directory of the user's own is made."""
    if not settings.is_explicit("db") and not os.path.isdir(os.path.dirname(settings.db)):
        from versioner_agent.creation import make_private_directory  # noqa: PLC0415  # once in a user's life

        make_private_directory(settings.db)
    return Outbox(settings.db, busy_timeout=settings.busy_timeout, queued_by=user())


def _wants_best_effort(options: Mapping[str, Any]) -> bool:
    """Tell it without the configuration, which may be what can't be used."""
    said = options["best_effort"]
    return bool(truth_of(os.environ.get(ENV_BEST_EFFORT, "")) if said is None else said)


@contextmanager
def _best_effort(*, is_wanted: bool) -> Iterator[None]:
    """Turn what goes wrong into one line, if that *is_wanted*; an invalid event stays an error."""
    try:
        yield
    except UsageError:
        raise
    except Exception as exc:
        if not is_wanted:
            raise
        words = exc.message if isinstance(exc, AgentError) else f"{type(exc).__name__}: {exc}"
        hint = f"; {exc.hint}" if isinstance(exc, AgentError) and exc.hint else ""
        _notes.warn(f"the event was NOT queued: {' '.join(words.split())}{hint}")


def destination(settings: Settings, api_key: str | None = None) -> Destination | None:
    """Return where the caller explicitly means the event to go, None where nothing was said."""
    key = api_key or settings.api_key
    account = key_account(key) if key else None
    if settings.is_explicit("api_url"):
        from versioner_agent.urls import origin_of  # noqa: PLC0415  # 3 ms, only for who names an API

        return Destination(origin_of(settings.api_url), account)
    return Destination(None, account) if account else None


def _show(receipts: list[Receipt], *, as_json: bool) -> None:
    if as_json:
        for receipt in receipts:
            echo_json(receipt._asdict())
        return
    if len(receipts) > SHOWN_RECEIPTS:
        queued = [receipt.id for receipt in receipts if receipt.outcome == "queued"]
        ids = f" (records {queued[0]} to {queued[-1]})" if queued else ""
        click.echo(f"queued {len(queued)} events{ids}, {len(receipts) - len(queued)} duplicates")
        return
    for receipt in receipts:
        names = [receipt.kind, receipt.product_name, receipt.version, receipt.environment_name, receipt.status]
        what = printable(" ".join(name for name in names if name))
        word = "queued" if receipt.outcome == "queued" else "duplicate of"
        click.echo(f"{word} {receipt.id}: {what}")


def user() -> str:
    """Say who queues, without asking a directory service that may hang."""
    name = os.environ.get("LOGNAME") or os.environ.get("USER")
    return f"{name[:64]} (uid {os.getuid()})" if name and name.isprintable() else f"uid {os.getuid()}"


def wait(queued: Queued | None, options: Mapping[str, Any], timeout: float | None = None, **how: Any) -> int:
    """Wait for verdicts where that was asked for; returns the exit code. *how* is for `wait_and_report`."""
    seconds = options["wait_s"] if timeout is None else timeout
    if queued is None or seconds is None or not queued.receipts:
        return 0
    from versioner_agent.cli._waiting import wait_and_report  # noqa: PLC0415  # only for who waits

    env = dict(os.environ)
    if options.get("call_key"):
        env["VERSIONER_API_KEY"] = options["call_key"]
    said = {"as_json": options["as_json"], "verbose": options["verbose"]}
    return wait_and_report(queued.settings, env, queued.receipts, seconds, **said, **how)
