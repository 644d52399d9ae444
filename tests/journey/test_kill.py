"""SIGKILL at any moment: nothing is lost, little is repeated, nothing overtakes."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest
from host import eventually
from scripted import accepted

EVENTS, PRODUCTS, CONCURRENCY = 500, 5, 4
KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("SEED", "20261106"))


@pytest.mark.parametrize("seed", range(SEED, SEED + 1))
def test_an_agent_killed_again_and_again_delivers_every_event_in_order(host_for, serve, seed):
    dice = random.Random(seed)
    lock = threading.Lock()
    moments = sorted(dice.sample(range(10, EVENTS - 10), KILLS))
    reached = threading.Event()

    def script(seen):
        with lock:
            if moments and seen.number >= moments[0]:
                reached.set()
        return accepted(f"evt-{seen.key}")

    server = serve(script)
    host = host_for(server.url)
    for product in range(PRODUCTS):
        host.queue(f"product-{product}", EVENTS // PRODUCTS, first=0)

    for _ in range(KILLS):
        agent = host.agent(VERSIONER_AGENT_CONCURRENCY=str(CONCURRENCY))
        assert reached.wait(30)
        threading.Event().wait(dice.random() / 100)
        agent.send_signal(signal.SIGKILL)
        assert agent.wait(30) == -signal.SIGKILL
        with lock:
            moments[:] = [moment for moment in moments[1:] if moment > len(server.requests)]
            reached.clear()
            if not moments:
                reached.set()
    host.agent()
    eventually(lambda: host.counts() == {"delivered": EVENTS})

    firsts, requests = server.firsts(), list(server.requests)
    assert len(firsts) == EVENTS
    assert len(requests) - EVENTS <= CONCURRENCY * KILLS
    assert len({(seen.key, seen.body) for seen in requests}) == EVENTS
    for product in range(PRODUCTS):
        versions = [int(seen.event["version"]) for seen in firsts if seen.product == f"product-{product}"]
        assert versions == list(range(EVENTS // PRODUCTS))


def test_an_event_whose_answer_was_lost_in_a_kill_is_repeated_with_the_same_key_and_bytes(host_for, serve):
    hold = threading.Event()

    def script(seen):
        if seen.number == 0:
            hold.wait(30)
        return accepted()

    server = serve(script)
    host = host_for(server.url)
    host.queue("payments", 2)
    agent = host.agent()
    server.wait_for(1)

    agent.kill()
    agent.wait(30)
    hold.set()
    host.agent()
    eventually(lambda: host.counts() == {"delivered": 2})

    first, repeat, second = server.requests
    assert (first.key, first.body) == (repeat.key, repeat.body)
    assert second.event["version"] == "2"


def test_a_killed_agent_leaves_no_lock_behind(host_for, serve):
    host = host_for(serve().url)
    agent = host.agent()
    assert host.presence().pid == agent.pid

    agent.kill()
    agent.wait(30)

    assert not host.presence().has_agent
    assert not host.presence().is_delivering
    host.queue("payments")
    assert host.run("flush").returncode == 0
