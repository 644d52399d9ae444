"""Where this program is: what a unit has to start, and whether a hardened service could read it there."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from typing import NamedTuple

import versioner_agent
from versioner_agent.errors import AgentError
from versioner_agent.units import SHIPPED_PREFIX, SHIPPED_SCRIPT

#: What ProtectHome=yes and PrivateTmp=yes of the unit hide.
HIDDEN = ("/root", "/home", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  # named, not used
SYSTEM_PYTHON = "/usr/bin/python3"
REMEDY = (
    "make it a place that a service can read: /usr/bin/python3 -m venv /opt/versioner-agent; "
    "install it with /opt/versioner-agent/bin/pip (umask 022), and use /opt/versioner-agent/bin/versioner-agent"
)


class Program(NamedTuple):
    """How to start this program from a unit."""

    command: tuple[str, ...]  # without `run`
    script: str  # what a user calls: the script, or the archive
    places: tuple[str, ...]  # directories and files it is read from
    marker: str  # a file that every installation writes anew

    @property
    def beyond_usr(self) -> tuple[str, ...]:
        """The places that a unit has to allow besides /usr."""
        return tuple(place for place in self.places if not f"{place}/".startswith("/usr/"))

    def below(self, root: str) -> Program:
        """Return the program as it will be where *root* is the root directory.

        A program that is not in there is expected where the shipped units look for it.
        """
        if not f"{self.script}/".startswith(f"{root}/"):
            return Program((SHIPPED_SCRIPT,), SHIPPED_SCRIPT, (SHIPPED_PREFIX,), self.marker)

        def inside(path: str) -> str:
            return path.removeprefix(root) if f"{path}/".startswith(f"{root}/") else path

        interpreter = () if len(self.command) == 1 else (self._interpreter_below(root),)
        return Program(
            (*interpreter, inside(self.command[-1])),
            inside(self.script),
            tuple(inside(place) for place in self.places),
            self.marker,
        )

    def _interpreter_below(self, root: str) -> str:
        """Return what runs an archive there: not the Python of the machine that makes the image."""
        own = self.command[0]
        return own.removeprefix(root) if own.startswith(f"{root}/") else SYSTEM_PYTHON


def found() -> Program:
    """Return the program that is running."""
    archive = getattr(versioner_agent.__spec__.loader, "archive", None)  # zipimport's
    bases = _distinct(sys.prefix, sys.base_prefix)
    if archive is not None:
        archive = os.path.abspath(archive)
        interpreter = os.path.abspath(sys.executable)
        return Program((interpreter, archive), archive, _distinct(*bases, archive), archive)
    script = os.path.join(sysconfig.get_path("scripts"), "versioner-agent")
    marker = os.path.abspath(versioner_agent.__file__)
    return Program((script,), script, bases, marker)


def check_readable(program: Program, *, interpreter: str | None = None, hidden: Sequence[str] = HIDDEN) -> None:
    """Raise AgentError where the service's account could not run *program* under the unit's hardening."""
    check_there(program)
    for path in _distinct(program.script, *program.places, program.marker, interpreter or sys.executable):
        real = os.path.realpath(path)
        for place in hidden:
            if f"{real}/".startswith(f"{place}/"):
                raise AgentError(f"the service could not run {real}: it sees nothing of {place}", REMEDY)
        closed = _closed(real)
        if closed:
            raise AgentError(f"the service could not run {real}: its account may not enter or read {closed}", REMEDY)
    if program.script in program.command[:1] and not can_all_execute(program.script):
        raise AgentError(f"the service could not run {program.script}: its account may not execute it", REMEDY)


def check_there(program: Program) -> None:
    """Raise AgentError where there is nothing that a unit could start: the package is not installed, only imported."""
    if not os.path.exists(program.script):
        raise AgentError(f"there is no {program.script} to start", REMEDY)


def can_all_execute(path: str) -> bool:
    """Tell whether every account may execute the file *path*, as far as its mode says."""
    return bool(os.stat(path).st_mode & 0o001)


def _closed(path: str) -> str | None:
    """Return the first directory on the way to *path* that others can't enter, or *path* if they can't read it."""
    parts = path.split("/")
    ways = ["/".join(parts[:count]) or "/" for count in range(1, len(parts))]
    for way in ways:
        if not os.stat(way).st_mode & 0o001:
            return way
    return None if os.stat(path).st_mode & 0o004 else path


def _distinct(*paths: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(os.path.abspath(path) for path in paths))
