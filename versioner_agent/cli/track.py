"""`track build|deployment`: the official client's command, options and variables; the event is queued here.

What differs: it is there at once and for good, whatever the network does. A deployment's start waits for its verdict,
because the API checks its rules then, and a script relies on the exit code.
"""

from __future__ import annotations

import os
from typing import Any

import click

from versioner_agent.cli import _events, _notes
from versioner_agent.cli._events import Decorated, Kinds, event_options, queue_options, truth_option
from versioner_agent.cli._spelling import SpelledCommand, truth_of
from versioner_agent.errors import UsageError, ValidationError

OFFICIAL_CONFIG = "config.yaml"
STILL_QUEUED = 75  # EX_TEMPFAIL of sysexits(3)
ENV_FAIL = "VERSIONER_FAIL_ON_API_ERROR"


def _official_options(function: Decorated) -> Decorated:
    function = click.option("--ui-url", hidden=True, help="Taken as the official client does; not used.")(function)
    function = click.option("--debug", is_flag=True, help="The same as --verbose.")(function)
    function = truth_option(
        "--fail-on-api-error",
        help="A deployment's start that nobody checked exits 75; otherwise --wait tells what the API says.",
    )(function)
    return click.option(
        "--api-key",
        "call_key",
        metavar="KEY",
        help="For this call's waiting only, and visible in `ps`: better set VERSIONER_API_KEY.",
    )(function)


def _build() -> click.Command:
    @click.command(cls=SpelledCommand)
    @event_options("build")
    @_official_options
    @queue_options()
    def build(**options: Any) -> int:
        """Record a build, as `versioner track build` does; returns at once.

        \b
        versioner-agent track build --product=api-service --version=1.2.3 --status=completed
        """
        return _track("build", options)

    return build


def _deployment() -> click.Command:
    @click.command(cls=SpelledCommand)
    @event_options("deployment")
    @_official_options
    @queue_options("gate_timeout")
    def deployment(**options: Any) -> int:
        """Record a deployment, as `versioner track deployment` does.

        With --status=started it waits for the verdict, up to --gate-timeout: exits 0 where the deployment may go on, 5
        where a rule forbids it. With the API down it queues, exits 0 and says that the rules were NOT checked.

        \b
        versioner-agent track deployment --product=api-service --environment=production --version=1.2.3 --status=started
        """
        return _track("deployment", options)

    return deployment


@click.group(
    cls=Kinds,
    makers={"build": _build, "deployment": _deployment},
    context_settings={"help_option_names": ["-h", "--help"]},
)
def track() -> None:
    """Record an event with the official client's command: options, VERSIONER_<OPTION> variables, exit codes.

    \b
    versioner-agent track build --product=api-service --version=1.2.3
    """


def _track(kind: str, options: dict[str, Any]) -> int:
    options["verbose"] = options["verbose"] or options["debug"]
    options["api_url"] = options["api_url"] or None  # a template whose variable is unset
    event, run_attempt = _prepare(kind, options)
    fails = _fails_unchecked(options)
    is_start = kind == "deployment" and event.fields["status"] == "started"
    _tell_differences(options, event.fields, is_start=is_start)
    queued = _events.queue([event], run_attempt, options, waits=is_start)
    if queued is None and is_start:
        _notes.warn("the deployment was NOT checked against the rules: it could not be queued")
        return STILL_QUEUED if fails else 0
    if queued is None or not is_start or options["wait_s"] is not None:
        return _events.wait(queued, options)
    gate_s = queued.settings.gate_timeout
    if not gate_s:
        return 0
    code = _events.wait(queued, options, gate_s, is_gate=True, fails_unchecked=fails is True)
    return 0 if code == 4 and fails is False else code  # what a rule says counts all the same


def _prepare(kind: str, options: dict[str, Any]) -> _events.Prepared:
    try:
        return _events.prepare(kind, options)
    except ValidationError as exc:
        places = (OFFICIAL_CONFIG, os.path.expanduser(f"~/.versioner/{OFFICIAL_CONFIG}"))
        theirs = next(filter(os.path.exists, places), "")
        hint = f"{theirs} of the official client is not read: give its values as VERSIONER_<OPTION> variables"
        raise ValidationError(exc.problems, hint if theirs else exc.hint) from exc


def _fails_unchecked(options: dict[str, Any]) -> bool | None:
    """Return what was explicitly said on API errors, None where nothing was; raises UsageError."""
    if options["fail_on_api_error"] is not None:
        return bool(options["fail_on_api_error"])
    given = os.environ.get(ENV_FAIL, "").strip()
    if not given:
        return None
    found = truth_of(given)
    if found is None:
        raise UsageError(f"{ENV_FAIL}: must be true or false")
    return found


def _tell_differences(options: dict[str, Any], fields: dict[str, Any], *, is_start: bool) -> None:
    """Say what some of the official client's options mean here."""
    if options["call_key"]:
        _notes.warn("--api-key is visible in process lists; set VERSIONER_API_KEY instead. It is used for waiting only")
    fails = options["fail_on_api_error"]
    if fails is False:
        _notes.note("--fail-on-api-error=false: the event is queued, so the API's errors don't fail this anyway")
    elif fails and not is_start:
        _notes.note("--fail-on-api-error: the event is queued, so the API's errors come later; --wait waits for them")
    if options.get("skip_preflight_checks") and fields.get("skip_preflight_checks"):
        _notes.note("--skip-preflight-checks: passed on to the API, which then checks no deployment rules")
