"""How many events per second can be queued by one process."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from statistics import median

from measure import COMMAND, Bench, Result, in_turns, outbox_environment, seconds

from versioner_agent.outbox import Outbox

STEP = 200  # inserts per turn
TURNS = 15
EVENTS = 50_000
FIELDS = {"status": "success", "scm_sha": "8d1f0c7e5b9a4d3c2b1a0f9e8d7c6b5a49382716", "scm_branch": "main"}


def api_rate(bench: Bench) -> Iterator[Result]:
    """Compare `Outbox.enqueue` with bare inserts of as many bytes: one connection each, every row synced."""
    path = os.path.join(bench.directory, "outbox.db")
    numbers = itertools.count(1)
    with Outbox(path) as outbox:

        def ours() -> float:
            return STEP / seconds(lambda: [outbox.enqueue("build", _event(next(numbers))) for _ in range(STEP)])

        ours()
        bare = _bare_connection(os.path.join(bench.directory, "bare.db"))
        row = bytes(_row_width(path))

        def floor() -> float:
            insert = "INSERT INTO event (body) VALUES (?)"
            return STEP / seconds(lambda: [bare.execute(insert, (row,)) for _ in range(STEP)])

        rates = in_turns(ours, floor, TURNS)
        bare.close()
    yield Result("api_rate", rates[0], "ev/s", 0.5, rates[1], at_least=True)


def json_rate(bench: Bench) -> Iterator[Result]:
    """Queue a file of 50 000 events with `enqueue json`, start of the process and all."""
    source = os.path.join(bench.directory, "events.jsonl")
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(_event(number)) + "\n" for number in range(EVENTS))
    taken = []
    for turn in range(3):
        directory = os.path.join(bench.directory, str(turn))
        os.mkdir(directory)
        env = outbox_environment(directory)
        command = [COMMAND, "enqueue", "json", "--kind", "build", source]
        taken.append(seconds(lambda: subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)))  # noqa: B023
    yield Result("json_rate", EVENTS / median(taken), "ev/s", 10_000, at_least=True)


def _event(number: int) -> dict[str, str]:
    return {
        "product_name": f"product-{number % 50}",
        "version": f"1.0.{number}",
        "invoke_id": f"run-{number}",
        **FIELDS,
    }


def _bare_connection(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_mode = PERSIST")
    connection.execute("CREATE TABLE event (id INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL)")
    return connection


def _row_width(path: str) -> int:
    """Return the bytes of one record's values."""
    connection = sqlite3.connect(path)
    row = connection.execute("SELECT * FROM record LIMIT 1").fetchone()
    connection.close()
    return sum(len(value if isinstance(value, bytes) else str(value)) for value in row if value is not None)
