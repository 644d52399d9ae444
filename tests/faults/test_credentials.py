"""Keys that are revoked, missing or replaced: events wait, the API is asked rarely, and a new key needs no restart."""

from __future__ import annotations

import os

import pytest
from host import KEY, eventually
from scripted import accepted, refused

NEW_KEY = "sk_acme_k2_freshsecret"


@pytest.fixture
def api(serve):
    """An API that knows one key, which a test may change."""

    def script(seen):
        is_known = seen.headers["authorization"] == f"Bearer {server.key}"
        return accepted(f"evt-{seen.key}") if is_known else refused(401, "Invalid API key")

    server = serve(script)
    server.key = NEW_KEY
    return server


@pytest.fixture
def host(host_for, api):
    """A host that reads its key from a file."""
    made = host_for(api.url)
    del made.env["VERSIONER_API_KEY"]
    made.key_file = made.directory / "api_key"
    made.env["VERSIONER_AGENT_API_KEY_FILE"] = str(made.key_file)
    made.key_file.write_text(KEY)
    return made


def test_a_revoked_key_fails_nothing_and_a_new_one_is_picked_up_without_a_restart(host, api):
    for number in range(20):
        host.queue(f"p{number}", 50)
    # The longest pause is longer than this test: what is asked at all is the beginning of the backoff.
    agent = host.agent(VERSIONER_AGENT_MAX_BACKOFF="3")
    eventually(lambda: host.health().state == "unauthorized")
    api.wait_for(8)
    asked = len(api.requests)
    text = host.run("status").stdout.decode()
    (status,) = host.json("status")

    assert host.counts() == {"pending": 1000}
    assert asked <= 12
    assert api.most_under_way <= 4
    assert status["destination"]["reason"] == "Invalid API key"
    assert "check the API key (VERSIONER_API_KEY, api_key_file)" in text

    host.key_file.write_text(NEW_KEY)
    eventually(lambda: host.counts() == {"delivered": 1000})
    assert agent.poll() is None
    assert host.health().state == "up"
    for product in range(20):
        order = [int(seen.event["version"]) for seen in api.firsts() if seen.product == f"p{product}"]
        assert order == sorted(order)
    assert KEY.encode() not in host.said()
    assert NEW_KEY.encode() not in host.said()


def test_a_key_that_is_revoked_in_the_middle_stops_deliveries_and_nothing_else(host, api):
    host.key_file.write_text(NEW_KEY)
    host.queue("payments", 50)
    host.agent()
    eventually(lambda: host.counts().get("delivered", 0) > 5)
    api.key = "sk_acme_k3_other"
    eventually(lambda: host.health().state == "unauthorized" or "pending" not in host.counts())
    host.queue("payments", 5, first=100)
    eventually(lambda: host.health().state == "unauthorized")

    assert "failed" not in host.counts()
    host.key_file.write_text("sk_acme_k3_other")
    eventually(lambda: host.counts() == {"delivered": 55})


@pytest.mark.parametrize("loss", ["missing", "empty"])
def test_an_agent_without_a_key_says_so_and_waits_for_one(host, api, loss):
    host.key_file.unlink() if loss == "missing" else host.key_file.write_text("\n")
    host.queue("payments", 3)
    agent = host.agent()
    eventually(lambda: host.health().state == "unauthorized")
    words = host.run("status").stdout.decode()

    assert "no API key" in agent.log.read_text()
    assert str(host.key_file) in words if loss == "missing" else "there is no API key" in words
    assert api.requests == []
    assert host.counts() == {"pending": 3}
    host.key_file.write_text(NEW_KEY)
    eventually(lambda: host.counts() == {"delivered": 3})
    assert len(api.requests) == 3
    assert agent.poll() is None


@pytest.mark.parametrize("loss", ["missing", "empty", "unset"])
def test_a_flush_without_a_key_exits_3_and_says_what_is_missing(host, api, loss):
    host.queue("payments")
    host.key_file.unlink() if loss == "missing" else host.key_file.write_text("")
    if loss == "unset":
        del host.env["VERSIONER_AGENT_API_KEY_FILE"]

    done = host.run("flush", "--timeout", "1")

    assert done.returncode == 3
    assert str(host.key_file).encode() in done.stderr if loss == "missing" else b"VERSIONER_API_KEY" in done.stderr
    assert b"Traceback" not in done.stderr
    assert host.counts() == {"pending": 1}
    assert api.requests == []


def test_a_revoked_key_ends_a_flush_with_75_and_the_reason(host):
    host.queue("payments")

    done = host.run("flush", "--timeout", "0.5")

    assert done.returncode == 75
    assert b"unauthorized: Invalid API key" in done.stderr
    assert host.counts() == {"pending": 1}


@pytest.mark.parametrize("kind", ["pipe", "directory", "endless", "not UTF-8"])
def test_a_key_file_that_becomes_something_else_is_named_and_gets_over_it(host, api, kind):
    host.key_file.write_text(NEW_KEY)
    agent = host.agent()
    host.queue("payments")
    eventually(lambda: host.counts() == {"delivered": 1})
    host.key_file.unlink()
    if kind == "pipe":
        os.mkfifo(host.key_file)
    elif kind == "directory":
        host.key_file.mkdir()
    elif kind == "endless":
        host.key_file.symlink_to("/dev/zero")
    else:
        host.key_file.write_bytes(b"sk_acme_\xff\xfe")
    host.queue("payments", first=2)
    eventually(lambda: host.health().state == "unauthorized")

    assert str(host.key_file) in host.health().reason
    assert host.counts() == {"delivered": 1, "pending": 1}
    host.key_file.rmdir() if kind == "directory" else host.key_file.unlink()
    host.key_file.write_text(NEW_KEY)
    eventually(lambda: host.counts() == {"delivered": 2})
    assert host.end(agent) == 0
