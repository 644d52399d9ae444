"""`doctor` on the network: names, connections, certificates, the API and its key, the way that delivery goes.

Each step is bounded in time, and left out where the one before it failed. Nothing is raised, nothing is created, and
the key goes nowhere but to the configured API, once what answers there may be one.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple
from urllib.parse import urlsplit

from versioner_agent import binding, network, tls, urls
from versioner_agent.config import Key, Settings
from versioner_agent.delivery import Look, Sender
from versioner_agent.doctor import Case
from versioner_agent.errors import AgentError, ConfigError
from versioner_agent.findings import Finding, not_looked_at, ok
from versioner_agent.outcomes import ADVICE, Outcome, classify
from versioner_agent.text import duration, mask_keys

STEP_S = 5.0  # what each step may take
MOST_ADDRESSES = 8
EXPIRES_SOON_S = 21 * 86_400.0
CLOCK_WARN_S = 300.0
CLOCK_ERROR_S = 86_400.0
#: The settings that say where a request goes.
_DECIDING = ("api_url", "proxy", "no_proxy", "ca_bundle", "allow_insecure_http", "timeout")
_NETWORK = "look at this host's network, firewall and resolver"
_PROXY = "look whether the proxy runs, and whether it is the right one"


class Way(NamedTuple):
    """Where connections go first: to the API, or to a proxy before it."""

    host: str
    port: int
    proxy: str | None = None

    @property
    def whose(self) -> str:
        """Say whose address it is, where it is not the API's."""
        return " (the proxy's)" if self.proxy else ""

    @property
    def advice(self) -> str:
        """Say what to look at where nobody answers there."""
        return f"{_PROXY}, or {_NETWORK}" if self.proxy else _NETWORK


def examine(case: Case, key: Key) -> list[Finding]:
    """Look at the way to the API, the API, and what it says of *key*."""
    if why := case.unknown(*_DECIDING):
        return [not_looked_at("network", why)]
    return look(case.settings, case.env, key.key)


def look(settings: Settings, env: Mapping[str, str], key: str | None) -> list[Finding]:
    """Look by *settings*, whose key does not matter."""
    try:
        bounded = settings._replace(values={**settings.values, "timeout": min(settings.timeout, STEP_S)})
        given = {**env, "VERSIONER_API_KEY": key} if key else env
        sender, _, _ = binding.sending(bounded, given, binding.Account(None))
    except ConfigError as exc:
        return [Finding("configuration", "error", mask_keys(problem), exc.hint or "") for problem in exc.problems]
    except AgentError as exc:
        return [Finding("configuration", "error", mask_keys(exc.message), exc.hint or "")]
    with closing(sender):
        way = _way(settings, env)
        return [*_proxy(settings, env, way), *_connect(sender, way, settings.api_url, has_key=key is not None)]


def _way(settings: Settings, env: Mapping[str, str]) -> Way:
    proxy = urls.proxy_for(settings.api_url, (settings.proxy, settings.no_proxy), env)
    first = urlsplit(proxy or settings.api_url)
    return Way(first.hostname or "", first.port or (443 if first.scheme == "https" else 80), proxy)


def _proxy(settings: Settings, env: Mapping[str, str], way: Way) -> list[Finding]:
    if way.proxy is None:
        return [ok("proxy", "none")]
    source = settings.sources["proxy"] if settings.proxy else _variable(settings.api_url, env)
    return [ok("proxy", f"{urls.without_password(way.proxy)} ({source})")]


def _variable(api_url: str, env: Mapping[str, str]) -> str:
    """Return the variable that names the proxy, in the order in which delivery looks at them."""
    names = (f"{urlsplit(api_url).scheme}_proxy", "all_proxy")
    return next((name for low in names for name in (low, low.upper()) if env.get(name)), "the environment")


def _connect(sender: Sender, way: Way, api_url: str, *, has_key: bool) -> list[Finding]:
    found, addresses = _dns(way)
    if not addresses:
        return found
    tcp = _tcp(way, addresses)
    found.append(tcp)
    if tcp.level == "error":
        return found
    return [*found, *_api(sender, api_url, has_key=has_key)]


def _dns(way: Way) -> tuple[list[Finding], list[str]]:
    started = time.monotonic()
    try:
        addresses = network.addresses_of(way.host, way.port, STEP_S)
    except OSError as exc:
        return [Finding("dns", "error", f"{exc}{way.whose}", way.advice)], []
    words = f"{way.host}: {', '.join(addresses[:MOST_ADDRESSES])} ({_ms(started)})"
    return [ok("dns", words)], addresses[:MOST_ADDRESSES]


def _tcp(way: Way, addresses: Sequence[str]) -> Finding:
    """Connect to all addresses at once: one that swallows packets must not take the others' time."""
    with ThreadPoolExecutor(MOST_ADDRESSES) as pool:
        tried = list(pool.map(lambda address: _connected(address, way.port), addresses))
    words = "; ".join(f"{address} port {way.port}: {told}" for address, (told, _) in zip(addresses, tried, strict=True))
    good = sum(is_good for _, is_good in tried)
    if not good:
        return Finding("tcp", "error", f"{words}{way.whose}", way.advice)
    if good < len(tried):
        return Finding("tcp", "warning", words, "addresses that don't answer cost time: look at routes and IPv6")
    return ok("tcp", words)


def _connected(address: str, port: int) -> tuple[str, bool]:
    started = time.monotonic()
    try:
        socket.create_connection((address, port), STEP_S).close()
    except TimeoutError:
        return f"no answer within {STEP_S:g} s", False
    except OSError as exc:
        return exc.strerror or str(exc), False
    return _ms(started), True


# --- what answers there


def _api(sender: Sender, api_url: str, *, has_key: bool) -> list[Finding]:
    look = sender.look("/health")
    is_secure = api_url.lower().startswith("https:")
    found = _tls(look, time.time()) if is_secure else [ok("tls", "plain http, as configured")]
    if look.problem:
        if not look.is_tls:
            found = [] if look.certificate is None else found
            found.append(Finding("health", "error", look.problem, look.remedy or _NETWORK))
        return found
    found += [*_clock(look, time.time()), _health(look)]
    if found[-1].level == "error" or not has_key:
        return found
    return [*found, key_accepted(sender.send("build", b"{}", str(uuid.uuid4())))]


def _tls(look: Look, now: float) -> list[Finding]:
    if look.is_tls:
        return [Finding("tls", "error", look.problem, look.remedy)]
    return [expiry(look.certificate, now)] if look.certificate else []


def expiry(certificate: Mapping[str, object], now: float) -> Finding:
    """Judge a certificate that is trusted, as `getpeercert` gives it, at *now* (seconds since 1970)."""
    issuer = tls.named(certificate.get("issuer"))
    end = ssl.cert_time_to_seconds(str(certificate.get("notAfter")))
    words = f"certificate issued by {issuer}, valid for {duration(end - now)}"
    if end - now < EXPIRES_SOON_S:
        return Finding("tls", "warning", words, "have it renewed; when it has expired, nothing is delivered")
    return ok("tls", words)


def _clock(look: Look, now: float) -> list[Finding]:
    server = classify(look.status, look.headers, look.body, now).server_time
    return [] if server is None else [clock(now - server)]


def clock(ahead_s: float) -> Finding:
    """Judge how far (seconds) this host's clock is before the server's."""
    words = f"this host's clock is {duration(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'} the API's"
    action = "set the clock (timedatectl set-ntp true): events are queued with this host's time"
    if abs(ahead_s) > CLOCK_ERROR_S:
        return Finding("clock", "error", f"{words}; nothing is pruned meanwhile", action)
    if abs(ahead_s) > CLOCK_WARN_S:
        return Finding("clock", "warning", words, action)
    return ok("clock", "as the API's, to 5 minutes")


def _health(look: Look) -> Finding:
    words = f"/health answers HTTP {look.status}"
    if 200 <= look.status <= 299 and _is_object(look.body):
        return ok("health", words)
    if look.status == 407:
        return Finding("health", "error", f"{words}: the proxy wants credentials", ADVICE["proxy"])
    if look.status < 400 or look.status == 511:
        outcome = classify(look.status, look.headers, look.body, 0.0)
        return Finding("health", "error", f"what answers is not the API: {outcome.detail}", ADVICE["not_authentic"])
    return Finding("health", "warning", words, "nothing to do if the API comes back soon; else ask its administrators")


def _is_object(body: bytes) -> bool:
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def key_accepted(outcome: Outcome) -> Finding:
    """Judge the answer to an empty event: one that is refused as invalid was let in, and nothing was created."""
    answered = f"HTTP {outcome.http_status}" if outcome.http_status else "no answer"
    words = f"{answered}: {outcome.detail}" if outcome.detail else answered
    if outcome.reason == "unauthorized":
        return Finding("key_accepted", "error", f"the API refuses the key ({words})", ADVICE["unauthorized"])
    if outcome.reason == "invalid" and outcome.http_status in (400, 422):
        return ok("key_accepted", f"the API takes the key ({answered} to an empty event)")
    if outcome.reason in ("misrouted", "not_authentic", "proxy"):
        return Finding("key_accepted", "error", f"the event API is not there: {words}", ADVICE[outcome.reason])
    action = ADVICE.get(outcome.reason, "ask the API's administrators what answers there")
    return Finding("key_accepted", "warning", f"the API says nothing of the key ({words})", action)


def _ms(started: float) -> str:
    return f"{(time.monotonic() - started) * 1000:.0f} ms"
