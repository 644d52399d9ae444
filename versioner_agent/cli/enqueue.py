"""`enqueue build|deployment|json`: the path that scripts call thousands of times a day, so imports are few."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from versioner_agent import events
from versioner_agent.cli import _events
from versioner_agent.cli._events import Kinds, event_options, queue_options
from versioner_agent.cli._spelling import SpelledCommand


def _build() -> click.Command:
    @click.command(cls=SpelledCommand)
    @event_options("build")
    @queue_options()
    def build(**options: Any) -> int:
        """Record a build.

        \b
        versioner-agent enqueue build --product my-service --version 1.2.3 --status started --invoke-id 42
        versioner-agent enqueue build --product my-service --version 1.2.3 --status failed --error "make: *** [all]"
        """
        return _enqueue_one("build", options)

    return build


def _deployment() -> click.Command:
    @click.command(cls=SpelledCommand)
    @event_options("deployment")
    @queue_options()
    def deployment(**options: Any) -> int:
        """Record a deployment.

        \b
        versioner-agent enqueue deployment --product my-service --version 1.2.3 --environment staging
        versioner-agent enqueue deployment --environment production --status started --wait=15 && ./deploy.sh
        """
        return _enqueue_one("deployment", options)

    return deployment


def _json() -> click.Command:
    @click.command(name="json", cls=SpelledCommand)
    @click.argument("file", default="-", metavar="[FILE|-]")
    @click.option("--kind", type=click.Choice(events.KINDS), help="What the events are, where they don't say it.")
    @click.option("--allow-unknown-fields", is_flag=True, help="Send fields that the API documentation does not name.")
    @queue_options()
    def from_json(**options: Any) -> int:
        """Record events given as the API's own JSON bodies: one object, an array, or JSON lines; all or nothing.

        \b
        versioner-agent enqueue json event.json
        versioner-agent enqueue json --kind build - < builds.jsonl
        """
        return _enqueue_json(options)

    return from_json


@click.group(
    cls=Kinds,
    makers={"build": _build, "deployment": _deployment, "json": _json},
    context_settings={"help_option_names": ["-h", "--help"]},
)
def enqueue() -> None:
    """Record an event in the local outbox; it is on the disk when this exits 0.

    Needs no network and no API key. What the CI system tells need not be given. A repeat of an event of the same run
    (--invoke-id) is queued once.

    \b
    versioner-agent enqueue build --product my-service --version 1.2.3 --scm-sha abc123
    versioner-agent enqueue deployment --product my-service --version 1.2.3 --environment production --status started
    echo '{"product_name": "my-service", "version": "1.2.3", "status": "success"}' | versioner-agent enqueue json
    """


def _enqueue_one(kind: str, options: dict[str, Any]) -> int:
    event, run_attempt = _events.prepare(kind, options)
    return _events.wait(_events.queue([event], run_attempt, options), options)


def _enqueue_json(options: dict[str, Any]) -> int:
    from versioner_agent import bodies, sources  # noqa: PLC0415  # only where there is JSON to read

    source = options["file"]
    items = bodies.parse_json(_events.read_input(source), "standard input" if source == "-" else source)
    found = _events.detected(options)

    def complete(kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        # Several events are rarely all of what lies here: a wrong SHA would be bound to a version for good.
        git = _events.checkout(kind, found, options) if len(items) == 1 else {}
        filled = fillers[kind].fill(fields, git)
        if options["verbose"]:
            told.append(filled)
        return filled.fields

    fillers = {kind: sources.Filler(kind, os.environ, found) for kind in events.KINDS}
    told: list[sources.Filled] = []
    valid = bodies.validate_all(
        items, options["kind"], allow_unknown=options["allow_unknown_fields"], complete=complete
    )
    for event, filled in zip(valid, told, strict=False):
        _events.tell_sources(found, event, filled.sources)
    return _events.wait(_events.queue(valid, found.run_attempt, options), options)
