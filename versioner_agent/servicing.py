"""The service as systemd sees it: whether it runs, how often it was restarted, what its unit and its journal say.

Only asks; a machine without systemd, or without the unit, has nothing to tell.
"""

from __future__ import annotations

import shlex
from typing import NamedTuple

from versioner_agent import shipped
from versioner_agent.errors import AgentError
from versioner_agent.findings import Finding, not_looked_at, ok
from versioner_agent.machine import Machine

ASK_S = 5.0  # what systemd gets for an answer
JOURNAL_LINES = 40_000
JOURNAL_BYTES = 5 * 1024 * 1024
UNITS = (shipped.SERVICE, shipped.KEY_PATH, shipped.KEY_SERVICE)
_PROPERTIES = ("LoadState", "UnitFileState", "ActiveState", "SubState", "NRestarts", "StatusText", "NeedDaemonReload")
_RESTART_DUE = "restart due"  # in the status line of an agent that is older than its package (see `vitals`)


class Text(NamedTuple):
    """What a command said, or why there is nothing."""

    content: str
    problem: str = ""


def examine(machine: Machine) -> list[Finding]:
    """Look at the service of *machine*; nothing where there is none."""
    if not machine.has_systemd:
        return []
    try:
        shown = machine.shown(shipped.SERVICE, *_PROPERTIES)
    except AgentError as exc:
        return [not_looked_at("service", exc.message)]
    if shown["LoadState"] == "not-found":
        return []
    return [judged(shown, user="--user " if machine.is_user else "")]


def judged(shown: dict[str, str], *, user: str = "") -> Finding:
    """Judge the properties of the unit; *user* is `--user ` for one of a user's own."""
    name = shipped.SERVICE.removesuffix(".service")
    has_ended = shown["ActiveState"] == "inactive"  # what it said last was that it stops
    says = f": {shown['StatusText']}" if shown["StatusText"] and not has_ended else ""
    restarts = f", restarted {shown['NRestarts']} times" if shown["NRestarts"] not in ("", "0") else ""
    words = f"{shipped.SERVICE} is {shown['ActiveState']} ({shown['SubState']}){restarts}{says}"
    if shown["LoadState"] == "masked":
        words = f"{shipped.SERVICE} is masked: somebody forbade to start it"
        return Finding("service", "error", words, f"systemctl {user}unmask {name}")
    if shown["ActiveState"] not in ("active", "reloading"):
        action = f"journalctl {user}-u {name} -n 20; systemctl {user}start {name}"
        return Finding("service", "error", words, action)
    if _RESTART_DUE in shown["StatusText"] or shown["NeedDaemonReload"] == "yes":
        words += "; its unit has changed on disk" if shown["NeedDaemonReload"] == "yes" else ""
        action = f"systemctl {user}daemon-reload && systemctl {user}restart {name}"
        return Finding("service", "warning", words, action)
    if shown["UnitFileState"] == "disabled":
        return Finding("service", "warning", f"{words}; it does not start at boot", f"systemctl {user}enable {name}")
    return ok("service", words)


def environment(machine: Machine) -> dict[str, str]:
    """Return the variables that the unit, with its drop-ins, gives the service: a proxy may be named only there."""
    if not machine.has_systemd:
        return {}
    try:
        words = shlex.split(machine.shown(shipped.SERVICE, "Environment")["Environment"])
    except ValueError:  # quoted in a way that only systemd knows
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def units(machine: Machine) -> Text:
    """Return the units with their drop-ins as systemd reads them."""
    ran = machine.systemctl("cat", *(UNITS[:1] if machine.is_user else UNITS))
    return Text(ran.out, "" if ran.out else _said(ran.err, ran.code))


def journal(machine: Machine) -> Text:
    """Return what the service wrote within a day, of which the last 5 MB."""
    unit = ("--user-unit" if machine.is_user else "-u", shipped.SERVICE)
    ran = machine.run(
        ("journalctl", *unit, "--since", "-1d", "-o", "short-iso", "-n", str(JOURNAL_LINES), "--no-pager")
    )
    content = ran.out
    if len(content.encode()) > JOURNAL_BYTES:
        content = content.encode()[-JOURNAL_BYTES:].decode("utf-8", "ignore").partition("\n")[2]
    problem = _said(ran.err, ran.code) if ran.code or ran.err.strip() else ""
    return Text(content, problem)


def _said(err: str, code: int) -> str:
    return " ".join(err.split())[:500] or f"exit status {code}"
