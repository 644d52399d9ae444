"""A machine that tests install a service on: its root is a directory, its systemd and its accounts are pretended."""

from __future__ import annotations

import os
import subprocess
import sys

from versioner_agent import layout, shipped
from versioner_agent.machine import Machine, Ran
from versioner_agent.program import Program
from versioner_agent.service import Site
from versioner_agent.steps import Work

SCRIPT = "/opt/versioner-agent/bin/versioner-agent"
EXECUTABLE = "/bin/sh"  # stands for a program that is really there

OLD_KEY = "sk_acme_k1_oldsecret"


class Pretend:
    """Runs no command: it remembers them, and answers as systemctl and systemd-sysusers would."""

    def __init__(self, directory, **about):
        self.root = str(directory / "machine")
        os.makedirs(self.root, exist_ok=True)
        marker = directory / "__init__.py"
        marker.touch()
        self.commands = []
        self.fails = {}  # words of a command -> what it says on stderr
        self.has_account = False
        self.states = {}  # unit -> ActiveState
        self.status_text = ""
        self.sub_state = ""
        self.environment = ""
        self.starts_as = "active"
        self.behind = set()  # units that systemd has not read again
        self.invocation = 0
        self.started_us = ""
        self.on_stop = lambda: None
        self.about = {"is_root": True, "has_systemd": True, "root": self.root, **about}
        self.layout = layout.SYSTEM
        self.program = Program((SCRIPT,), EXECUTABLE, ("/opt/versioner-agent", "/usr"), str(marker))

    @property
    def site(self):
        return Site(Machine(run=self.run, account=self.account, **self.about), self.layout, self.program)

    def at(self, path):
        return self.root + path

    def account(self, user, group):
        is_there = self.has_account or user == "root"
        return (os.geteuid(), os.getegid()) if is_there else None

    def run(self, command):
        words = tuple(word for word in command if word not in ("--user", "--no-block"))
        self.commands.append(tuple(command))
        for failing, said in self.fails.items():
            if failing in " ".join(words):
                return Ran(1, err=said)
        if words[0] == "systemd-sysusers":
            self.has_account = True
        if words[:2] == ("systemctl", "show"):
            return Ran(0, self._show(words[2].removeprefix("--property=").split(","), words[3]))
        if words[0] == "systemctl" and len(words) == 3:
            self._act(words[1], words[2])
        return Ran(0)

    def asked(self, *words):
        """The commands that hold all of *words*."""
        return [command for command in self.commands if set(words) <= set(command)]

    def _act(self, verb, unit):
        if verb == "stop":
            self.states[unit] = "inactive"
            self.on_stop()
        is_running = self.states.get(unit, "inactive") != "inactive"
        if verb in ("start", "restart") or (verb == "try-restart" and is_running):
            self.states[unit] = self.starts_as if unit == shipped.SERVICE else "active"
            self.invocation += 1

    def _show(self, names, unit):
        told = {
            "ActiveState": self.states.get(unit, "inactive"),
            "SubState": self.sub_state,
            "Environment": self.environment,
            "StatusText": self.status_text,
            "NeedDaemonReload": "yes" if unit in self.behind else "no",
            "InvocationID": str(self.invocation),
            "ExecMainStartTimestampMonotonic": self.started_us,
        }
        return "".join(f"{name}={told[name]}\n" for name in names)


def changes(work):
    """What the steps changed, as (action, target)."""
    return [(step.action, step.target) for step in work.steps if step.changed]


def work(**how):
    return Work(**how)


def tree(directory):
    """Every file below *directory*: {path: (kind, mode, content or target)}."""
    found = {}
    for place, directories, files in os.walk(directory):
        for name in directories + files:
            path = os.path.join(place, name)
            shown = os.path.relpath(path, directory)
            mode = os.lstat(path).st_mode & 0o7777
            if os.path.islink(path):
                found[shown] = ("link", 0, os.readlink(path))
            elif os.path.isdir(path):
                found[shown] = ("directory", mode, None)
            else:
                with open(path, "rb") as file:
                    found[shown] = ("file", mode, file.read())
    return found


#: No command is found on this PATH: what runs as root must not reach the machine's accounts and systemd.
NO_COMMANDS = {"PATH": "/nonexistent"}


def command(*args, stdin=b"", **env):
    """Run the real command line to its end; it finds no command of the machine's."""
    return subprocess.run(
        (sys.executable, "-m", "versioner_agent", *map(str, args)),
        input=stdin, capture_output=True, timeout=60, check=False, env={**os.environ, **NO_COMMANDS, **env},
    )  # fmt: skip
