"""A long outage of a large installation: a million events of a hundred thousand products wait."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator

from measure import Bench, Result, in_turns, refusing_url, running_agent, seconds, server

from versioner_agent import events
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import CHUNK, Outbox

SMALL = 1000
EVENTS_PER_KEY = 10
DOWN_S = 20.0  # some of it as the probes rotate
STEP = 50
TURNS = 15
SEEK = 64  # keys a look ahead asks for


def scale(bench: Bench) -> Iterator[Result]:
    """Fill an outbox, then measure memory, restart, enqueuing and choosing."""
    large, small = os.path.join(bench.directory, "large"), os.path.join(bench.directory, "small")
    for directory, size in ((large, bench.records), (small, SMALL)):
        os.mkdir(directory)
        _fill(_outbox_in(directory), size)
    with refusing_url() as url, running_agent(large, url) as process:
        time.sleep(DOWN_S)
        assert process.poll() is None
        yield Result("scale_memory", _peak_memory_mb(process.pid), "MB", 60)
    yield Result("scale_restart", _first_delivery_s(large), "s", 5)
    for name, prepare in (("enqueue", _enqueuing), ("keys", _seeking), ("head", _choosing)):
        ours, floor = (prepare(directory, size) for directory, size in ((large, bench.records), (small, SMALL)))
        taken = in_turns(ours, floor, TURNS)
        yield Result(f"scale_{name}", 1e6 * taken[0], "us", 1.3, 1e6 * taken[1])


def _outbox_in(directory: str) -> str:
    return os.path.join(directory, "outbox.db")


def _fill(path: str, size: int) -> None:
    """Queue *size* builds, those of one product far apart."""
    keys = size // EVENTS_PER_KEY
    with Outbox(path) as outbox:
        for start in range(0, size, CHUNK):
            outbox.enqueue_all([_build(n, keys) for n in range(start, min(start + CHUNK, size))])


def _build(number: int, keys: int) -> events.Event:
    fields = {"product_name": _key(number % keys), "version": f"1.{number}", "status": "success"}
    return events.validate("build", {**fields, "invoke_id": f"run-{number}"})


def _key(number: int) -> str:
    return f"product-{number:06}"


def _first_delivery_s(directory: str) -> float:
    """Return the seconds from starting an agent to the first request's arrival."""
    with server(tells=True) as api:
        started_at = time.monotonic()
        with running_agent(directory, api.url):
            arrived_at, _ = api.arrival()
    return arrived_at - started_at


def _enqueuing(directory: str, size: int) -> Callable[[], float]:
    outbox = Outbox(_outbox_in(directory))
    numbers = itertools.count(size)
    return lambda: _mean(lambda: outbox.enqueue_all([_build(next(numbers), size // EVENTS_PER_KEY)]))


def _seeking(directory: str, size: int) -> Callable[[], float]:
    ledger = Ledger(Outbox(_outbox_in(directory)).store)
    # Each look finds as many keys as it asks for, in the small outbox too.
    cursors = itertools.cycle(_key(n) for n in range(0, size // EVENTS_PER_KEY - SEEK, SEEK))
    return lambda: _mean(lambda: ledger.keys(next(cursors), SEEK, frozenset()))


def _choosing(directory: str, size: int) -> Callable[[], float]:
    ledger = Ledger(Outbox(_outbox_in(directory)).store)
    keys = itertools.cycle(_key(n) for n in range(size // EVENTS_PER_KEY))
    return lambda: _mean(lambda: ledger.head(next(keys)))


def _mean(work: Callable[[], object]) -> float:
    return seconds(lambda: [work() for _ in range(STEP)]) / STEP


def _peak_memory_mb(pid: int) -> float:
    """Return the most that a process had resident so far (proc_pid_status(5))."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        peak = next(line for line in file if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024
