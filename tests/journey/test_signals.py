"""Stopping, and who delivers when two want to."""

from __future__ import annotations

import signal
import threading

import pytest
from host import KEY, eventually
from scripted import accepted, refused


@pytest.fixture
def gate():
    opened = threading.Event()
    yield opened
    opened.set()


@pytest.fixture
def slow(serve, gate):
    """A server whose answers wait for the gate."""

    def script(_):
        gate.wait(30)
        return accepted()

    return serve(script)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_answer_that_arrives_while_stopping_is_settled(host_for, slow, gate, number):
    host = host_for(slow.url)
    (first, second) = host.queue("payments", 2)
    agent = host.agent()
    slow.wait_for(1)

    agent.send_signal(number)
    gate.set()

    assert agent.wait(30) == 0
    assert host.record(first)[0].state == "delivered"
    assert host.record(second)[0].state == "pending"
    assert len(slow.requests) == 1


def test_a_request_without_an_answer_does_not_keep_an_agent_from_stopping(host_for, slow):
    host = host_for(slow.url)
    (record_id,) = host.queue("payments")
    agent = host.agent()
    slow.wait_for(1)

    assert host.end(agent) == 0
    assert "1 requests unanswered" in agent.log.read_text()
    assert host.record(record_id)[0].state == "pending"


def test_a_second_signal_ends_an_agent_at_once(host_for, slow):
    host = host_for(slow.url)
    host.queue("payments")
    metrics = host.directory / "versioner.prom"
    agent = host.agent(VERSIONER_AGENT_METRICS_FILE=str(metrics))
    slow.wait_for(1)
    eventually(metrics.exists)

    agent.send_signal(signal.SIGTERM)
    agent.send_signal(signal.SIGINT)

    assert agent.wait(30) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert not metrics.exists()
    assert host.counts() == {"pending": 1}


def test_an_idle_agent_stops_with_exit_status_0(host_for, serve):
    host = host_for(serve().url)

    assert host.end(host.agent()) == 0
    assert not host.presence().has_agent


def test_a_second_agent_exits_1_naming_the_first(host_for, serve):
    host = host_for(serve().url)
    agent = host.agent()

    second = host.run("run")

    assert second.returncode == 1
    assert f"pid {agent.pid}".encode() in second.stderr
    assert b"Traceback" not in second.stderr
    host.queue("payments")
    eventually(lambda: host.counts() == {"delivered": 1})


def test_an_agent_waits_for_a_flush_which_hands_over(host_for, serve):
    """The flush is asked to leave between events; the agent finishes what it left."""
    is_up = threading.Event()
    server = serve(lambda _: accepted() if is_up.is_set() else refused(503))
    host = host_for(server.url)
    host.queue("payments", 20)
    flush = host.start("flush", "--timeout", "60")
    server.wait_for(1)

    agent = host.agent()
    assert host.presence().has_agent
    assert flush.poll() is None
    is_up.set()

    assert flush.wait(30) == 0
    assert host.counts() == {"delivered": 20}
    assert agent.poll() is None
    firsts = [seen.event["version"] for seen in server.firsts()]
    assert firsts == [str(number) for number in range(1, 21)]


def test_an_agent_says_that_it_waits_for_a_flush_with_a_request_under_way(host_for, slow, gate):
    host = host_for(slow.url)
    host.queue("payments", 2)
    flush = host.start("flush", "--timeout", "60")
    slow.wait_for(1)

    agent = host.start("run")
    eventually(lambda: f"waiting for a flush (pid {flush.pid})" in agent.log.read_text())
    gate.set()

    assert flush.wait(30) == 0
    assert host.counts() == {"delivered": 2}
    assert slow.most_under_way == 1
    assert host.end(agent) == 0


def test_an_agent_that_waits_for_a_flush_can_be_stopped(host_for, slow):
    host = host_for(slow.url)
    host.queue("payments")
    host.start("flush", "--timeout", "60")
    slow.wait_for(1)
    agent = host.start("run")
    eventually(lambda: "waiting for a flush" in agent.log.read_text())

    assert host.end(agent) == 0


def test_a_flush_beside_an_agent_waits_for_it_and_sends_nothing_itself(host_for, slow, gate):
    host = host_for(slow.url)
    host.queue("payments", 3)
    host.agent()
    slow.wait_for(1)
    flush = host.start("flush", "--timeout", "60", VERSIONER_API_KEY="sk_acme_k9_flush")

    gate.set()

    assert flush.wait(30) == 0
    assert {seen.headers["authorization"] for seen in slow.requests} == {f"Bearer {KEY}"}
    assert len(slow.requests) == 3


def test_a_flush_beside_an_agent_reports_what_the_agent_saw_refused(host_for, serve, gate):
    def script(_):
        gate.wait(30)
        return refused(422, "no")

    server = serve(script)
    host = host_for(server.url)
    host.queue("payments")
    host.agent()
    server.wait_for(1)
    flush = host.start("flush", "--timeout", "60", "-v")
    eventually(lambda: "outbox" in flush.log.read_text())
    threading.Event().wait(0.3)  # the flush has begun to watch; a refusal before that is not its own

    gate.set()

    assert flush.wait(30) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_flush_settles_what_is_answered(host_for, slow, gate, number):
    host = host_for(slow.url)
    host.queue("payments", 2)
    flush = host.start("flush", "--timeout", "60")
    slow.wait_for(1)

    flush.send_signal(number)
    gate.set()

    assert flush.wait(30) == 75
    assert host.counts() == {"delivered": 1, "pending": 1}
    assert len(slow.requests) == 1
