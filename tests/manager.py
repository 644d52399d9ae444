"""The service manager's end of sd_notify(3): a real datagram socket, and all that arrives on it."""

from __future__ import annotations

import os
import socket
import tempfile

PATIENCE_S = 30.0


class Manager:
    """Listens; `until` reads on until a message fits, `heard` keeps all of them as lists of lines."""

    def __init__(self, address=None):
        self._directory = tempfile.TemporaryDirectory(prefix="versioner-agent-notify-")
        self.address = address or os.path.join(self._directory.name, "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)
        self._socket.settimeout(PATIENCE_S)
        self.heard = []

    @property
    def env(self):
        return {"NOTIFY_SOCKET": self.address}

    def next(self):
        """Wait for one message; returns its lines."""
        self.heard.append(self._socket.recv(65536).decode().split("\n"))
        return self.heard[-1]

    def until(self, words):
        """Read on until a line starts with *words*; returns that line."""
        while True:
            found = [line for line in self.next() if line.startswith(words)]
            if found:
                return found[0]

    def waiting(self):
        """Return what has arrived and was not read yet."""
        self._socket.setblocking(False)
        try:
            while True:
                self.next()
        except BlockingIOError:
            return self.heard
        finally:
            self._socket.settimeout(PATIENCE_S)

    def lines(self):
        return [line for message in self.heard for line in message]

    def close(self):
        self._socket.close()
        self._directory.cleanup()
