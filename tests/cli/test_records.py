"""`list`, `show`, `retry`, `discard`: documented keys, harmless text, and a person's word."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess

import pytest
from host import COMMAND

from versioner_agent.outbox import Outbox

RECORD_KEYS = [
    *("id", "event_id", "state", "kind", "product_name", "version", "environment_name", "status", "invoke_id"),
    *("queued_at", "queued_by", "attempts", "last_attempt_at", "settled_at", "http_status", "server_id", "reason"),
    *("code", "rule", "retry_after", "late", "detail"),
]
HOSTILE = "evil\x1b]0;pwned\x07\x1b[31m\u202e\u2066name\r\nforged 1: line"


@pytest.fixture
def outbox(db):
    with Outbox(db) as made:
        yield made


def queue(outbox, product="payments", version="1.2.3", **fields):
    return outbox.enqueue("build", {"product_name": product, "version": version, "status": "ok", **fields}).id


def fail(outbox, record_id, detail="exists with a different SHA", reason="conflict"):
    connection = sqlite3.connect(outbox.store.path)
    connection.execute(
        "UPDATE record SET state = 'failed', reason = ?, detail = ?, http_status = 409, attempts = 1, "
        "settled_at = 1793500000, last_attempt_at = 1793500000 WHERE id = ?",
        (reason, detail, record_id),
    )
    connection.execute(
        "INSERT INTO attempt (record_id, at, outcome, http_status, detail, duration_s) VALUES (?, 1793500000, ?, 409, ?, 0.1)",
        (record_id, reason, detail),
    )
    connection.commit()
    connection.close()


def lines(done):
    return [json.loads(line) for line in done.out.splitlines()]


def test_list_json_has_exactly_the_documented_keys(cli, outbox):
    queue(outbox)
    fail(outbox, queue(outbox))

    found = lines(cli("list", "--json"))

    assert [list(each) for each in found] == [RECORD_KEYS] * 2
    assert [(each["id"], each["state"], each["late"]) for each in found] == [
        (2, "failed", False),
        (1, "pending", False),
    ]


def test_show_json_adds_payload_and_attempts(cli, outbox):
    fail(outbox, queue(outbox))

    (found,) = lines(cli("show", "1", "--json"))

    assert list(found) == [
        *RECORD_KEYS, "payload", "attempt_log", "origin", "origin_host", "amends", "amended_by"
    ]  # fmt: skip
    assert found["payload"]["product_name"] == "payments"
    assert [list(each) for each in found["attempt_log"]] == [["at", "outcome", "http_status", "detail", "duration_s"]]
    assert found["attempt_log"][0]["at"].endswith("Z")


def test_list_selects_by_state_product_and_limit(cli, outbox):
    for number in range(5):
        queue(outbox, "a" if number % 2 else "b", str(number))
    fail(outbox, 1)

    assert [each["id"] for each in lines(cli("list", "--json", "--limit", "2"))] == [5, 4]
    assert [each["id"] for each in lines(cli("list", "--json", "--product", "a"))] == [4, 2]
    assert [each["id"] for each in lines(cli("list", "--json", "--state", "failed"))] == [1]
    assert [each["id"] for each in lines(cli("list", "--json", "--product", "a", "--limit", "1"))] == [4]


@pytest.mark.parametrize("args", [("--state", "lost"), ("--limit", "0"), ("--limit", "x")])
def test_list_refuses_nonsense(cli, args):
    assert cli("list", *args).code == 2


def test_an_outbox_that_was_never_made_has_no_records(cli, db):
    done = cli("list")

    assert (done.code, done.out, done.err) == (0, "", "no records\n")
    assert cli("list", "--json") == (0, "", "")
    assert not db.exists()


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_show_of_a_record_that_is_not_there_exits_2(cli, outbox, args):
    queue(outbox)

    done = cli("show", "7", *args)

    assert (done.code, done.out) == (2, "")
    assert "there is no record 7" in done.err


@pytest.mark.parametrize("record_id", ["0", "-1", "99999999999999999999999", "x", ""])
def test_an_id_that_no_record_has_exits_2_without_an_internal_error(cli, outbox, record_id):
    queue(outbox)

    for command in (("show",), ("retry",), ("discard",)):
        done = cli(*command, "--", record_id)
        assert done.code == 2, (command, done)
        assert "internal error" not in done.err


def test_show_for_people_tells_everything(cli, outbox):
    fail(outbox, queue(outbox, scm_sha="abc"))

    out = cli("show", "1").out

    for words in (
        "payments",
        "1.2.3",
        "failed",
        "conflict: exists with a different SHA",
        '"scm_sha": "abc"',
        "HTTP 409",
    ):
        assert words in out


def test_hostile_text_cannot_steer_a_terminal_or_forge_a_line(cli, outbox):
    fail(outbox, queue(outbox, HOSTILE, HOSTILE, scm_branch=HOSTILE), HOSTILE)

    for command in (("list",), ("show", "1"), ("status",)):
        out = cli(*command).out
        assert not {"\x1b", "\x07", "\r", "\u202e", "\u2066"} & set(out), command
        assert not any(line.startswith("forged") for line in out.splitlines())
    assert len(cli("list").out.splitlines()) == 2


def test_json_keeps_hostile_text_as_it_came(cli, outbox):
    queue(outbox, HOSTILE)

    done = cli("list", "--json")

    assert lines(done)[0]["product_name"] == HOSTILE
    assert done.out.count("\n") == 1
    assert "\x1b" not in done.out


def on_a_terminal(host, *args, **env):
    """Run a command with stdout on a pseudo-terminal and return what arrived there."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen((*COMMAND, *args), stdout=theirs, stderr=subprocess.DEVNULL, env={**host.env, **env})
        os.close(theirs)
        said = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # EIO: the other side is closed
                break
            if not block:
                break
            said += block
        assert process.wait(30) == 0
    finally:
        os.close(ours)
    return said


@pytest.mark.parametrize("command", ["list", "status"])
def test_colours_are_for_terminals_only_and_no_color_is_honoured(host_for, command):
    host = host_for()
    host.queue("payments")

    assert b"\x1b" not in host.run(command).stdout
    assert b"\x1b[" in on_a_terminal(host, command, TERM="xterm")
    assert b"\x1b" not in on_a_terminal(host, command, TERM="xterm", NO_COLOR="1")


# --- retry and discard


def test_retry_makes_a_failed_record_pending_again(cli, outbox):
    fail(outbox, queue(outbox))

    done = cli("retry", "1", "--json")

    assert (done.code, lines(done)) == (0, [{"id": 1, "outcome": "retried", "detail": ""}])
    assert lines(cli("show", "1", "--json"))[0]["state"] == "pending"


def test_retry_all_failed_takes_them_in_their_order(cli, outbox):
    for number in range(3):
        fail(outbox, queue(outbox, version=str(number)))

    assert cli("retry", "--all-failed").out == "1 retried\n2 retried\n3 retried\n"
    done = cli("retry", "--all-failed")
    assert (done.code, done.out, done.err) == (0, "", "nothing to do\n")


@pytest.mark.parametrize("args", [(), ("1", "--all-failed")])
def test_retry_takes_ids_or_all(cli, outbox, args):
    fail(outbox, queue(outbox))

    assert cli("retry", *args).code == 2


def test_retry_of_what_is_not_failed_is_refused(cli, outbox):
    queue(outbox)

    done = cli("retry", "1", "9")

    assert (done.code, done.out) == (2, "")
    assert "1 refused: it is pending" in done.err
    assert "9 not found" in done.err


def test_retry_skips_what_was_queued_again(cli, outbox):
    fail(outbox, queue(outbox, invoke_id="42"))
    queue(outbox, invoke_id="42")

    done = cli("retry", "1")

    assert (done.code, done.out) == (0, "1 superseded: the same event was queued again as 2\n")


def test_discard_needs_yes_for_a_pending_record(cli, outbox):
    queue(outbox)

    refused, done = cli("discard", "1"), cli("discard", "1", "--yes", "--json")

    assert refused.code == 2
    assert "--yes" in refused.err
    assert (done.code, lines(done)) == (0, [{"id": 1, "outcome": "discarded", "detail": ""}])
    assert lines(cli("list", "--json"))[0]["state"] == "discarded"


def test_discard_gives_up_a_failed_record(cli, outbox):
    fail(outbox, queue(outbox))

    assert cli("discard", "1", "1").out == "1 discarded\n"
    assert cli("discard").code == 2


@pytest.mark.parametrize("command", [("retry", "1"), ("discard", "1"), ("show", "1"), ("retry", "--all-failed")])
def test_a_record_of_an_outbox_that_was_never_made_is_an_error_with_a_message(cli, db, command):
    done = cli(*command)

    assert done.code in (1, 2)
    assert "internal error" not in done.err
    assert not db.exists()
