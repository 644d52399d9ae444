"""The reason this exists: the API is away, events are queued all the same, and arrive in order when it is back."""

from __future__ import annotations

import json

from host import eventually, free_port

from versioner_agent.sandbox import Misbehaviour, Sandbox

PRODUCTS = ("payments", "orders", "web", "search", "billing")


def payloads(sandbox):
    return [event["payload"] for event in sandbox.events]


def test_events_queued_in_an_outage_arrive_once_and_in_order_and_a_refusal_is_shown(host_for):
    port = free_port()
    host = host_for(f"http://127.0.0.1:{port}")
    host.agent()
    for version in range(1, 13):
        for product in PRODUCTS:
            host.queue(product, first=version)
    eventually(lambda: host.health().state == "down")
    assert host.counts() == {"pending": 60}

    with Sandbox(port) as sandbox:
        eventually(lambda: host.counts() == {"delivered": 60})
        arrived = payloads(sandbox)
        assert len(arrived) == 60
        for product in PRODUCTS:
            versions = [event["version"] for event in arrived if event["product_name"] == product]
            assert versions == [str(number) for number in range(1, 13)]

        # The version is bound to its first commit: another one is a conflict, for good.
        host.queue("payments", first=100, scm_sha="aaa")
        (refused,) = host.queue("payments", first=100, scm_sha="bbb")
        eventually(lambda: host.counts() == {"delivered": 61, "failed": 1})

    (listed,) = host.json("list", "--state", "failed")
    (shown,) = host.json("show", str(refused))
    (status,) = host.json("status")
    assert (listed["id"], listed["reason"], listed["http_status"]) == (refused, "conflict", 409)
    assert "different SHA" in listed["detail"]
    assert shown["payload"]["scm_sha"] == "bbb"
    assert [(each["outcome"], each["http_status"]) for each in shown["attempt_log"]] == [("conflict", 409)]
    assert status["last_failure"]["id"] == refused
    assert status["counts"] == {"pending": 0, "delivered": 61, "failed": 1, "exported": 0, "discarded": 0}
    for command in (("list",), ("show", str(refused)), ("status",)):
        assert b"different SHA" in host.run(*command).stdout


def test_an_api_that_goes_away_and_comes_back_gets_every_event_once(host_for):
    port = free_port()
    host = host_for(f"http://127.0.0.1:{port}")
    host.agent()
    state = None
    for turn in range(3):
        host.queue("payments", 10, first=1 + 10 * turn)
        with Sandbox(port, state=state) as sandbox:
            state = sandbox.state
            eventually(lambda: host.counts().get("pending") is None)

    versions = [event["payload"]["version"] for event in state.events()]
    assert versions == [str(number) for number in range(1, 31)]


def test_an_unsteady_api_gets_every_event_once_and_in_order(host_for):
    with Sandbox(misbehaviour=Misbehaviour(fail=(503, 500, 502), rate=0.3)) as sandbox:
        host = host_for(sandbox.url)
        for product in PRODUCTS:
            host.queue(product, 10)

        done = host.run("flush", "--timeout", "50")

        assert done.returncode == 0, done.stderr
        for product in PRODUCTS:
            versions = [event["version"] for event in payloads(sandbox) if event["product_name"] == product]
            assert versions == [str(number) for number in range(1, 11)]


def test_a_host_that_was_queued_to_without_any_configuration_is_drained_by_flush(host_for):
    with Sandbox() as sandbox:
        host = host_for(sandbox.url)
        done = host.run(
            *("enqueue", "json"),
            stdin="\n".join(
                json.dumps({"product_name": "web", "version": str(number), "status": "success"}) for number in range(3)
            ).encode(),
            VERSIONER_API_URL="",
            VERSIONER_API_KEY="",
        )
        assert done.returncode == 0, done.stderr

        assert host.run("flush").returncode == 0
        assert [event["version"] for event in payloads(sandbox)] == ["0", "1", "2"]
