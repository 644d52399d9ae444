"""What `--wait` and a gate print, and what they exit with."""

from __future__ import annotations

import contextlib
import json
import os
import time

import pytest
from host import KEY, free_port
from scripted import accepted, answer, refused

from versioner_agent import config, waiting
from versioner_agent.cli._waiting import wait_and_report
from versioner_agent.locks import FlusherLock
from versioner_agent.outbox import Outbox
from versioner_agent.records import _JSON_KEYS
from versioner_agent.storage import Store

WHAT = "deployment my-service 1.2.3 production started"
RULE = {
    "error": "deployment_blocked",
    "message": "Deployments are frozen",
    "code": "NO_DEPLOY_WINDOW",
    "retry_after": "2030-01-07T00:00:00Z",
    "details": {"rule_name": "Friday freeze"},
}


@pytest.fixture
def outbox(db):
    with Outbox(db) as made:
        yield made


@pytest.fixture
def deployment(outbox):
    """The receipt of a deployment that has started."""
    fields = {"product_name": "my-service", "version": "1.2.3", "environment_name": "production", "status": "started"}
    return outbox.enqueue("deployment", fields)


@pytest.fixture
def said(outbox, capsys):
    """Wait for receipts and return the exit code and what was printed."""

    def wait(url, receipts, timeout=20.0, **how):
        flags = {"db": outbox.store.path, "api_url": url, "max_backoff": 0.1}
        settings = config.resolve(flags, {}, [])
        given = {"as_json": False, "is_gate": False, **how}
        code = wait_and_report(settings, {"VERSIONER_API_KEY": KEY}, receipts, timeout, **given)
        out, err = capsys.readouterr()
        return code, out, err

    return wait


def change(outbox, sql):
    with contextlib.closing(Store(outbox.store.path)) as store, store.write() as connection:
        connection.execute(sql)


def test_a_delivery_is_one_line_with_the_servers_id(said, serve, deployment):
    code, out, err = said(serve().url, [deployment])

    assert (code, out) == (0, "")
    assert err == f"delivered 1: {WHAT} (id evt-1)\n"


def test_a_gate_says_that_it_is_allowed(said, serve, deployment):
    code, _, err = said(serve().url, [deployment], is_gate=True)

    assert (code, err) == (0, f"delivered 1: {WHAT} (id evt-1): allowed\n")


def test_a_refusal_has_the_apis_words_and_the_next_action(said, serve, deployment):
    code, _, err = said(serve(lambda _: refused(400, "no such environment")).url, [deployment])

    assert code == 4
    assert err.splitlines() == [
        f"refused 1: {WHAT}: invalid: no such environment",
        "  next: `versioner-agent amend 1 --set …` queues it corrected",
    ]


def test_a_builds_409_says_that_versions_are_immutable(said, serve, outbox):
    receipt = outbox.enqueue("build", {"product_name": "my-service", "version": "1.2.3", "status": "completed"})

    code, _, err = said(serve(lambda _: refused(409, "exists with different SHA")).url, [receipt])

    assert code == 4
    assert "refused 1: build my-service 1.2.3 completed: conflict: exists with different SHA\n" in err
    assert "versions are immutable" in err


def test_a_deployments_409_exits_5(said, serve, deployment):
    code, _, err = said(serve(lambda _: refused(409, "another one is running")).url, [deployment], is_gate=True)

    assert code == 5
    assert err.splitlines()[0] == f"refused 1: {WHAT}: conflict: another one is running"
    assert "versioner-agent retry 1" in err


@pytest.mark.parametrize("is_gate", [True, False])
@pytest.mark.parametrize("body", [RULE, {"detail": RULE}])
def test_a_rule_is_shown_by_name_code_words_and_time(said, serve, deployment, body, is_gate):
    code, _, err = said(serve(lambda _: answer(423, body)).url, [deployment], is_gate=is_gate)

    assert code == 5
    assert err.splitlines() == [
        f"blocked 1: {WHAT}",
        "  rule: Friday freeze (NO_DEPLOY_WINDOW)",
        "  message: Deployments are frozen",
        "  retry after: 2030-01-07T00:00:00Z",
        "  next: wait until the window has ended, then run this again or `versioner-agent retry 1`",
    ]


@pytest.mark.parametrize(
    ("form", "lines"),
    [
        (
            {"code": "APPROVAL_REQUIRED", "message": "ask Ann"},
            ["rule: APPROVAL_REQUIRED", "ask Ann", "get the approval"],
        ),
        ({"message": "no", "details": {"rule_name": "Two eyes"}}, ["rule: Two eyes", "no", "ask whoever set the rule"]),
        ({"message": "no", "code": "NEW_RULE", "retry_after": "soon"}, ["NEW_RULE", "retry after: soon", "until then"]),
        ({"message": "no"}, ["  message: no\n", "ask whoever"]),
    ],
)
def test_of_a_rule_what_is_known_is_shown(said, serve, deployment, form, lines):
    code, _, err = said(serve(lambda _: answer(428, form)).url, [deployment])

    assert code == 5
    assert all(line in err for line in lines)
    assert "None" not in err


def test_a_late_verdict_says_so(said, serve, deployment, outbox):
    settle = "UPDATE record SET state = 'failed', reason = 'blocked', detail = 'no', late = 1"
    change(outbox, settle)

    assert "late: it was queued over 10 minutes before" in said(serve().url, [deployment])[2]


def test_what_is_still_queued_exits_75_and_says_why(said, deployment):
    code, out, err = said(f"http://127.0.0.1:{free_port()}", [deployment], 0.3)

    assert (code, out) == (75, "")
    assert err.startswith("1 event is still queued: the API is down: can't connect")
    assert len(err.splitlines()) == 1


def test_a_gate_that_could_not_ask_says_so_loudly_and_exits_0(said, deployment):
    code, _, err = said(f"http://127.0.0.1:{free_port()}", [deployment], 0.3, is_gate=True)

    assert code == 0
    assert err.startswith(f"warning: {WHAT} was NOT checked against the rules: the API is down: can't connect")
    assert err.endswith("; it is queued (1)\n")


def test_a_gate_that_must_be_checked_exits_75(said, deployment):
    code, _, err = said(f"http://127.0.0.1:{free_port()}", [deployment], 0.3, is_gate=True, fails_unchecked=True)

    assert code == 75
    assert "NOT checked" in err


def test_a_gate_does_not_let_go_on_what_a_signal_ended(said, deployment, monkeypatch):
    """A script whose gate was told to stop must not deploy."""
    ended = waiting.Waited([], "interrupted", signal=15)
    monkeypatch.setattr(waiting, "await_verdicts", lambda *_, **__: ended)

    code, _, err = said("http://127.0.0.1:1", [deployment], is_gate=True)

    assert code == 143
    assert "NOT checked against the rules: interrupted" in err


def test_an_outbox_that_cannot_be_read_is_what_the_event_is_queued_in(said, deployment, outbox):
    outbox.close()
    os.rename(outbox.store.path, f"{outbox.store.path}.away")

    code, _, err = said("http://127.0.0.1:1", [deployment])

    assert code == 75
    assert err.startswith("1 event is still queued: the outbox ")
    assert said("http://127.0.0.1:1", [deployment], is_gate=True)[0] == 0


def test_a_record_that_vanished_is_an_error(said, deployment, outbox, serve):
    change(outbox, "DELETE FROM record")

    assert said(serve().url, [deployment])[::2] == (1, "error: the outbox has no record 1 any more\n")


def test_a_discarded_one_exits_1(said, deployment, outbox, serve):
    change(outbox, "UPDATE record SET state = 'discarded'")

    code, _, err = said(serve().url, [deployment])

    assert code == 1
    assert err == f"discarded 1: {WHAT}: a person gave it up, it will not be delivered\n"


def test_an_exported_one_is_not_checked(said, deployment, outbox, serve):
    change(outbox, "UPDATE record SET state = 'exported'")

    assert said(serve().url, [deployment])[0] == 75
    code, _, err = said(serve().url, [deployment], is_gate=True)
    assert code == 0
    assert "NOT checked against the rules: 1 is exported, waiting for a receipt" in err


def test_json_is_one_record_per_event_and_talk_stays_on_stderr(said, serve, outbox):
    fields = {"product_name": "a", "version": "1", "status": "completed"}
    receipts = [outbox.enqueue("build", fields | {"version": str(number)}) for number in range(3)]

    code, out, err = said(
        serve(lambda seen: refused(400) if seen.event["version"] == "1" else accepted()).url, receipts, as_json=True
    )

    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 4
    assert [(line["id"], line["state"]) for line in lines] == [(1, "delivered"), (2, "failed"), (3, "delivered")]
    assert all(set(line) == set(_JSON_KEYS) for line in lines)
    assert "refused 2" in err


def test_many_deliveries_are_summed_up_and_refusals_are_not(said, serve, outbox):
    fields = {"product_name": "a", "status": "completed"}
    receipts = [outbox.enqueue("build", {**fields, "version": str(number)}) for number in range(30)]

    _, _, err = said(
        serve(lambda seen: refused(400) if seen.event["version"] in ("7", "8") else accepted()).url, receipts
    )

    assert "delivered 28 events\n" in err
    assert err.count("delivered") == 1
    assert [line[:9] for line in err.splitlines() if line.startswith("refused")] == ["refused 8", "refused 9"]


def test_a_refusal_is_not_said_twice_but_that_of_a_predecessor_is_said(said, serve, outbox):
    fields = {"product_name": "a", "status": "completed"}
    outbox.enqueue("build", {**fields, "version": "1"})
    receipt = outbox.enqueue("build", {**fields, "version": "2"})

    code, _, err = said(serve(lambda _: refused(400, "no")).url, [receipt])

    assert code == 4
    assert err.count("refused 1: ") == 1
    assert err.count("refused 2: ") == 1


# --- GitHub Actions


def test_a_refusal_is_one_annotation_in_github_actions(said, serve, deployment, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    rule = {**RULE, "message": "100% frozen, until: Monday", "details": {"rule_name": "Freeze: all, 50%"}}

    code, out, err = said(serve(lambda _: answer(423, rule)).url, [deployment])

    assert (code, out) == (5, "")
    (line,) = [line for line in err.splitlines() if line.startswith("::")]
    assert line == (
        f"::error title=blocked 1%3A {WHAT}::rule: Freeze: all, 50%25 (NO_DEPLOY_WINDOW); message: 100%25 frozen, until: Monday; "
        "retry after: 2030-01-07T00:00:00Z; "
        "next: wait until the window has ended, then run this again or `versioner-agent retry 1`"
    )
    assert f"blocked 1: {WHAT}" in err


def test_a_gate_that_could_not_ask_is_a_warning_in_github_actions(said, deployment, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    code, _, err = said(f"http://127.0.0.1:{free_port()}", [deployment], 0.3, is_gate=True)

    assert code == 0
    assert err.startswith(f"::warning title=versioner-agent::{WHAT} was NOT checked against the rules: the API is down")
    assert "\nwarning:" not in err


@pytest.mark.parametrize("github", ["true", ""])
def test_what_others_write_stays_text(said, serve, outbox, monkeypatch, github):
    """Neither a server nor an event's names can steer a terminal, start a workflow command or show a key."""
    monkeypatch.setenv("GITHUB_ACTIONS", github)
    nasty = f"\x1b[2J\r\n::error title=x::forged\u202e{KEY}"
    fields = {"product_name": nasty, "version": "1%0A::stop", "environment_name": "p", "status": "started"}
    receipt = outbox.enqueue("deployment", fields)
    form = {"message": nasty, "code": nasty, "retry_after": nasty, "details": {"rule_name": nasty}}

    code, _, err = said(serve(lambda _: answer(423, form)).url, [receipt])

    assert code == 5
    assert not {"\x1b", "\r", "\u202e"} & set(err)
    assert KEY not in err
    commands = [line for line in err.splitlines() if line.startswith("::")]
    assert len(commands) == (1 if github else 0)
    assert all("1%250A" in line for line in commands)


# --- the clock of a gate


def test_a_gate_whose_api_is_known_to_be_down_sends_nothing(said, serve, deployment, outbox):
    server = serve()
    due = time.time() + 10
    change(outbox, f"UPDATE destination SET state = 'down', reason = 'no route', next_attempt_at = {due}")
    with contextlib.closing(FlusherLock(outbox.store.path)) as agents:
        assert agents.claim_agent()
        assert agents.claim_delivery()

        code, _, err = said(server.url, [deployment], is_gate=True)

    assert code == 0
    assert f"{WHAT} was NOT checked against the rules: the API is down: no route; it is queued (1)" in err
    assert server.requests == []
