"""Whoever reads slowly must not keep anybody from queuing."""

from __future__ import annotations

import subprocess

import pytest
from host import COMMAND, eventually


@pytest.fixture
def host(host_for):
    made = host_for()
    lines = b"\n".join(b'{"product_name": "p%d", "version": "1", "status": "ok"}' % number for number in range(3000))
    assert made.run("enqueue", "json", stdin=lines).returncode == 0
    return made


@pytest.mark.parametrize("command", [("list", "--json", "--limit", "3000"), ("list", "--limit", "3000")])
def test_a_reader_that_stopped_reading_delays_no_enqueue(host, command):
    with subprocess.Popen((*COMMAND, *command), stdout=subprocess.PIPE, env=host.env) as reader:
        first = reader.stdout.readline()
        assert first
        # The pipe is full when the process sleeps in a write: it will not get any further.
        eventually(lambda: _state(reader.pid) == "S")

        done = host.run("enqueue", "build", "--product", "p", "--version", "1", "--busy-timeout", "1")

        assert reader.poll() is None
        reader.kill()
    assert done.returncode == 0, done.stderr


def test_a_reader_that_left_early_is_no_error(host):
    with subprocess.Popen(
        (*COMMAND, "list", "--json", "--limit", "3000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=host.env
    ) as reader:
        reader.stdout.readline()
        reader.stdout.close()
        words = reader.stderr.read()

    assert reader.returncode == 0
    assert words == b""


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
