"""What one `enqueue` costs a script, as a whole process."""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
from collections.abc import Iterator

from measure import COMMAND, HERE, PYTHON, Bench, Result, environment, in_turns, outbox_environment, seconds

#: What a CI system says of a run.
CI = {
    "GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "acme/payments", "GITHUB_SHA": "8d1f0c7e5b9a4d3c2b1a0f9e8d7c6b5a49382716",
    "GITHUB_REF_NAME": "main", "GITHUB_RUN_ID": "77", "GITHUB_RUN_NUMBER": "7", "GITHUB_RUN_ATTEMPT": "1",
    "GITHUB_SERVER_URL": "https://github.com", "GITHUB_ACTOR": "jo", "GITHUB_WORKFLOW": "build", "GITHUB_JOB": "build",
}  # fmt: skip


def enqueue_process(bench: Bench) -> Iterator[Result]:
    """Measure it with outbox and configuration named by the environment."""
    ours, floor = _compared(bench, outbox_environment(bench.directory))
    yield Result("enqueue_process", ours, "ms", 1.25, floor)


def enqueue_process_files(bench: Bench) -> Iterator[Result]:
    """Measure it with the outbox named by the user's configuration file, in a CI system."""
    home = bench.directory
    folder = os.path.join(home, ".config", "versioner-agent")
    os.makedirs(folder)
    with open(os.path.join(folder, "config.toml"), "w", encoding="utf-8") as file:
        file.write(f'db = "{os.path.join(home, "outbox.db")}"\n')
    folders = {"XDG_CONFIG_HOME": os.path.join(home, ".config"), "XDG_STATE_HOME": os.path.join(home, "state")}
    ours, floor = _compared(bench, environment(HOME=home, **folders, **CI))
    yield Result("enqueue_process_files", ours, "ms", 1.45, floor)


def _compared(bench: Bench, env: dict[str, str]) -> tuple[float, float]:
    """Return the medians of both whole processes in milliseconds."""
    bare = os.path.join(bench.directory, "bare.db")
    connection = sqlite3.connect(bare)
    connection.execute("CREATE TABLE event (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL)")
    connection.close()
    versions = itertools.count(1)

    def ours() -> float:
        return _run([COMMAND, "enqueue", "build", "--product", "p", "--version", str(next(versions))], env)

    def floor() -> float:
        return _run([PYTHON, os.path.join(HERE, "bare_enqueue.py"), bare], env)

    return in_turns(ours, floor, bench.pairs)


def _run(command: list[str], env: dict[str, str]) -> float:
    return 1000 * seconds(lambda: subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True))
