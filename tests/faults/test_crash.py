"""SIGKILL at every system call that writes, syncs, sends or receives: what exited 0 arrives, and nothing else goes wrong.

`enqueue` and the one who delivers are killed from outside, without any code for it in the product.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3

import pytest
from crash import (
    COMMAND,
    DISK,
    NETWORK,
    killed_at,
    killed_in_background,
    needs_strace,
    points_of,
    side_by_side,
    sweep,
    traced,
)
from host import eventually
from scripted import accepted
from specimen import records_of

from versioner_agent import damage
from versioner_agent.storage import Store

pytestmark = needs_strace
FLUSH = (*COMMAND, "flush", "--timeout", "30")
PRODUCTS = ("payments", "orders", "web")


def enqueue(version, product="payments"):
    return (*COMMAND, "enqueue", "build", "--product", product, "--version", str(version))


def check_sound(path):
    """Nothing to rescue: the file is sound, and every record in a state of its own."""
    with contextlib.closing(Store(path)) as store:
        assert damage.find(store) is None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert {kept.state for kept in records_of(path).values()} <= {"pending", "delivered"}


def check_arrived(server, acknowledged, kills, *, concurrency=4):
    """All that was acknowledged arrived, nothing unknown did, repeats are the same to the byte, order is kept."""
    firsts, requests = server.firsts(), list(server.requests)
    versions = {(seen.product, int(seen.event["version"])) for seen in firsts}
    assert acknowledged <= versions
    assert len({(seen.key, seen.body) for seen in requests}) == len(firsts) == len(versions)
    assert len(requests) - len(firsts) <= kills * concurrency
    for product in {seen.product for seen in firsts}:
        arrived = [int(seen.event["version"]) for seen in firsts if seen.product == product]
        assert arrived == sorted(arrived)
    return versions - acknowledged


@pytest.fixture
def server(serve):
    return serve(lambda seen: accepted(f"evt-{seen.key}"))


def test_the_sync_precedes_the_exit_status(host_for):
    """The database is written and synced, its journal ended and synced; only then the receipt is printed."""
    host = host_for()
    host.queue("payments")
    done, calls = traced(enqueue(2), ("openat", "pwrite64", "fdatasync", "write", "exit_group"), env=host.env)
    fds = {}
    for name, line in calls:
        for suffix in ("", "-journal"):
            if name == "openat" and f'"{host.path}{suffix}"' in line:
                fds[suffix] = line.rpartition("= ")[2]
    steps = [
        (name, suffix)
        for name, line in calls
        for suffix, fd in fds.items()
        if name in ("pwrite64", "fdatasync") and line.startswith((f"{name}({fd},", f"{name}({fd})"))
    ]
    told = next(at for at, (name, line) in enumerate(calls) if name == "write" and "queued 2" in line)

    assert done.returncode == 0
    assert steps[-4:] == [("pwrite64", ""), ("fdatasync", ""), ("pwrite64", "-journal"), ("fdatasync", "-journal")]
    assert steps[0] == ("pwrite64", "-journal")
    assert ("fdatasync", "-journal") in steps[: steps.index(("pwrite64", ""))]
    assert not any(name in ("pwrite64", "fdatasync") for name, _ in calls[told:])
    assert calls[-1][0] == "exit_group"


@sweep
def test_the_first_enqueue_killed_anywhere_leaves_an_outbox_that_the_next_can_use(host_for, chosen):
    points = points_of(enqueue(0), DISK, env=host_for().env)
    assert len(points) > 60

    def check(host, call, number):
        was_killed, _ = killed_at(call, number, enqueue(1), env=host.env)
        assert was_killed, (call, number)
        done = host.run("enqueue", "build", "--product", "payments", "--version", "2")
        assert done.returncode == 0, (call, number, done.stderr)
        check_sound(host.path)
        versions = [json.loads(kept.payload)["version"] for kept in records_of(host.path).values()]
        assert versions in (["2"], ["1", "2"]), (call, number)

    side_by_side(check, [(host_for(), *point) for point in chosen(points)])


def test_what_an_enqueue_acknowledged_arrives_wherever_others_were_killed(host_for, server):
    host = host_for(server.url)
    host.queue("payments")
    points = points_of(enqueue(2), DISK, env=host.env)
    assert len(points) > 25
    acknowledged = {("payments", 1), ("payments", 2)}
    version = 2
    for call, number in points:
        version += 1
        was_killed, _ = killed_at(call, number, enqueue(version), env=host.env)
        assert was_killed, (call, number)
        version += 1
        host.queue("payments", first=version)
        acknowledged.add(("payments", version))
    check_sound(host.path)

    assert host.run("flush").returncode == 0

    unsure = check_arrived(server, acknowledged, 0)
    assert len(unsure) < len(points)
    check_sound(host.path)


@pytest.mark.parametrize("most", [10, pytest.param(1000, marks=pytest.mark.long)])
def test_a_large_array_killed_anywhere_is_queued_as_a_whole_or_not_at_all(host_for, most):
    host = host_for()
    host.queue("other")
    events = [{"product_name": "payments", "version": str(n), "status": "ok"} for n in range(1100)]
    body = "\n".join(map(json.dumps, events)).encode()
    command = (*COMMAND, "enqueue", "json", "--kind", "build")
    points = points_of(command, ("fdatasync", "flock"), env=host.env, stdin=body)
    expected = 1101
    for call, number in points[:: -(-len(points) // most)]:
        was_killed, _ = killed_at(call, number, command, env=host.env, stdin=body)
        assert was_killed, (call, number)
        queued = host.counts()["pending"]
        assert queued in (expected, expected + 1100), (call, number)
        expected = queued


def deliver_killed(host, server, command, calls, stride):
    """Queue a little, deliver it until killed at the next point, and again; in the end everything is delivered."""
    version = kills = 0

    def queue():
        nonlocal version
        version += 1
        for product in PRODUCTS:
            host.queue(product, 2, first=2 * version)

    queue()
    points = points_of(FLUSH, calls, env=host.env)
    assert len(points) >= 10  # two answers of a product are two commits at least, of five syncs each
    chosen = points[::stride]
    for call, number in chosen:
        queue()
        if command == "flush":
            was_killed, done = killed_at(call, number, FLUSH, env=host.env)
            assert was_killed or done.returncode == 0, done.stderr
        else:
            run = (*COMMAND, "run")
            was_killed = killed_in_background(call, number, run, lambda: "pending" not in host.counts(), env=host.env)
        kills += was_killed
    assert kills > len(chosen) // 2
    eventually(lambda: not host.presence().is_delivering)
    done = host.run("flush", "--timeout", "30")

    assert done.returncode == 0, done.stderr
    everything = {(product, n) for product in PRODUCTS for n in range(2, 2 * version + 2)}
    assert check_arrived(server, everything, kills) == set()
    assert host.counts() == {"delivered": len(everything)}
    check_sound(host.path)


@pytest.mark.parametrize(("calls", "stride"), [(NETWORK, 2), (("fdatasync",), 3), (("pwrite64",), 24)])
def test_who_delivers_killed_anywhere_loses_nothing_and_repeats_little(host_for, serve, calls, stride):
    def deliver(host, server, command):
        try:
            deliver_killed(host, server, command, calls, stride)
        finally:
            host.close_outbox()  # SQLite has it closed by the thread that opened it

    servers = [serve(lambda seen: accepted(f"evt-{seen.key}")) for _ in range(2)]
    side_by_side(
        deliver,
        [(host_for(server.url), server, command) for server, command in zip(servers, ("flush", "run"), strict=True)],
    )


@pytest.mark.long
@pytest.mark.parametrize("command", ["flush", "run"])
@pytest.mark.parametrize("calls", [NETWORK, ("fdatasync",), ("pwrite64",)])
def test_who_delivers_killed_at_every_single_call(host_for, server, command, calls):
    deliver_killed(host_for(server.url), server, command, calls, 1)
