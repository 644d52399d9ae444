"""A file of metrics for a collector that reads it at any moment: replaced as a whole, by a command or by the agent.

The agent's own is not synced: a power cut loses at most the numbers of 15 s, which are written anew at the next start,
and a sync four times a minute would keep a sleeping disk awake.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
import time
from contextlib import closing, suppress

from versioner_agent import gauges, metrics
from versioner_agent.errors import OutboxError
from versioner_agent.files import inode_of, open_plain
from versioner_agent.storage import Store

logger = logging.getLogger(__name__)

WRITE_S = 15.0
BUSY_S = 2.0  # who keeps the outbox locked for longer is told of, not waited for: the loop has other things to do
MODE = 0o644  # a collector is another user
#: How every file begins that we wrote.
OURS = f"# HELP {metrics.PREFIX}".encode()


def replace(path: str, content: str, *, outbox: str, synced: bool) -> tuple[int, int]:
    """Put a file in the place of *path*, and return its device and inode; raises OSError.

    The name it has before does not end as the collector's files do (`.prom`), so that half a file is never read. What
    is there and not ours to replace, the *outbox* above all, is left alone.
    """
    _refuse_other(path, outbox)
    directory = os.path.dirname(os.path.abspath(path))
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", suffix=".new", dir=directory)
    try:
        with open(fd, "wb") as file:
            file.write(content.encode())
            os.fchmod(fd, MODE)
            file.flush()
            if synced:
                os.fsync(fd)
            found = os.fstat(fd)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return found.st_dev, found.st_ino


def _refuse_other(path: str, outbox: str) -> None:
    """Raise OSError where *path* is the outbox's, no file (a link could lead to anything), or a file of other content.

    The outbox is told by its name: to open it here would drop the locks of SQLite.
    """
    if os.path.realpath(path).startswith(os.path.realpath(outbox)):
        raise OSError(errno.EINVAL, "that name belongs to the outbox", path)
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        with open(open_plain(path, follow=False), "rb") as file:
            start = file.read(len(OURS))
    except FileNotFoundError:
        return
    if start and start != OURS:
        raise OSError(errno.EEXIST, "it holds something else than these metrics", path)


class MetricsFile:
    """The agent's metrics, as the setting `metrics_file` names them; one look at the clock between two writes."""

    def __init__(self, outbox_path: str, busy_timeout: float) -> None:
        """Measure the outbox at *outbox_path*; nothing is written before there is a name."""
        self._outbox = outbox_path
        self._busy_timeout = min(busy_timeout, BUSY_S)
        self._build = gauges.build()
        self._path: str | None = None
        self._written: tuple[int, int] | None = None
        self._due = 0.0
        self._is_told = False

    def name(self, path: str | None) -> None:
        """Write to *path* from now on, to nowhere if None; what was written under another name is removed."""
        if path != self._path:
            self.remove()
            self._path = path
            self._due = 0.0
            self._is_told = False

    def tell(self, now: float) -> None:
        """Write what is due at *now* (monotonic seconds). What goes wrong is logged once, and tried again."""
        if self._path is None or now < self._due:
            return
        self._due = now + WRITE_S
        try:
            self._written = replace(self._path, self._text(), outbox=self._outbox, synced=False)
        except OSError as exc:
            if not self._is_told:
                words = exc.strerror or str(exc)
                extra = {"action": "metrics_error"}
                logger.error("can't write metrics to %s: %s; trying again", self._path, words, extra=extra)  # noqa: TRY400
            self._is_told = True
        else:
            self._is_told = False

    def remove(self) -> None:
        """Remove what was written: numbers of an agent that is gone must not be taken for its state."""
        if self._path is not None and self._written is not None:
            with suppress(OSError):
                if inode_of(self._path) == self._written:  # else it is somebody else's by now
                    os.unlink(self._path)
        self._written = None

    def _text(self) -> str:
        # On a connection of its own: it is also measured while the agent itself waits for the outbox.
        with closing(Store(self._outbox, self._busy_timeout)) as store:
            try:
                view = gauges.look(store, is_named=True)  # the agent has made, or found, its directory
            except OutboxError:
                view = None  # whoever delivers says why
        return metrics.render(metrics.families(view, self._build, last_loop_at=time.time()))
