"""The agent at rest: how soon it notices an event, and what waiting costs."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from statistics import median

from measure import Bench, Result, Server, running_agent, server

from versioner_agent.outbox import Outbox

EVENTS = 40
SETTLED_S = 2.0  # after its start an agent looks after its outbox


def latency(bench: Bench) -> Iterator[Result]:
    """Measure from the commit of one event to its arrival at the API, at moments the agent can't foresee."""
    with (
        server(tells=True) as api,
        Outbox(os.path.join(bench.directory, "outbox.db")) as outbox,
        running_agent(bench.directory, api.url),
    ):
        _deliver_one(outbox, api)
        taken = []
        for number in range(EVENTS):
            time.sleep(0.25 + random.random() * 0.2)
            receipt = outbox.enqueue("build", _event(number))
            committed_at = time.monotonic()
            arrived_at, key = api.arrival()
            assert key == receipt.event_id
            taken.append(1000 * (arrived_at - committed_at))
    yield Result("latency", median(taken), "ms", 100)


def idle(bench: Bench) -> Iterator[Result]:
    """Measure the share of one core that an agent with nothing to do takes."""
    with (
        server(tells=True) as api,
        Outbox(os.path.join(bench.directory, "outbox.db")) as outbox,
        running_agent(bench.directory, api.url) as process,
    ):
        _deliver_one(outbox, api)
        before = _cpu_s(process.pid)
        time.sleep(bench.idle_s)
        share = (_cpu_s(process.pid) - before) / bench.idle_s
    yield Result("idle", 100 * share, "%", 0.5)


def _deliver_one(outbox: Outbox, api: Server) -> None:
    """See that the agent is up."""
    outbox.enqueue("build", {"product_name": "first", "version": "1", "status": "success"})
    api.arrival()
    time.sleep(SETTLED_S)


def _event(number: int) -> dict[str, str]:
    return {"product_name": f"product-{number}", "version": "1", "status": "success"}


def _cpu_s(pid: int) -> float:
    """Return utime and stime of a process (proc_pid_stat(5)) in seconds."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
