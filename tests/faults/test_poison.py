"""Events that never go through, and parts of the API that do not: they hold up nobody but themselves."""

from __future__ import annotations

import functools

import pytest
from bench import DELIVERED, POISON, SILENCE, UNAVAILABLE
from host import eventually
from scripted import accepted, hanging, refused

from versioner_agent import Outbox


def is_poison(seen):
    return seen.event["version"] == "poison"


def is_delivered(host, record_id):
    return host.record(record_id)[0].state == "delivered"


def queue_poison(host):
    with Outbox(host.path) as outbox:
        return outbox.enqueue("build", {"product_name": "sick", "version": "poison", "status": "ok"}).id


def deliver_and_try(host, poison, fresh):
    """A fresh event is delivered, then the poisoned one is tried again."""
    before = host.record(poison)[0]
    host.queue("fresh", first=fresh)
    eventually(lambda: host.counts()["delivered"] == 999 + fresh)
    eventually(lambda: host.record(poison)[0].attempts > before.attempts)


def test_one_poisoned_event_among_a_thousand_holds_up_none_and_is_given_up_by_the_rule(host_for, serve):
    """Only answers with a delivery of another event in between count; then it is shown as what it is."""
    server = serve(lambda seen: refused(500, "division by zero") if is_poison(seen) else accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    host.queue("other", 500)
    poison = queue_poison(host)
    host.queue("more", 499)
    limits = {"VERSIONER_AGENT_MAX_EVENT_ATTEMPTS": "15", "VERSIONER_AGENT_GIVE_UP_AFTER": "0"}
    # So long a pause that even a slow disk has recorded a thousand deliveries before the last of the tries.
    agent = host.agent(VERSIONER_AGENT_MAX_BACKOFF="120", **limits)
    eventually(lambda: host.counts().get("delivered") == 999)
    assert host.counts() == {"delivered": 999, "pending": 1}
    (held,) = host.json("status")[0]["held"]
    assert (held["product_name"], held["id"]) == ("sick", poison)
    assert host.record(poison)[0].counted < 15

    assert host.end(agent) == 0
    agent = host.agent(**limits)
    fresh = 0
    while host.record(poison)[0].state == "pending":
        fresh += 1
        deliver_and_try(host, poison, fresh)

    record, _, _ = host.record(poison)
    (failure,) = host.json("list", "--state", "failed")
    assert (record.state, record.reason, record.counted) == ("failed", "gave_up", 15)
    assert record.detail == "gave up after 15 answers while other events were delivered: division by zero"
    assert failure["id"] == poison
    assert "gave_up" in agent.log.read_text()
    assert host.run("retry", str(poison)).returncode == 0


def test_without_deliveries_in_between_no_event_is_ever_given_up(host_for, serve):
    server = serve(lambda _: refused(500, "on fire"))
    host = host_for(server.url)
    host.queue("a", 3)
    host.queue("b", 3)
    host.agent(VERSIONER_AGENT_MAX_EVENT_ATTEMPTS="3", VERSIONER_AGENT_GIVE_UP_AFTER="0")
    server.wait_for(60)

    assert host.counts() == {"pending": 6}


def test_a_product_whose_every_event_is_refused_does_not_slow_others(host_for, serve):
    def script(seen):
        return refused(422, "no such product") if seen.product == "refused" else accepted(f"evt-{seen.key}")

    server = serve(script)
    host = host_for(server.url)
    host.queue("refused", 200)
    for number in range(4):
        host.queue(f"p{number}", 50)
    host.agent()
    eventually(lambda: host.counts() == {"delivered": 200, "failed": 200})

    # Side by side: neither had to wait until the other was done.
    order = [seen.product == "refused" for seen in server.requests]
    assert abs(sum(order[:200]) - 100) < 90
    assert len(server.requests) == 400


def test_a_shard_that_answers_503_for_hours_fails_nothing_and_holds_up_nobody(bench):
    b = bench(concurrency=4)
    shard = [f"shard-{letter}" for letter in "abcdef"]
    for product in shard:
        b.queue(product, 2)
    delivered = 0
    for minute in range(10 * 60):
        if minute % 10 == 0:
            # The longest backoff is two minutes: the last one has gone long ago.
            assert b.states().get("delivered", 0) == delivered
            delivered += 1
            b.queue("healthy", first=delivered)
        b.step(after=60.0)
        while b.wire._waiting:
            b.answer(*((product, DELIVERED if product == "healthy" else UNAVAILABLE) for product in b.wire._waiting))

    assert b.failed == []
    assert b.states() == {"pending": 12, "delivered": delivered}
    assert all(set(b.wire.versions(product)) == {"1"} for product in shard)


@pytest.mark.parametrize("poison", [POISON, SILENCE], ids=["500", "silence"])
@pytest.mark.parametrize("took", [0.0, 30.0])
def test_a_poisoned_event_alone_in_the_outbox_delays_a_fresh_one_by_at_most_the_longest_backoff(bench, poison, took):
    """Also where it makes the API hang until the deadline: that is part of the interval between probes."""
    b = bench(max_backoff=120.0)
    b.queue("sick")
    for _ in range(30):
        if b.step(after=60.0):
            b.answer(("sick", poison), took=took)
    queued_at = b.now
    b.queue("fresh")
    while "fresh" not in b.wire._waiting:
        b.step(after=1.0)
        if "sick" in b.wire._waiting:
            b.now += took  # so long it hangs, and the others wait
            b.answer(("sick", poison), took=took)
        assert b.now - queued_at <= 121


def test_a_poisoned_event_that_hangs_does_not_keep_a_fresh_one_from_a_real_agent(host_for, serve):
    server = serve(lambda seen: hanging() if is_poison(seen) else accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    queue_poison(host)
    host.agent(VERSIONER_AGENT_TIMEOUT="0.3", VERSIONER_AGENT_MAX_BACKOFF="1")
    server.wait_for(6)
    for version in range(5):
        (record_id,) = host.queue("fresh", first=version)
        eventually(functools.partial(is_delivered, host, record_id))

    assert host.record(1)[0].state == "pending"


@pytest.mark.parametrize("wait_s", [None, 3600.0], ids=["503", "503 with Retry-After"])
def test_many_products_in_trouble_do_not_starve_one_that_is_well(bench, wait_s):
    """Thirty of them, each with its own backoff, beside one that has something every few minutes."""
    b = bench(concurrency=4)
    for number in range(30):
        b.queue(f"a-{number:02}", 2)  # before the healthy one, by name and by age
    b.queue("well", 20)
    seconds = 0
    while b.states().get("delivered", 0) < 20:
        seconds += 1
        assert seconds < 600
        b.step(after=1.0)
        while b.wire._waiting:
            trouble = UNAVAILABLE._replace(wait_s=wait_s)
            b.answer(*((product, DELIVERED if product == "well" else trouble) for product in list(b.wire._waiting)))

    assert b.failed == []
    assert b.wire.versions("well") == [str(number) for number in range(1, 21)]


@pytest.mark.parametrize("trouble", [UNAVAILABLE, SILENCE], ids=["503", "silence"])
def test_a_fresh_event_is_asked_with_before_those_that_failed_however_many_they_are(bench, trouble):
    """Of a product that was well, though forty others were since, and of one that is new."""
    b = bench(concurrency=4)
    well = [f"well-{number:02}" for number in range(40)]
    for product in well:
        b.queue(product)
    b.drain()
    sick = [f"a-{number:02}" for number in range(40)]
    for product in sick:
        b.queue(product, 2)

    def answer():
        while b.wire._waiting:
            b.answer(*((product, trouble if product in sick else DELIVERED) for product in list(b.wire._waiting)))

    for _ in range(600):
        b.step(after=10.0)
        answer()
    for version, product in enumerate([well[0], "a-new", well[20], well[39]], start=2):
        b.queue(product, first=version)
        tried = len(b.wire.sent)
        for _ in range(121):
            b.step(after=1.0)
            if product in b.wire._waiting or b.states()["pending"] == 80:
                break
            answer()
        answer()
        probes = [name for name, _, _ in b.wire.sent[tried:]]
        assert str(version) in b.wire.versions(product)
        assert probes.index(product) <= 1

    assert b.failed == []


def test_a_product_that_was_well_is_asked_with_before_those_that_are_new(bench):
    """Forty new ones that will all fail, before it by name and by age."""
    b = bench()
    b.queue("well")
    b.drain()
    b.queue("sick-1")
    b.queue("sick-2")
    while not b.flusher._pace.is_open:
        b.step(after=10.0)
        b.answer_all(UNAVAILABLE)
    for number in range(40):
        b.queue(f"a-{number:02}")
    b.queue("well", first=2)
    tried = len(b.wire.sent)
    b.step(after=121.0)

    assert [product for product, _, _ in b.wire.sent[tried:]] == ["well"]
