"""`service install|set-key|uninstall`: the agent under systemd, for the whole host or for one user."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from versioner_agent.cli._common import Seconds, echo, echo_json, json_option
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.text import printable

if TYPE_CHECKING:
    from versioner_agent.service import Site
    from versioner_agent.steps import Step, Work

NO_VERDICT = 75  # EX_TEMPFAIL of sysexits(3)
REFUSED = 4
Decorated = TypeVar("Decorated", bound=Callable[..., Any])

user_option = click.option("--user", is_flag=True, help="For the current user instead of the whole host.")
root_option = click.option("--root", metavar="DIR", help="Below DIR, for packages and images; no systemd is asked.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def service() -> None:
    """Run the agent under systemd: for the whole host (as root), or with --user for yourself.

    \b
    sudo versioner-agent service install --now
    sudo versioner-agent service set-key
    """


@service.command()
@user_option
@root_option
@click.option("--now", is_flag=True, help="Start it, or restart an older one, and wait until it is active.")
@click.option("--key-file", metavar="FILE|-", help="Store the API key that is in FILE, or on stdin.")
@dry_run_option
@json_option
def install(user: bool, root: str | None, now: bool, key_file: str | None, dry_run: bool, as_json: bool) -> int:
    """Install or upgrade the service; what is there already is left, and a repeat changes nothing.

    Configuration, key and outbox of an older installation stay. Exits 1 if the service does not become active.

    \b
    sudo versioner-agent service install --now
    """
    from versioner_agent import program, service, service_key  # noqa: PLC0415

    if root is not None and now:
        raise UsageError("--now starts a service here, --root writes files for elsewhere", "give one of them")
    site = _site(user=user, root=root, dry_run=dry_run)
    if now:
        service.refuse_now_without_systemd(site.machine)
    if user:
        program.check_there(site.program)
    elif root is None:
        program.check_readable(site.program)
    if key_file is not None:
        key: str | None = service_key.read_given(key_file)
    else:
        key = None if dry_run or root is not None else _asked_if_missing(site)
    work = _work(dry_run=dry_run, as_json=as_json)
    service.install(site, work, key=key, now=now)
    if not os.path.lexists(site.machine.at(site.layout.key)) and key is None and root is None:
        work.warn(f"there is no API key yet, events wait: versioner-agent service set-key{' --user' if user else ''}")
    _finish(work, as_json=as_json)
    return 0


@service.command(name="set-key")
@click.argument("source", required=False, metavar="[FILE|-]")
@user_option
@click.option(
    "--timeout",
    type=Seconds(min=1),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to ask the API.",
)
@click.option("--force", is_flag=True, help="Store it even if the API refuses it, or it is of another account.")
@dry_run_option
@json_option
def set_key(source: str | None, user: bool, timeout: float, force: bool, dry_run: bool, as_json: bool) -> int:
    """Give the service an API key, from a file, stdin, or asked without showing it.

    The key is tried on the API first, with an empty event that creates nothing. Exits 0 if it was accepted, 4 if it was
    refused (the old key stays), 75 if the API gave no verdict in time: then the key is stored, and events wait.

    \b
    sudo versioner-agent service set-key
    """
    from versioner_agent import service_key, servicing, urls  # noqa: PLC0415
    from versioner_agent.text import key_public_part  # noqa: PLC0415

    site = _site(user=user, root=None, dry_run=False)
    if source is None and sys.stdin.isatty():
        key = service_key.checked(_asked("API key").encode(), "the terminal")
    else:
        key = service_key.read_given(source or "-")
    unit = servicing.environment(site.machine)
    settings = service_key.settings_of(site, os.environ, unit)
    work = _work(dry_run=dry_run, as_json=as_json)
    env = {**os.environ, **unit}
    verdict = service_key.set_key(site, work, key, settings=settings, env=env, timeout=timeout, force=force)
    shown, api = key_public_part(key), urls.origin_of(settings.api_url)
    if as_json:
        echo_json({"key": shown, "api": api, "verdict": verdict.word, "detail": verdict.detail, **work.summary()})
    else:
        if work.steps or work.warnings:
            _finish(work, as_json=False)
        is_stored = bool(work.steps) and not dry_run
        words = _words(verdict.word, verdict.detail, shown, api, is_stored=is_stored)
        click.echo(printable(words), err=verdict.word != "accepted")
    return {"accepted": 0, "refused": REFUSED}.get(verdict.word, NO_VERDICT)


@service.command()
@user_option
@root_option
@click.option("--purge", is_flag=True, help="Remove outbox, configuration and key too.")
@click.option("--yes", is_flag=True, help="Purge even if that destroys undelivered events.")
@dry_run_option
@json_option
def uninstall(user: bool, root: str | None, purge: bool, yes: bool, dry_run: bool, as_json: bool) -> int:
    """Stop and remove the service; outbox, configuration and key stay unless --purge.

    Undelivered events are not purged unless --yes: exits 2, and nothing is touched.

    \b
    sudo versioner-agent service uninstall
    """
    from versioner_agent import removal  # noqa: PLC0415

    if yes and not purge:
        raise UsageError("--yes is for --purge: without it nothing is destroyed")
    site = _site(user=user, root=root, dry_run=dry_run)
    work = _work(dry_run=dry_run, as_json=as_json)
    removal.uninstall(site, work, os.environ, purge=purge, yes=yes)
    _finish(work, as_json=as_json)
    return 0


def _site(*, user: bool, root: str | None, dry_run: bool) -> Site:
    from versioner_agent import layout, program  # noqa: PLC0415
    from versioner_agent.machine import this_machine  # noqa: PLC0415
    from versioner_agent.service import Site  # noqa: PLC0415

    if root is not None and user:
        raise UsageError("--root is for the whole host's service, --user for yours", "give one of them")
    below = os.path.realpath(root).rstrip("/") if root is not None else ""
    if root is not None and not os.path.isdir(below or "/"):
        raise UsageError(f"--root: there is no directory {root}")
    machine = this_machine(user=user, root=below)
    if not (user or root is not None or machine.is_root or dry_run):
        raise UsageError(
            "the service of the whole host is root's to change", "run it with sudo, or --user for yourself"
        )
    os.umask(0o077 if user else 0o022)
    found = program.found()
    where = layout.of_user(os.environ) if user else layout.SYSTEM
    if not os.path.isabs(where.units):
        raise AgentError("there is no home directory to install in", "set HOME")
    return Site(machine, where, found.below(below) if below else found)


def _asked_if_missing(site: Site) -> str | None:
    """Ask a person for the key that is missing; None for an empty answer, or where nobody is there to ask."""
    from versioner_agent import service_key  # noqa: PLC0415

    is_there = os.path.lexists(site.machine.at(site.layout.key))
    if is_there or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    answer = _asked("API key (empty: later)")
    return service_key.checked(answer.encode(), "the terminal") if answer.strip() else None


def _asked(question: str) -> str:
    return str(click.prompt(question, hide_input=True, default="", show_default=False, err=True))


def _work(*, dry_run: bool, as_json: bool) -> Work:
    from versioner_agent.steps import WORDS, Work  # noqa: PLC0415

    def show(step: Step) -> None:
        word = WORDS[step.action][dry_run] if step.changed or step.action == "keep" else "unchanged"
        detail = f" ({step.detail})" if step.detail else ""
        echo(printable(f"{word} {step.target}{detail}"))

    return Work(dry_run=dry_run, on_step=(lambda _: None) if as_json else show)


def _finish(work: Work, *, as_json: bool) -> None:
    if as_json:
        echo_json(work.summary())
        return
    for warning in work.warnings:
        click.echo(printable(f"warning: {warning}"), err=True)
    if not work.changed:
        echo("nothing to change")


def _words(word: str, detail: str, key: str, api: str, *, is_stored: bool) -> str:
    if word == "accepted":
        return f"{key} was accepted by {api}"
    if word == "refused":
        rest = (
            "it is stored all the same" if is_stored else "it was not stored (--force does), and the key there is stays"
        )
        return f"{key} was refused by {api}: {detail}; {rest}"
    rest = "; it is stored, and events wait until the API answers" if is_stored else ""
    return f"{api} gave no verdict on {key} in time: {detail}{rest}"
