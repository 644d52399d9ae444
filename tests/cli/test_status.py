"""`status`: documented keys, the truth from another process, and nothing disturbed."""

from __future__ import annotations

import json
import os

import pytest
from host import eventually
from scripted import accepted, refused

KEYS = {
    "outbox": ["path", "bytes", "other_machine"],
    "counts": ["pending", "delivered", "failed", "exported", "discarded"],
    "oldest_pending_age_s": None,
    "last_delivered_at": None,
    "last_failure": None,
    "failures": None,
    "held": None,
    "exports": ["batches", "held_products"],
    "damage": None,
    "destination": ["url", "account", "state", "reason", "since", "next_attempt_at"],
    "agent": ["running", "pid", "key"],
}


def assert_documented(status):
    assert list(status) == list(KEYS)
    for key, inner in KEYS.items():
        if inner is not None:
            assert list(status[key]) == inner


def test_status_of_an_outbox_that_was_never_made(cli, db):
    done = cli("status", "--json")
    status = json.loads(done.out)

    assert done.code == 0
    assert_documented(status)
    assert status["outbox"] == {"path": str(db), "bytes": 0, "other_machine": False}
    assert status["counts"] == dict.fromkeys(KEYS["counts"], 0)
    assert (status["destination"]["state"], status["agent"]) == (
        "unknown",
        {"running": False, "pid": None, "key": None},
    )
    assert not db.exists()
    assert cli("status").code == 0


def test_status_counts_what_waits_and_for_how_long(cli):
    for version in "12":
        cli("enqueue", "build", "--product", "payments", "--version", version)

    status = json.loads(cli("status", "--json").out)

    assert_documented(status)
    assert status["counts"]["pending"] == 2
    assert 0 <= status["oldest_pending_age_s"] < 3600
    assert "oldest" in cli("status").out
    assert "`versioner-agent run` or `flush` delivers what is pending" in cli("status").out


def test_status_beside_an_agent_tells_its_pid_the_failure_and_what_is_held(host_for, serve):
    def script(seen):
        return {"bad": refused(422, "no such product"), "slow": refused(500, "a bug")}.get(seen.product, accepted())

    server = serve(script)
    host = host_for(server.url)
    for product in ("bad", "slow", "good"):
        host.queue(product)
    agent = host.agent()
    eventually(lambda: host.counts() == {"pending": 1, "failed": 1, "delivered": 1})
    eventually(lambda: host.json("status")[0]["held"])

    (status,) = host.json("status")

    assert_documented(status)
    assert status["agent"] == {"running": True, "pid": agent.pid, "key": "sk_acme_k1_…"}
    assert list(status["last_failure"]) == ["id", "product_name", "version", "reason", "detail"]
    assert (status["last_failure"]["product_name"], status["last_failure"]["reason"]) == ("bad", "invalid")
    assert [list(held) for held in status["held"]] == [["product_name", "id", "since", "reason"]]
    assert (status["held"][0]["product_name"], status["held"][0]["reason"]) == ("slow", "unavailable")
    assert (status["destination"]["url"], status["destination"]["account"]) == (server.url, "acme")
    text = host.run("status").stdout.decode()
    assert f"running (pid {agent.pid})" in text
    assert "slow waits for record 2" in text
    assert "no such product" in text


def test_status_never_keeps_an_agent_from_starting(host_for, serve):
    host = host_for(serve().url)
    host.queue("payments")
    for _ in range(3):
        statuses = [host.start("status") for _ in range(4)]
        agent = host.agent()
        assert host.end(agent) == 0
        assert [each.wait(30) for each in statuses] == [0] * 4


def test_status_says_why_the_api_is_not_reached(host_for):
    host = host_for()
    host.queue("payments")
    host.run("flush", "--timeout", "0.3")

    (status,) = host.json("status")

    assert status["destination"]["state"] == "down"
    assert "can't connect" in status["destination"]["reason"]
    assert status["destination"]["since"].endswith("Z")
    assert "nothing to do: events wait" in host.run("status").stdout.decode()


def test_status_after_a_kill_does_not_claim_an_agent(host_for, serve):
    host = host_for(serve().url)
    agent = host.agent()
    agent.kill()
    agent.wait(30)

    assert host.json("status")[0]["agent"] == {"running": False, "pid": None, "key": None}


@pytest.mark.parametrize("content", ["my diary", "x" * 100_000])
def test_status_of_a_file_that_is_no_outbox_exits_1(cli, db, content):
    db.write_text(content)

    done = cli("status")

    assert done.code == 1
    assert str(db) in done.err
    assert db.read_text() == content


def test_events_in_an_outbox_that_nobody_empties_are_told(host_for, tmp_path):
    """Queued before the host had an outbox for all, or while that was gone."""
    host = host_for()
    state = str(tmp_path / "home-state")
    own = {"VERSIONER_AGENT_DB": "", "XDG_STATE_HOME": state}
    assert host.run("enqueue", "build", "--product", "p", "--version", "1", **own).returncode == 0

    told = host.run("status", XDG_STATE_HOME=state)
    of_own = host.run("status", **own)

    assert told.returncode == 0
    path = f"{state}/versioner-agent/outbox.db"
    assert told.stderr.decode() == (
        f"warning: 1 event waits in your own outbox; with a key, `versioner-agent flush --db {path}` delivers\n"
    )
    assert of_own.stderr == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have an outbox in the directory of another user")
def test_they_are_told_to_root_too(host_for, tmp_path, reachable):
    """The host's outbox belongs to the service's account, which can't look into root's home."""
    host = host_for()
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    own = {"VERSIONER_AGENT_DB": "", "XDG_STATE_HOME": str(closed)}
    assert host.run("enqueue", "build", "--product", "p", "--version", "1", **own).returncode == 0
    os.chown(reachable, 65534, 65534)

    told = host.run("status", XDG_STATE_HOME=str(closed), VERSIONER_AGENT_DB=str(reachable / "outbox.db"))

    assert told.returncode == 0
    assert b"1 event waits in your own outbox" in told.stderr
