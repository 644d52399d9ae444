"""HTTP/1.1 on 127.0.0.1 for any function from Request to Answer, with bounded bodies and refusals in the API's form.

Knows nothing of events: what is answered, and what is kept of it, is the caller's business.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any, NamedTuple

HOST = "127.0.0.1"
MAX_BODY_BYTES = 1024 * 1024
IDLE_TIMEOUT_S = 60.0  # a connection that says nothing for longer is closed
STOP_TIMEOUT_S = 2.0  # how long `disconnect` waits for answers under way


class Request(NamedTuple):
    """One HTTP request, completely read; header names in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    """One HTTP answer; `about` says in the log what it was about, unescaped."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    about: str = ""


def json_answer(status: int, document: Any, about: str = "", *headers: tuple[str, str]) -> Answer:
    """Return *document* as an answer; *about* is what the log says of it."""
    return Answer(status, (("Content-Type", "application/json"), *headers), json.dumps(document).encode(), about)


def refusal(status: int, detail: Any, *headers: tuple[str, str]) -> Answer:
    """Return a refusal in the API's form, `{"detail": …}`."""
    return json_answer(status, {"detail": detail}, detail if isinstance(detail, str) else "", *headers)


def read_body(headers: Mapping[str, str], stream: BufferedIOBase) -> bytes | Answer:
    """Read a request's body, or return the refusal after which the connection must be closed.

    Raises ConnectionError when the client leaves in the middle. Lengths as in RFC 9112, section 6.
    """
    if "transfer-encoding" in headers:
        return refusal(411, "Send a Content-Length; transfer codings are not supported")
    length = headers.get("content-length", "0").strip()
    if not (length.isascii() and length.isdigit()):
        return refusal(400, "Content-Length is not a number")
    if len(length) > 18 or int(length) > MAX_BODY_BYTES:
        return refusal(413, f"The body is over {MAX_BODY_BYTES} bytes")
    body = stream.read(int(length))
    if len(body) < int(length):
        raise ConnectionError("the client left before its body was complete")
    return body


class LoopbackServer(ThreadingHTTPServer):
    """HTTP/1.1 on 127.0.0.1 for any function from Request to Answer; a client can end its connection, nothing else."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers share a port
    allow_reuse_port = False

    def __init__(self, port: int, respond: Callable[[Request], Answer], log: Callable[[str], None] | None) -> None:
        """Bind *port* (0: any free one); raises OSError. *log* gets one unescaped line per answer."""
        self.respond = respond
        self.log = log or (lambda _line: None)
        self._connections: set[Any] = set()
        self._idle = threading.Condition()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking the DNS for a name, as the base class would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, then serve it in a thread."""
        with self._idle:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close the connection and forget it."""
        super().shutdown_request(request)
        with self._idle:
            self._connections.discard(request)
            self._idle.notify_all()

    def disconnect(self) -> None:
        """End kept-alive connections too: a stopped server must not go on answering on them."""
        with self._idle:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._idle.wait_for(lambda: not self._connections, STOP_TIMEOUT_S)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # the base class's signature
        """Say in one line why a connection ended; clients that leave are no reason for a traceback."""
        self.log(f"- connection ended: {sys.exception()!r}")


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackServer
    protocol_version = "HTTP/1.1"
    server_version = "versioner-agent-sandbox"
    sys_version = ""
    timeout = IDLE_TIMEOUT_S
    disable_nagle_algorithm = True
    requestline = ""
    _is_unread = False

    def _serve(self) -> None:
        headers: dict[str, str] = {}
        for name, value in self.headers.items():
            headers[name.lower()] = f"{headers[name.lower()]}, {value}" if name.lower() in headers else value
        body = read_body(headers, self.rfile)
        if isinstance(body, Answer):
            self._refuse(body)
        else:
            self._write(self.server.respond(Request(self.command, self.path, headers, body)))

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Serve every method alike: the base class looks up `do_GET` and the like."""
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Refuse what is no HTTP as the API refuses everything: with a `detail`."""
        self._refuse(refusal(code, message or self.responses[HTTPStatus(code)][0]))

    def _refuse(self, refusal: Answer) -> None:
        self.close_connection = self._is_unread = True
        self._write(refusal)

    def _write(self, answer: Answer) -> None:
        line = self.requestline[:200].rpartition(" HTTP/")[0] or self.requestline[:200]
        self.server.log(f"{answer.status} {line} {answer.about}".rstrip())
        headers = [("Server", self.server_version), ("Date", self.date_time_string()), *answer.headers]
        has_body = answer.status not in (204, 304)
        headers += [("Content-Length", str(len(answer.body)))] if has_body else []
        headers.append(("Connection", "close" if self.close_connection else "keep-alive"))
        phrase = self.responses.get(answer.status, ("Unknown", ""))[0]
        lines = [f"HTTP/1.1 {answer.status} {phrase}", *(f"{name}: {value}" for name, value in headers)]
        head = "\r\n".join(line.replace("\r", "").replace("\n", "") for line in lines) + "\r\n\r\n"
        # In one write: an answer in two packets waits for the client's delayed acknowledgement.
        body = answer.body if has_body and self.command != "HEAD" else b""
        self.wfile.write(head.encode("latin-1", "replace") + body)

    def finish(self) -> None:
        """Close; what the client is still sending is read first, or the reset would destroy our answer."""
        if self._is_unread:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(0.2)
                for _ in range(256):
                    if not self.connection.recv(65_536):
                        break
        super().finish()

    def log_message(self, *_args: Any) -> None:
        """Keep the base class quiet: `_write` logs."""
