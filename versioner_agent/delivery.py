"""Sending one event over HTTP: `send` returns an Outcome and never raises. One exchange: no redirects, no cookies.

A redirect is never followed, for the key would go along. A connection that was kept from the exchange before may have
been closed meanwhile: then the same request is sent once more on a new one, within the same deadline.
"""

from __future__ import annotations

import math
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import httpcore
import httpx

from versioner_agent import __version__, network, tls
from versioner_agent.errors import ConfigError
from versioner_agent.network import Line, Proxy
from versioner_agent.outcomes import ADVICE, Outcome, classify, no_answer, no_key, proxy_refused
from versioner_agent.text import key_account
from versioner_agent.urls import place_of

MAX_ANSWER_BYTES = 64 * 1024
TELLING_S = 2.0  # an API that has not answered for so long is in trouble, whatever we would have waited for
ENDPOINTS = {"build": "/build-events/", "deployment": "/deployment-events/"}
USER_AGENT = f"versioner-agent/{__version__}"
_HEADERS = {
    "Content-Type": "application/json",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": USER_AGENT,
}


class Target(NamedTuple):
    """Where and how to send."""

    api_url: str
    timeout: float = 30.0  # seconds, for one whole POST
    ca_bundle: str | None = None
    proxy: str | None = None  # already decided for api_url


class Look(NamedTuple):
    """What was seen of the API without a key; status 0 where there was no complete answer, and *problem* says why."""

    status: int = 0
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""
    certificate: Mapping[str, Any] | None = None  # as getpeercert gives it; None without TLS
    problem: str = ""
    remedy: str = ""  # what to do, where more is known than that the network is in the way
    is_tls: bool = False  # it was TLS that failed


class Sender:
    """Sends from any number of threads, each over a line of its own; connections are kept alive between events."""

    def __init__(self, target: Target, read_key: Callable[[], str | None]) -> None:
        """Prepare; *read_key* is asked before each POST. Raises ConfigError for an unusable target."""
        self._target = target
        self._read_key = read_key
        #: Whatever is asked, the answer is not waited for beyond this moment (monotonic seconds).
        self.end = math.inf
        self._context, self._store = tls.trust(target.ca_bundle)
        self._proxy = _proxy(target.proxy) if target.proxy else None
        try:
            self._urls = {kind: httpx.URL(target.api_url.rstrip("/") + path) for kind, path in ENDPOINTS.items()}
            if not all(url.host for url in self._urls.values()):  # a name is decoded when it is asked for
                raise ValueError("it has no host")
        except (httpx.InvalidURL, ValueError) as exc:
            raise ConfigError([f"api_url: {target.api_url} is not a URL: {' '.join(str(exc).split())}"]) from exc
        self._own = threading.local()
        self._lines: set[Line] = set()
        self._guard = threading.Lock()

    def send(self, kind: str, payload: bytes, idempotency_key: str) -> Outcome:
        """POST one event and return what came of it."""
        try:
            key = self._read_key()
        except ConfigError as exc:
            return no_key(exc.message)
        if not key:
            return no_key("there is no API key (VERSIONER_API_KEY, or a file named by api_key_file)")
        now = time.monotonic()
        self._own.allowed_s = min(self._target.timeout, max(0.0, self.end - now))
        network.current.deadline = now + self._own.allowed_s
        headers = {**_HEADERS, "Authorization": f"Bearer {key}", "Idempotency-Key": idempotency_key}
        request = httpx.Request("POST", self._urls[kind], headers=headers, content=payload)
        return _without(key, self._attempt(request, key))._replace(account=key_account(key))

    def look(self, path: str) -> Look:
        """GET *path* below the API as a POST would get there, but without the key."""
        self._own.allowed_s = self._target.timeout
        network.current.deadline = time.monotonic() + self._own.allowed_s
        request = httpx.Request("GET", self._target.api_url.rstrip("/") + path, headers={"User-Agent": USER_AGENT})
        line = self._new_line()
        certificate = None
        try:
            response = line.handle_request(request)
            secure = response.extensions["network_stream"].get_extra_info("ssl_object")
            certificate = secure.getpeercert() if secure is not None else None
            assert isinstance(response.stream, httpx.SyncByteStream)
            body = _read(response.stream, response.headers.get("content-encoding", ""))
            response.stream.close()
            line.finish()
        except Exception as exc:  # noqa: BLE001  # whatever the network does, it was seen
            failure, refused = self._failure(exc, None), _cause(exc, ssl.SSLError)
            remedy = tls.remedy(refused) if refused else ADVICE["proxy"] if failure.reason == "proxy" else ""
            return Look(certificate=certificate, problem=failure.detail, remedy=remedy, is_tls=refused is not None)
        finally:
            line.close()
        return Look(response.status_code, dict(response.headers), body or b"", certificate)

    def close(self) -> None:
        """Close all connections; requests under way end as unanswered."""
        with self._guard:
            lines, self._lines = self._lines, set()
        for line in lines:
            line.close()

    def _attempt(self, request: httpx.Request, key: str) -> Outcome:
        for is_last in (False, True):
            line = self._line()
            was_connected = line.is_connected
            try:
                outcome = self._exchange(line, request, key)
            except Exception as exc:  # noqa: BLE001  # whatever the network does, it is an outcome
                self._drop(line)
                is_stale = was_connected and not network.current.received and isinstance(exc, _STALE)
                if is_last or not is_stale or network.is_over():
                    return self._failure(exc, key)
            else:
                if not line.finish():
                    self._drop(line)
                return outcome
        raise AssertionError("unreachable: the last turn returns")

    def _exchange(self, line: Line, request: httpx.Request, key: str) -> Outcome:
        response = line.handle_request(request)
        status, headers = response.status_code, dict(response.headers)
        assert isinstance(response.stream, httpx.SyncByteStream)
        try:
            body = _read(response.stream, headers.get("content-encoding", ""))
        except zlib.error:
            body = None
            problem = f"HTTP {status} with a body that is not {headers.get('content-encoding')}, as it says"
        else:
            problem = f"HTTP {status} with an answer of over {MAX_ANSWER_BYTES} bytes"
        response.stream.close()
        if body is None:
            return no_answer(problem)
        outcome = classify(status, headers, body.replace(key.encode(), b"***"), time.time())
        if outcome.reason == "proxy" and self._target.proxy:
            return outcome._replace(detail=f"the proxy {place_of(self._target.proxy)}: {outcome.detail}")
        return outcome

    def _line(self) -> Line:
        """Return this thread's line."""
        line: Line | None = getattr(self._own, "line", None)
        if line is None or line not in self._lines:
            line = self._own.line = self._new_line()
            with self._guard:
                self._lines.add(line)
        return line

    def _new_line(self) -> Line:
        return Line(self._context, self._proxy)

    def _drop(self, line: Line) -> None:
        with self._guard:
            self._lines.discard(line)
        line.close()

    def _failure(self, exc: Exception, key: str | None) -> Outcome:
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
            return no_answer(self._untrusted(refused, host, port))
        if isinstance(exc, httpcore.TimeoutException) or network.is_over():
            words = f"no complete answer from {where} within {self._own.allowed_s:.3g} s"
            return no_answer(words)._replace(is_cut=self._own.allowed_s < min(self._target.timeout, TELLING_S))
        said = str(exc).replace(key, "***") if key else str(exc)
        words = " ".join(said.split()) or type(exc).__name__
        return no_answer(f"{_WHAT.get(type(exc), 'request failed')} ({where}): {words}")

    def _untrusted(self, exc: ssl.SSLCertVerificationError, host: str, port: int) -> str:
        """Say whose certificate was refused, the proxy's or the API's, and who issued it where that can be seen."""
        proxy = urlsplit(self._target.proxy or "")
        if network.current.tls_host == proxy.hostname:
            host, port = proxy.hostname or "", proxy.port or 443
        is_seen = not self._target.proxy or host == proxy.hostname
        certificate = network.certificate_of(host, port) if is_seen and not network.is_over() else None
        return tls.explain(exc, self._store, host, certificate)


#: What failed, in words, by httpcore's class.
_WHAT: dict[type[Exception], str] = {
    httpcore.ConnectError: "can't connect",
    httpcore.ReadError: "the connection broke before the answer was complete",
    httpcore.WriteError: "the connection broke while sending",
    httpcore.RemoteProtocolError: "the answer is not HTTP or ended early",
    httpcore.LocalProtocolError: "the request can't be written as HTTP",
    httpcore.UnsupportedProtocol: "unsupported URL",
}
#: How a connection fails that the other side had closed before it was used again.
_STALE = (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError)
_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate"})


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


def _proxy(given: str) -> Proxy:
    """Read a proxy's URL; raises ConfigError, without quoting it: it may hold a password."""
    try:
        url = httpx.URL(given)
        if url.scheme not in ("http", "https") or not url.host or urlsplit(given).port == 0:
            raise ConfigError(["proxy: must be an http:// or https:// URL with a host"])
        auth = (unquote(url.username).encode(), unquote(url.password).encode()) if url.username else None
        return Proxy(str(url.copy_with(username=None, password=None, path="/", query=None, fragment=None)), auth)
    except (httpx.InvalidURL, ValueError, TypeError) as exc:
        raise ConfigError(
            ["proxy: is not a URL; characters like / # : @ in a password are written as %2F and so on"]
        ) from exc


def _cause(exc: BaseException | None, wanted: type[BaseException]) -> BaseException | None:
    while exc is not None and not isinstance(exc, wanted):
        exc = exc.__cause__ or exc.__context__
    return exc
