"""Unit files as text: adapted to where the program is, and read for what they say. Pure.

Only what our own files need of systemd.syntax(7), systemd.unit(5) and tmpfiles.d(5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

#: Where the shipped units look for the program.
SHIPPED_PREFIX = "/opt/versioner-agent"
SHIPPED_SCRIPT = f"{SHIPPED_PREFIX}/bin/versioner-agent"


class Directory(NamedTuple):
    """A `d` line of tmpfiles.d(5)."""

    path: str
    mode: int
    user: str
    group: str


def adapted(text: str, command: Sequence[str], places: Sequence[str]) -> str:
    """Return a unit that starts *command* and may execute what is in *places*, which /usr does not cover."""
    lines = []
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key == "ExecStart" and value.startswith(SHIPPED_SCRIPT):
            line = f"ExecStart={' '.join(map(quoted, command))}{value.removeprefix(SHIPPED_SCRIPT)}"  # noqa: PLW2901
        if key == "ExecPaths":
            own = [_escaped(f"-{place}") for place in places]
            line = f"{key}={' '.join([word for word in value.split() if word != f'-{SHIPPED_PREFIX}'] + own)}"  # noqa: PLW2901
        lines.append(line)
    return "\n".join(lines) + "\n"


def quoted(word: str) -> str:
    """Return *word* as one argument of a command line (systemd.service(5), Command Lines)."""
    return _escaped(word.replace("$", "$$"))


def _escaped(word: str) -> str:
    safe = word.replace("\\", "\\\\").replace("%", "%%")
    if any(character in safe for character in " \t\"';"):
        return '"' + safe.replace('"', '\\"') + '"'
    return safe


def started(text: str) -> str | None:
    """Return the program, or the archive an interpreter runs, that a unit of ours starts; None for another unit."""
    for line in text.splitlines():
        key, _, value = line.partition("=")
        words = value.split()
        if key == "ExecStart" and len(words) > 1 and words[-1] == "run":
            return words[-2]
    return None


def wanted_by(text: str) -> list[str]:
    """Return the targets that want a unit, of its [Install] section."""
    section, targets = "", []
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if line.startswith("["):
            section = line
        elif section == "[Install]" and key == "WantedBy":
            targets += value.split()
    return targets


def directories(text: str) -> list[Directory]:
    """Return the directories that a tmpfiles.d file makes."""
    rows = (line.split() for line in text.splitlines())
    return [Directory(row[1], int(row[2], 8), row[3], row[4]) for row in rows if row[:1] == ["d"]]


def configuration_of_user(text: str, key_file: str) -> str:
    """Return the example configuration for one user: the usual outbox, and the key in *key_file*.

    *key_file* is written as a TOML string; TOML's escapes for `"` and the backslash are JSON's.
    """
    import json  # noqa: PLC0415

    head = (
        "# Configuration of versioner-agent for this user. What is commented out shows the default.\n"
        "# The key is not written here: `versioner-agent service set-key --user` puts it into api_key_file.\n"
    )
    body = text.partition("\n\n")[2]
    lines = []
    for line in body.splitlines():
        if line.startswith(("# The outbox", "db =")):
            line = {"#": "# The outbox; by default ~/.local/state/versioner-agent/outbox.db.", "d": '#db = ""'}[line[0]]  # noqa: PLW2901
        elif line.startswith("# File that holds the API key"):
            line = "# File that holds the API key; read before each request."  # noqa: PLW2901
        elif line.startswith("#api_key_file"):
            line = f"api_key_file = {json.dumps(key_file, ensure_ascii=False)}"  # noqa: PLW2901
        lines.append(line)
    return head + "\n" + "\n".join(lines) + "\n"
