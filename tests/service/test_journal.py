"""Lines for systemd's journal: priorities where stderr leads there, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from host import COMMAND, eventually


@pytest.fixture
def journal(tmp_path):
    """A file that stands for the journal's socket, and the variable by which systemd names it."""
    path = tmp_path / "journal"
    with path.open("wb") as file:
        found = os.fstat(file.fileno())
        yield path, file, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}


def agent(host, file, **env):
    process = subprocess.Popen((*COMMAND, "run"), stderr=file, env={**host.env, **env}, start_new_session=True)
    process.log = None
    return process


def test_each_line_of_the_agent_carries_its_priority(host_for, journal):
    path, file, env = journal
    host = host_for()
    host.queue("payments")
    process = agent(host, file, **env, VERSIONER_AGENT_LOG_LEVEL="debug")
    try:
        eventually(lambda: "<4>the API is down" in path.read_text())
    finally:
        process.terminate()
        assert process.wait(30) == 0

    lines = path.read_text().splitlines()
    assert {line[:3] for line in lines} <= {"<3>", "<4>", "<6>", "<7>"}
    assert any(line.startswith("<6>agent ") for line in lines)
    assert any(line.startswith("<7>waiting 1") for line in lines)


def test_json_lines_carry_it_too(host_for, journal):
    path, file, env = journal
    host = host_for()
    process = agent(host, file, **env, VERSIONER_AGENT_LOG_FORMAT="json")
    eventually(lambda: "delivers from" in path.read_text())
    process.terminate()
    process.wait(30)

    for line in path.read_text().splitlines():
        assert line[:3] == "<6>"
        assert json.loads(line[3:])["level"] == "info"


def test_an_error_of_a_command_is_one_of_the_journal(host_for, journal):
    path, file, env = journal
    host = host_for()
    host.config.write_text("nosuchkey = 1\nconcurrency = 0\n")

    done = subprocess.run((*COMMAND, "run"), stderr=file, env={**host.env, **env}, check=False, timeout=60)

    assert done.returncode == 3
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("<3>") for line in lines)


@pytest.mark.parametrize("stream", ["", "1:2", "x", "8:"])
def test_another_stderr_gets_no_priorities(host_for, stream):
    host = host_for()
    host.config.write_text("nosuchkey = 1\n")

    done = host.run("run", JOURNAL_STREAM=stream)

    assert done.stderr.startswith(b"error: ")


def test_a_terminal_or_a_pipe_gets_the_time(host_for):
    host = host_for()
    process = host.agent()

    first = process.log.read_text().splitlines()[0]

    assert first[4] == "-"
    assert "Z info: agent " in first
