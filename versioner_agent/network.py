"""A line to the API for one thread: one connection at most, each exchange under one deadline, nothing left over.

httpcore does HTTP, TLS and proxies; what it is told here is when to stop. Its timeouts are per socket operation, and
some of its loops take one anew for each: every operation is capped at the time left, and a guard ends the connection
when the deadline has passed. A connection that failed, or on which more came than the answer, is never used again.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import httpcore
import httpx

KEEPALIVE_S = 5.0  # how long a connection may be idle and still be used
GUARD_POLL_S = 0.1  # how late a deadline may be noticed by the guard; an operation's own timeout comes first


class _Exchange(threading.local):
    """What this thread knows of the exchange it is making."""

    deadline = 0.0  # monotonic seconds
    has_written = False
    received = 0  # bytes
    tls_host: str | None = None  # who was last asked for a certificate
    handle: socket.socket | None = None


current = _Exchange()


class Proxy(NamedTuple):
    """A proxy and what it wants to know."""

    url: str
    auth: tuple[bytes, bytes] | None


class Line(httpx.BaseTransport):
    """Exchanges one request at a time; belongs to one thread, though any may close it."""

    def __init__(self, context: ssl.SSLContext, proxy: Proxy | None) -> None:
        """Connect on the first request, through *proxy* where there is one."""
        shared: dict[str, Any] = {
            "ssl_context": context,
            "max_connections": 1,
            "max_keepalive_connections": 1,
            "keepalive_expiry": KEEPALIVE_S,
            "network_backend": _Backend(),
        }
        if proxy is None:
            self._pool = httpcore.ConnectionPool(**shared)
        else:
            if proxy.url.startswith("https:"):
                shared["proxy_ssl_context"] = context
            self._pool = httpcore.HTTPProxy(proxy.url, proxy_auth=proxy.auth, **shared)

    @property
    def is_connected(self) -> bool:
        """Whether a connection of an earlier exchange is there."""
        return bool(self._pool.connections)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send *request*; its answer's body must be read, or the line closed. Raises what httpcore raises."""
        current.has_written, current.received, current.tls_host = False, 0, None
        assert isinstance(request.stream, httpx.SyncByteStream)
        answer = self._pool.handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
            )
        )
        assert isinstance(answer.stream, Iterable)
        return httpx.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=_Body(answer.stream),
            extensions=dict(answer.extensions),
        )

    def finish(self) -> bool:
        """End the exchange, whose answer has been read; False where more came than that.

        That must not be taken for the next answer: the line is to be closed.
        """
        if current.handle is not None:
            _guard.forget(current.handle)
        return not self._has_more()

    def _has_more(self) -> bool:
        for connection in self._pool.connections:
            innermost: Any = connection
            while hasattr(innermost, "_connection"):  # a tunnel's, a proxy's, the one that speaks HTTP/1.1
                innermost = innermost._connection  # noqa: SLF001  # there is no public way; a test holds it to httpcore
            parser = getattr(innermost, "_h11_state", None)
            if parser is None or parser.trailing_data[0]:
                return True
        return False

    def close(self) -> None:
        """Close the connection; an exchange under way fails."""
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


def certificate_of(host: str, port: int) -> bytes | None:
    """Return the certificate that *host* shows, unverified (DER), within the deadline; None where there is none to see.

    Nothing is sent over this connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        stream = _Backend().connect_tcp(host, port)
    except Exception:  # noqa: BLE001  # it was only to say more
        return None
    try:
        stream = stream.start_tls(context, host)
        shown = stream.get_extra_info("socket").getpeercert(binary_form=True)
    except Exception:  # noqa: BLE001
        return None
    finally:
        stream.close()
    return bytes(shown) if shown else None


def time_left() -> float:
    """Return the seconds left of this thread's exchange; raises httpcore.ReadTimeout when there are none."""
    left = float(current.deadline) - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the deadline passed")
    return left


def is_over() -> bool:
    """Tell whether this thread's deadline has passed."""
    return bool(time.monotonic() >= current.deadline)


class _Guard:
    """Ends connections whose deadline has passed, whatever loop waits on them: one thread, asleep without any."""

    def __init__(self) -> None:
        self._ends: dict[socket.socket, float] = {}
        self._is_needed = threading.Event()
        self._start = threading.Lock()
        self._is_running = False

    def watch(self, connection: socket.socket, end: float) -> None:
        """Shut *connection* down soon after *end* (monotonic seconds), unless it is forgotten before."""
        self._ends[connection] = end
        if self._is_needed.is_set():
            return
        self._is_needed.set()
        with self._start:
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="deadlines", daemon=True).start()

    def forget(self, connection: socket.socket) -> None:
        """Leave *connection* alone from now on."""
        self._ends.pop(connection, None)

    def _run(self) -> None:
        while self._is_needed.wait():
            self._is_needed.clear()
            while self._ends:
                time.sleep(GUARD_POLL_S)
                now = time.monotonic()
                for connection in [one for one, end in list(self._ends.items()) if end <= now]:
                    self.forget(connection)
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)


_guard = _Guard()


class _Backend(httpcore.SyncBackend):
    """Connects within the deadline, to whichever address answers."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002  # ours is tighter
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _resolve(host, port)
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for tried, address in enumerate(addresses):
            # An address that swallows packets must leave time for the next one.
            share = time_left() / (len(addresses) - tried)
            try:
                stream = super().connect_tcp(address, port, share, local_address, socket_options)
                return _Stream(stream, stream.get_extra_info("socket").dup())
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        raise failure


class _Stream(httpcore.NetworkStream):
    """A connection whose operations end with the deadline; *handle* reaches it below all TLS."""

    def __init__(self, stream: httpcore.NetworkStream, handle: socket.socket, *, is_tls: bool = False) -> None:
        self._stream = stream
        self._handle = handle
        self._is_tls = is_tls

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        data: bytes = self._within(lambda left: self._stream.read(max_bytes, left))
        current.received += len(data)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        # Only plain connections: TLS may have something to say between two exchanges.
        is_first, current.has_written = not current.has_written, True
        if is_first and not self._is_tls and self._stream.get_extra_info("is_readable"):
            raise httpcore.RemoteProtocolError("the server spoke before it was asked, or closed the connection")
        self._within(lambda left: self._stream.write(buffer, left))

    def close(self) -> None:
        _guard.forget(self._handle)
        self._stream.close()
        self._handle.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        current.tls_host = server_hostname
        try:
            secure = self._within(lambda left: self._stream.start_tls(ssl_context, server_hostname, left))
        except BaseException:
            self.close()
            raise
        return _Stream(secure, self._handle, is_tls=True)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def _within(self, operate: Callable[[float], Any]) -> Any:
        left = time_left()
        current.handle = self._handle
        _guard.watch(self._handle, current.deadline)
        return operate(left)


def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of *host* within the deadline; raises httpcore.ConnectError or ConnectTimeout."""
    try:
        return addresses_of(host, port, time_left())
    except TimeoutError as exc:
        raise httpcore.ConnectTimeout(str(exc)) from exc
    except OSError as exc:
        raise httpcore.ConnectError(str(exc)) from exc


def addresses_of(host: str, port: int, within_s: float) -> list[str]:
    """Return the addresses of *host*; raises TimeoutError after *within_s* seconds, OSError with what is wrong.

    In a thread, because getaddrinfo(3) knows no timeout and can hang for half a minute on a dead resolver.
    """
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as exc:
            found.append(exc)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(within_s)
    if not found:
        raise TimeoutError(f"the name {host} was not resolved in time")
    if isinstance(found[0], Exception):
        raise OSError(f"the name {host} can't be resolved: {found[0]}") from found[0]
    return list(dict.fromkeys(str(entry[4][0]) for entry in found[0]))
