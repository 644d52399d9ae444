"""The machine that a service is installed on: its commands, its accounts, its systemd, and where its root is."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from versioner_agent.errors import AgentError

COMMAND_S = 120.0  # seconds any external command may take
BOOTED = "/run/systemd/system"  # there only where systemd is running: sd_booted(3)
SELINUX = "/sys/fs/selinux/enforce"


class Ran(NamedTuple):
    """What an external command came to."""

    code: int
    out: str = ""
    err: str = ""


class Machine(NamedTuple):
    """The world as the steps of an installation see it; tests have another."""

    run: Callable[[Sequence[str]], Ran]
    account: Callable[[str, str], tuple[int, int] | None]  # uid and gid of a user and a group; None if one is missing
    is_root: bool
    has_systemd: bool
    has_selinux: bool = False
    is_user: bool = False  # the systemd of one user
    root: str = ""  # a directory that stands for /
    is_image: bool = False  # what is below *root* runs elsewhere, or later

    def at(self, path: str) -> str:
        """Return where the system's *path* is; raises AgentError where a link on the way leads out of the root."""
        place = self.root + path
        if self.is_image:
            inside, leads_to = os.path.realpath(self.root), os.path.realpath(os.path.dirname(place))
            if not f"{leads_to}/".startswith(f"{inside}/"):
                raise AgentError(f"{place} leads out of {self.root}, to {leads_to}", "make that link a relative one")
        return place

    def systemctl(self, *words: str) -> Ran:
        """Run systemctl for this systemd, whatever comes of it."""
        return self.run(("systemctl", *(("--user",) if self.is_user else ()), *words))

    def must(self, *command: str) -> Ran:
        """Run a command; raises AgentError with what it said where it fails."""
        ran = self.run(command)
        if ran.code:
            said = " ".join((ran.err or ran.out).split()) or f"exit status {ran.code}"
            raise AgentError(f"`{shlex.join(command)}` failed: {said}")
        return ran

    def must_systemctl(self, *words: str) -> Ran:
        """Run systemctl for this systemd; raises AgentError where it fails."""
        return self.must("systemctl", *(("--user",) if self.is_user else ()), *words)

    def shown(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of *unit* by name, empty strings for those it has not; raises AgentError."""
        lines = self.must_systemctl("show", f"--property={','.join(names)}", unit).out.splitlines()
        told = dict(line.split("=", 1) for line in lines if "=" in line)
        return {name: told.get(name, "") for name in names}


def this_machine(*, user: bool = False, root: str = "", within_s: float = COMMAND_S) -> Machine:
    """Return the machine this runs on; no command takes longer than *within_s* seconds."""
    return Machine(
        run=partial(_run, within_s=within_s),
        account=_account,
        is_root=os.geteuid() == 0,
        has_systemd=not root and os.path.isdir(BOOTED) and (not user or _has_user_manager()),
        has_selinux=not root and not user and os.path.exists(SELINUX) and _is_on_path("restorecon"),
        is_user=user,
        root=root,
        is_image=bool(root),
    )


def _has_user_manager() -> bool:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return bool(runtime) and os.path.isdir(os.path.join(runtime, "systemd"))


def _is_on_path(name: str) -> bool:
    import shutil  # noqa: PLC0415

    return shutil.which(name) is not None


def _run(command: Sequence[str], *, within_s: float) -> Ran:
    env = {**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
    try:
        done = subprocess.run(  # noqa: S603  # no shell, and no words of others
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=within_s,
            env=env,
        )
    except FileNotFoundError:
        return Ran(127, err=f"there is no {command[0]} on this machine")
    except subprocess.TimeoutExpired:
        return Ran(124, err=f"no end within {within_s:g} s")
    except OSError as exc:
        return Ran(126, err=exc.strerror or str(exc))
    return Ran(done.returncode, done.stdout, done.stderr)


def _account(user: str, group: str) -> tuple[int, int] | None:
    import grp  # noqa: PLC0415  # POSIX only
    import pwd  # noqa: PLC0415

    with suppress(KeyError):
        return pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
    return None
