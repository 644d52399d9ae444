"""An HTTP server on loopback whose every answer is scripted, down to the bytes and how the connection ends."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

HOST = "127.0.0.1"
PATIENCE_S = 30.0  # nothing here waits longer for a client


class Seen(NamedTuple):
    """One request as it arrived; header names in lower case."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self):
        return json.loads(self.body)

    @property
    def product(self):
        return self.event["product_name"]

    @property
    def key(self):
        return self.headers.get("idempotency-key")


class Reaction(NamedTuple):
    """What is done to a request: *act* gets the connection; the connection lives on only where *keeps* it."""

    act: Callable[[ScriptedServer, socket.socket], None]
    keeps: bool = False


def answer(status, body=b"", **headers):
    """A well-formed answer; a dict or list becomes JSON; header names are written with underscores."""
    kind = "text/html" if isinstance(body, bytes) else "application/json"
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": kind, **{name.replace("_", "-").title(): value for name, value in headers.items()}}
    named.setdefault("Content-Length", str(len(content)))
    head = f"HTTP/1.1 {status} Scripted\r\n" + "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return Reaction(lambda _, connection: connection.sendall(head.encode() + b"\r\n" + content), keeps=True)


def accepted(server_id="evt-1"):
    return answer(200, {"id": server_id})


def refused(status, detail="scripted refusal", **headers):
    return answer(status, {"detail": detail}, **headers)


def raw(data):
    """These bytes, whatever they are, then the end of the connection."""
    return Reaction(lambda _, connection: connection.sendall(data))


def closed():
    return Reaction(lambda *_: None)


def reset():
    def act(_, connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return Reaction(act)


def dripped(data, pause_s=0.1):
    """One byte per pause, until the client or the server gives up."""

    def act(server, connection):
        for byte in data:
            connection.sendall(bytes((byte,)))
            if server.stopping.wait(pause_s):
                return

    return Reaction(act)


def hanging():
    """No answer at all until the server stops or the client leaves."""

    def act(server, connection):
        connection.settimeout(0.05)
        while not server.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    return

    return Reaction(act)


class ScriptedServer:
    """Asks *script* about each request; remembers all of them, and how many were under way at once.

    A script may wait for something: its request counts as under way meanwhile.
    """

    def __init__(self, script=lambda _: accepted(), *, tls=None, port=0):
        self.script = script
        self.requests = []
        self.most_under_way = 0
        self.stopping = threading.Event()
        self.arrived = threading.Condition()
        self._tls = tls
        self._under_way = 0
        self._connections = set()
        self._threads = []
        self._listener = None
        self.port = port
        self.start()

    @property
    def url(self):
        return f"{'https' if self._tls else 'http'}://{HOST}:{self.port}"

    def start(self):
        """Listen, on the same port as before where there was one."""
        self.stopping.clear()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((HOST, self.port))
        self._listener.listen(128)
        self.port = self._listener.getsockname()[1]
        self._run(self._accept, self._listener)

    def stop(self):
        """Refuse connections and end those that are open."""
        self.stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self.arrived:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._threads = []

    def wait_for(self, count, within=PATIENCE_S):
        """Wait until *count* requests have arrived."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.requests) >= count, within), f"{len(self.requests)} arrived"

    def firsts(self):
        """The requests without repeats of an idempotency key, in order of arrival."""
        found = {}
        for seen in list(self.requests):
            found.setdefault(seen.key, seen)
        return list(found.values())

    def _run(self, function, *args):
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self.arrived:
                self._connections.add(connection)
            self._run(self._serve, connection)

    def _serve(self, connection):
        secure = connection
        try:
            connection.settimeout(PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                secure = self._tls.wrap_socket(connection, server_side=True)
            with secure.makefile("rb") as stream:
                while not self.stopping.is_set() and self._answer_one(secure, stream):
                    pass
        except (OSError, ssl.SSLError, ValueError):
            pass  # the client left, or was made to
        finally:
            with self.arrived:
                self._connections.discard(connection)
            secure.close()
            connection.close()

    def _answer_one(self, connection, stream):
        line = stream.readline().decode("latin-1").split()
        if len(line) < 2:  # the client left, or speaks something else
            return False
        headers = {}
        while (header := stream.readline().decode("latin-1").strip()) != "":
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", "0"))
        body = stream.read(length)
        if len(body) < length:
            return False
        with self.arrived:
            seen = Seen(len(self.requests), line[0], line[1], headers, body)
            self.requests.append(seen)
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
            self.arrived.notify_all()
        try:
            reaction = self.script(seen)
            reaction.act(self, connection)
        finally:
            with self.arrived:
                self._under_way -= 1
        return reaction.keeps
