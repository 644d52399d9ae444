"""Sending one event over HTTP: `send` returns an Outcome and never raises. The only module that knows httpx.

Every POST has one deadline over name resolution, connecting, TLS, headers and body; httpx's own timeouts are per
operation, so a server dripping a byte a second could hold a request for ever. A network backend caps each socket
operation at the time left. Redirects are never followed: the key would go along.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import httpcore
import httpx

from versioner_agent import __version__, tls
from versioner_agent.errors import ConfigError
from versioner_agent.outcomes import Outcome, classify, no_answer, no_key, proxy_refused
from versioner_agent.text import key_account
from versioner_agent.urls import place_of

MAX_ANSWER_BYTES = 64 * 1024
ENDPOINTS = {"build": "/build-events/", "deployment": "/deployment-events/"}
USER_AGENT = f"versioner-agent/{__version__}"

#: The deadline (monotonic seconds) of the request this thread is making.
_current = threading.local()


class Target(NamedTuple):
    """Where and how to send."""

    api_url: str
    timeout: float = 30.0  # seconds, for one whole POST
    concurrency: int = 4
    ca_bundle: str | None = None
    proxy: str | None = None  # already decided for api_url


class Sender:
    """One HTTP client for all threads; connections are kept alive between events."""

    def __init__(self, target: Target, read_key: Callable[[], str | None]) -> None:
        """Prepare the client; *read_key* is asked before each POST. Raises ConfigError for an unusable target."""
        self._target = target
        self._read_key = read_key
        self._context, self._store = tls.trust(target.ca_bundle)
        self._urls = {kind: httpx.URL(target.api_url.rstrip("/") + path) for kind, path in ENDPOINTS.items()}
        self._client = httpx.Client(
            transport=_Transport(_pool(target, self._context)),
            headers={
                "Content-Type": "application/json",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": USER_AGENT,
            },
            timeout=target.timeout,
            follow_redirects=False,
            trust_env=False,
        )

    def send(self, kind: str, payload: bytes, idempotency_key: str) -> Outcome:
        """POST one event and return what came of it."""
        try:
            key = self._read_key()
        except ConfigError as exc:
            return no_key(exc.message)
        if not key:
            return no_key("there is no API key (VERSIONER_API_KEY, or a file named by api_key_file)")
        _current.deadline = time.monotonic() + self._target.timeout
        return self._attempt(kind, payload, idempotency_key, key)._replace(account=key_account(key))

    def close(self) -> None:
        """Close all connections; requests under way end as unanswered."""
        self._client.close()

    def _attempt(self, kind: str, payload: bytes, idempotency_key: str, key: str) -> Outcome:
        try:
            return self._post(
                kind, payload, {"Authorization": f"Bearer {key}", "Idempotency-Key": idempotency_key}, key
            )
        except Exception as exc:  # noqa: BLE001  # whatever the network does, it is an outcome
            return self._failure(exc, key)

    def _post(self, kind: str, payload: bytes, headers: dict[str, str], key: str) -> Outcome:
        with self._client.stream("POST", self._urls[kind], content=payload, headers=headers) as response:
            status, named = response.status_code, dict(response.headers)
            try:
                body = _read(response.iter_raw(), named.get("content-encoding", ""))
            except zlib.error:
                return no_answer(f"HTTP {status} with a body that is not {named.get('content-encoding')}, as it says")
            if body is None:
                return no_answer(f"HTTP {status} with an answer of over {MAX_ANSWER_BYTES} bytes")
            return _without(key, classify(status, named, body.replace(key.encode(), b"***"), time.time()))

    def _failure(self, exc: Exception, key: str) -> Outcome:
        url = urlsplit(self._target.api_url)
        host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        where = f"{host}:{port}"
        if self._target.proxy:
            where += f" through the proxy {place_of(self._target.proxy)}"
        if isinstance(exc, httpcore.ProxyError):
            words = str(exc)
            status = int(words[:3]) if words[:3].isdigit() else None
            return proxy_refused(f"the proxy {place_of(self._target.proxy or '')} refused: {words}", status)
        refused = _cause(exc, ssl.SSLCertVerificationError)
        if isinstance(refused, ssl.SSLCertVerificationError):
            left = None if self._target.proxy else max(0.1, min(5.0, _time_left()))
            return no_answer(tls.explain(refused, self._store, host, port, left))
        if isinstance(exc, httpcore.TimeoutException):
            return no_answer(f"no complete answer from {where} within {self._target.timeout:g} s")
        words = " ".join(str(exc).replace(key, "***").split()) or type(exc).__name__
        return no_answer(f"{_WHAT.get(type(exc), 'request failed')} ({where}): {words}")


class _Transport(httpx.BaseTransport):
    """httpx over our own connection pool, for httpx offers no way to pass a network backend."""

    def __init__(self, pool: httpcore.ConnectionPool) -> None:
        self._pool = pool

    def handle_request(self, request: httpx.Request) -> httpx.Response:
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
                extensions=request.extensions,
            )
        )
        assert isinstance(answer.stream, Iterable)
        return httpx.Response(status_code=answer.status, headers=answer.headers, stream=_Stream(answer.stream))

    def close(self) -> None:
        self._pool.close()


class _Stream(httpx.SyncByteStream):
    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


class _DeadlineBackend(httpcore.SyncBackend):
    """Caps every socket operation at what is left of the POST's deadline."""

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
            share = _time_left() / (len(addresses) - tried)
            try:
                stream = super().connect_tcp(address, port, share, local_address, socket_options)
                return _DeadlineStream(stream)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        raise failure


class _DeadlineStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, _time_left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, _time_left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        return _DeadlineStream(self._stream.start_tls(ssl_context, server_hostname, _time_left()))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})
#: What failed, in words, by httpcore's class.
_WHAT: dict[type[Exception], str] = {
    httpcore.ConnectError: "can't connect",
    httpcore.ReadError: "the connection broke before the answer was complete",
    httpcore.WriteError: "the connection broke while sending",
    httpcore.RemoteProtocolError: "the answer is not HTTP or ended early",
    httpcore.LocalProtocolError: "the request can't be written as HTTP",
    httpcore.UnsupportedProtocol: "unsupported URL",
}


def _read(chunks: Iterable[bytes], encoding: str) -> bytes | None:
    """Return a body of up to MAX_ANSWER_BYTES as it came and as it is decoded, None for a larger one.

    We ask for no encoding, but something on the way may compress all the same. Raises zlib.error.
    """
    # 32 + the largest window: a gzip or zlib header tells which it is (zlib manual, inflateInit2).
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding.strip().lower() in _COMPRESSED else None
    body = bytearray()
    received = 0
    for chunk in chunks:
        received += len(chunk)
        body += decoder.decompress(chunk, MAX_ANSWER_BYTES + 1) if decoder else chunk
        if max(received, len(body)) > MAX_ANSWER_BYTES:
            return None
    return bytes(body)


def _without(key: str, outcome: Outcome) -> Outcome:
    """Mask the key in what a server quoted of our request: it must not get any further than here."""
    words = ("detail", "server_id", "code", "rule", "retry_after")
    quoted = {name: value.replace(key, "***") for name in words if (value := getattr(outcome, name)) is not None}
    return outcome._replace(**quoted)


def _pool(target: Target, context: ssl.SSLContext) -> httpcore.ConnectionPool:
    shared: dict[str, Any] = {
        "ssl_context": context,
        "max_connections": target.concurrency,
        "max_keepalive_connections": target.concurrency,
        "keepalive_expiry": 5.0,
        "network_backend": _DeadlineBackend(),
    }
    if target.proxy is None:
        return httpcore.ConnectionPool(**shared)
    url = urlsplit(target.proxy)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError([f"proxy: {place_of(target.proxy)} must be an http:// or https:// URL"])
    auth = (unquote(url.username or ""), unquote(url.password or "")) if url.username else None
    place = f"{url.scheme}://{place_of(target.proxy)}"
    return httpcore.HTTPProxy(place, proxy_auth=auth, **shared)


def _resolve(host: str, port: int) -> list[str]:
    """Return the addresses of *host* within the deadline; raises httpcore.ConnectError or ConnectTimeout.

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
    thread.join(_time_left())
    if not found:
        raise httpcore.ConnectTimeout(f"the name {host} was not resolved in time")
    if isinstance(found[0], Exception):
        raise httpcore.ConnectError(f"the name {host} can't be resolved: {found[0]}") from found[0]
    return list(dict.fromkeys(str(entry[4][0]) for entry in found[0]))


def _time_left() -> float:
    """Return the seconds left of this thread's POST; raises httpcore.ReadTimeout when there are none."""
    left = float(_current.deadline) - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the deadline passed")
    return left


def _cause(exc: BaseException | None, wanted: type[BaseException]) -> BaseException | None:
    while exc is not None and not isinstance(exc, wanted):
        exc = exc.__cause__ or exc.__context__
    return exc
