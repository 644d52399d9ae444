"""A large array is queued as a whole: who dies after publishing it leaves nothing behind that waits for ever."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from host import eventually
from scripted import accepted

DIE_AFTER_PUBLISHING = """
import os, signal, sys
from versioner_agent import batches, bodies, outbox
batches.hand_over_batch = lambda store: os.kill(os.getpid(), signal.SIGKILL)
valid = bodies.validate_all(bodies.parse_json(sys.stdin.buffer.read()), "build")
outbox.Outbox(sys.argv[1]).enqueue_all(valid)
"""


def lines(count):
    events = ({"product_name": f"p{n % 3}", "version": str(n), "status": "ok"} for n in range(count))
    return "\n".join(json.dumps(event) for event in events).encode()


@pytest.mark.parametrize("command", ["run", "flush"])
def test_a_published_batch_is_delivered_though_nothing_else_is_queued(host_for, serve, command):
    server = serve(lambda _seen: accepted())
    host = host_for(server.url)
    died = subprocess.run(
        [sys.executable, "-c", DIE_AFTER_PUBLISHING, host.path], input=lines(1200), env=host.env, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert host.counts() == {"pending": 1200}

    if command == "run":
        host.agent()
        eventually(lambda: host.counts() == {"delivered": 1200})
    else:
        assert host.run("flush").returncode == 0

    assert host.counts() == {"delivered": 1200}
    for product in ("p0", "p1", "p2"):
        versions = [int(seen.event["version"]) for seen in server.firsts() if seen.product == product]
        assert versions == sorted(versions)


def test_events_queued_beside_a_batch_keep_the_order_of_their_product(host_for, serve):
    """While a batch is staged and handed over, others queue the same product and an agent delivers."""
    server = serve(lambda _seen: accepted())
    host = host_for(server.url)
    host.agent()
    batch = subprocess.Popen(
        (sys.executable, "-m", "versioner_agent", "enqueue", "json", "--kind", "build"),
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=host.env,
    )  # fmt: skip
    batch.stdin.write(lines(2000))
    batch.stdin.close()
    count = 0
    while batch.poll() is None:
        count += 1
        host.queue("p0", first=100_000 + count)
    after = host.queue("p0", first=999_999)
    eventually(lambda: host.counts() == {"delivered": 2000 + count + 1}, within=60)

    assert batch.returncode == 0
    versions = [int(seen.event["version"]) for seen in server.firsts() if seen.product == "p0"]
    for chosen in ([v for v in versions if v < 100_000], [v for v in versions if v >= 100_000]):
        assert chosen == sorted(chosen)
    assert versions[-1] == 999_999
    assert host.record(after[0])[0].state == "delivered"
