"""An export beside an agent that delivers: the agent lends the outbox, and nothing is both delivered and exported."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading

import pytest
from host import COMMAND, eventually
from scripted import accepted

PRODUCTS = tuple("abcdefgh")


def exported(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()[1:-1]]


@pytest.fixture
def gate():
    """Requests wait for it; open at first."""
    opened = threading.Event()
    opened.set()
    return opened


@pytest.fixture
def server(serve, gate):
    def script(seen):
        gate.wait(20)
        return accepted(f"evt-{seen.key}")

    return serve(script)


def test_exports_beside_an_agent_under_load_part_the_events(host_for, server, gate, tmp_path):
    """Each is either delivered or exported, each product's in order: first delivered, then exported, then nothing."""
    host = host_for(server.url)
    for version in range(1, 61):
        for product in PRODUCTS:
            host.queue(product, first=version)
    agent = host.agent(VERSIONER_AGENT_CONCURRENCY="4")
    server.wait_for(20)

    for number in range(3):
        gate.clear()  # else all may be delivered before the export has begun
        export = host.start("export", "--limit", "40", str(tmp_path / f"{number}.jsonl"))
        eventually(lambda: host.presence().has_borrower)
        gate.set()
        assert export.wait(30) == 0, export.log.read_text()
        host.queue("fresh", first=number)
        eventually(lambda number=number: ("fresh", str(number)) in arrived(server))

    lines = [line for number in range(3) for line in exported(tmp_path / f"{number}.jsonl")]
    keys = {line["event_id"] for line in lines}
    delivered = [seen.key for seen in server.requests]
    assert len(keys) == len(lines)
    assert not keys & set(delivered)
    assert len(delivered) == len(set(delivered)), "nothing was sent twice"
    assert host.presence().agent_pid == agent.pid
    for product in PRODUCTS:
        sent = [int(seen.event["version"]) for seen in server.requests if seen.product == product]
        written = [int(line["version"]) for line in lines if line["product_name"] == product]
        assert sent + written == list(range(1, len(sent + written) + 1))
    assert host.end(agent) == 0


def arrived(server):
    return [(seen.product, seen.event["version"]) for seen in list(server.requests)]


def test_what_is_under_way_is_settled_before_anything_is_exported(host_for, server, gate, tmp_path):
    host = host_for(server.url)
    host.queue("a", 3)
    gate.clear()
    agent = host.agent()
    server.wait_for(1)
    export = host.start("export", str(tmp_path / "events.jsonl"))
    eventually(lambda: host.presence().has_borrower)
    assert export.poll() is None
    gate.set()

    assert export.wait(30) == 0
    assert [seen.event["version"] for seen in server.requests] == ["1"]
    assert [line["version"] for line in exported(tmp_path / "events.jsonl")] == ["2", "3"]
    assert host.counts() == {"delivered": 1, "exported": 2}
    assert host.end(agent) == 0
    assert f"lent to pid {export.pid}" in agent.log.read_text()


def test_the_agent_stays_the_agent_while_it_lends(host_for, server, lent):
    host, agent, _ = lent

    presence = host.presence()
    assert (presence.has_agent, presence.agent_pid, presence.is_delivering) == (True, agent.pid, True)
    assert host.json("status")[0]["agent"]["running"]
    assert host.run("run").returncode == 1


#: An export that is held up with all claimed and the file written.
HELD_UP = """
import os, sys
from versioner_agent import exporting
from versioner_agent.config import load
def held_up(*args, **how):
    print("lent")
    input()
exporting.NewFile.place = held_up
exporting.export(load({"db": sys.argv[1]}, {}, os.devnull), sys.argv[2])
"""


@pytest.fixture
def lent(host_for, server, child, tmp_path):
    """An agent that has lent to an export which goes no further."""
    host = host_for(server.url)
    host.queue("a", 200)
    agent = host.agent(VERSIONER_API_KEY="")  # without a key all stays pending
    export = child(HELD_UP, host.path, tmp_path / "first.jsonl")
    assert export.says() == "lent"
    return host, agent, export.process


def test_a_borrower_that_is_killed_gives_back(lent):
    host, agent, export = lent

    export.kill()

    eventually(lambda: host.presence().pid == agent.pid)
    assert host.counts() == {"pending": 200}
    assert host.end(agent) == 0


def test_an_agent_that_is_told_to_stop_while_it_lends_stops(lent):
    host, agent, export = lent

    assert host.end(agent) == 0
    assert host.presence().pid == export.pid


def test_an_agent_that_is_killed_while_it_lends_harms_nobody(lent):
    host, agent, export = lent

    agent.send_signal(signal.SIGKILL)
    agent.wait()
    successor = host.start("run")
    eventually(lambda: "hand over" in successor.log.read_text())

    assert host.presence().pid == export.pid
    export.kill()
    eventually(lambda: host.presence().pid == successor.pid)


def test_a_reader_that_does_not_read_keeps_nothing_from_being_delivered(host_for, server, tmp_path):
    host = host_for(server.url)
    host.queue("a", 200)
    blocked = tmp_path / "pipe"
    os.mkfifo(blocked)
    reader = os.open(blocked, os.O_RDONLY | os.O_NONBLOCK)
    with open(blocked, "wb") as pipe:
        export = subprocess.Popen(
            (*COMMAND, "export", "-"), stdout=pipe, stderr=subprocess.DEVNULL, env=host.env, start_new_session=True
        )
    eventually(lambda: select.select([reader], [], [], 0)[0])

    assert host.run("flush", "--timeout", "60").returncode == 0
    assert host.counts() == {"delivered": 200}
    assert export.poll() is None
    export.kill()
    export.wait()
    os.close(reader)


def test_a_second_borrower_waits_for_the_first(lent, tmp_path):
    host, agent, export = lent
    second = host.start("export", str(tmp_path / "second.jsonl"))
    eventually(lambda: list(tmp_path.glob(".second*")))
    assert second.poll() is None

    export.kill()

    assert second.wait(30) == 0
    assert len(exported(tmp_path / "second.jsonl")) == 200
    eventually(lambda: host.presence().pid == agent.pid)


def test_a_flush_lets_an_export_in_and_goes_on(host_for, server, gate, tmp_path):
    host = host_for(server.url)
    host.queue("a", 2)
    host.queue("b")
    gate.clear()
    flush = host.start("flush", "--timeout", "60", VERSIONER_AGENT_CONCURRENCY="1")
    server.wait_for(1)
    first = server.requests[0].product
    other = "b" if first == "a" else "a"
    export = host.start("export", "--product", other, str(tmp_path / "events.jsonl"))
    eventually(lambda: host.presence().has_borrower)
    gate.set()

    assert (export.wait(30), flush.wait(60)) == (0, 0)
    assert {seen.product for seen in server.requests} == {first}
    assert {line["product_name"] for line in exported(tmp_path / "events.jsonl")} == {other}


def test_marking_waits_for_what_is_under_way(host_for, server, gate):
    """A record that is delivered while it is to be marked is delivered, and not marked."""
    host = host_for(server.url)
    host.queue("a", 2)
    digest = json.loads(host.run("export", "-").stdout.splitlines()[-1])["sha256"]
    gate.clear()
    host.agent(VERSIONER_AGENT_CONCURRENCY="1")
    server.wait_for(1)
    marking = host.start("export", "--mark", digest)
    eventually(lambda: host.presence().has_borrower)
    gate.set()

    assert marking.wait(30) == 0
    eventually(lambda: host.counts() == {"delivered": 1, "exported": 1})
    assert len(server.requests) == 1
