"""`flush`: its exit codes, and whose events it sends."""

from __future__ import annotations

import json
import os

import pytest
from host import KEY
from scripted import accepted, answer, refused

RULE = {"error": "blocked", "message": "frozen", "code": "NO_DEPLOY_WINDOW"}


def test_nothing_pending_exits_0_without_key_or_network(host_for):
    host = host_for()

    done = host.run("flush", VERSIONER_API_KEY="")

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not os.path.exists(host.path)


def test_everything_delivered_exits_0(host_for, serve):
    host = host_for(serve().url)
    host.queue("payments", 3)

    done = host.run("flush", "--json")

    assert done.returncode == 0
    assert json.loads(done.stdout) == {"pending": 0, "refused": [], "note": None}


@pytest.mark.parametrize(
    ("kind", "reaction", "code"),
    [
        ("build", refused(422), 4),
        ("build", refused(409), 4),
        ("deployment", refused(409), 5),
        ("deployment", answer(423, RULE), 5),
        ("build", answer(409, RULE), 5),
        ("deployment", refused(400), 4),
    ],
)
def test_a_refusal_exits_4_and_a_rules_or_a_deployments_409_exits_5(host_for, serve, kind, reaction, code):
    host = host_for(serve(lambda _: reaction).url)
    (record_id,) = host.queue("payments", **({"environment_name": "production"} if kind == "deployment" else {}))

    done = host.run("flush", "--json")

    assert done.returncode == code
    assert json.loads(done.stdout)["refused"] == [record_id]


def test_a_plain_refusal_among_those_of_rules_exits_4(host_for, serve):
    host = host_for(serve(lambda seen: refused(422) if seen.product == "a" else answer(423, RULE)).url)
    host.queue("a")
    host.queue("b")

    assert host.run("flush").returncode == 4


def test_a_refusal_matters_more_than_what_is_still_queued(host_for, serve):
    host = host_for(serve(lambda seen: refused(422) if seen.product == "a" else refused(503)).url)
    host.queue("a")
    host.queue("b")

    done = host.run("flush", "--timeout", "1")

    assert done.returncode == 4
    assert b"1 event is still queued" in done.stderr


def test_what_is_still_queued_exits_75_and_says_why(host_for):
    host = host_for()
    host.queue("payments", 2)

    done = host.run("flush", "--timeout", "1")

    assert done.returncode == 75
    assert b"2 events are still queued: the API is down" in done.stderr


def test_a_timeout_of_zero_exits_75(host_for, serve):
    host = host_for(serve().url)
    host.queue("payments")

    assert host.run("flush", "--timeout", "0").returncode == 75


def test_a_failure_of_before_is_not_reported_again(host_for, serve):
    host = host_for(serve(lambda seen: refused(422) if seen.product == "a" else accepted()).url)
    host.queue("a")
    assert host.run("flush").returncode == 4
    host.queue("b")

    assert host.run("flush").returncode == 0


@pytest.mark.parametrize(
    "env", [{"VERSIONER_API_KEY": ""}, {"VERSIONER_API_KEY": "", "VERSIONER_AGENT_API_KEY_FILE": "/no/key"}]
)
def test_no_key_exits_3(host_for, serve, env):
    server = serve()
    host = host_for(server.url)
    host.queue("payments")

    done = host.run("flush", **env)

    assert done.returncode == 3
    assert server.requests == []
    assert env.get("VERSIONER_AGENT_API_KEY_FILE", "VERSIONER_API_KEY").encode() in done.stderr


def test_another_destination_exits_3_and_is_taken_when_told_so(host_for, serve):
    server, other = serve(), serve()
    host = host_for(server.url)
    host.queue("payments")
    host.run("flush")
    host.queue("payments", first=2)

    done = host.run("flush", "--api-url", other.url)
    assert done.returncode == 3
    assert server.url.encode() in done.stderr
    assert other.url.encode() in done.stderr
    assert b"--new-destination" in done.stderr
    assert other.requests == []

    assert host.run("flush", "--api-url", other.url, "--new-destination").returncode == 0
    assert len(other.requests) == 1


def test_another_account_exits_3(host_for, serve):
    server = serve()
    host = host_for(server.url)
    host.queue("payments")
    host.run("flush")
    host.queue("payments", first=2)

    assert host.run("flush", VERSIONER_API_KEY="sk_rival_k1_x").returncode == 3
    assert len(server.requests) == 1


def test_a_shared_outbox_is_left_to_its_agent(host_for, serve):
    """A job's key must never deliver other people's events."""
    server = serve()
    host = host_for(server.url)
    host.queue("payments")
    os.chmod(host.path, 0o660)
    os.chmod(os.path.dirname(host.path), 0o2770)

    done = host.run("flush", "--timeout", "0.3", VERSIONER_API_KEY="sk_acme_k7_job")

    assert done.returncode == 75
    assert b"only its agent delivers from it" in done.stderr
    assert server.requests == []

    host.agent()
    assert host.run("flush", VERSIONER_API_KEY="sk_acme_k7_job").returncode == 0
    assert [seen.headers["authorization"] for seen in server.requests] == [f"Bearer {KEY}"]


@pytest.mark.parametrize("args", [("--timeout", "-1"), ("--timeout", "soon"), ("extra",), ("--nonsense",)])
def test_a_bad_call_exits_2(host_for, args):
    assert host_for().run("flush", *args).returncode == 2


def test_bad_settings_are_reported_all_at_once(host_for):
    done = host_for().run("flush", "--concurrency", "0", "--max-backoff", "soon", VERSIONER_AGENT_TIMEOUT="-1")

    assert done.returncode == 3
    for words in (b"concurrency (--concurrency)", b"max_backoff (--max-backoff)", b"timeout (VERSIONER_AGENT_TIMEOUT)"):
        assert words in done.stderr
