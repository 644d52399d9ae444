"""`enqueue build|deployment|json`: the path that scripts call thousands of times a day, so imports are few."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from versioner_agent import events
from versioner_agent.cli._common import echo_json, json_option, outbox_settings, settings_options
from versioner_agent.cli._notes import warn
from versioner_agent.config import Settings
from versioner_agent.errors import UsageError, ValidationError
from versioner_agent.outbox import Destination, Outbox, Receipt
from versioner_agent.text import key_account, printable

SHOWN_RECEIPTS = 20  # more than these are summed up in text output


class _Kinds(click.Group):
    """Makes a subcommand when it is asked for: a kind's thirty options take a millisecond."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_MAKERS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name in _MAKERS and cmd_name not in self.commands:
            self.add_command(_MAKERS[cmd_name]())
        return self.commands.get(cmd_name)


@click.group(cls=_Kinds, context_settings={"help_option_names": ["-h", "--help"]})
def enqueue() -> None:
    """Record an event in the local outbox; it is on the disk when this exits 0.

    Needs no network and no API key. A repeat of an event of the same run (--invoke-id) is queued once.

    \b
    versioner-agent enqueue build --product my-service --version 1.2.3 --scm-sha abc123
    versioner-agent enqueue deployment --product my-service --version 1.2.3 --environment production --status started
    echo '{"product_name": "my-service", "version": "1.2.3", "status": "success"}' | versioner-agent enqueue json
    """


def _event_options(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(events.FIELDS):
            if kind in field.kinds:
                function = _option(field)(function)
        return function

    return decorate


def _option(field: events.Field) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if field.type == "boolean":
        return click.option(field.option, field.name, is_flag=True, default=None, help=field.help)
    default = "completed" if field.type == "status" else None
    mark = " [required]" if field.required and default is None else ""
    metavar = {"timestamp": "TIME", "object": "JSON|@FILE|-"}.get(field.type, "TEXT")
    return click.option(
        field.option,
        field.name,
        default=default,
        show_default=default is not None,
        metavar=metavar,
        help=field.help + mark,
    )


def _queue_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = json_option(function)
    function = settings_options("busy_timeout", "api_url")(function)
    return click.option("--new", is_flag=True, help="Queue it even if it repeats an event of its run.")(function)


def _metadata_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--error", metavar="TEXT", help="What went wrong; becomes extra_metadata.error.")(function)
    return click.option(
        "--meta", multiple=True, metavar="KEY=VALUE", help="Add one text to extra_metadata; repeatable."
    )(function)


def _build() -> click.Command:
    @click.command()
    @_event_options("build")
    @_metadata_options
    @_queue_options
    def build(**options: Any) -> None:
        """Record a build.

        \b
        versioner-agent enqueue build --product my-service --version 1.2.3 --status started --invoke-id 42
        versioner-agent enqueue build --product my-service --version 1.2.3 --status failed --error "make: *** [all]"
        """
        _enqueue_one("build", options)

    return build


def _deployment() -> click.Command:
    @click.command()
    @_event_options("deployment")
    @_metadata_options
    @_queue_options
    def deployment(**options: Any) -> None:
        """Record a deployment.

        \b
        versioner-agent enqueue deployment --product my-service --version 1.2.3 --environment staging
        """
        _enqueue_one("deployment", options)

    return deployment


def _json() -> click.Command:
    @click.command(name="json")
    @click.argument("file", default="-", metavar="[FILE|-]")
    @click.option("--kind", type=click.Choice(events.KINDS), help="What the events are, where they don't say it.")
    @click.option("--allow-unknown-fields", is_flag=True, help="Send fields that the API documentation does not name.")
    @_queue_options
    def from_json(**options: Any) -> None:
        """Record events given as the API's own JSON bodies: one object, an array, or JSON lines; all or nothing.

        \b
        versioner-agent enqueue json event.json
        versioner-agent enqueue json --kind build - < builds.jsonl
        """
        from versioner_agent import bodies  # noqa: PLC0415  # only where there is JSON to read

        source = options["file"]
        items = bodies.parse_json(_read(source), "standard input" if source == "-" else source)
        valid = bodies.validate_all(items, options["kind"], allow_unknown=options["allow_unknown_fields"])
        _enqueue(valid, options)

    return from_json


_MAKERS = {"build": _build, "deployment": _deployment, "json": _json}


def _enqueue_one(kind: str, options: dict[str, Any]) -> None:
    names = [field.name for field in events.FIELDS if kind in field.kinds]
    fields = {name: options[name] for name in names if options[name] is not None}
    problems: list[str] = []
    try:
        metadata = _metadata(options)
        fields.pop("extra_metadata", None)
        if metadata:
            fields["extra_metadata"] = metadata
    except ValidationError as exc:
        problems += exc.problems
        fields.pop("extra_metadata", None)
    try:
        event = events.validate(kind, fields)
    except ValidationError as exc:
        raise ValidationError(problems + exc.problems) from exc
    if problems:
        raise ValidationError(problems)
    _enqueue([event], options)


def _metadata(options: dict[str, Any]) -> dict[str, Any]:
    """Return extra_metadata from --extra-metadata, --meta over it, and --error over both; raises ValidationError."""
    given = options["extra_metadata"]
    metadata: dict[str, Any] = {}
    if given is not None:
        if given == "-" or given.startswith("@"):
            name = "-" if given == "-" else given[1:]
            text = _read(name).decode("utf-8", "surrogateescape")
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
        metadata["error"] = options["error"]
    return metadata


def _read(name: str) -> bytes:
    try:
        if name == "-":
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            return file.read()
    except OSError as exc:
        raise UsageError(f"can't read {printable(name)}: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise UsageError(f"can't read {printable(name)}: {exc}") from exc


def _enqueue(valid: list[events.Event], options: dict[str, Any]) -> None:
    settings = outbox_settings(options)
    if not settings.is_explicit("db") and not os.path.isdir(os.path.dirname(settings.db)):
        from versioner_agent.creation import make_private_directory  # noqa: PLC0415  # once in a user's life

        make_private_directory(settings.db)
    outbox = Outbox(settings.db, busy_timeout=settings.busy_timeout, queued_by=_user())
    with outbox:
        receipts = outbox.enqueue_all(valid, new=options["new"], destination=_destination(settings))
    # From here on the events are safe: whatever becomes of stdout, the script did its part.
    try:
        _show(receipts, as_json=options["as_json"])
        sys.stdout.flush()
    except OSError as exc:
        from versioner_agent.cli import _silence_stdout  # noqa: PLC0415

        _silence_stdout()
        warn(f"queued, but the receipt can't be printed: {exc.strerror}")
    for warning in dict.fromkeys(warning for receipt in receipts for warning in receipt.warnings):
        warn(warning)


def _destination(settings: Settings) -> Destination | None:
    """Return where the caller explicitly means the event to go, None where nothing was said."""
    account = key_account(settings.api_key) if settings.api_key else None
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


def _user() -> str:
    """Say who queues, without asking a directory service that may hang."""
    name = os.environ.get("LOGNAME") or os.environ.get("USER")
    return f"{name[:64]} (uid {os.getuid()})" if name and name.isprintable() else f"uid {os.getuid()}"
