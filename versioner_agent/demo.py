"""The whole story on loopback, with a private outbox in a temporary directory: outage, queue, delivery, a refusal.

Everything is real: the agent is a process of its own, the API is the sandbox on a real socket. Each step is checked,
and a step that did not happen as told ends the demo with an error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from versioner_agent import review
from versioner_agent.errors import AgentError
from versioner_agent.outbox import Outbox
from versioner_agent.review import Stats
from versioner_agent.sandbox import Sandbox

PRODUCTS = ("shop", "billing", "search")
EVENTS_EACH = 4
STEP_TIMEOUT_S = 30.0
_KEY = "sk_demo_k1_local"


def play(say: Callable[[str], None]) -> None:
    """Tell the story, one line at a time, through *say*; raises AgentError for a step that did not happen."""
    with tempfile.TemporaryDirectory(prefix="versioner-agent-demo-") as directory:
        path = os.path.join(directory, "outbox.db")
        port = _free_port()
        with Outbox(path) as outbox, _agent(directory, path, port) as process:
            queued = _unreachable(outbox, say)
            with Sandbox(port) as sandbox:
                _back(outbox, sandbox, queued, say)
                _refused(outbox, sandbox, say)
            _stop(process, say)


def _unreachable(outbox: Outbox, say: Callable[[str], None]) -> list[tuple[str, str]]:
    say("1. The API is unreachable. Builds go on, and their events are queued at once:")
    queued = []
    started = time.monotonic()
    for number in range(1, EVENTS_EACH + 1):
        for product in PRODUCTS:
            version = f"1.0.{number}"
            fields = {"product_name": product, "version": version, "status": "success", "scm_sha": f"{number:07x}"}
            receipt = outbox.enqueue("build", fields)
            _check(receipt.outcome == "queued", f"{product} {version} was not queued")
            queued.append((product, version))
    took = (time.monotonic() - started) * 1000 / len(queued)
    say(f"   {len(queued)} events of {len(PRODUCTS)} products, {took:.1f} ms each, synced to the disk")
    stats = _wait_for(outbox, lambda stats: stats.health.state == "down", "the agent did not notice the outage")
    _check(stats.counts["pending"] == len(queued), "events were lost during the outage")
    say(f"   the agent says: the API is {stats.health.state}: {stats.health.reason}")
    say(f"   {stats.counts['pending']} pending, nothing lost, nothing failed")
    return queued


def _back(outbox: Outbox, sandbox: Sandbox, queued: list[tuple[str, str]], say: Callable[[str], None]) -> None:
    say("2. The API is back. The agent finds out by itself and delivers:")
    _wait_for(outbox, lambda stats: stats.counts["delivered"] == len(queued), "not everything was delivered")
    arrived = [(event["payload"]["product_name"], event["payload"]["version"]) for event in sandbox.events]
    _check(sorted(arrived) == sorted(queued), "what arrived is not what was queued")
    for product in PRODUCTS:
        versions = [version for name, version in arrived if name == product]
        _check(versions == [version for name, version in queued if name == product], f"{product} is out of order")
        say(f"   {product:<8} {' -> '.join(versions)}")
    say(f"   {len(arrived)} delivered, each once, in order per product")


def _refused(outbox: Outbox, sandbox: Sandbox, say: Callable[[str], None]) -> None:
    say("3. Somebody builds shop 1.0.1 again from another commit. Versions are immutable:")
    before = len(sandbox.events)
    fields = {"product_name": "shop", "version": "1.0.1", "status": "success", "scm_sha": "fffffff"}
    receipt = outbox.enqueue("build", fields)
    stats = _wait_for(outbox, lambda stats: stats.counts["failed"] == 1, "the second commit was not refused")
    failure = stats.last_failure
    _check(failure is not None and failure.id == receipt.id, "another event was refused")
    _check(failure is not None and failure.http_status == 409 and failure.reason == "conflict", "it was no conflict")
    _check(len(sandbox.events) == before and stats.counts["pending"] == 0, "the refused event was not settled")
    if failure is not None:
        say(f"   record {failure.id}: HTTP {failure.http_status}, {failure.reason}: {failure.detail}")
    say("   a permanent failure: kept and shown by `list --state failed`, never tried again by itself")


def _stop(process: subprocess.Popen[bytes], say: Callable[[str], None]) -> None:
    process.send_signal(signal.SIGTERM)
    _check(process.wait(STEP_TIMEOUT_S) == 0, "the agent did not stop cleanly")
    say("4. SIGTERM: the agent settles what is under way and exits 0.")


@contextmanager
def _agent(directory: str, path: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run an agent of our own, kept away from the user's configuration."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("VERSIONER_")}
    env |= {
        "VERSIONER_API_URL": f"http://127.0.0.1:{port}",
        "VERSIONER_API_KEY": _KEY,
        "VERSIONER_AGENT_DB": path,
        "VERSIONER_AGENT_CONFIG": os.path.join(directory, "config.toml"),
        # The package may lie in a single file that only this process was started with.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "versioner_agent", "run", "--max-backoff", "1"]
    with open(os.path.join(directory, "agent.log"), "wb") as log:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_for(outbox: Outbox, is_so: Callable[[Stats], bool], problem: str) -> Stats:
    end = time.monotonic() + STEP_TIMEOUT_S
    while True:
        stats = review.stats(outbox.store)
        if is_so(stats):
            return stats
        _check(time.monotonic() < end, problem)
        time.sleep(0.05)


def _check(is_so: bool, problem: str) -> None:
    if not is_so:
        raise AgentError(f"the demo did not go as told: {problem}")


def _free_port() -> int:
    """Return a port that nothing listens on, so that connecting is refused."""
    import socket  # noqa: PLC0415

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
