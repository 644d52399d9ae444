"""The package's own files: all of them loaded before they may be replaced, and whether that has happened."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re

import versioner_agent

#: Modules that only other commands use.
_OF_OTHERS = frozenset({
    "__main__", "amending", "borrowing", "bundle", "checking", "checkout", "child", "ci", "cli", "cursors", "demo",
    "doctor", "exportfile", "exporting", "findings", "flush", "importfile", "importing", "importlines", "layout",
    "loopback", "machine", "masked", "mounts", "newfile", "premises", "privileges", "probing", "program",
    "receipts", "removal", "repair", "sandbox", "selecting", "service", "service_key", "servicing", "shipped",
    "sources", "spilling", "steps", "units", "waiting", "wrapper",
})  # fmt: skip
#: What the standard library and ours load when they are first needed.
_LATER = ("difflib", "encodings.idna", "encodings.utf_8_sig", "grp", "pwd", "tomllib", "unicodedata", "zoneinfo")


def load_all() -> None:
    """Import all that an agent may ever need: an upgrade takes the files away under it."""
    for found in pkgutil.iter_modules(versioner_agent.__path__):
        if found.name not in _OF_OTHERS:
            importlib.import_module(f"versioner_agent.{found.name}")
    for name in _LATER:
        importlib.import_module(name)


class Watch:
    """Notices that the files of this program are others than those it was started from."""

    def __init__(self) -> None:
        self._path = versioner_agent.__file__
        self._seen = _stamp(self._path)

    def change(self) -> str:
        """Say what has become of the files; empty while they are the same."""
        now = _stamp(self._path)
        if now == self._seen:
            return ""
        try:
            with open(self._path, encoding="utf-8") as file:
                found = re.search(r'^__version__ = "([^"]+)"', file.read(), re.MULTILINE)
        except (OSError, ValueError):
            found = None
        running = versioner_agent.__version__
        if found and found[1] != running:
            return f"version {found[1]} is installed, {running} is running"
        return "its files are gone" if now is None else "its files were replaced"


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Return what changes when the file at *path*, or the archive around it, is replaced; None where it is gone."""
    while True:
        try:
            found = os.stat(path)
        except NotADirectoryError:
            path = os.path.dirname(path)
        except OSError:
            return None
        else:
            return found.st_ino, found.st_mtime_ns, found.st_size
