"""`--wait` and `track deployment --status started` as scripts use them: exit codes, with and without an agent."""

from __future__ import annotations

import json

import pytest
from host import eventually, free_port
from scripted import accepted, answer, hanging, refused

BUILD = ("enqueue", "build", "--product", "payments", "--version", "1.2.3")
DEPLOYMENT = ("enqueue", "deployment", "--product", "payments", "--version", "1.2.3", "--environment", "production")
STARTED = ("track", *DEPLOYMENT[1:], "--status=started")
RULE = {
    "error": "deployment_blocked",
    "message": "no deployments on Fridays",
    "code": "NO_DEPLOY_WINDOW",
    "retry_after": "2026-11-27T18:00:00Z",
    "details": {"rule_name": "Friday freeze"},
}
#: Answer -> exit codes of a waiting build, a waiting deployment and a deployment's gate.
ANSWERS = {
    "accepted": (accepted(), (0, 0, 0)),
    "invalid": (refused(422), (4, 4, 4)),
    "bad request": (refused(400), (4, 4, 4)),
    "conflict": (refused(409, "Version 1.2.3 already exists with different SHA"), (4, 5, 5)),
    "concurrent": (answer(409, {**RULE, "code": "CONCURRENT_DEPLOYMENT"}), (5, 5, 5)),
    "window": (answer(423, RULE), (5, 5, 5)),
    "nested rule": (answer(423, {"detail": RULE}), (5, 5, 5)),
    "precondition": (answer(428, {**RULE, "code": "APPROVAL_REQUIRED"}), (5, 5, 5)),
}
#: Nothing that the API said: the codes are 75, 75 and 0.
SILENCE = {
    "unauthorized": refused(401),
    "html": answer(403, b"<html>blocked</html>"),
    "redirect": answer(302, b"", location="http://elsewhere.example/"),
    "broken": refused(503),
    "hanging": hanging(),
}


@pytest.fixture(params=["alone", "beside an agent"])
def host_with(request, host_for):
    """Make a host, half of them with an agent running."""

    def make(url):
        host = host_for(url)
        if request.param != "alone":
            host.agent()
        return host

    return make


def both(table, beside):
    """Parameters: all of *table* alone; beside an agent those named, and with `-m long` all.

    All that an agent leaves of an answer to who waits is a record, and one answer of each kind makes each of them.
    """
    return [
        pytest.param(
            how, case, id=f"{name}-{how}", marks=() if how == "alone" or name in beside else (pytest.mark.long,)
        )
        for name, case in table.items()
        for how in ("alone", "beside an agent")
    ]


@pytest.mark.parametrize(
    ("host_with", "case"), both(ANSWERS, ("accepted", "invalid", "conflict", "window")), indirect=["host_with"]
)
def test_the_verdict_is_the_exit_code(host_with, serve, case):
    reaction, codes = case
    host = host_with(serve(lambda _: reaction).url)

    calls = ((*BUILD, "--wait=30"), (*DEPLOYMENT, "--wait"), (*STARTED, "--fail-on-api-error=true"))
    done = [host.run(*call) for call in calls]
    assert [each.returncode for each in done] == list(codes), done[0].stderr
    if codes[2] == 5 and reaction is not ANSWERS["conflict"][0]:
        said = done[2].stderr.decode()
        assert all(words in said for words in ("Friday freeze", "no deployments on Fridays", "2026-11-27T18:00:00Z"))


@pytest.mark.parametrize(
    ("host_with", "reaction"), both(SILENCE, ("unauthorized", "broken", "hanging")), indirect=["host_with"]
)
def test_without_a_verdict_nothing_fails_but_what_was_asked_to(host_with, serve, reaction):
    host = host_with(serve(lambda _: reaction).url)

    assert host.run(*BUILD, "--wait=0.3").returncode == 75
    done = host.run(*STARTED, "--gate-timeout=0.3")
    assert done.returncode == 0
    assert b"was NOT checked against the rules" in done.stderr
    strict = host.run(*STARTED, "--new", "--gate-timeout=0.3", "--fail-on-api-error")
    assert strict.returncode == 75
    assert host.counts() == {"pending": 3}


def test_an_api_that_is_down_is_not_waited_for_twice(host_with):
    """The second gate knows what the first, or the agent, found out: it is over before the first try could be."""
    host = host_with(f"http://127.0.0.1:{free_port()}")
    host.run(*STARTED, "--gate-timeout=1")
    eventually(lambda: host.health().state == "down")

    done = host.run(*STARTED, "--new", "--gate-timeout=600")
    assert done.returncode == 0
    assert b"the API is down" in done.stderr
    assert host.run(*STARTED, "--new", "--gate-timeout=600", VERSIONER_FAIL_ON_API_ERROR="true").returncode == 75


def test_the_gate_can_be_switched_off(host_for, serve):
    server = serve(lambda _: refused(423))
    host = host_for(server.url)

    assert host.run(*STARTED, "--gate-timeout=0").returncode == 0
    assert host.run(*STARTED, "--new", VERSIONER_AGENT_GATE_TIMEOUT="0").returncode == 0
    assert server.requests == []


def test_a_refusal_that_is_no_rule_can_be_let_pass(host_for, serve):
    host = host_for(serve(lambda _: refused(422)).url)
    assert host.run(*STARTED, "--fail-on-api-error=false").returncode == 0

    ruled = host_for(serve(lambda _: answer(423, RULE)).url)
    assert ruled.run(*STARTED, "--fail-on-api-error=false").returncode == 5


@pytest.mark.parametrize("call", [BUILD, DEPLOYMENT, ("track", *BUILD[1:]), (*DEPLOYMENT, "--status=started")])
def test_nothing_else_waits(host_for, serve, call):
    server = serve()
    host = host_for(server.url)

    assert host.run(*call).returncode == 0
    assert server.requests == []


def test_a_key_given_for_the_call_is_used_for_waiting_alone(host_for, serve):
    server = serve()
    host = host_for(server.url)

    done = host.run("track", *BUILD[1:], "--api-key=sk_acme_k9_ofthecall", "--wait", VERSIONER_API_KEY="")
    assert done.returncode == 0, done.stderr
    assert server.requests[0].headers["authorization"] == "Bearer sk_acme_k9_ofthecall"
    assert b"ofthecall" not in done.stdout + done.stderr
    assert host.run(*BUILD, "--new", "--wait=1", VERSIONER_API_KEY="").returncode == 75


def test_json_says_the_receipt_and_then_the_record(host_for, serve):
    host = host_for(serve().url)

    done = host.run(*DEPLOYMENT, "--wait", "--json")
    receipt, record = map(json.loads, done.stdout.splitlines())
    assert (receipt["outcome"], record["state"], record["id"]) == ("queued", "delivered", receipt["id"])


def test_several_events_are_waited_for_together(host_for, serve):
    host = host_for(serve(lambda seen: refused(422) if seen.product == "b" else accepted()).url)
    events = [{"product_name": name, "version": "1", "status": "ok"} for name in "abc"]

    done = host.run("enqueue", "json", "--wait", "-", stdin=json.dumps(events).encode())
    assert done.returncode == 4
    assert host.counts() == {"delivered": 2, "failed": 1}


def test_a_refusal_is_an_annotation_in_github_actions(host_for, serve):
    host = host_for(serve(lambda _: answer(423, {**RULE, "message": "no\n::error::forged"})).url)

    done = host.run(*STARTED, "--invoke-id=1", GITHUB_ACTIONS="true")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 5
    assert len([line for line in lines if line.startswith("::error title=")]) == 1
    assert not any(line.startswith("::error::") for line in lines)
