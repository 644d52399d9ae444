"""Whether a stream leads to systemd's journal, and how a line tells it its priority (sd-daemon(3))."""

from __future__ import annotations

import os
from typing import TextIO

#: By the names of log levels (syslog(3)).
PRIORITIES = {"error": 3, "warning": 4, "info": 6, "debug": 7}


def is_journal(stream: TextIO, journal_stream: str | None) -> bool:
    """Tell whether *stream* is what JOURNAL_STREAM names by device and inode (systemd.exec(5))."""
    if not journal_stream:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{found.st_dev}:{found.st_ino}"


def with_priority(line: str, level: str) -> str:
    """Return *line* for the journal, which takes the prefix off again."""
    return f"<{PRIORITIES.get(level, 6)}>{line}"
