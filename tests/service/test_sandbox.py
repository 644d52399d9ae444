"""The sandbox on real sockets: what it accepts, refuses, plays and survives."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from click.testing import CliRunner

import versioner_agent
from versioner_agent.cli.sandbox import sandbox as command
from versioner_agent.errors import AgentError
from versioner_agent.loopback import HOST, MAX_BODY_BYTES, Request
from versioner_agent.sandbox import Misbehaviour, Sandbox, State, answer

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
DEPLOYMENT = {**BUILD, "environment_name": "production", "status": "success"}
ROOT = os.path.dirname(os.path.dirname(versioner_agent.__file__))
KEY = "sk_acme_k1_secret"


@pytest.fixture
def log():
    return []


@pytest.fixture
def server(log):
    with Sandbox(log=log.append) as running:
        yield running


@pytest.fixture
def api(server):
    with connect(server) as client:
        yield client


def connect(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=5)


def build(api, *, key=None, **changes):
    return send(api, "/build-events/", {**BUILD, **changes}, key)


def deploy(api, *, key=None, **changes):
    return send(api, "/deployment-events/", {**DEPLOYMENT, **changes}, key)


def send(api, path, body, key=None):
    return api.post(path, json=body, headers={"Idempotency-Key": key} if key else {})


def raw(server, data):
    """Send *data* as it is; returns all that comes back until the server closes."""
    with socket.create_connection((HOST, server.port), 5) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as stream:
            return stream.read()


# What is accepted


def test_a_build_is_answered_as_documented(api):
    """A build's answer holds an id, what it is about, the canonical status and created_at."""
    response = build(api, status="BUILT")

    told = response.json()
    assert response.status_code == 200
    assert told.keys() == {"id", "product_name", "version", "status", "created_at"}
    assert told["id"]
    assert (told["product_name"], told["version"], told["status"]) == ("payments", "1.2.3", "completed")


def test_a_deployment_is_answered_as_documented(api):
    """A deployment's answer adds the environment, deployed_at and who it was."""
    told = deploy(api, deployed_by="ann").json()

    assert told.keys() == {
        *("id", "product_name", "version", "environment_name", "status", "deployed_at", "deployed_by"),
    }
    assert (told["environment_name"], told["status"], told["deployed_by"]) == ("production", "completed", "ann")


def test_events_are_listed_in_order_of_arrival(api, server):
    """GET /events shows each accepted event with its payload as it was sent."""
    build(api, key="one", extra_metadata={"a": [1, None]})
    deploy(api)

    listed = httpx.get(f"{server.url}/events", trust_env=False).json()["events"]
    assert listed == server.events
    assert [event["kind"] for event in listed] == ["build", "deployment"]
    assert listed[0].keys() == {"id", "kind", "idempotency_key", "received_at", "requests", "status", "payload"}
    assert listed[0]["payload"] == {**BUILD, "extra_metadata": {"a": [1, None]}}
    assert [(event["idempotency_key"], event["requests"]) for event in listed] == [("one", 1), (None, 1)]


def test_events_of_one_product_are_selected(api):
    """?product= selects by the exact name."""
    build(api)
    build(api, product_name="a b&c")

    listed = api.get("/events", params={"product": "a b&c"}).json()["events"]
    assert [event["payload"]["product_name"] for event in listed] == ["a b&c"]


def test_a_snapshot_of_events_cannot_change_the_sandbox(api, server):
    """`events` is a copy, payloads included."""
    build(api)

    server.events[0]["payload"]["version"] = "9"
    assert server.events[0]["payload"]["version"] == "1.2.3"


def test_products_and_environments_are_created_on_first_sight(api, server):
    """Nothing has to exist before its first event."""
    deploy(api)

    assert server.state.products == {"payments"}
    assert server.state.environments == {"production"}
    assert server.state.versions == {("payments", "1.2.3"): None}


def test_fields_nobody_knows_are_kept(api, server):
    """Unknown fields are no error, and null is as good as absent."""
    assert build(api, colour="red", scm_sha=None).status_code == 200
    assert server.events[0]["payload"]["colour"] == "red"


# What is refused


def test_health_needs_no_key(server):
    """GET /health is open."""
    response = httpx.get(f"{server.url}/health", trust_env=False)

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("value", [None, "", "Bearer", "Basic abc", KEY])
def test_an_event_without_a_key_is_refused(server, value):
    """Only `Bearer K` is a key."""
    headers = {} if value is None else {"Authorization": value}
    response = httpx.post(f"{server.url}/build-events/", json=BUILD, headers=headers, trust_env=False)

    assert (response.status_code, response.json()) == (401, {"detail": "Missing API key"})
    assert server.events == []


def test_only_the_given_key_is_valid():
    """With a key given, any other one is refused."""
    with Sandbox(key="sk_other_k1_x") as server, connect(server) as api:
        refused = build(api)
        accepted = api.post("/build-events/", json=BUILD, headers={"Authorization": "bearer sk_other_k1_x"})

    assert (refused.status_code, refused.json()) == (401, {"detail": "Invalid API key"})
    assert accepted.status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 200_000])
def test_a_body_that_is_no_json_object_is_a_400(api, body):
    """Not JSON, not an object, or not finite: 400 with a detail, and the connection stays usable."""
    response = api.post("/build-events/", content=body)

    assert response.status_code == 400
    assert isinstance(response.json()["detail"], str)
    assert build(api).status_code == 200


def test_deep_nesting_is_refused(api, server):
    """What could not be listed again is not accepted."""
    deep = b'{"product_name":"p","version":"1","status":"ok","extra_metadata":' + b'{"a":' * 200 + b"1" + b"}" * 201
    response = api.post("/build-events/", content=deep)

    assert response.status_code == 400
    assert server.events == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/build-events/", "product_name"),
        ("/build-events/", "version"),
        ("/build-events/", "status"),
        ("/deployment-events/", "environment_name"),
    ],
)
def test_a_missing_required_field_is_a_422(api, path, name):
    """The answer names the field in the list form."""
    body = {field: value for field, value in DEPLOYMENT.items() if field != name}
    response = send(api, path, body)

    assert response.status_code == 422
    assert response.json() == {
        "detail": [{"loc": ["body", name], "msg": "field required", "type": "value_error.missing"}]
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("product_name", 5),
        ("version", 1.2),
        ("version", " "),
        ("status", None),
        ("scm_sha", ["abc"]),
        ("build_number", 456),
        ("completed_at", "yesterday"),
        ("completed_at", "2026-11-06T15:30:00"),
        ("skip_preflight_checks", "true"),
        ("extra_metadata", "{}"),
    ],
)
def test_a_wrong_type_is_a_422(api, server, name, value):
    """Types are not coerced, and times carry an offset."""
    response = deploy(api, **{name: value})

    assert response.status_code == 422
    assert [problem["loc"] for problem in response.json()["detail"]] == [["body", name]]
    assert server.events == []


@pytest.mark.parametrize(("send_it", "status"), [(build, "deployed"), (deploy, "building"), (build, "done")])
def test_an_unknown_status_is_a_400(api, send_it, status):
    """Aliases of the other kind are unknown too."""
    response = send_it(api, status=status)

    assert response.status_code == 400
    assert status in response.json()["detail"]


def test_a_version_is_bound_to_its_first_commit(api, server):
    """Another SHA is a 409; none, the same, or another version is not."""
    assert build(api, status="started").status_code == 200
    assert build(api, scm_sha="abc").status_code == 200
    refused = deploy(api, scm_sha="def")

    assert refused.status_code == 409
    assert refused.json() == {"detail": "Version 1.2.3 already exists with different SHA"}
    assert deploy(api).status_code == deploy(api, scm_sha="abc").status_code == 200
    assert build(api, version="1.2.4", scm_sha="def").status_code == 200
    assert len(server.events) == 5


def test_a_refused_event_binds_nothing(api, server):
    """A blocked deployment leaves no trace of its version."""
    server.misbehaviour = Misbehaviour(blocked=("production",))
    deploy(api, scm_sha="abc")

    assert build(api, scm_sha="def").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/", 404),
        ("GET", "/build-events/", 405),
        ("PUT", "/deployment-events/", 405),
        ("POST", "/health", 405),
        ("DELETE", "/events", 405),
        ("BREW", "/events", 405),
    ],
)
def test_unknown_paths_and_methods_are_refused_with_a_detail(api, method, path, status):
    """404 for a path, 405 with Allow for a method."""
    response = api.request(method, path)

    assert response.status_code == status
    assert response.json()["detail"]
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/build-events", "/deployment-events"])
def test_a_path_without_its_slash_is_redirected(api, server, path):
    """307 keeps the method and the body, and nothing is stored on the way."""
    response = api.post(path, json=DEPLOYMENT)

    assert (response.status_code, response.headers["location"]) == (307, f"{path}/")
    assert server.events == []
    assert api.post(path, json=DEPLOYMENT, follow_redirects=True).status_code == 200


def test_a_head_request_gets_no_body(api):
    """HEAD answers as GET does, without the body, and the connection stays in step."""
    assert api.head("/health").content == b""
    assert api.get("/health").json() == {"status": "ok"}


# Repeats


def test_a_repeat_gets_the_same_answer_and_is_stored_once(api, server):
    """An idempotency key stands for one event, however often it is sent."""
    first = build(api, key="k")
    again = build(api, key="k")

    assert again.status_code == 200
    assert again.json() == first.json()
    assert [event["requests"] for event in server.events] == [2]


def test_a_repeat_of_an_accepted_event_is_beyond_the_rules(api, server):
    """A window that closes later does not change what was answered."""
    first = deploy(api, key="k")
    server.misbehaviour = Misbehaviour(blocked=("production",))

    assert deploy(api, key="k").json() == first.json()
    assert deploy(api, key="l").status_code == 423


def test_failed_requests_count_as_requests(api, server):
    """`requests` tells how often an event had to be sent, failures included."""
    server.misbehaviour = Misbehaviour(fail=(503,))
    build(api, key="k")
    build(api, key="k")
    server.misbehaviour = Misbehaviour()
    build(api, key="k")

    assert [event["requests"] for event in server.events] == [3]


def test_a_refused_event_may_be_corrected_under_the_same_key(api, server):
    """Only acceptance settles an idempotency key."""
    assert build(api, key="k", status="nonsense").status_code == 400
    assert build(api, key="k").status_code == 200
    assert len(server.events) == 1


def test_simultaneous_repeats_are_stored_once(server):
    """Twenty requests with one key at the same moment make one event and get one answer."""
    start = threading.Barrier(20)

    def post(_number):
        with connect(server) as api:
            start.wait(5)
            return build(api, key="k").json()["id"]

    with ThreadPoolExecutor(20) as pool:
        ids = set(pool.map(post, range(20)))

    assert len(ids) == 1
    assert [event["requests"] for event in server.events] == [20]


# Misbehaviour


@pytest.mark.parametrize("status", [200, 204, 302, 401, 403, 409, 429, 499, 500, 503])
def test_a_failure_is_played_with_its_status(api, server, status):
    """Any code is played, keeps the connection in step and stores nothing."""
    server.misbehaviour = Misbehaviour(fail=(status,), retry_after="7")
    response = build(api)

    assert response.status_code == status
    assert response.headers["retry-after"] == "7"
    if status != 204:
        assert response.json() == {"detail": f"sandbox: told to fail with {status}"}
    assert api.get("/health").status_code == 200
    assert server.events == []


def test_failures_take_turns(api, server):
    """Several codes come round in the order given."""
    server.misbehaviour = Misbehaviour(fail=(500, 503))

    assert [build(api).status_code for _ in range(4)] == [500, 503, 500, 503]


def test_the_rate_decides_who_fails():
    """A POST fails when its roll is below the rate."""
    rolls = iter([0.1, 0.3, 0.29, 0.9])
    shaky = Misbehaviour(fail=(503,), rate=0.3)
    with Sandbox(misbehaviour=shaky, roll=lambda: next(rolls)) as server, connect(server) as api:
        statuses = [build(api).status_code for _ in range(4)]

    assert statuses == [503, 200, 503, 200]


def test_a_failure_header_cannot_break_the_answer(api, server):
    """Line breaks and foreign characters in Retry-After do not reach the wire."""
    server.misbehaviour = Misbehaviour(fail=(429,), retry_after="1\r\nX-Evil: 1 \u2603")
    response = build(api)

    assert "x-evil" not in response.headers
    assert response.json()["detail"]


def test_a_blocked_environment_refuses_deployments_in_the_rule_form(api, server):
    """423 with code, retry time and details; builds and other environments pass."""
    server.misbehaviour = Misbehaviour(blocked=("production",))
    response = deploy(api, status="started")

    told = response.json()
    assert response.status_code == 423
    assert told.keys() == {"error", "message", "code", "retry_after", "details"}
    assert (told["error"], told["code"]) == ("deployment_blocked", "NO_DEPLOY_WINDOW")
    assert told["details"].keys() == {"rule_name", "window", "reason"}
    assert told["details"]["rule_name"] == "Sandbox freeze"
    assert build(api, environment_name="production").status_code == 200
    assert deploy(api, environment_name="staging").status_code == 200


def test_a_block_ends_one_hour_ahead():
    """The retry time is an hour from the request; no socket is needed to see it."""
    body = json.dumps(DEPLOYMENT).encode()
    request = Request("POST", "/deployment-events/", {"authorization": "Bearer k"}, body)
    told = json.loads(answer(request, State(clock=lambda: 0.0), blocked=("production",)).body)

    assert told["retry_after"] == "1970-01-01T01:00:00.000Z"


def test_latency_outlasts_an_impatient_client(server):
    """An event whose sender gave up waiting is accepted all the same, and its repeat is no second one."""
    server.misbehaviour = Misbehaviour(latency_s=0.3)
    with connect(server) as api, pytest.raises(httpx.ReadTimeout):
        api.post("/build-events/", json=BUILD, headers={"Idempotency-Key": "k"}, timeout=0.05)
    with connect(server) as api:
        assert build(api, key="k").status_code == 200

    assert [event["requests"] for event in server.events] == [2]


# The wire


def test_connections_are_kept_alive(server):
    """Many requests go over one connection."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=5)
    with contextlib.closing(connection):
        ports = set()
        for path in ("/health", "/nowhere", "/health"):
            connection.request("GET", path)
            connection.getresponse().read()
            ports.add(connection.sock.getsockname())

    assert len(ports) == 1


def test_an_answer_says_its_date(api):
    """Date is there for clients that judge Retry-After dates by it."""
    assert api.get("/health").headers["date"].endswith("GMT")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"POST /build-events/ HTTP/1.1\r\nContent-Length: ten\r\n\r\n", 400),
        (b"POST /build-events/ HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /build-events/ HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"POST /build-events/ HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
        (b"POST /build-events/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    ],
    ids=["tls", "garbage", "version", "long", "headers", "word", "negative", "two-lengths", "huge", "chunked"],
)
def test_garbage_is_refused_with_a_detail_and_the_connection_closed(server, data, status, capfd):
    """Whatever arrives: one HTTP answer with a detail, no traceback, and the next client is served."""
    head, _, body = raw(server, data).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close" in head
    assert json.loads(body)["detail"]
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert capfd.readouterr() == ("", "")


def test_a_body_over_the_limit_is_refused_and_the_refusal_arrives(api):
    """413 reaches a client that is still sending; one byte less than too much is read."""
    at_limit = json.dumps({**BUILD, "pad": ""})
    fitting = at_limit.replace('"pad": ""', '"pad": "' + "x" * (MAX_BODY_BYTES - len(at_limit)) + '"')

    assert len(fitting) == MAX_BODY_BYTES
    assert api.post("/build-events/", content=fitting).status_code == 200
    assert api.post("/build-events/", content=fitting + " ").status_code == 413
    assert api.post("/build-events/", content=b"x" * 4 * MAX_BODY_BYTES).status_code == 413


def test_a_client_that_leaves_in_the_middle_does_no_harm(server, capfd):
    """Half a body, a reset, a silent close: nothing is stored and nothing is printed."""
    half = b"POST /build-events/ HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"
    assert raw(server, half) == b""
    with socket.create_connection((HOST, server.port), 5) as connection:
        connection.sendall(half)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with socket.create_connection((HOST, server.port), 5):
        pass

    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert server.events == []
    server.stop()
    assert capfd.readouterr() == ("", "")


def test_the_log_has_one_line_per_request(api, log):
    """Status, method, path and what it was about."""
    build(api)
    api.get("/health")

    assert log == ["200 POST /build-events/ payments 1.2.3 completed", "200 GET /health"]


# Life


def test_stopping_twice_is_the_same_as_once(server):
    """`stop` is idempotent, and the port is free after it."""
    server.stop()
    server.stop()

    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health", trust_env=False)


def test_stopping_before_starting_frees_the_port():
    """A sandbox that never served stops all the same, and serves no more."""
    server = Sandbox()
    server.stop()
    server.serve_forever()

    Sandbox(port=server.port).stop()


def test_stopping_ends_connections_that_are_kept_alive(api, server):
    """An outage is one for clients with an open connection, too."""
    assert api.get("/health").status_code == 200
    server.stop()

    with pytest.raises(httpx.TransportError):
        api.get("/health")


def test_stopping_does_not_wait_for_latency(server):
    """A request still waiting for its answer gets none and leaves nothing behind."""
    server.misbehaviour = Misbehaviour(latency_s=3600)
    with connect(server) as api, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(build, api)
        while not server._server._connections:
            time.sleep(0.01)
        server.stop()

        with pytest.raises(httpx.TransportError):
            waiting.result(5)
    assert server.events == []


def test_a_new_sandbox_continues_on_the_same_port_with_the_same_state(api, server):
    """After an outage the API still knows what it accepted."""
    first = build(api, key="k")
    server.stop()
    with Sandbox(port=server.port, state=server.state) as again, connect(again) as client:
        repeat = build(client, key="k")

    assert repeat.json() == first.json()


def test_a_port_in_use_is_refused(server):
    """The class raises OSError, the command says what to do."""
    with pytest.raises(OSError, match="in use"):
        Sandbox(port=server.port)
    result = CliRunner().invoke(command, ["--port", str(server.port)])

    assert isinstance(result.exception, AgentError)
    assert str(server.port) in result.exception.message
    assert "--port" in result.exception.hint


# The command


@contextlib.contextmanager
def running(*options):
    code = "from versioner_agent.cli.sandbox import sandbox; sandbox()"
    arguments = [sys.executable, "-c", code, "--port", "0", *options]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_tells_where_it_listens_and_ends_cleanly(number):
    """It prints the url and the exports at once, and exits 0 on SIGTERM and Ctrl-C."""
    with running() as process:
        first = process.stdout.readline()
        url = first.split()[3]
        exports = process.stdout.readline() + process.stdout.readline()
        alive = httpx.get(f"{url}/health", trust_env=False).status_code
        process.send_signal(number)
        _, talk = process.communicate(timeout=10)

    assert first == f"sandbox listening on {url} (any key accepted)\n"
    assert f"export VERSIONER_API_URL={url}\n" in exports
    assert "export VERSIONER_API_KEY=sk_sandbox_k1_local\n" in exports
    assert alive == 200
    assert process.returncode == 0
    assert talk.splitlines() == ["200 GET /health", "sandbox stopped"]


def test_the_command_neither_prints_its_key_nor_obeys_a_product_name():
    """The key stays out of all output, and control characters are shown as escapes."""
    with running("--key", KEY, "--blocked", "production", "--fail", "503", "--rate", "0") as process:
        lines = [process.stdout.readline() for _ in range(3)]
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=lines[0].split()[3], headers=headers, trust_env=False) as api:
            statuses = [build(api, product_name="a\x1b[2J\nb").status_code, deploy(api).status_code]
        process.send_signal(signal.SIGTERM)
        rest, talk = process.communicate(timeout=10)

    assert statuses == [200, 423]
    assert KEY not in "".join(lines) + rest + talk
    assert "\x1b" not in talk
    assert "\\x1b[2J" in talk
    assert len(talk.splitlines()) == 3


def test_a_sandbox_interrupted_before_it_serves_can_be_stopped(monkeypatch):
    """SIGTERM may come between the first line and the loop; stopping must not wait for a loop that never began."""
    sandbox = Sandbox()

    def interrupted(_poll_s):
        raise KeyboardInterrupt

    def live():
        with contextlib.suppress(KeyboardInterrupt):
            sandbox.serve_forever()
        sandbox.stop()

    monkeypatch.setattr(sandbox._server, "serve_forever", interrupted)
    life = threading.Thread(target=live, daemon=True)
    life.start()
    life.join(10)

    assert not life.is_alive()
