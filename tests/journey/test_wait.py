"""Waiting for verdicts, with real processes: agents, flushes and others that wait beside it, signals, and deaths."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from host import KEY, eventually, free_port
from scripted import accepted, answer, refused

from versioner_agent.locks import FlusherLock

JOB_KEY = "sk_acme_k7_job"
#: Queues one event and waits for its verdict: arguments kind, fields, seconds, options.
CODE = """
import contextlib, json, os, sys
from versioner_agent import config
from versioner_agent.cli import _waiting
from versioner_agent.outbox import Outbox

kind, fields, seconds, options = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4])
settings = config.load({}, os.environ)
with contextlib.closing(Outbox(settings.db)) as outbox:
    receipt = outbox.enqueue(kind, fields)
print("queued", receipt.id, file=sys.stderr, flush=True)
try:
    sys.exit(_waiting.wait_and_report(settings, os.environ, [receipt], seconds, as_json=False, **options))
except KeyboardInterrupt:
    sys.exit(130)
"""


class Waiter:
    """A process that queues one event and waits for its verdict."""

    def __init__(self, host, log, product, version, *, seconds, is_gate, env):
        fields = {"product_name": product, "version": version, "status": "started"}
        if is_gate:
            fields["environment_name"] = "production"
        kind = "deployment" if is_gate else "build"
        arguments = (kind, json.dumps(fields), str(seconds), json.dumps({"is_gate": is_gate}))
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, *arguments], stdout=file, stderr=file, env={**host.env, **env}
            )
        eventually(lambda: "queued" in self.said())

    def said(self):
        return self.log.read_text()

    def ends(self, within=60):
        code = self.process.wait(within)
        assert "Traceback" not in self.said()
        return code

    def send(self, number):
        self.process.send_signal(number)


@pytest.fixture
def waits(tmp_path):
    """Start waiters; none outlives the test."""
    made = []

    def start(host, product="payments", version="1", *, seconds=60, is_gate=False, **env):
        log = tmp_path / f"waiter-{len(made)}.log"
        made.append(Waiter(host, log, product, version, seconds=seconds, is_gate=is_gate, env=env))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def is_up():
    opened = threading.Event()
    yield opened
    opened.set()


@pytest.fixture
def coming(serve, is_up):
    """A server that answers 503 until it is up."""
    return serve(lambda _: accepted() if is_up.is_set() else refused(503, "starting"))


@pytest.fixture
def slow(serve, is_up):
    """A server whose answers wait until it is up."""

    def script(_):
        is_up.wait(30)
        return accepted()

    return serve(script)


def keys_used(server):
    return {seen.headers["authorization"].removeprefix("Bearer ") for seen in server.requests}


def test_without_an_agent_it_delivers_itself(host_for, serve, waits):
    server = serve()
    host = host_for(server.url)
    host.queue("other")

    waiter = waits(host)

    assert waiter.ends() == 0
    assert "delivered 2: build payments 1 started (id evt-1)" in waiter.said()
    assert [seen.product for seen in server.requests] == ["payments"]
    assert host.counts() == {"pending": 1, "delivered": 1}


def test_beside_an_agent_the_agents_key_is_used(host_for, serve, waits):
    server = serve()
    host = host_for(server.url)
    host.agent()

    assert waits(host, VERSIONER_API_KEY=JOB_KEY).ends() == 0
    assert keys_used(server) == {KEY}


def test_a_shared_outbox_is_left_to_its_agent(host_for, serve, waits):
    """A job's key must never deliver other people's events."""
    server = serve()
    host = host_for(server.url)
    host.queue("payments")
    os.chmod(host.path, 0o660)
    os.chmod(os.path.dirname(host.path), 0o2770)

    waiter = waits(host, version="2", seconds=0.3, VERSIONER_API_KEY=JOB_KEY)
    assert waiter.ends() == 75
    assert "only its agent delivers from it, and none is running" in waiter.said()
    assert server.requests == []

    host.agent()
    assert waits(host, version="3", VERSIONER_API_KEY="").ends() == 0
    assert keys_used(server) == {KEY}


def test_an_agent_that_starts_gets_its_turn_and_delivers(host_for, coming, is_up, waits):
    host = host_for(coming.url)
    waiter = waits(host, VERSIONER_API_KEY=JOB_KEY)
    coming.wait_for(1)

    agent = host.agent()
    assert waiter.process.poll() is None
    is_up.set()

    assert waiter.ends() == 0
    assert agent.poll() is None
    assert coming.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert len({seen.key for seen in coming.requests}) == 1


def test_an_agent_gets_its_turn_from_a_request_that_hangs(host_for, slow, is_up, waits):
    host = host_for(slow.url)
    waiter = waits(host)
    slow.wait_for(1)

    host.agent()  # which waits for it
    is_up.set()

    assert waiter.ends() == 0
    assert host.counts() == {"delivered": 1}


def test_two_that_wait_deliver_each_its_own_in_order(host_for, coming, is_up, waits):
    host = host_for(coming.url)
    first = waits(host, version="1")
    coming.wait_for(1)
    second = waits(host, version="2")
    is_up.set()

    assert (first.ends(), second.ends()) == (0, 0)
    assert [seen.event["version"] for seen in coming.firsts()] == ["1", "2"]
    assert "delivered 2" in second.said()


def test_one_that_waits_longer_takes_over_what_the_first_gave_up(host_for, coming, is_up, waits):
    host = host_for(coming.url)
    first = waits(host, version="1", seconds=0.5)
    coming.wait_for(1)
    second = waits(host, version="2")

    assert first.ends() == 75
    is_up.set()

    assert second.ends() == 0
    assert [seen.event["version"] for seen in coming.firsts()] == ["1", "2"]


def test_a_flush_beside_it_goes_on_when_it_is_done(host_for, coming, is_up, waits):
    """It had only delivered its own."""
    host = host_for(coming.url)
    host.queue("other", 2)
    waiter = waits(host)
    coming.wait_for(1)
    flush = host.start("flush", "--timeout", "60", "-v")
    eventually(lambda: "outbox" in flush.log.read_text())
    assert {seen.product for seen in coming.requests} == {"payments"}
    is_up.set()

    assert waiter.ends() == 0
    assert flush.wait(30) == 0
    assert host.counts() == {"delivered": 3}


def test_beside_a_flush_it_waits_and_goes_on_when_that_leaves(host_for, serve, is_up, waits):
    """The flush has nothing to do with its timeout."""
    server = serve(lambda _: accepted() if is_up.is_set() else refused(503))
    host = host_for(server.url)
    host.queue("other")
    flush = host.start("flush", "--timeout", "1.5")
    server.wait_for(1)
    waiter = waits(host)

    assert flush.wait(30) == 75
    is_up.set()

    assert waiter.ends() == 0
    assert host.record(2)[0].state == "delivered"


def test_killed_while_it_delivers_it_loses_nothing(host_for, slow, is_up, waits):
    host = host_for(slow.url)
    waiter = waits(host)
    slow.wait_for(1)
    waiter.process.kill()
    waiter.process.wait(30)
    is_up.set()

    assert host.counts() == {"pending": 1}
    assert host.run("flush").returncode == 0
    assert host.counts() == {"delivered": 1}
    assert len({seen.key for seen in slow.requests}) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_settles_what_is_under_way(host_for, slow, is_up, waits, number):
    host = host_for(slow.url)
    host.queue("payments")
    waiter = waits(host, version="2")
    slow.wait_for(1)

    waiter.send(number)
    is_up.set()

    assert waiter.ends() == 75
    assert "1 event is still queued: interrupted" in waiter.said()
    assert host.counts() == {"delivered": 1, "pending": 1}


def test_a_gate_that_is_told_to_stop_does_not_let_the_deployment_go_on(host_for, slow, is_up, waits):
    host = host_for(slow.url)
    host.queue("payments")
    waiter = waits(host, version="2", is_gate=True)
    slow.wait_for(1)

    waiter.send(signal.SIGTERM)
    is_up.set()

    assert waiter.ends() == 128 + signal.SIGTERM


def test_ctrl_c_while_it_watches_leaves_at_once(host_for, slow, waits):
    host = host_for(slow.url)
    host.agent()
    waiter = waits(host)
    slow.wait_for(1)

    waiter.send(signal.SIGINT)

    assert waiter.ends() == 130
    assert host.counts() == {"pending": 1}


def test_a_gate_refused_by_a_rule_exits_5(host_for, serve, waits):
    rule = {"error": "deployment_blocked", "message": "frozen", "code": "NO_DEPLOY_WINDOW"}
    host = host_for(serve(lambda _: answer(423, {"detail": rule})).url)
    host.agent()

    waiter = waits(host, is_gate=True)

    assert waiter.ends() == 5
    assert "rule: NO_DEPLOY_WINDOW" in waiter.said()


def test_a_second_gate_does_not_wait_for_an_api_that_is_down(host_for, waits):
    """The first one found out; the second would have an hour."""
    host = host_for(f"http://127.0.0.1:{free_port()}")
    env = {"VERSIONER_AGENT_MAX_BACKOFF": "100"}

    first = waits(host, version="1", seconds=0.5, is_gate=True, **env)
    assert first.ends() == 0
    second = waits(host, version="2", seconds=3600, is_gate=True, **env)

    assert second.ends() == 0
    for waiter in (first, second):
        assert "was NOT checked against the rules: the API is down" in waiter.said()
    assert host.counts() == {"pending": 2}


def test_a_gate_beside_an_agent_that_finds_the_api_down_does_not_wait(host_for, waits):
    host = host_for(f"http://127.0.0.1:{free_port()}")
    host.queue("other")
    host.agent()
    eventually(lambda: host.health().state == "down")

    waiter = waits(host, seconds=3600, is_gate=True)

    assert waiter.ends() == 0
    assert "NOT checked" in waiter.said()


def test_a_flush_names_who_has_the_turn_where_that_is_no_agent(host_for):
    host = host_for()
    host.queue("payments")
    with contextlib.closing(FlusherLock(host.path)) as somebody:
        assert somebody.claim_delivery()

        done = host.run("flush", "--timeout", "0")

    assert done.returncode == 75
    assert f"pid {os.getpid()} has its turn at delivering".encode() in done.stderr
