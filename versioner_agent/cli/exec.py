"""`exec build|deployment … -- COMMAND`: a command whose start and end are told; see `wrapper`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from versioner_agent.cli import _events, _notes
from versioner_agent.cli._common import load_settings, settings_options
from versioner_agent.cli._events import Decorated, Kinds, detection_option, event_options, truth_option
from versioner_agent.cli._spelling import SpelledCommand
from versioner_agent.config import Settings
from versioner_agent.errors import AgentError
from versioner_agent.outbox import Outbox, Receipt

#: What the command itself decides.
_NOT_GIVEN = ("status", "started_at", "completed_at")


def _options(kind: str) -> Callable[[Decorated], Decorated]:
    def decorate(function: Decorated) -> Decorated:
        function = click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")(
            function
        )
        function = settings_options("busy_timeout", "api_url", "gate_timeout")(function)
        function = detection_option(function)
        function = truth_option("--best-effort", help="As it is anyway.", hidden=True)(function)
        function = click.option(
            "--gate", is_flag=True, help="Ask the API's rules first; don't run the command where one forbids it."
        )(function)
        return event_options(kind, but=_NOT_GIVEN)(function)

    return decorate


def _build() -> click.Command:
    @click.command(cls=SpelledCommand, context_settings={"allow_interspersed_args": False})
    @_options("build")
    def build(**options: Any) -> int:
        """Run a command that builds.

        \b
        versioner-agent exec build --product my-service --version 1.2.3 -- make -j4
        """
        return _execute("build", options)

    return build


def _deployment() -> click.Command:
    @click.command(cls=SpelledCommand, context_settings={"allow_interspersed_args": False})
    @_options("deployment")
    def deployment(**options: Any) -> int:
        """Run a command that deploys.

        \b
        versioner-agent exec deployment --environment production --gate -- ./deploy.sh
        """
        return _execute("deployment", options)

    return deployment


@click.group(
    name="exec",
    cls=Kinds,
    makers={"build": _build, "deployment": _deployment},
    context_settings={"help_option_names": ["-h", "--help"]},
)
def execute() -> None:
    """Run a command, and record that it started and how it ended; exits as the command does.

    Whatever is wrong with the outbox is a line on stderr. Exits 2 for an invalid event, 5 where --gate finds a rule
    against it, 126 for a command that can't be run, 127 for one that is not found.

    \b
    versioner-agent exec build --product my-service --version 1.2.3 -- make
    """


def _execute(kind: str, options: dict[str, Any]) -> int:
    from versioner_agent import wrapper  # noqa: PLC0415

    event, run_attempt = _events.prepare(kind, {**options, "status": "started"})
    fields = {name: value for name, value in event.fields.items() if name != "status"}
    settings, problem = _settings(options)

    def open_outbox() -> Outbox:
        if settings is None:
            raise problem or AssertionError
        return _events.open_outbox(settings)

    return wrapper.run(
        wrapper.Plan(
            kind,
            fields,
            list(options["command"]),
            open_outbox,
            _notes.warn,
            run_attempt,
            _events.destination(settings) if settings is not None else None,
            _gate(settings) if options["gate"] else None,
        )
    )


def _settings(options: dict[str, Any]) -> tuple[Settings | None, AgentError | None]:
    """Return settings, or why there are none: a configuration that can't be used must not keep a build from running."""
    try:
        return load_settings(options), None
    except AgentError as exc:
        return None, exc


def _gate(settings: Settings | None) -> Callable[[Receipt], int]:
    """Return what asks the rules: 0 to go on; only a rule, or a signal, keeps the command from being run."""
    from versioner_agent.cli._waiting import load, wait_and_report  # noqa: PLC0415  # only for a gate

    if os.geteuid() == 0:
        load()

    def ask(receipt: Receipt) -> int:
        assert settings is not None  # or nothing could have been queued
        code = wait_and_report(settings, os.environ, [receipt], settings.gate_timeout, as_json=False, is_gate=True)
        return code if code == 5 or code > 128 else 0

    return ask
