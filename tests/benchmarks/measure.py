"""What the benchmarks share: results, turns, processes. Knows nothing of what is measured."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

API_KEY = "sk_bench_key1_0123456789abcdef"
PYTHON = os.environ.get("BENCH_PYTHON") or sys.executable
COMMAND = os.path.join(os.path.dirname(PYTHON), "versioner-agent")
HERE = os.path.dirname(os.path.abspath(__file__))


class Bench(NamedTuple):
    """What a benchmark may use and how long it may take."""

    directory: str  # empty, on the disk to be measured, removed afterwards
    pairs: int
    idle_s: float
    records: int


class Result(NamedTuple):
    """One measured budget: judged by its ratio to *floor*, or as it is where there is none."""

    name: str
    measured: float
    unit: str
    budget: float
    floor: float | None = None
    at_least: bool = False

    @property
    def judged(self) -> float:
        """What the budget speaks of."""
        return self.measured if self.floor is None else self.measured / self.floor

    @property
    def is_ok(self) -> bool:
        """Whether the budget is kept."""
        return self.judged >= self.budget if self.at_least else self.judged <= self.budget

    def line(self) -> str:
        """Return name, measured, floor, ratio, budget and verdict in columns."""
        floor = f"{self.floor:11,.2f}" if self.floor is not None else f"{'-':>11}"
        ratio = f"{self.judged:6.2f}" if self.floor is not None else f"{'-':>6}"
        bound = f"{'>=' if self.at_least else '<='} {self.budget:,g}"
        verdict = "OK" if self.is_ok else "MISSED"
        return f"{self.name:24}{self.measured:11,.2f} {self.unit:5}{floor}{ratio:>8}   {bound:10} {verdict}"


@contextmanager
def workspace(parent: str | None) -> Iterator[str]:
    """Lend a directory and remove it, whatever happened; SIGTERM too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = tempfile.mkdtemp(prefix="versioner-agent-bench-", dir=parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def in_turns(ours: Callable[[], float], floor: Callable[[], float], pairs: int) -> tuple[float, float]:
    """Return the medians of both, measured in turns; one more pair in front warms the caches up."""
    ours(), floor()
    taken = [(ours(), floor()) for _ in range(pairs)]
    return median(a for a, _ in taken), median(b for _, b in taken)


def seconds(work: Callable[[], Any]) -> float:
    """Return how long *work* took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without the agent's settings, and *more*."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VERSIONER_")}
    return kept | more


def outbox_environment(directory: str, **more: str) -> dict[str, str]:
    """Return an environment that names the outbox and the (missing) configuration."""
    db, config = os.path.join(directory, "outbox.db"), os.path.join(directory, "none.toml")
    return environment(VERSIONER_AGENT_DB=db, VERSIONER_AGENT_CONFIG=config, **more)


class Server(NamedTuple):
    """A running server.py."""

    process: subprocess.Popen[bytes]
    url: str

    def arrival(self) -> tuple[float, str]:
        """Wait for the next request: when it came (monotonic seconds), and its idempotency key."""
        assert self.process.stdout is not None
        at, key = self.process.stdout.readline().split()
        return float(at), key.decode()


@contextmanager
def server(delay_s: float = 0.0, *, tells: bool = False) -> Iterator[Server]:
    """Answer every event with success from a process of its own; with *tells*, `arrival` reports each."""
    command = [sys.executable, os.path.join(HERE, "server.py"), str(delay_s), "tell" if tells else ""]
    with stopping(subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)) as process:
        assert process.stdout is not None
        yield Server(process, f"http://127.0.0.1:{int(process.stdout.readline())}")


@contextmanager
def running_agent(directory: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the agent on the outbox in *directory* until the end of the block."""
    env = outbox_environment(directory, VERSIONER_API_URL=url, VERSIONER_API_KEY=API_KEY)
    with stopping(subprocess.Popen([COMMAND, "run"], env=env, stderr=subprocess.DEVNULL)) as process:
        yield process


@contextmanager
def stopping(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End *process* at the end of the block."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def refusing_url() -> Iterator[str]:
    """Lend a URL that refuses connections: the port is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
