"""A job is told to be over whoever dies: its wrapper or the agent, at any moment, once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from crash import killed_at, needs_strace, points_of, sweep
from host import eventually
from scripted import accepted
from wrapped import FIELDS, events_of, files, run, statuses, wrapped

from versioner_agent.ledger import Ledger
from versioner_agent.locks import WriteQueue
from versioner_agent.orphans import UNKNOWN, Orphans
from versioner_agent.storage import Store

#: What changes the disk; the wrapped command does none of it.
CALLS = ("write", "pwrite64", "fdatasync", "fsync", "unlink", "rename", "flock")
#: What an agent does for the jobs of the dead, and what a flush does before it delivers.
LOOK = """
import sys, time
from versioner_agent.ledger import Ledger
from versioner_agent.orphans import Orphans
from versioner_agent.storage import Store
ledger = Ledger(Store(sys.argv[1]))
ledger.open(create=False)
Orphans(ledger).look(time.monotonic())
"""
#: Wrappers one after another, in processes that have imported everything.
MANY = """
import os, sys
from versioner_agent import wrapper
from versioner_agent.outbox import Outbox
path, name, count = sys.argv[1:]
for number in range(int(count)):
    pid = os.fork()
    if pid == 0:
        fields = {"product_name": name, "version": str(number), "invoke_id": f"{name}-{number}"}
        plan = wrapper.Plan("build", fields, ["true"], lambda: Outbox(path), lambda words: print(words, flush=True))
        os._exit(wrapper.run(plan))
    assert os.waitpid(pid, 0) == (pid, 0)
"""


@pytest.fixture
def path(tmp_path):
    directory = tmp_path / "outbox"
    directory.mkdir(mode=0o700)
    run(directory / "outbox.db", "true", fields=FIELDS | {"invoke_id": "first"})
    return directory / "outbox.db"


def look(path):
    """Do what whoever delivers does."""
    with contextlib.closing(Store(path)) as store:
        ledger = Ledger(store)
        ledger.open(create=False)
        Orphans(ledger).look(1e9)


def of_run(path, invoke_id):
    return [status for status, body in events_of(path) if body["invoke_id"] == invoke_id]


def left(path):
    """The job files that are not just unfinished."""
    return [name for name in files(path) if not name.endswith(".new")]


@needs_strace
@sweep
def test_a_wrapper_killed_anywhere_has_one_end_if_its_start_was_queued(path, chosen):
    env = dict(os.environ)

    def command(invoke_id):
        return wrapped(path, "true", fields=FIELDS | {"invoke_id": invoke_id})

    points = points_of(command("traced"), CALLS, env=env)
    assert len(points) > 40
    seen = set()
    for call, number in chosen(points):
        invoke_id = f"{call}-{number}"
        was_killed, _ = killed_at(call, number, command(invoke_id), env=env)
        assert was_killed, invoke_id
        before = of_run(path, invoke_id)
        look(path)
        after = of_run(path, invoke_id)
        assert after in ([], ["started", "aborted"], ["started", "completed"]), invoke_id
        assert bool(after) == bool(before)
        assert left(path) == [], invoke_id
        look(path)
        assert of_run(path, invoke_id) == after
        seen.add((tuple(before), tuple(after)))

    assert seen == {
        ((), ()),
        (("started",), ("started", "aborted")),
        (("started",), ("started", "completed")),  # it knew how the command had ended
        (("started", "completed"), ("started", "completed")),
    }


@needs_strace
@sweep
def test_who_queues_the_end_can_be_killed_anywhere_too(path, tmp_path, chosen):
    env = dict(os.environ)
    command = (sys.executable, "-c", LOOK, str(path))

    def orphan(invoke_id):
        process = subprocess.Popen(
            wrapped(path, "cat", fields=FIELDS | {"invoke_id": invoke_id}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        eventually(lambda: b'{"started":true}' in b"".join((path.parent / name).read_bytes() for name in left(path)))
        process.kill()
        process.communicate()

    orphan("traced")
    points = points_of(command, CALLS, env=env)
    assert of_run(path, "traced") == ["started", "aborted"]
    assert {call for call, _ in points} >= {"pwrite64", "fdatasync", "unlink", "flock"}
    for call, number in chosen(points):
        invoke_id = f"{call}-{number}"
        orphan(invoke_id)
        was_killed, _ = killed_at(call, number, command, env=env)
        assert was_killed, invoke_id
        look(path)
        assert of_run(path, invoke_id) == ["started", "aborted"], invoke_id
        assert left(path) == []


def test_a_living_wrapper_is_never_taken_for_a_dead_one(path, child):
    """Somebody looks all the time while wrappers start and end, several at once."""
    running = [child(MANY, path, f"product-{number}", 50) for number in range(3)]
    moment = 0.0
    with contextlib.closing(Store(path)) as store:
        ledger = Ledger(store)
        ledger.open(create=False)
        orphans = Orphans(ledger)
        while any(each.process.poll() is None for each in running):
            moment += 100
            orphans.look(moment)

    assert [each.ends() for each in running] == [0, 0, 0]
    assert [each.process.stdout.read() for each in running] == ["", "", ""]
    for name in ("product-0", "product-1", "product-2"):
        for number in range(50):
            assert of_run(path, f"{name}-{number}") == ["started", "completed"]
    assert files(path) == []


@pytest.fixture
def api(serve):
    return serve(lambda seen: accepted(f"evt-{seen.key}"))


def arrived(server):
    return [(seen.event["invoke_id"], seen.event["status"]) for seen in server.firsts()]


@pytest.fixture
def started():
    """Start wrapped commands that have begun and wait for their stdin; they are gone in the end."""
    running = []

    def start(host, *, invoke_id, code=0, **options):
        command = ("sh", "-c", f"echo ready; read line; exit {code}")
        line = wrapped(host.path, *command, fields=FIELDS | {"invoke_id": invoke_id}, **options)
        running.append(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=host.env))
        assert running[-1].stdout.readline() == b"ready\n"
        return running[-1]

    yield start
    for process in running:
        if process.returncode is None:
            kill(process)


def kill(process):
    process.kill()
    process.communicate()


def test_a_running_agent_ends_the_job_of_a_killed_wrapper(host_for, api, started):
    host = host_for(api.url)
    agent = host.agent()
    process = started(host, invoke_id="1")
    eventually(lambda: arrived(api) == [("1", "started")])

    kill(process)

    eventually(lambda: arrived(api) == [("1", "started"), ("1", "aborted")])
    assert api.firsts()[-1].event["extra_metadata"]["error"] == UNKNOWN
    assert "sh, started" in agent.log.read_text()
    assert left(host.path) == []


def test_an_agent_that_starts_later_ends_it(host_for, api, started):
    host = host_for(api.url)
    kill(started(host, invoke_id="1"))

    host.agent()

    eventually(lambda: arrived(api) == [("1", "started"), ("1", "aborted")])


def test_an_agent_leaves_a_living_wrapper_alone(host_for, api, started):
    host = host_for(api.url)
    first = started(host, invoke_id="1")
    second = started(host, invoke_id="2")
    host.agent()
    kill(second)
    eventually(lambda: ("2", "aborted") in arrived(api))

    first.communicate(b"go\n", timeout=30)

    assert first.returncode == 0
    eventually(lambda: len(arrived(api)) == 4)
    assert sorted(arrived(api)) == [("1", "completed"), ("1", "started"), ("2", "aborted"), ("2", "started")]


def test_a_flush_ends_it_even_if_nothing_else_is_pending(host_for, api, started):
    host = host_for(api.url)
    process = started(host, invoke_id="1")
    assert host.run("flush").returncode == 0
    assert arrived(api) == [("1", "started")]
    kill(process)

    done = host.run("flush")

    assert done.returncode == 0, done.stderr
    assert arrived(api) == [("1", "started"), ("1", "aborted")]
    assert b"its wrapper was killed" in done.stderr


def test_a_flush_leaves_the_jobs_of_a_shared_outbox_to_its_agent(host_for, api, started):
    host = host_for(api.url)
    kill(started(host, invoke_id="1"))
    os.chmod(os.path.dirname(host.path), 0o770)

    assert host.run("flush", "--timeout", "0").returncode == 75

    assert statuses(host.path) == ["started"]
    assert len(left(host.path)) == 1


def test_an_end_that_could_not_be_queued_is_delivered_as_it_was(host_for, api, started):
    host = host_for(api.url)
    process = started(host, invoke_id="1", code=9, busy_timeout=0.05)
    with contextlib.closing(WriteQueue(f"{host.path}.queue")) as queue:
        assert queue.acquire(1)
        process.communicate(b"go\n", timeout=30)

    assert process.returncode == 9
    assert host.run("flush").returncode == 0
    last = api.firsts()[-1].event
    assert (last["status"], last["extra_metadata"]["exit_code"]) == ("failed", 9)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_wrappers_and_an_agent_that_is_killed_and_started_again(host_for, api, started, number):
    host = host_for(api.url)
    agent = host.agent()
    processes = [started(host, invoke_id=str(run)) for run in range(4)]
    killers = [threading.Thread(target=kill, args=[process]) for process in processes[:2]]
    for killer in killers:
        killer.start()
    agent.send_signal(number)
    agent.wait(30)
    for killer in killers:
        killer.join()
    host.agent()
    for process in processes[2:]:
        process.communicate(b"go\n", timeout=30)

    ends = {("0", "aborted"), ("1", "aborted"), ("2", "completed"), ("3", "completed")}
    eventually(lambda: set(arrived(api)) == ends | {(str(run), "started") for run in range(4)})
    assert len(arrived(api)) == 8
    assert left(host.path) == []
