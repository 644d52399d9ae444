"""Fifty processes queue at once, beside an agent that drains and people who look: none fails, none is lost."""

from __future__ import annotations

import subprocess

import pytest
from crash import COMMAND, needs_strace
from host import eventually
from scripted import accepted

from versioner_agent.storage import DEFAULT_BUSY_TIMEOUT_S

WRITERS = 50
#: Every sync takes 40 ms: some thirty times what it takes here.
SLOW = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync",
        "-e", "inject=fsync,fdatasync:delay_enter=40000")  # fmt: skip


def enqueue_all(host, before=()):
    """Start all writers at once; returns what those that failed said."""
    started = [
        subprocess.Popen(
            (*before, *COMMAND, "enqueue", "build", "--product", f"p{number % 5}", "--version", str(number)),
            env=host.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for number in range(WRITERS)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [words for process, words in zip(started, said, strict=True) if process.returncode != 0]


@pytest.fixture
def host(host_for, serve):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    made = host_for(server.url)
    made.server = server
    assert "VERSIONER_AGENT_BUSY_TIMEOUT" not in made.env
    assert DEFAULT_BUSY_TIMEOUT_S == 10
    return made


def check_all_arrived(host, count=WRITERS):
    eventually(lambda: host.counts() == {"delivered": count}, within=120)
    arrived = sorted(seen.event["version"] for seen in host.server.firsts() if seen.product.startswith("p"))
    assert arrived == sorted(str(number) for number in range(WRITERS))


@pytest.mark.parametrize("disk", ["fast", pytest.param("slow", marks=needs_strace)])
def test_fifty_writers_beside_a_draining_agent(host, disk):
    slow = SLOW if disk == "slow" else ()
    host.queue("q", 20)
    agent = host.agent(before=slow)

    assert enqueue_all(host, slow) == []

    check_all_arrived(host, WRITERS + 20)
    assert agent.poll() is None


def test_fifty_writers_beside_people_who_look(host):
    """A reader that has stopped in the middle of a long list, and doctors one after the other."""
    host.queue("q", 600)
    with subprocess.Popen(
        (*COMMAND, "list", "--json", "--limit", "600"), env=host.env, stdout=subprocess.PIPE
    ) as reader:
        reader.stdout.readline()  # it has begun, and nobody reads on
        doctor = subprocess.Popen(
            ("/bin/sh", "-c", 'while "$@" doctor --offline >/dev/null 2>&1; do :; done', "sh", *COMMAND), env=host.env
        )
        try:
            assert enqueue_all(host) == []
            assert doctor.poll() is None
        finally:
            doctor.kill()
            doctor.wait()
        reader.kill()
    host.agent()
    check_all_arrived(host, WRITERS + 600)
