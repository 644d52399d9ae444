"""One product in trouble does not stop the others, and its events still arrive in order."""

from __future__ import annotations

import threading

import pytest
from host import eventually
from scripted import accepted, hanging, refused


@pytest.mark.parametrize("trouble", [refused(503), refused(500), hanging()], ids=["503", "500", "hanging"])
def test_others_flow_while_one_product_is_in_trouble_and_it_follows_in_order(host_for, serve, trouble):
    is_well = threading.Event()
    server = serve(lambda seen: trouble if seen.product == "slow" and not is_well.is_set() else accepted())
    host = host_for(server.url)
    slow = host.queue("slow", 5)
    for product in ("a", "b", "c"):
        host.queue(product, 20)
    host.agent("--request-timeout", "1")

    eventually(lambda: host.counts() == {"delivered": 60, "pending": 5})
    assert {seen.event["version"] for seen in server.requests if seen.product == "slow"} == {"1"}
    is_well.set()
    eventually(lambda: host.counts() == {"delivered": 65})

    for product, count in (("slow", 5), ("a", 20), ("b", 20), ("c", 20)):
        versions = [seen.event["version"] for seen in server.firsts() if seen.product == product]
        assert versions == [str(number) for number in range(1, count + 1)]
    assert [host.record(each)[0].state for each in slow] == ["delivered"] * 5


def test_an_event_that_always_fails_does_not_keep_others_waiting_after_an_outage(host_for, serve):
    """Its name sorts first, so whoever looks for something to try finds it first."""
    server = serve(lambda seen: refused(500, "a bug") if seen.product == "aaa" else accepted())
    server.stop()
    host = host_for(server.url)
    for product in ("aaa", "bbb", "ccc"):
        host.queue(product, 2)
    host.agent()
    eventually(lambda: host.health().state == "down")
    threading.Event().wait(1.0)  # every product has been tried by now, or this shows less than it could

    server.start()

    eventually(lambda: host.counts() == {"delivered": 4, "pending": 2}, within=10)


def test_no_product_has_two_requests_under_way(host_for, serve):
    lock, under_way, worst = threading.Lock(), {}, []

    def script(seen):
        with lock:
            under_way[seen.product] = under_way.get(seen.product, 0) + 1
            worst.append(under_way[seen.product])
        threading.Event().wait(0.002)
        with lock:
            under_way[seen.product] -= 1
        return accepted()

    server = serve(script)
    host = host_for(server.url)
    for product in ("a", "b"):
        host.queue(product, 40)

    assert host.run("flush", "--concurrency", "8").returncode == 0
    assert max(worst) == 1
    assert len(server.requests) == 80


def test_concurrency_is_a_limit(host_for, serve):
    def script(_):
        threading.Event().wait(0.02)
        return accepted()

    server = serve(script)
    host = host_for(server.url)
    for number in range(40):
        host.queue(f"product-{number}")

    assert host.run("flush", "--concurrency", "3").returncode == 0
    assert server.most_under_way <= 3
