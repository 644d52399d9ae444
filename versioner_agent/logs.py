"""Log lines of the agent: text for people or one JSON object per line, always on stderr, never with a key in it.

Where stderr is systemd's journal, lines carry their priority, and leave out what the journal knows itself.
"""

from __future__ import annotations

import logging
import os
import sys
import time

from versioner_agent.journal import is_journal, with_priority
from versioner_agent.text import json_line, mask_keys, printable

#: Attributes of a LogRecord that our own calls add and JSON lines carry on.
_EXTRA = ("action", "record", "product", "state", "pid")


class TextFormatter(logging.Formatter):
    """`2026-11-06T15:30:00Z warning: words`, one line whatever the words hold."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        """Format with a lower-case level, keys masked, and nothing in it that could pass for another line."""
        record.levelname = record.levelname.lower()
        return printable(mask_keys(super().format(record)))


class PlainFormatter(logging.Formatter):
    """The words alone, one line whatever they hold: the journal adds time and priority."""

    def format(self, record: logging.LogRecord) -> str:
        """Format with keys masked."""
        return printable(mask_keys(super().format(record)))


class JournalFormatter(logging.Formatter):
    """A line of *inner* with its priority before it."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """Format for the journal."""
        level = record.levelname.lower()
        return with_priority(self._inner.format(record), level)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, message, and what the call added."""

    def format(self, record: logging.LogRecord) -> str:
        """Format with keys masked."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": mask_keys(record.getMessage()),
        }
        added = {name: getattr(record, name) for name in _EXTRA if hasattr(record, name)}
        added |= getattr(record, "fields", {})
        line |= {name: mask_keys(value) if isinstance(value, str) else value for name, value in added.items()}
        return json_line(line, sys.stderr)


def configure(log_format: str, log_level: str) -> None:
    """Send the package's log lines of *log_level* and above to stderr as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(log_format))
    ours = logging.getLogger("versioner_agent")
    ours.handlers[:] = [handler]
    ours.setLevel(log_level.upper())
    ours.propagate = False
    logging.raiseExceptions = False  # a log that can't be written must not stop deliveries


def _formatter(log_format: str) -> logging.Formatter:
    to_journal = is_journal(sys.stderr, os.environ.get("JOURNAL_STREAM"))
    if log_format == "json":
        formatter: logging.Formatter = JsonFormatter()
    else:
        formatter = PlainFormatter() if to_journal else TextFormatter()
    return JournalFormatter(formatter) if to_journal else formatter
