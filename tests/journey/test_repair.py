"""From a refusal to its repair, with a real API and a real agent: told in one line of the log, corrected, delivered."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
from host import COMMAND, eventually
from recipes import follow, recipe
from scripted import accepted, answer, refused

from versioner_agent.sandbox import Sandbox

RULE = {
    "error": "deployment_blocked",
    "message": "Deployments are frozen\n2026-01-01T00:00:00Z error: forged",
    "code": "NO_DEPLOY_WINDOW",
    "retry_after": "2030-01-07T00:00:00Z",
    "details": {"rule_name": "Friday [freeze] code=none"},
}


def line_of(host, word):
    """The one line of the log that begins with *word* behind time and level."""
    found = [line for line in host.said().decode().splitlines() if f" error: {word}" in line]
    assert len(found) == 1, found
    return found[0]


def test_a_409_is_told_corrected_and_delivered(host_for):
    with Sandbox() as sandbox:
        host = host_for(sandbox.url)
        host.queue("pay", scm_sha="abc", build_url="https://ci/1")
        agent = host.agent()
        eventually(lambda: host.counts() == {"delivered": 1})
        host.queue("pay", scm_sha="fff", invoke_id="run 7", build_url="https://ci/2")
        eventually(lambda: host.counts().get("failed") == 1)
        eventually(lambda: "refused 2" in host.said().decode())
        told = line_of(host, "refused 2: build pay 1 completed: conflict: ")
        for words in ('invoke_id="run 7"', "http_status=409", "build_url=https://ci/2", "queued_by="):
            assert words in told
        assert "environment=" not in told

        assert host.json("list", "--new", "mail")[0]["id"] == 2
        assert host.run("amend", "2", "--set", "version=2").returncode == 0
        (amended,) = host.json("amend", "2", "--set", "version=2", "--yes")
        assert amended["amended_by"] == 3
        eventually(lambda: host.counts() == {"delivered": 2, "discarded": 1})
        assert host.end(agent) == 0
        assert [(each["payload"]["version"], each["payload"]["scm_sha"]) for each in sandbox.events] == [
            ("1", "abc"),
            ("2", "fff"),
        ]
        assert sandbox.events[1]["payload"]["completed_at"] == json.loads(host.record(2)[1])["completed_at"]
        assert host.json("list", "--new", "mail") == []


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_failure_is_one_line_whatever_it_holds(host_for, serve, log_format):
    server = serve(lambda seen: answer(409, RULE) if seen.product != "good" else accepted())
    host = host_for(server.url)
    host.queue("pay\nforged", environment_name="prod] code=X", status="started", deploy_url="https://d/1")
    host.queue("good")
    host.agent(VERSIONER_AGENT_LOG_FORMAT=log_format)
    eventually(lambda: host.counts() == {"failed": 1, "delivered": 1} and b"Friday" in host.said())
    (told,) = [line for line in host.said().decode().splitlines() if "Friday" in line]

    if log_format == "json":
        line = json.loads(told)
        record = host.json("show", "1")[0]
        assert line["level"] == "error"
        assert line["action"] == "failed"
        assert line["queued_at"] == record["queued_at"]
        for key in (
            "event_id",
            "kind",
            "version",
            "status",
            "queued_by",
            "http_status",
            "reason",
            "code",
            "rule",
            "retry_after",
            "detail",
        ):
            assert line[key] == record[key], key
        assert (line["record"], line["product"], line["environment"]) == (1, "pay\nforged", "prod] code=X")
        assert line["build_url"] == "https://d/1"
        assert "invoke_id" not in line
    else:
        assert "refused 1: deployment pay\\nforged 1 started: blocked: " in told
        assert 'environment="prod] code=X"' in told
        assert 'rule="Friday [freeze] code=none"' in told
        assert "code=NO_DEPLOY_WINDOW" in told


def test_an_altered_record_is_told_with_its_fields(host_for, serve):
    host = host_for(serve().url)
    (record_id,) = host.queue("pay", build_url="https://ci/9")
    with host._outbox.store.write() as connection:
        connection.execute("UPDATE record SET queued_by = 'eve', version = 'altered' WHERE id = ?", (record_id,))
    host.agent()
    eventually(lambda: host.counts() == {"failed": 1} and b"damaged 1" in host.said())
    told = line_of(host, "damaged 1: build pay altered completed: damaged: ")

    assert "queued_by=eve" in told
    assert "build_url=https://ci/9" in told


def test_only_what_is_corrected_is_sent_again(host_for, serve):
    """Late, others' and delivered events stay as they are; the plan of a repair touches nothing."""
    server = serve(lambda seen: refused(422, "no such product") if seen.product == "pya" else accepted())
    host = host_for(server.url)
    host.queue("pya", 3)
    host.queue("pay", 2)
    assert host.run("flush").returncode == 4
    host.run("retry", "--product", "pya")
    host.run("discard", "--product", "pya")
    host.run("amend", "--product", "pya", "--set", "product_name=pay")
    assert host.counts() == {"failed": 3, "delivered": 2}

    host.json("amend", "--product", "pya", "--reason", "invalid", "--set", "product_name=pay", "--yes")
    assert host.run("flush").returncode == 0
    assert host.counts() == {"delivered": 5, "discarded": 3}
    assert [each.event["version"] for each in server.requests if each.product == "pay"] == ["1", "2", "1", "2", "3"]
    assert len({each.key for each in server.requests}) == 8


@pytest.fixture
def shell(tmp_path):
    """The variables of a host's shell, with the command on its PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "versioner-agent"
    script.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    script.chmod(0o755)
    return lambda host: {**host.env, "PATH": f"{directory}:{host.env['PATH']}"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="README's recipes are for a shell")
def test_the_repair_of_readme_works_as_written(host_for, shell):
    with Sandbox() as sandbox:
        host = host_for(sandbox.url)
        first = {"version": "1.2.3", "product_name": "my-service", "status": "completed"}
        host._outbox.enqueue("build", {**first, "scm_sha": "abc"})
        second = {
            **first,
            "scm_sha": "fff",
            "build_url": "https://ci.example.com/7",
            "built_by": "alice",
            "invoke_id": "7",
        }
        for status in ("started", "completed"):
            host._outbox.enqueue("build", {**second, "status": status})
        host.run("flush")
        looked = follow("repair: look", host.directory, env=shell(host)).stdout
        amended = follow("repair: amend", host.directory, env=shell(host)).stdout
        follow("repair: others", host.directory, env=shell(host))

    assert "my-service 1.2.3: 2 refused (conflict), first by alice (record 2) https://ci.example.com/7\n" in looked
    assert "amended as   4" in amended
    assert host.counts() == {"delivered": 3, "discarded": 2}
    assert [each["payload"]["status"] for each in sandbox.events] == ["completed", "started", "completed"]


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="README's recipe needs bash and curl")
def test_what_readme_posts_is_posted_once_and_kept_while_it_can_not_be(host_for, serve, shell):
    host = host_for(serve(lambda _: refused(422)).url)
    host.queue("pay", 2)
    host.run("flush")
    hook = serve(lambda seen: answer(500) if seen.number == 0 else answer(200))
    how = {"env": shell(host), "instead": {"https://chat.example.com": hook.url}, "check": False}
    done = [follow("told: post", host.directory, **how).returncode for _ in range(3)]

    assert done[0] != 0
    assert done[1:] == [0, 0]
    posts = [[json.loads(line)["id"] for line in each.body.splitlines()] for each in hook.requests]
    assert posts == [[1, 2], [1, 2]]


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="README's recipe needs bash and curl")
def test_a_line_that_a_kill_cut_short_spoils_no_other_one(host_for, serve, shell):
    host = host_for(serve(lambda _: refused(422)).url)
    host.queue("pay", 2)
    host.run("flush")
    (host.directory / "unposted").write_text('{"id": 7}\n{"id": 1, "eve')
    hook = serve(lambda _: answer(200))
    follow("told: post", host.directory, env=shell(host), instead={"https://chat.example.com": hook.url})

    assert [json.loads(line)["id"] for line in hook.requests[0].body.splitlines()] == [7, 1, 2]


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="README's recipe needs bash and curl")
def test_a_post_that_takes_long_removes_nothing_that_another_run_adds(host_for, serve, shell):
    host = host_for(serve(lambda _: refused(422)).url)
    is_read = threading.Event()

    def slowly(_):
        is_read.wait(30)
        return answer(200)

    hook = serve(slowly)
    how = {"env": shell(host), "instead": {"https://chat.example.com": hook.url}, "check": False}
    host.queue("pay")
    host.run("flush")
    first = threading.Thread(target=follow, args=("told: post", host.directory), kwargs=how)
    first.start()
    hook.wait_for(1)
    host.queue("pay", first=2)
    host.run("flush")
    during = follow("told: post", host.directory, **how)
    is_read.set()
    first.join()
    follow("told: post", host.directory, **how)

    assert during.returncode == 0
    assert [[json.loads(line)["id"] for line in each.body.splitlines()] for each in hook.requests] == [[1], [2]]


def test_the_mail_of_readme_is_a_command(host_for):
    line = recipe("told: mail").splitlines()[-1]
    host = host_for()
    host.queue("pay")

    assert host.run(*line.partition("/versioner-agent ")[2].split()).returncode == 0
