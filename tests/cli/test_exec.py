"""`exec` on the command line: what it takes, and that nothing of ours keeps a command from running."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sqlite3

import pytest
from host import eventually
from scripted import accepted, answer, hanging, refused

CALL = ("exec", "build", "--product", "payments", "--version", "1.2.3")
DEPLOY = ("exec", "deployment", "--product", "payments", "--version", "1.2.3", "--environment", "production")


def events(host):
    connection = sqlite3.connect(host.path)
    try:
        return [json.loads(row[0]) for row in connection.execute("SELECT payload FROM record ORDER BY id")]
    finally:
        connection.close()


def statuses(host):
    return [event["status"] for event in events(host)] if os.path.exists(host.path) else []


@pytest.mark.parametrize("separator", [("--",), ()], ids=["with --", "without"])
def test_a_command_keeps_its_arguments_and_its_exit_code(host_for, separator):
    host = host_for()

    done = host.run(*CALL, *separator, "sh", "-c", "echo $0 $1; exit 7", "--version", "-v")
    assert (done.returncode, done.stdout) == (7, b"--version -v\n")
    assert statuses(host) == ["started", "failed"]


def test_both_events_say_what_was_given_and_share_a_run(host_for):
    host = host_for()

    assert host.run(*CALL, "--meta", "team=core", "--invoke-id", "42", "--", "true").returncode == 0
    started, ended = events(host)
    assert {started["invoke_id"], ended["invoke_id"]} == {"42"}
    assert {each["extra_metadata"]["team"] for each in (started, ended)} == {"core"}
    assert ended["extra_metadata"]["exit_code"] == 0
    assert ended["extra_metadata"]["build_duration_seconds"] >= 0


def test_without_a_run_one_is_made(host_for):
    host = host_for()
    host.run(*CALL, "--", "true")
    host.run(*CALL, "--", "true")

    runs = [event["invoke_id"] for event in events(host)]
    assert runs[0] == runs[1] != runs[2] == runs[3]


def test_an_invalid_event_is_told_before_anything_is_run(host_for, tmp_path):
    host = host_for()

    done = host.run("exec", "build", "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 2
    assert b"product_name: is required" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert host.run(*CALL, "--").returncode == 2


@pytest.mark.parametrize(
    "broken",
    [
        {"VERSIONER_AGENT_DB": "/nowhere/at/all/outbox.db"},
        {"VERSIONER_AGENT_TIMEOUT": "long"},
        {"VERSIONER_AGENT_CONFIG": "/"},
    ],
    ids=["outbox", "setting", "configuration"],
)
def test_whatever_is_broken_the_command_is_run(host_for, broken):
    done = host_for().run(*CALL, "--", "sh", "-c", "cat; exit 3", stdin=b"bytes \xff", **broken)

    assert (done.returncode, done.stdout) == (3, b"bytes \xff")
    assert b"Traceback" not in done.stderr
    assert all(line.startswith(b"warning: ") for line in done.stderr.splitlines())


RULE = {"error": "blocked", "message": "no deployments on Fridays", "code": "NO_DEPLOY_WINDOW"}


@pytest.mark.parametrize(
    ("reaction", "code", "told"),
    [
        (answer(423, RULE), 5, ["started"]),
        (refused(409), 5, ["started"]),
        (refused(422), 0, ["started", "completed"]),
        (answer(200, {"id": "e"}), 0, ["started", "completed"]),
        (hanging(), 0, ["started", "completed"]),
    ],
    ids=["rule", "conflict", "invalid", "accepted", "hanging"],
)
def test_a_rule_keeps_a_gated_command_from_being_run(host_for, serve, tmp_path, reaction, code, told):
    host = host_for(serve(lambda _: reaction).url)

    done = host.run(*DEPLOY, "--gate", "--gate-timeout", "0.5", "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == code, done.stderr
    assert (tmp_path / "ran").exists() == (code == 0)
    assert statuses(host) == told
    assert done.stdout == b""
    assert not [name for name in os.listdir(os.path.dirname(host.path)) if ".job-" in name]


def gate_of(process):
    """The process that asks for *process*, once there is one."""
    return int(
        eventually(lambda: pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())[0]
    )


def test_a_gate_that_dies_keeps_nothing_from_running(host_for, serve):
    server = serve(lambda _: hanging())
    host = host_for(server.url)
    process = host.start(*DEPLOY, "--gate", "--gate-timeout", "600", "--", "echo", "RAN")
    server.wait_for(1)
    os.kill(gate_of(process), signal.SIGKILL)

    assert process.wait(30) == 0
    assert "RAN" in process.log.read_text()
    assert "NOT checked against the rules" in process.log.read_text()
    assert statuses(host) == ["started", "completed"]


def test_a_signal_that_stops_nobody_waits_for_the_command(host_for, serve, tmp_path):
    """A batch system's warning: the gate would die of it."""
    server = serve(lambda _: eventually((tmp_path / "go").exists) and accepted())
    host = host_for(server.url)
    waits = "trap 'echo GOT; exit 0' USR1; while :; do sleep 0.01; done"
    process = host.start(*DEPLOY, "--gate", "--", "sh", "-c", waits)
    server.wait_for(1)
    process.send_signal(signal.SIGUSR1)
    (tmp_path / "go").touch()

    assert process.wait(30) == 128 + signal.SIGUSR1 or "GOT" in process.log.read_text()
    assert statuses(host)[0] == "started"
    assert host.counts()["delivered"] == 1


def test_a_gate_does_not_outlive_its_wrapper(host_for, serve):
    """It would hold the job's lock, the turn to deliver and the reader of its output."""
    server = serve(lambda _: hanging() if len(server.requests) == 1 else accepted())
    host = host_for(server.url)
    process = host.start(*DEPLOY, "--gate", "--gate-timeout", "600", "--", "echo", "RAN")
    server.wait_for(1)
    gate = gate_of(process)
    host.end(process, signal.SIGKILL)
    eventually(
        lambda: not os.path.exists(f"/proc/{gate}/cmdline") or not pathlib.Path(f"/proc/{gate}/cmdline").read_bytes()
    )

    assert host.run("flush", "--timeout", "20").returncode == 0
    assert statuses(host) == ["started", "aborted"]


def test_a_refusal_that_comes_with_a_signal_is_one(host_for, serve, tmp_path):
    """For the API the deployment did not begin, so it has no end."""
    server = serve(lambda _: eventually((tmp_path / "go").exists) and answer(423, RULE))
    host = host_for(server.url)
    process = host.start(*DEPLOY, "--gate", "--gate-timeout", "600", "--", "echo", "RAN")
    server.wait_for(1)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()

    assert process.wait(30) == 5
    assert statuses(host) == ["started"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_after_the_gate_is_the_commands_alone(host_for, serve, tmp_path, name):
    """What the gate left behind, a thread of its network above all, must not be hit by it: the exit code would be lost."""
    host = host_for(serve().url)
    number = getattr(signal, name)
    ignoring = f"trap '' TERM INT HUP; touch {tmp_path}/on; while [ ! -e {tmp_path}/off ]; do sleep 0.01; done; exit 5"
    process = host.start(*DEPLOY, "--gate", "--", "sh", "-c", ignoring)
    eventually((tmp_path / "on").exists)

    for _ in range(20):
        process.send_signal(number)
    (tmp_path / "off").touch()
    assert process.wait(30) == 5, process.log.read_text()
    assert statuses(host) == ["started", "aborted"]
    assert not [name for name in os.listdir(os.path.dirname(host.path)) if ".job-" in name]


@pytest.mark.parametrize(
    "broken",
    [{"VERSIONER_AGENT_DB": "/nowhere/at/all/outbox.db"}, {"VERSIONER_AGENT_GATE_TIMEOUT": "abc"}],
    ids=["outbox", "setting"],
)
def test_a_gate_that_could_not_be_asked_says_so(host_for, broken):
    done = host_for().run(*DEPLOY, "--gate", "--", "echo", "RAN", **broken)

    assert (done.returncode, done.stdout) == (0, b"RAN\n")
    assert b"NOT checked against the rules" in done.stderr


def test_best_effort_is_taken_and_changes_nothing(host_for):
    assert host_for().run(*CALL, "--best-effort", "--", "sh", "-c", "exit 4").returncode == 4


def test_without_a_gate_nothing_is_asked(host_for, serve):
    server = serve(lambda _: answer(423, RULE))
    host = host_for(server.url)

    assert host.run(*DEPLOY, "--", "true").returncode == 0
    assert server.requests == []


def test_a_gate_that_is_told_to_stop_tells_the_end(host_for, serve, tmp_path):
    """The API hangs, and CI cancels the job: nothing is run, and the job does not stay in progress."""
    server = serve(lambda _: hanging())
    host = host_for(server.url)
    process = host.start(*DEPLOY, "--gate", "--gate-timeout", "600", "--", "touch", str(tmp_path / "ran"))
    server.wait_for(1)

    assert host.end(process, signal.SIGTERM) == 128 + signal.SIGTERM
    assert statuses(host) == ["started", "aborted"]
    assert not (tmp_path / "ran").exists()
