"""`doctor`: what is wrong with this host, its outbox and its way to the API, and what to do about it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import click

from versioner_agent.cli._common import (
    DELIVERY_KEYS,
    echo,
    echo_json,
    given_flags,
    json_option,
    outbox_settings,
    settings_options,
)
from versioner_agent.cli.status import GROUPS, status_json
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.text import harmless, mask_keys, printable

if TYPE_CHECKING:
    from versioner_agent.bundle import Part
    from versioner_agent.doctor import Case
    from versioner_agent.findings import Finding
    from versioner_agent.locks import Presence
    from versioner_agent.machine import Machine

COLORS = {"ok": "green", "warning": "yellow", "error": "red"}
CHECK_WIDTH = 13
#: Checks that show the public part of a key, and have masked all else.
MASKED_ALREADY = ("configuration", "key")


@click.command()
@click.option("--offline", is_flag=True, help="Leave out the network.")
@click.option("--deep", is_flag=True, help="Read the whole outbox, however large; queuing waits meanwhile.")
@click.option(
    "--bundle", metavar="FILE.tar.gz", help="Write what support needs to see, without secrets, to a new file."
)
@click.option(
    "--acknowledge",
    is_flag=True,
    help="Take note of past damage, and of another machine that the outbox was made on: nobody is told any more.",
)
@settings_options(*DELIVERY_KEYS)
@json_option
def doctor(offline: bool, deep: bool, bundle: str | None, acknowledge: bool, as_json: bool, **options: Any) -> int:
    """Look at configuration, outbox, agent, key and network, and say what to do.

    Exits 1 where something keeps events from being queued or delivered, or damage was not acknowledged; 0 where there
    are warnings at most. Nothing is changed, and no event is created: the key is tried with an empty one.

    \b
    versioner-agent doctor
    sudo versioner-agent doctor --bundle support.tar.gz
    """
    if not acknowledge:
        return _examine(options, offline=offline, deep=deep, bundle=bundle, as_json=as_json)
    if offline or deep or bundle:
        raise UsageError("--acknowledge looks at nothing", "leave out --offline, --deep and --bundle")
    return _acknowledge(options, as_json=as_json)


def _examine(options: dict[str, Any], *, offline: bool, deep: bool, bundle: str | None, as_json: bool) -> int:
    # All of it before root steps down: the outbox's owner may not be able to read this program.
    from versioner_agent import bundle as bundles  # noqa: PLC0415
    from versioner_agent import doctor as checks  # noqa: PLC0415
    from versioner_agent import probing, servicing  # noqa: PLC0415
    from versioner_agent.findings import exit_code, total  # noqa: PLC0415
    from versioner_agent.machine import this_machine  # noqa: PLC0415
    from versioner_agent.newfile import taken  # noqa: PLC0415
    from versioner_agent.privileges import as_owner_of  # noqa: PLC0415

    if bundle is not None and os.path.lexists(bundle):
        raise taken(bundle)
    machine, own = (this_machine(user=user, within_s=servicing.ASK_S) for user in (False, True))
    case = _case(options, machine)
    key = checks.key_of(case)
    found: list[Finding] = []

    def say(findings: Sequence[Finding]) -> None:
        _show(findings, as_json=as_json)
        found.extend(findings)

    say([*checks.configuration(case), *checks.clock(time.time())])
    with as_owner_of(checks.directory_of(case)):
        told, presence = checks.outbox(case, key, time.time(), deep=deep)
        parts = [_status(case, presence), *bundles.of_outbox(case)] if bundle else []
    say([*told, *checks.key(case, key, presence, offline=offline)])
    services = servicing.examine(machine), servicing.examine(own)
    say([*services[0], *services[1]])
    if not offline:
        say(probing.examine(case, key))
    if not as_json:
        echo(total(found))
    if bundle is not None:
        parts += bundles.about(case, key, found) + bundles.of_service(
            own if services[1] and not services[0] else machine
        )
        shell = case._replace(env=os.environ)
        secrets = [*bundles.secrets_of(case, key.key), *bundles.secrets_of(shell, None)]
        bundles.write(bundle, parts, bundles.Mask(secrets))
        click.echo(f"written: {harmless(bundle)}; manifest.txt in it says what was left out", err=True)
    return exit_code(found)


def _case(options: dict[str, Any], machine: Machine) -> Case:
    """Read the configuration; for the outbox of the service, with what that is told, and not this shell."""
    from versioner_agent import doctor as checks  # noqa: PLC0415
    from versioner_agent import servicing  # noqa: PLC0415

    case = checks.case_of(given_flags(options), os.environ, options["config"])
    if checks.is_services(case):
        with suppress(AgentError):  # the check of the service says why
            env = checks.environment_of(case, servicing.environment(machine))
            case = checks.case_of(given_flags(options), env, options["config"])
    return case


def _show(findings: Sequence[Finding], *, as_json: bool) -> None:
    for each in findings:
        if each.check not in MASKED_ALREADY:
            each = each._replace(finding=mask_keys(each.finding), action=mask_keys(each.action))  # noqa: PLW2901
        if as_json:
            echo_json(each._asdict())
            continue
        level = click.style(each.level.ljust(8), fg=COLORS[each.level])
        echo(f"{level} {each.check:<{CHECK_WIDTH}} {printable(each.finding)}")
        if each.action:
            echo(f"{'':<{CHECK_WIDTH + 9}} {printable(each.action)}")


def _status(case: Case, presence: Presence) -> Part:
    """Return what `status --json` prints."""
    from versioner_agent import groups, review  # noqa: PLC0415
    from versioner_agent.bundle import Part  # noqa: PLC0415
    from versioner_agent.doctor import BUSY_S  # noqa: PLC0415
    from versioner_agent.errors import OutboxError  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    if why := case.unknown("db", "api_url"):
        return Part("status.json", "", why)
    with closing(Store(case.settings.db, min(case.settings.busy_timeout, BUSY_S))) as store:
        try:
            stats = review.stats(store)
            failures = groups.summary(store, GROUPS)
        except OutboxError as exc:
            return Part("status.json", "", exc.message)
    found = status_json(store.path, stats, failures, presence, case.settings.api_url)
    return Part("status.json", json.dumps(found) + "\n")


def _acknowledge(options: dict[str, Any], *, as_json: bool) -> int:
    from versioner_agent import birthplace  # noqa: PLC0415
    from versioner_agent.damage import acknowledged  # noqa: PLC0415
    from versioner_agent.findings import ok  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    settings = outbox_settings(options)
    with closing(Store(settings.db, settings.busy_timeout)) as store:
        damage = acknowledged(store)
        words = "there was nothing to acknowledge" if damage is None else f"acknowledged: {damage}"
        found = [ok("damage", words)]
        if birthplace.settle_in(store, moved_too=True):
            found.append(ok("machine", "the outbox belongs to this machine now"))
    _show(found, as_json=as_json)
    return 0
