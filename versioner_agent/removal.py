"""Uninstalling the service. Outbox, configuration and key stay, unless a person says to purge them.

No undelivered event is destroyed unless that is said too: they are counted before anything is stopped, and again while
nobody else can queue.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress

from versioner_agent import review, shipped
from versioner_agent.errors import ConfigError, OutboxBusy, OutboxError, UsageError
from versioner_agent.files import size_of
from versioner_agent.locks import FLUSHER_SUFFIX, QUEUE_SUFFIX, WriteQueue
from versioner_agent.privileges import as_owner_of
from versioner_agent.service import ACCOUNT, Site, installed_command, is_our_link
from versioner_agent.service_key import settings_of
from versioner_agent.servicing import environment
from versioner_agent.steps import Work
from versioner_agent.storage import DEFAULT_BUSY_TIMEOUT_S, OutboxMissing, Store

UNDELIVERED = ("pending", "failed", "exported")
QUEUE_S = DEFAULT_BUSY_TIMEOUT_S  # seconds to wait for others who write
_LOCKS = (QUEUE_SUFFIX, FLUSHER_SUFFIX)


def uninstall(site: Site, work: Work, env: Mapping[str, str], *, purge: bool = False, yes: bool = False) -> None:
    """Stop and remove what an installation made; with *purge*, the outbox, the configuration and the key too.

    Raises UsageError, with nothing changed, where undelivered events would be destroyed and *yes* is not said.
    """
    elsewhere = _outbox_elsewhere(site, env)
    if purge and not yes:
        _refuse_undelivered(_outboxes(site))
    stopped = _stop(site, work)
    if purge:
        try:
            _purge_state(site, work, yes=yes)
        except (UsageError, OutboxError):
            if not work.dry_run:
                for unit in stopped:
                    site.machine.systemctl("--no-block", "start", unit)
            raise
    _remove_files(site, work)
    if site.machine.has_systemd and work.changed:
        work.step("reload", "systemd", True, lambda: site.machine.must_systemctl("daemon-reload"))
        if not work.dry_run:
            site.machine.systemctl("reset-failed", shipped.SERVICE)
    if purge:
        directory = site.machine.at(os.path.dirname(site.layout.config))
        work.step("remove", directory, os.path.lexists(directory), lambda: shutil.rmtree(directory))
    _tell_what_stays(site, work, elsewhere)


def _stop(site: Site, work: Work) -> list[str]:
    """Stop the watching of the key first, then the service; returns what was running."""
    if not site.machine.has_systemd:
        return []
    running: list[str] = []
    names = [os.path.basename(path) for path in site.layout.unit_files]
    for name in (name for name in (shipped.KEY_PATH, shipped.SERVICE) if name in names):
        state = site.machine.shown(name, "ActiveState")["ActiveState"]
        if state not in ("", "inactive", "failed"):
            work.step("stop", name, True, lambda name=name: site.machine.must_systemctl("stop", name))  # type: ignore[misc]
            running.insert(0, name)
    return running


def _remove_files(site: Site, work: Work) -> None:
    layout, machine = site.layout, site.machine
    link = machine.at(layout.link) if layout.link else None
    is_ours = link is not None and is_our_link(site, link, installed_command(site))
    for path in layout.wants:
        work.remove(machine.at(path), action="disable")
    for path in (*layout.unit_files, *layout.other_files):
        work.remove(machine.at(path))
    if link is not None and is_ours:
        work.remove(link)
    elif link is not None and os.path.lexists(link):
        work.step("keep", link, False, lambda: None, "somebody else's")


def _tell_what_stays(site: Site, work: Work, elsewhere: str | None) -> None:
    layout, machine = site.layout, site.machine
    purposes = {layout.state: "the outbox", layout.config: "the configuration", layout.key: "the key"}
    purposes[os.path.join(layout.units, f"{shipped.SERVICE}.d")] = "drop-ins, made by hand"
    if elsewhere:
        purposes[elsewhere] = f"an outbox outside {layout.state}"
    for path, purpose in purposes.items():
        place = path if path == elsewhere else machine.at(path)
        is_gone = work.dry_run and any(
            step.action == "remove" and f"{place}/".startswith(f"{step.target}/") for step in work.steps
        )
        if os.path.lexists(place) and not is_gone:
            work.step("keep", place, False, lambda: None, purpose)
    if layout.sysusers is not None and not machine.is_image and machine.account(ACCOUNT, ACCOUNT):
        words = "its number must not be given to somebody else, who would own what it left"
        work.step("keep", f"account {ACCOUNT}", False, lambda: None, words)


def _outbox_elsewhere(site: Site, env: Mapping[str, str]) -> str | None:
    """Return the configured outbox where it is not in the state directory."""
    with suppress(ConfigError):
        given = str(settings_of(site, env, environment(site.machine)).db)
        path = os.path.realpath(site.machine.at(given) if site.machine.is_image else given)
        if not path.startswith(f"{os.path.realpath(site.machine.at(site.layout.state))}/"):
            return path
    return None


def _outboxes(site: Site) -> list[str]:
    """Return the outboxes in the state directory: the usual one, and all that have a queue of writers."""
    state = site.machine.at(site.layout.state)
    try:
        names = os.listdir(state)
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise UsageError(
            f"can't look for undelivered events in {state}: {exc.strerror}", "--yes removes it all the same"
        ) from exc
    found = {name.removesuffix(QUEUE_SUFFIX) for name in names if name.endswith(QUEUE_SUFFIX)}
    return [os.path.join(state, name) for name in sorted(found | ({"outbox.db"} & set(names)))]


def _refuse_undelivered(outboxes: list[str]) -> None:
    """Raise UsageError where an outbox holds undelivered events, or can't be read."""
    for path in outboxes:
        _refuse_undelivered_of(path)


def _refuse_undelivered_of(path: str) -> None:
    with as_owner_of(os.path.dirname(os.path.realpath(path))), closing(Store(path)) as store:
        try:
            if store.is_remembered() and not size_of(path):
                raise OutboxError("it is missing or empty")  # opening it would lose its journal
            counts = review.stats(store).counts
        except OutboxMissing:
            return
        except OutboxError as exc:
            raise UsageError(
                f"the outbox {path} may hold undelivered events, it can't be read: {exc.message}; nothing was removed",
                "look at it with `versioner-agent doctor`; --yes removes it all the same",
            ) from exc
    if any(counts[state] for state in UNDELIVERED):
        told = ", ".join(f"{counts[state]} {state}" for state in UNDELIVERED)
        raise UsageError(
            f"the outbox {path} holds undelivered events ({told}); nothing was removed",
            "deliver or discard them first; --yes destroys them",
        )


def _purge_state(site: Site, work: Work, *, yes: bool) -> None:
    state = site.machine.at(site.layout.state)

    def act() -> None:
        if os.path.islink(state):
            os.unlink(state)  # what it leads to is not ours to judge
            return
        if yes:
            _empty(state)  # whoever holds a lock for ever must not keep root from removing it
        else:
            outboxes = _outboxes(site)
            with _nobody_queues(outboxes):
                _refuse_undelivered(outboxes)
                _empty(state)
        try:
            os.rmdir(state)
        except OSError as exc:
            work.warn(f"{state} stays: {exc.strerror}")  # a mount point, or an event queued after the last look

    leads_to = f"a link; {os.path.realpath(state)} stays" if os.path.islink(state) else ""
    work.step("remove", state, os.path.lexists(state), act, leads_to)


@contextmanager
def _nobody_queues(outboxes: list[str]) -> Iterator[None]:
    """Hold the write queues of *outboxes* for the block; raises OutboxBusy."""
    with ExitStack() as stack:
        for path in outboxes:
            queue = stack.enter_context(closing(WriteQueue(path + QUEUE_SUFFIX)))
            if not queue.acquire(QUEUE_S):
                raise OutboxBusy(f"other writers keep the outbox {path} busy", "try again")
        yield


def _empty(directory: str) -> None:
    """Remove what is in *directory*, the locks last: until then nobody can queue into what is going to be removed."""
    names = sorted(os.listdir(directory), key=lambda name: name.endswith(_LOCKS))
    for name in names:
        path = os.path.join(directory, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
