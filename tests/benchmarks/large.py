"""Years of work: commands, pruning and queuing beside it in an outbox of a million records, most of them delivered.

Made by the same code that queues, with nothing synced, and settled by SQL.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from statistics import quantiles

from measure import COMMAND, Bench, Result, outbox_environment, stopping

from versioner_agent import events
from versioner_agent.batches import CHUNK
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import Outbox
from versioner_agent.storage import Store
from versioner_agent.upkeep import Upkeep

DAY_S = 86_400.0
PRODUCTS = 5000
RARE = "rare-product"
OLD_DAYS = 400

#: What is measured, for up to `SECONDS_EACH`; a command that this version does not have is passed over.
COMMANDS = {
    "status": ("status",),
    "list": ("list", "--limit", "50"),
    "list_failed": ("list", "--state", "failed", "--limit", "50"),
    "list_rare": ("list", "--product", RARE, "--limit", "50"),
    "doctor": ("doctor", "--offline"),
    "check": ("check",),
    "metrics": ("metrics",),
    "export": ("export", "{directory}/export.jsonl"),
}
SECONDS_EACH = 5
MEMORY_MB = 60
PRUNED_FOR_S = 60.0
ALONE_S = 20.0
#: A million in five minutes, and what queuing beside it may cost.
PRUNED_A_SECOND = 3300
BESIDE = 2.0

_FAST = ("PRAGMA synchronous = OFF", "PRAGMA journal_mode = MEMORY", "PRAGMA cache_size = -200000")


def years(bench: Bench) -> Iterator[Result]:
    """Measure commands (time, and the most memory resident), then pruning and queuing beside it."""
    path = os.path.join(bench.directory, "outbox.db")
    fill(path, bench.records)
    settle(path)
    for name, command in COMMANDS.items():
        taken = _run([each.format(directory=bench.directory) for each in command], bench.directory)
        if taken is not None:
            yield Result(f"years_{name}", taken[0], "s", SECONDS_EACH)
            yield Result(f"years_{name}_memory", taken[1], "MB", MEMORY_MB)
    alone, beside = (os.path.join(bench.directory, name) for name in ("alone", "beside"))
    with _queuing(path, alone):
        time.sleep(ALONE_S)
    with _queuing(path, beside):
        pruned = _pruned_a_second(path)
    yield Result("years_prune", pruned, "rec/s", PRUNED_A_SECOND, at_least=True)
    yield Result("years_beside_p99", _p99_ms(beside), "ms", BESIDE, _p99_ms(alone))


def _run(command: list[str], directory: str) -> tuple[float, float] | None:
    """Return seconds and megabytes of a command; None where there is no such one."""
    env = outbox_environment(directory)
    starter = [sys.executable, "-c", RUN, COMMAND, *command]  # a small one, for what it has resident counts too
    done = subprocess.run(starter, env=env, capture_output=True, text=True, check=True)
    if "No such" in done.stderr:
        return None
    taken_s, kilobytes = done.stdout.split()
    return float(taken_s), int(kilobytes) / 1024


def _pruned_a_second(path: str) -> float:
    """Prune as an idle agent does, with its rests; returns records per second."""
    with closing(Store(path)) as store:
        ledger = Ledger(store)
        before, started = _counted(store), time.monotonic()
        upkeep = Upkeep(ledger)
        while time.monotonic() < started + PRUNED_FOR_S:
            now = time.monotonic()
            upkeep.step(now, now, time.time() - now, 30.0)
            if not upkeep.is_more:
                break
            time.sleep(max(0.0, upkeep.step_at - time.monotonic()))
        return (before - _counted(store)) / (time.monotonic() - started)


def _counted(store: Store) -> int:
    with store.read() as connection:
        return int(connection.execute("SELECT n FROM tally WHERE state = 'delivered'").fetchone()[0])


@contextmanager
def _queuing(path: str, log: str) -> Iterator[None]:
    """Queue fifty events a second at most beside the block; what each took goes to the file *log*."""
    with stopping(subprocess.Popen([sys.executable, __file__, path, log])):
        yield


def _p99_ms(log: str) -> float:
    with open(log, encoding="ascii") as file:
        return 1000 * quantiles([float(line) for line in file if line.endswith("\n")], n=100)[98]


def _queue_on(path: str, log: str) -> None:
    """Queue until somebody ends this process."""
    with Outbox(path) as outbox, open(log, "w", encoding="ascii", buffering=1) as file:
        for number in itertools.count():
            fields = {"product_name": f"new-{number % 50}", "version": f"2.{number}", "status": "success"}
            event = events.validate("build", {**fields, "invoke_id": f"new-{number}-{time.time()}"})
            started = time.perf_counter()
            outbox.enqueue_all([event])
            file.write(f"{time.perf_counter() - started}\n")
            time.sleep(0.02)


def fill(path: str, size: int, *, rare: int = 3) -> None:
    """Queue *size* builds at *path*, *rare* of them, far apart, of RARE."""
    every = max(1, size // rare)
    with Outbox(path) as outbox:
        outbox.enqueue_all([_build(0, 1)])
        with outbox.store.read() as connection:
            for pragma in _FAST:
                connection.execute(pragma).fetchall()
        for start in range(1, size, CHUNK):
            outbox.enqueue_all([_build(n, every) for n in range(start, min(start + CHUNK, size))])


def settle(path: str) -> None:
    """Make of every thousand records 949 delivered 400 days ago, 30 an hour ago, 10 failed, 10 exported; 1 waits."""
    now = time.time()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in _FAST:
            connection.execute(pragma).fetchall()
        connection.execute("BEGIN")
        for state, least, most, age_s in (
            ("delivered", 0, 949, OLD_DAYS * DAY_S),
            ("delivered", 949, 979, 3600.0),
            ("failed", 979, 989, 3600.0),
            ("exported", 989, 999, 3600.0),
        ):
            connection.execute(SETTLE, (state, now - age_s, state, state, least, most))
        connection.execute(ATTEMPTS, (now - OLD_DAYS * DAY_S,))
        connection.execute("COMMIT")


def _build(number: int, every: int) -> events.Event:
    product = RARE if number % every == every // 2 else f"product-{number % PRODUCTS:04}"
    fields = {"product_name": product, "version": f"1.{number}", "status": "success", "invoke_id": f"run-{number}"}
    return events.validate("build", fields)


RUN = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
SETTLE = """
    UPDATE record SET state = ?, settled_at = ?, attempts = 1,
        batch = CASE ? WHEN 'exported' THEN -1 ELSE batch END,
        reason = CASE ? WHEN 'failed' THEN 'conflict' END
    WHERE id % 1000 >= ? AND id % 1000 < ?
"""
ATTEMPTS = """
    INSERT INTO attempt (record_id, at, outcome, http_status, detail, duration_s)
    SELECT id, ?, 'delivered', 201, NULL, 0.1 FROM record WHERE state <> 'pending'
"""

if __name__ == "__main__":
    _queue_on(sys.argv[1], sys.argv[2])
