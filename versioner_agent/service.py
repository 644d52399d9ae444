"""Installing the service: what has to be there, each thing a step that changes nothing where it is already.

Configuration, key and outbox are never overwritten. What only a running systemd can do is left to the next boot where
none is running.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from versioner_agent import config, configfile, shipped, units
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.layout import Layout
from versioner_agent.machine import Machine
from versioner_agent.program import Program, can_all_execute
from versioner_agent.steps import Work, content_of, link_of
from versioner_agent.text import key_public_part

ACTIVE_S = 90.0  # what a start may take: the unit's own limit is 60 s
POLL_S = 0.2
ACCOUNT = "versioner-agent"  # of sysusers.d
_UP = ("active", "activating", "reloading")
_BEHIND = "NeedDaemonReload"
_PROPERTIES = ("ActiveState", "SubState", "StatusText", "InvocationID", "ExecMainStartTimestampMonotonic")


class Site(NamedTuple):
    """What is installed, and where: what every step needs."""

    machine: Machine
    layout: Layout
    program: Program


def install(site: Site, work: Work, *, key: str | None = None, now: bool = False) -> None:
    """Install the service, store *key*, and with *now* wait until it is active.

    Raises AgentError for what can't be done; what was done before stays, and a repeat goes on from there.
    """
    _check_not_masked(site)
    before = work.changed
    linked_to = installed_command(site)
    are_units_new = _write_units(site, work)
    _add_account(site, work)
    _make_directories(site, work)
    _write_configuration(site, work)
    is_key_new = key is not None and _store_key(site, work, key)
    _link_command(site, work, linked_to)
    is_enabled = _enable(site, work)
    _label(site, work, needed=work.changed != before)
    if site.machine.has_systemd:
        is_watched = _state(site.machine, shipped.KEY_PATH) == "active"
        is_old = are_units_new or (is_key_new and not is_watched)
        _reload(site, work, needed=are_units_new or is_enabled)
        if now:
            _bring_up(site, work, is_watched=is_watched, is_old=is_old)
        elif is_old and not work.dry_run and _state(site.machine, shipped.SERVICE) in _UP:
            work.warn("the service that runs is still the old one: repeat this with --now")
    elif not site.machine.is_image:
        work.warn("systemd is not running here: the service is enabled, and starts when it is")
    elif not os.path.lexists(site.machine.at(site.program.script)):
        work.warn(f"{site.machine.at(site.program.script)} is missing: put the program there, for the units start it")
    _check_configuration(site, work)


def _check_not_masked(site: Site) -> None:
    for path in site.layout.unit_files:
        if link_of(site.machine.at(path)) == os.devnull:
            name = os.path.basename(path)
            raise AgentError(f"{name} is masked: somebody forbade to start it", f"systemctl unmask {name}")


def unit_texts(site: Site) -> dict[str, str]:
    """Return paths of the units -> their texts, adapted to the program."""
    places = site.program.beyond_usr
    return {
        path: units.adapted(shipped.read(name), site.program.command, places)
        for path, name in site.layout.unit_files.items()
    }


def _write_units(site: Site, work: Work) -> bool:
    """Write units and declarations; returns whether a unit changed."""
    is_new = False
    for path, text in unit_texts(site).items():
        is_new |= work.write(site.machine.at(path), text.encode(), 0o644)
    for path, name in site.layout.other_files.items():
        work.write(site.machine.at(path), shipped.read(name).encode(), 0o644)
    return is_new


def _add_account(site: Site, work: Work) -> None:
    machine = site.machine
    if site.layout.sysusers is None or machine.is_image:
        return  # an image's first boot makes the account
    is_missing = machine.account(ACCOUNT, ACCOUNT) is None
    declared = machine.at(site.layout.sysusers)
    work.step("account", f"account {ACCOUNT}", is_missing, lambda: machine.must("systemd-sysusers", declared))


def _declared(site: Site) -> list[units.Directory]:
    """Return the directories to make, parents first."""
    if site.layout.tmpfiles is not None:
        return units.directories(shipped.read(shipped.TMPFILES))
    return [units.Directory(os.path.dirname(site.layout.key), 0o700, "", "")]


def _make_directories(site: Site, work: Work) -> None:
    machine = site.machine
    for entry in _declared(site):
        path = os.path.dirname(machine.at(f"{entry.path}/."))  # itself no link that leads out
        owner = machine.account(entry.user, entry.group) if entry.user and not machine.is_image else None
        whose = f" {entry.user}:{entry.group}" if entry.user else ""
        work.directory(path, entry.mode, owner, f"{entry.mode:04o}{whose}")


def _write_configuration(site: Site, work: Work) -> None:
    path = site.machine.at(site.layout.config)
    text = shipped.read(shipped.CONFIG)
    if site.machine.is_user:
        text = units.configuration_of_user(text, site.layout.key)
    if os.path.lexists(path):
        work.step("write", path, False, lambda: None, "it is yours")
    else:
        work.write(path, text.encode(), 0o600 if site.machine.is_user else 0o644)


def installed_command(site: Site) -> str | None:
    """Return what the unit starts that is there now: a link to that is ours; None without one."""
    content = content_of(site.machine.at(os.path.join(site.layout.units, shipped.SERVICE)))
    return units.started(content.decode("utf-8", "replace")) if content else None


def is_our_link(site: Site, path: str, installed: str | None) -> bool:
    """Tell whether *path* is a link that an installation made."""
    return link_of(path) in {site.program.script, installed} - {None}


def _store_key(site: Site, work: Work, key: str) -> bool:
    path, shown = site.machine.at(site.layout.key), key_public_part(key)
    return work.write(path, f"{key}\n".encode(), 0o600, action="key", detail=shown)


def _link_command(site: Site, work: Work, installed: str | None) -> None:
    if site.layout.link is None or site.layout.link == site.program.script:
        return
    path = site.machine.at(site.layout.link)
    if os.path.lexists(path) and not is_our_link(site, path, installed):
        work.warn(f"{path} is somebody else's and stays: users call {site.program.script}")
        return
    if not site.machine.is_image and not can_all_execute(site.program.script):
        work.warn(f"users can't execute {site.program.script}, so {path} was not made: chmod 755 it and repeat this")
        return
    work.link(path, site.program.script)


def _enable(site: Site, work: Work) -> bool:
    """Make the links that `systemctl enable` makes of [Install]; returns whether one was missing."""
    is_new = False
    for path, target in site.layout.wants.items():
        is_new |= work.link(site.machine.at(path), target, action="enable")
    return is_new


def _label(site: Site, work: Work, *, needed: bool) -> None:
    """Give files the types of SELinux's policy; only where it is in force."""
    if not site.machine.has_selinux:
        return
    layout = site.layout
    written = (*layout.unit_files, *layout.other_files, os.path.dirname(layout.config), layout.state, layout.link or "")
    ours = [site.machine.at(path) for path in written if path]
    paths = [path for path in (*ours, *site.program.beyond_usr) if os.path.lexists(path)]
    work.step("label", "SELinux", needed, lambda: site.machine.must("restorecon", "-RF", *paths))


def _state(machine: Machine, unit: str) -> str:
    return machine.shown(unit, "ActiveState")["ActiveState"]


def _reload(site: Site, work: Work, *, needed: bool) -> None:
    """Have systemd read the units again, also where an installation was cut short before it did."""
    machine = site.machine
    names = [os.path.basename(path) for path in site.layout.unit_files]
    is_behind = needed or any(machine.shown(name, _BEHIND)[_BEHIND] == "yes" for name in names)
    work.step("reload", "systemd", is_behind, lambda: machine.must_systemctl("daemon-reload"))


def _bring_up(site: Site, work: Work, *, is_watched: bool, is_old: bool) -> None:
    machine, service = site.machine, shipped.SERVICE
    if not machine.is_user:
        work.step("start", shipped.KEY_PATH, not is_watched, lambda: machine.must_systemctl("start", shipped.KEY_PATH))
    before = machine.shown(service, *_PROPERTIES)
    is_old = is_old or _is_newer_than(site.program.marker, before["ExecMainStartTimestampMonotonic"])
    if before["ActiveState"] in _UP:
        work.step("restart", service, is_old, lambda: _until_active(machine, "restart", before["InvocationID"]))
        if not is_old and not work.dry_run:
            wait_until_active(machine, "")
    else:
        work.step("start", service, True, lambda: _until_active(machine, "start", before["InvocationID"]))


def _is_newer_than(path: str, monotonic_us: str) -> bool:
    """Tell whether a file was made after a process that started so many microseconds after the boot."""
    if not monotonic_us.isdigit():
        return False
    process_s = time.clock_gettime(time.CLOCK_MONOTONIC) - int(monotonic_us) / 1e6
    return time.time() - os.stat(path).st_ctime < process_s


def _until_active(machine: Machine, verb: str, invocation: str) -> None:
    machine.must_systemctl("--no-block", verb, shipped.SERVICE)
    wait_until_active(machine, invocation)


def wait_until_active(
    machine: Machine, invocation: str, *, within_s: float = ACTIVE_S, pause: Callable[[float], None] = time.sleep
) -> None:
    """Wait until the service is active, and is another run than *invocation*; raises AgentError with its state."""
    end = time.monotonic() + within_s
    while True:
        shown = machine.shown(shipped.SERVICE, *_PROPERTIES)
        state = shown["ActiveState"]
        if state == "active" and shown["InvocationID"] != invocation:
            return
        is_new = shown["InvocationID"] != invocation
        has_ended = state == "failed" or shown["SubState"] == "auto-restart"
        if (has_ended and is_new) or time.monotonic() >= end:
            said = f": {shown['StatusText']}" if shown["StatusText"] else ""
            user = "--user " if machine.is_user else ""
            raise AgentError(
                f"{shipped.SERVICE} did not become active, it {'failed' if has_ended else f'is {state}'}{said}",
                f"journalctl {user}-u versioner-agent -n 20",
            )
        pause(POLL_S)


def _check_configuration(site: Site, work: Work) -> None:
    """Warn of a configuration under which commands and service would not meet."""
    content = _configured(site.machine.at(site.layout.config), work)
    if site.machine.is_user:
        check_key_is_named(site, work)
        if "db" in _configured(config.SYSTEM_FILE, work) and "db" not in content:
            work.warn(
                f"{config.SYSTEM_FILE} names the outbox of this host's service: your commands queue there, and this "
                f"service delivers only what you queue with --config {site.layout.config}"
            )
        return
    db = content.get("db")
    if not isinstance(db, str):
        if not content and work.warnings:
            return  # what it names is not known
        outbox = os.path.join(site.layout.state, "outbox.db")
        if os.path.lexists(site.machine.at(site.layout.config)):
            work.warn(f'{site.layout.config} names no `db`, so users queue elsewhere: add db = "{outbox}"')
    elif not os.path.abspath(db).startswith(f"{site.layout.state}/") and not _has_drop_in_for(
        site, os.path.dirname(db)
    ):
        work.warn(
            f"the outbox {db} is outside {site.layout.state}: the service can write there only with a drop-in "
            f"(systemctl edit versioner-agent) that says ReadWritePaths={os.path.dirname(db)}"
        )


def check_key_is_named(site: Site, work: Work) -> None:
    """Warn of a user's configuration that does not say where the key is."""
    path = site.machine.at(site.layout.config)
    if os.path.lexists(path) and _configured(path, work).get("api_key_file") != site.layout.key:
        work.warn(f'the key is read only where {path} says api_key_file = "{site.layout.key}"')


def _configured(path: str, work: Work) -> Mapping[str, Any]:
    """Return what a configuration file says; nothing for one that can't be read, of which it warns."""
    file = configfile.read_file(path)
    if file.problem is not None:
        work.warn(f"{file.problem}: the service will not start")
    return file.content


def _has_drop_in_for(site: Site, directory: str) -> bool:
    place = site.machine.at(os.path.join(site.layout.units, f"{shipped.SERVICE}.d"))
    names = os.listdir(place) if os.path.isdir(place) else []
    texts = (content_of(os.path.join(place, name)) or b"" for name in names if name.endswith(".conf"))
    return any(b"ReadWritePaths=" in text and directory.encode() in text for text in texts)


def refuse_now_without_systemd(machine: Machine) -> None:
    """Raise UsageError where nothing could be started."""
    if not machine.has_systemd:
        whose = "your systemd (XDG_RUNTIME_DIR/systemd)" if machine.is_user else "systemd"
        raise UsageError(f"--now needs {whose}, which is not running here", "leave --now out: it starts at boot")
