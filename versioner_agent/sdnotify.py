"""What systemd is told, as sd_notify(3) describes it: datagrams to NOTIFY_SOCKET, and none where that is not set.

Signs of life come from the agent's main loop only: a thread of their own would go on beside a loop that hangs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from versioner_agent.text import bounded, harmless

SEND_S = 2.0  # a service manager that hangs must not stop deliveries
EXTEND_S = 60.0  # what a start that takes long asks for at a time
EXTEND_EVERY_S = 10.0
MOST_DIGITS = 20  # of 64 bits, which systemd counts in
STATUS_CHARS = 1000  # what `systemctl status` can show; a datagram must stay small


class Notifier:
    """Says how the agent is. Belongs to one thread."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID (sd_notify(3), sd_watchdog_enabled(3))."""
        self._address = _address(env.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(env) if self._address else 0.0  # 0: nobody watches
        self._is_ready = False
        self._is_announced = False
        self._patience_s = SEND_S
        self._due = 0.0
        self._told = ""

    @property
    def is_heard(self) -> bool:
        """Tell whether there is somebody to tell."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        """Say that the start, or a reload, is over."""
        self._is_ready = True
        self._due = 0.0
        self._told = status
        self._is_announced = self._send("READY=1", f"STATUS={_line(status)}")

    def reloading(self) -> None:
        """Say that the configuration is being read again."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000 if hasattr(time, "CLOCK_MONOTONIC") else 0
        self._send("RELOADING=1", f"MONOTONIC_USEC={microseconds}")

    def stopping(self, status: str) -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1", f"STATUS={_line(status)}")

    def status(self, words: str) -> None:
        """Say in one line how things are; the same line is not sent twice."""
        if words != self._told and self._send(f"STATUS={_line(words)}"):
            self._told = words

    def alive(self, now: float) -> None:
        """Give a sign of life when one is due, or ask for more time while not ready; *now* is monotonic seconds."""
        if self._is_ready and not self._is_announced:
            self._is_announced = self._send("READY=1")
        if now < self._due:
            return
        if not self._is_ready:
            self._due = now + EXTEND_EVERY_S
            self._send(f"EXTEND_TIMEOUT_USEC={_microseconds(EXTEND_S)}")
        elif self.watchdog_s:
            self._due = now + self.watchdog_s / 4
            self._send("WATCHDOG=1")

    @contextmanager
    def allowing(self, seconds: float) -> Iterator[None]:
        """Ask to be left alone for *seconds* during the block, which gives no sign of life."""
        if not self._is_ready:
            self._send(f"EXTEND_TIMEOUT_USEC={_microseconds(max(seconds, EXTEND_S))}")
        elif self.watchdog_s:
            self._send(f"WATCHDOG_USEC={_microseconds(max(seconds, self.watchdog_s))}", "WATCHDOG=1")
        try:
            yield
        finally:
            if self._is_ready and self.watchdog_s:
                self._send(f"WATCHDOG_USEC={_microseconds(self.watchdog_s)}", "WATCHDOG=1")

    def _send(self, *assignments: str) -> bool:
        """Send one datagram; False where nobody took it. Who does not listen is waited for once."""
        if not self._address:
            return True
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(self._patience_s)
                channel.sendto("\n".join(assignments).encode("utf-8", "replace"), self._address)
        except OSError:
            self._patience_s = 0.0
            return False  # events are delivered all the same
        self._patience_s = SEND_S
        return True


def _address(given: str) -> str:
    """Return a socket's address: a path, or `@` for a name in the abstract namespace; else nothing."""
    if given.startswith("@"):
        return "\0" + given[1:]
    return given if given.startswith("/") else ""


def _watchdog_s(env: Mapping[str, str]) -> float:
    """Return within how many seconds a sign of life is expected of this process; 0 for never."""
    pid = env.get("WATCHDOG_PID", "")
    if pid and pid != str(os.getpid()):
        return 0.0
    given = env.get("WATCHDOG_USEC", "")
    return int(given) / 1e6 if given.isascii() and given.isdigit() and len(given) <= MOST_DIGITS else 0.0


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6)


def _line(words: str) -> str:
    """Return *words* as everybody on the host may see them."""
    return bounded(harmless(" ".join(words.split())), STATUS_CHARS)
