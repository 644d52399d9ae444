"""Real accounts of this machine, and a copy of the package that they can run: the tests' own Python may be private."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import pwd
import shutil
import subprocess
import sys
import tempfile

GROUP = "va-test-share"
OWNER, MEMBER, OTHER_MEMBER, OUTSIDER = "va-test-owner", "va-test-member", "va-test-second", "va-test-outsider"
PACKAGES = (
    "versioner_agent",
    "click",
    "httpx",
    "httpcore",
    "h11",
    "certifi",
    "idna",
    "anyio",
    "sniffio",
    "platformdirs",
)
MODULES = ("typing_extensions",)


def why_not():
    """Say why there can be no accounts here; empty where there can."""
    if os.geteuid() != 0:
        return "only root can make accounts"
    if not all(shutil.which(tool) for tool in ("useradd", "groupadd", "userdel", "groupdel")):
        return "needs useradd and groupadd"
    return "" if _interpreter() else "needs a Python 3.11 that ordinary users can run"


def _interpreter():
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    for path in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if not subprocess.run([path, "-c", code], check=False, capture_output=True, **nobody).returncode:
                return path
    return None


def copy_packages(library):
    """Copy ours and what it needs into the new directory *library*, readable for all."""
    library.mkdir(mode=0o755)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            shutil.copytree(os.path.dirname(spec.origin), library / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            shutil.copy(spec.origin, library)
    for path in (library, *library.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return library


class Accounts:
    """Four accounts, three of them in one group; `run` runs the command line as one of them."""

    def __init__(self):
        self.python = _interpreter()
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="versioner-agent-accounts-"))
        self.place.chmod(0o755)
        subprocess.run(["groupadd", "--force", GROUP], check=True)
        for name in (OWNER, MEMBER, OTHER_MEMBER, OUTSIDER):
            groups = [] if name == OUTSIDER else ["--groups", GROUP]
            subprocess.run(["useradd", "--no-create-home", *groups, name], check=True)
        library = copy_packages(self.place / "lib")
        # Once for all, or every command would compile what none of the accounts may leave there.
        subprocess.run([self.python, "-m", "compileall", "-q", "-j", "2", library], check=True)

    def close(self):
        for name in (OWNER, MEMBER, OTHER_MEMBER, OUTSIDER):
            subprocess.run(["userdel", name], check=False, capture_output=True)
        subprocess.run(["groupdel", GROUP], check=False, capture_output=True)
        shutil.rmtree(self.place)

    def shared_directory(self, name):
        """A directory as the service has it: the owner's, setgid, for the group."""
        directory = self.place / name
        directory.mkdir()
        shutil.chown(directory, OWNER, GROUP)
        directory.chmod(0o2770)
        return directory

    def home(self, user):
        """A new private home of *user*."""
        directory = pathlib.Path(tempfile.mkdtemp(dir=self.place))
        shutil.chown(directory, user, pwd.getpwnam(user).pw_gid)
        return directory

    def command(self, *args):
        return (self.python, "-m", "versioner_agent", *args)

    def who(self, user, umask=0o022):
        """Arguments of subprocess that run something as *user*, in all of their groups."""
        if user == "root":
            return {"umask": umask, "cwd": "/"}
        found = pwd.getpwnam(user)
        groups = os.getgrouplist(user, found.pw_gid)
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": groups, "umask": umask, "cwd": "/"}

    def env(self, path, **more):
        return {
            "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", "PYTHONPATH": str(self.place / "lib"),
            "PYTHONDONTWRITEBYTECODE": "1", "VERSIONER_AGENT_DB": str(path), "VERSIONER_AGENT_CONFIG": "/dev/null",
            **more,
        }  # fmt: skip

    def run(self, user, path, *args, umask=0o022, before=(), **more):
        return subprocess.run(
            (*before, *self.command(*args)), env=self.env(path, **more), capture_output=True, check=False, timeout=60,
            **self.who(user, umask),
        )  # fmt: skip
