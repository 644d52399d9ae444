"""The documented Versioner event API on loopback: scripts can be tried before there is an account.

`answer` turns a request into an answer and knows no sockets; `State` is all that is kept; `LoopbackServer` speaks HTTP
for any such function. What a valid event is stands here a second time on purpose, so that this module stays an
independent witness of what the agent sends. Unless said otherwise the rules are those of the Event Tracking API's
documentation. One rule is not played: concurrent deployments.
"""

from __future__ import annotations

import copy
import hmac
import itertools
import json
import math
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs

from versioner_agent.events import canonical_status, rfc3339
from versioner_agent.loopback import HOST, Answer, LoopbackServer, Request, json_answer, refusal

MAX_DEPTH = 100  # levels of nesting in a body
_KIND_OF = {"/build-events/": "build", "/deployment-events/": "deployment"}
_METHODS = {**dict.fromkeys(_KIND_OF, ("POST",)), **dict.fromkeys(("/health", "/events"), ("GET", "HEAD"))}
_REQUIRED = {
    "build": ("product_name", "version", "status"),
    "deployment": ("product_name", "version", "environment_name", "status"),
}
#: Type -> fields: the documentation's tables, and what the official CLI sends beyond them. Unknown fields are ignored.
_TYPES: dict[str, tuple[type, tuple[str, ...]]] = {
    "str": (
        str,
        (
            *("product_name", "version", "environment_name", "status", "scm_branch", "scm_sha", "scm_repository"),
            *("build_url", "build_number", "source_system", "invoke_id", "deploy_url"),
            *("built_by", "built_by_email", "built_by_name"),
            *("deployed_by", "deployed_by_email", "deployed_by_name"),
        ),
    ),
    "datetime": (str, ("started_at", "completed_at")),
    "bool": (bool, ("skip_preflight_checks",)),
    "dict": (dict, ("extra_metadata",)),
}
_TYPE_OF = {name: (word, kind) for word, (kind, names) in _TYPES.items() for name in names}
_DATETIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)


class Misbehaviour(NamedTuple):
    """What the sandbox does wrong on purpose to POSTs of events."""

    fail: tuple[int, ...] = ()  # HTTP statuses, taken in turn
    rate: float = 1.0  # share of POSTs that fail, 0 to 1
    latency_s: float = 0.0  # before every answer
    blocked: tuple[str, ...] = ()  # environments under a no-deploy window
    retry_after: str | None = None  # sent with failures, as it stands


_WELL_BEHAVED = Misbehaviour()


class State:
    """What the API would keep: products, environments, versions and events; safe to use from many threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Start empty; *clock* returns seconds since 1970."""
        self.clock = clock
        self.products: set[str] = set()
        self.environments: set[str] = set()
        self.versions: dict[tuple[str, str], str | None] = {}  # (product, version) -> its first scm_sha
        self._events: list[dict[str, Any]] = []
        self._answers: dict[str, dict[str, Any]] = {}  # idempotency key -> what the accepted request was told
        self._requests: dict[str, int] = {}  # idempotency key -> POSTs that carried it
        self._lock = threading.Lock()

    def count(self, key: str | None) -> dict[str, Any] | None:
        """Count a POST with this idempotency key; returns the answer to an accepted one with the same key, if any."""
        with self._lock:
            if key is not None:
                self._requests[key] = self._requests.get(key, 0) + 1
            return self._answers.get(key or "")

    def accept(self, kind: str, status: str, payload: dict[str, Any], key: str | None) -> dict[str, Any] | None:
        """Store a valid event once per idempotency key and return the answer to it.

        Returns None, and stores nothing, where the version is bound to another commit.
        """
        version = (payload["product_name"], payload["version"])
        sha = payload.get("scm_sha") or None
        with self._lock:
            if key is not None and key in self._answers:
                return self._answers[key]
            bound = self.versions.get(version)
            if bound is not None and sha is not None and sha != bound:
                return None
            self.versions[version] = bound or sha
            self.products.add(payload["product_name"])
            if kind == "deployment":
                self.environments.add(payload["environment_name"])
            arrived = {"id": str(uuid.uuid4()), "kind": kind, "idempotency_key": key}
            event = {**arrived, "received_at": rfc3339(self.clock()), "status": status, "payload": payload}
            self._events.append(event)
            told = _told(event)
            if key is not None:
                self._answers[key] = told
            return told

    def events(self, product: str | None = None) -> list[dict[str, Any]]:
        """Copy the accepted events, of one product or of all, in order of arrival, as GET /events shows them."""
        with self._lock:
            return [
                {**copy.deepcopy(event), "requests": self._requests.get(event["idempotency_key"], 1)}
                for event in self._events
                if product is None or event["payload"]["product_name"] == product
            ]


def _told(event: dict[str, Any]) -> dict[str, Any]:
    payload = event["payload"]
    told = {"id": event["id"], "product_name": payload["product_name"], "version": payload["version"]}
    if event["kind"] == "build":
        return {**told, "status": event["status"], "created_at": event["received_at"]}
    told |= {"environment_name": payload["environment_name"], "status": event["status"]}
    told["deployed_at"] = event["received_at"]
    if payload.get("deployed_by"):
        told["deployed_by"] = payload["deployed_by"]
    return told


def answer(
    request: Request,
    state: State,
    *,
    key: str | None = None,
    blocked: tuple[str, ...] = (),
    failure: Answer | None = None,
) -> Answer:
    """Answer *request* as the documented API does, and keep in *state* what it accepts; never raises.

    With *key*, any other one is refused; *blocked* names environments; *failure* is the answer to play to an event.
    """
    path, _, query = request.target.partition("?")
    allowed = _METHODS.get(path)
    if allowed is None:
        if f"{path}/" not in _KIND_OF:
            return refusal(404, "Not Found")
        return Answer(307, (("Location", f"{path}/" + (f"?{query}" if query else "")),), b"")
    if request.method not in allowed:
        return refusal(405, "Method Not Allowed", ("Allow", ", ".join(allowed)))
    if path not in _KIND_OF:
        product = parse_qs(query).get("product", [None])[0]
        return json_answer(200, {"status": "ok"} if path == "/health" else {"events": state.events(product)})
    told = state.count(request.headers.get("idempotency-key"))
    # In this order: a gateway fails without asking for the key; a repeat gets its first answer, whatever changed since.
    denied = failure or _key_refusal(request.headers.get("authorization", ""), key)
    if told is not None and denied is None:
        return json_answer(200, told, f"{_named(told)} (repeat)")
    return denied or _receive(_KIND_OF[path], request, state, blocked)


def _key_refusal(authorization: str, valid: str | None) -> Answer | None:
    scheme, _, key = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return refusal(401, "Missing API key", ("WWW-Authenticate", "Bearer"))
    if valid is not None and not hmac.compare_digest(*(k.encode(errors="replace") for k in (key.strip(), valid))):
        return refusal(401, "Invalid API key", ("WWW-Authenticate", "Bearer"))
    return None


def _receive(kind: str, request: Request, state: State, blocked: tuple[str, ...]) -> Answer:
    payload = _parse(request.body)
    if isinstance(payload, str):
        return refusal(400, payload)
    problems = [{"loc": ["body", name], "msg": text, "type": code} for name, text, code in _problems(kind, payload)]
    if problems:
        return refusal(422, problems)
    status = canonical_status(kind, payload["status"])
    if status is None:
        return refusal(400, f"Unknown status '{payload['status']}' for a {kind}")
    if kind == "deployment" and payload["environment_name"] in blocked:
        return _blocked(payload, rfc3339(state.clock() + 3600))
    told = state.accept(kind, status, payload, request.headers.get("idempotency-key"))
    if told is None:
        conflict = f"Version {payload['version']} already exists with different SHA"
        return refusal(409, conflict)._replace(about=_named(payload))
    return json_answer(200, told, _named(told))


def _parse(body: bytes) -> dict[str, Any] | str:
    """Return the JSON object in *body*, or what is wrong with it."""
    try:
        value = json.loads(body.decode(), parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as exc:
        return f"Invalid JSON: {exc}"
    if not isinstance(value, dict):
        return "The body must be a JSON object"
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return f"Nested deeper than {MAX_DEPTH} levels" if level else value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _problems(kind: str, payload: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in _REQUIRED[kind]:
        if name not in payload:
            yield (name, "field required", "value_error.missing")
        elif payload[name] is None:
            yield (name, "none is not an allowed value", "type_error.none.not_allowed")
        elif isinstance(payload[name], str) and not payload[name].strip():
            yield (name, "ensure this value has at least 1 characters", "value_error.any_str.min_length")
    for name, value in payload.items():
        word, expected = _TYPE_OF.get(name, ("", object))
        if value is None:
            continue
        if not isinstance(value, expected):
            yield (name, f"{word} type expected", f"type_error.{word}")
        elif word == "datetime" and not _DATETIME.fullmatch(str(value)):
            yield (name, "invalid datetime format", "value_error.datetime")


def _blocked(payload: dict[str, Any], until: str) -> Answer:
    environment = payload["environment_name"]
    reason = f"the sandbox was told to block {environment}"
    document = {
        "error": "deployment_blocked",
        "message": f"Deployment to {environment} is blocked by a no-deploy window",
        "code": "NO_DEPLOY_WINDOW",
        "retry_after": until,
        "details": {"rule_name": "Sandbox freeze", "window": f"until {until}", "reason": reason},
    }
    return json_answer(423, document, _named(payload))


def _named(fields: Mapping[str, Any]) -> str:
    names = ("product_name", "version", "environment_name", "status")
    return " ".join(str(fields[name]) for name in names if fields.get(name))


class Sandbox:
    """The API on a loopback port, from construction to `stop`; also a context manager that starts and stops it."""

    def __init__(
        self,
        port: int = 0,
        key: str | None = None,
        misbehaviour: Misbehaviour = _WELL_BEHAVED,
        roll: Callable[[], float] = random.random,
        *,
        log: Callable[[str], None] | None = None,
        state: State | None = None,
    ) -> None:
        """Bind *port* (0: any free one); raises OSError where it is taken.

        With *key*, every other API key is refused. *misbehaviour* may be replaced at any time; *roll* returns 0 to 1
        and decides who fails. *log* gets one unescaped line per request. *state* continues that of a stopped sandbox.
        """
        self.misbehaviour = misbehaviour
        self.state = state or State()
        self._key = key
        self._roll = roll
        self._turn = itertools.count()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._served_by: threading.Thread | None = None
        self._lifecycle = threading.Lock()
        self._server = LoopbackServer(port, self._respond, log)
        self.port = self._server.server_port
        self.url = f"http://{HOST}:{self.port}"

    @property
    def events(self) -> list[dict[str, Any]]:
        """A copy of the accepted events, in order of arrival, as GET /events shows them."""
        return self.state.events()

    def start(self) -> None:
        """Serve in a background thread; a sandbox that serves already goes on."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def serve_forever(self) -> None:
        """Serve in this thread until another one calls `stop`; a stopped sandbox returns at once."""
        with self._lifecycle:
            if self._stopping.is_set():
                return
            self._served_by = threading.current_thread()
        self._server.serve_forever(0.02)

    def stop(self) -> None:
        """Free the port and end every connection, in the middle of an answer too, as a crash would; idempotent."""
        with self._lifecycle:
            if self._stopping.is_set():
                return
            self._stopping.set()
        # A thread that stops what it served itself has left the loop, or was interrupted before it was in it.
        if self._served_by not in (None, threading.current_thread()):
            self._server.shutdown()
        self._server.server_close()
        self._server.disconnect()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _respond(self, request: Request) -> Answer:
        ways = self.misbehaviour
        failure = None
        if request.method == "POST" and request.target.partition("?")[0] in _KIND_OF:
            if self._stopping.wait(ways.latency_s):
                raise ConnectionError("stopped before the answer")
            if ways.fail and self._roll() < ways.rate:
                status = ways.fail[next(self._turn) % len(ways.fail)]
                hint = [("Retry-After", ways.retry_after)] if ways.retry_after is not None else []
                failure = refusal(status, f"sandbox: told to fail with {status}", *hint)
        return answer(request, self.state, key=self._key, blocked=ways.blocked, failure=failure)
