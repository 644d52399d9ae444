"""What the agent tells systemd while it lives, by a real process and a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading

import pytest
from accounts import copy_packages
from host import KEY, eventually
from manager import Manager
from scripted import accepted, refused

from versioner_agent import agent, config, mending, storage
from versioner_agent.locks import FlusherLock, WriteQueue


@pytest.fixture
def manager():
    with contextlib.closing(Manager()) as made:
        yield made


def test_ready_means_that_the_lock_is_held_and_the_outbox_open(host_for, manager):
    host = host_for()

    process = host.start("run", **manager.env)
    status = manager.until("READY=1") and manager.heard[-1][1]

    assert host.presence().agent_pid == process.pid
    assert host.counts() == {}
    assert status == "STATUS=up: 0 pending, 0 failed (API not asked yet)"
    assert manager.lines()[0].startswith("STATUS=opening the outbox /")


def test_status_follows_what_happens(host_for, serve, manager):
    server = serve(lambda seen: refused(409, "other SHA") if seen.event["version"] == "2" else accepted())
    host = host_for(server.url)
    host.start("run", **manager.env, WATCHDOG_USEC="400000")
    manager.until("READY=1")

    host.queue("payments", 2)

    manager.until("STATUS=up: 0 pending, 1 failed")
    manager.until("WATCHDOG=1")


def test_status_says_since_when_the_api_is_away(host_for, manager):
    host = host_for()
    host.queue("payments", 120)
    host.start("run", **manager.env, VERSIONER_AGENT_MAX_BACKOFF="120")

    line = manager.until("STATUS=API unreachable since ")

    assert ", 120 pending, " in line
    assert "next try in " in manager.until("STATUS=API unreachable since ") or "trying now" in manager.lines()[-1]


def test_status_says_that_there_is_no_key(host_for, manager):
    host = host_for()
    host.start("run", **manager.env, VERSIONER_API_KEY="")

    assert manager.until("STATUS=no API key")


def test_an_agent_that_waits_for_a_flush_tells_so_and_asks_for_time(host_for, manager):
    host = host_for()
    host.queue("payments")
    with contextlib.closing(FlusherLock(host.path)) as flush:
        assert flush.claim_delivery()
        host.start("run", **manager.env)
        manager.until(f"STATUS=waiting for a flush (pid {os.getpid()}) to hand over")
        manager.until("EXTEND_TIMEOUT_USEC=")
        assert "READY=1" not in manager.lines()

    manager.until("READY=1")


def test_a_second_agent_is_never_ready_and_names_the_first(host_for, manager):
    host = host_for()
    first = host.agent()

    second = host.start("run", **manager.env)

    assert second.wait(30) == 1
    assert f"another agent (pid {first.pid})" in second.log.read_text()
    manager.waiting()
    assert "READY=1" not in manager.lines()


def test_a_directory_that_appears_late_is_waited_for(host_for, serve, manager, tmp_path):
    host = host_for(serve().url)
    place = tmp_path / "late" / "disk"
    path = str(place / "outbox.db")
    process = host.start("run", **manager.env, VERSIONER_AGENT_DB=path)
    assert str(place) in manager.until("STATUS=waiting for the directory ")
    manager.until("EXTEND_TIMEOUT_USEC=")
    assert "READY=1" not in manager.lines()
    assert process.log.read_text().count("is its disk mounted?") == 1

    place.mkdir(parents=True)
    manager.until("READY=1")

    done = host.run("enqueue", "build", "--product", "p", "--version", "1", VERSIONER_AGENT_DB=path)
    assert done.returncode == 0
    manager.until("STATUS=up: 0 pending, 0 failed")
    assert host.end(process) == 0


def test_an_agent_that_waits_for_its_directory_can_be_stopped(host_for, manager, tmp_path):
    host = host_for()
    process = host.start("run", **manager.env, VERSIONER_AGENT_DB=str(tmp_path / "never" / "outbox.db"))
    manager.until("STATUS=waiting for the directory ")

    assert host.end(process) == 0


def test_a_reload_is_told_and_so_is_one_that_failed(host_for, manager):
    host = host_for()
    process = host.start("run", **manager.env)
    manager.until("READY=1")
    host.config.write_text("concurrency = 'many'\n")

    process.send_signal(signal.SIGHUP)
    manager.until("RELOADING=1")
    manager.until("READY=1")
    broken = manager.heard[-1][1]
    host.config.write_text("")
    process.send_signal(signal.SIGHUP)
    manager.until("RELOADING=1")
    manager.until("READY=1")

    assert "reload failed, the old configuration stays: configuration: " in broken
    assert "concurrency" in broken
    assert "reload failed" not in manager.heard[-1][1]


def test_the_end_is_told(host_for, manager):
    host = host_for()
    process = host.start("run", **manager.env)
    manager.until("READY=1")

    process.terminate()

    manager.until("STOPPING=1")
    assert process.wait(30) == 0


def test_status_shows_the_public_part_of_the_key_that_the_agent_uses(host_for):
    host = host_for()
    key_file = host.directory / "key"
    key_file.write_text("sk_acme_k1_firstsecret")
    host.env.pop("VERSIONER_API_KEY")
    host.env["VERSIONER_AGENT_API_KEY_FILE"] = str(key_file)
    process = host.agent()

    eventually(lambda: host.json("status")[0]["agent"]["key"] == "sk_acme_k1_…")
    key_file.write_text("sk_acme_k2_secondsecret")
    eventually(lambda: host.json("status")[0]["agent"]["key"] == "sk_acme_k2_…")

    assert f"running (pid {process.pid}), key sk_acme_k2_…" in host.run("status").stdout.decode()
    host.end(process)
    assert host.json("status")[0]["agent"] == {"running": False, "pid": None, "key": None}
    host.agent(VERSIONER_AGENT_API_KEY_FILE=str(host.config))
    assert host.json("status")[0]["agent"]["key"] is None
    assert b"secret" not in (host.directory / "state" / "outbox.db.flusher").read_bytes()


def test_an_upgrade_under_a_running_agent_changes_nothing_but_its_status(host_for, serve, manager, tmp_path):
    """Everything is imported before READY: with all the files gone it delivers, waits, mends and reloads."""
    library = copy_packages(tmp_path / "library")
    answers = {"1": accepted, "2": lambda: refused(409, "other SHA"), "3": lambda: refused(503)}
    server = serve(lambda seen: answers.get(seen.event["version"], accepted)())
    host = host_for(server.url)
    process = host.start("run", **manager.env, PYTHONPATH=str(library), PYTHONSAFEPATH="1", PYTHONPROFILEIMPORTTIME="1")
    manager.until("READY=1")
    eventually(lambda: "delivers from" in process.log.read_text())
    before = process.log.read_text().count("import time:")
    assert before > 100

    init = library / "versioner_agent" / "__init__.py"
    init.with_name("fresh.py").write_text(init.read_text().replace('__version__ = "', '__version__ = "9.'))
    init.with_name("fresh.py").replace(init)
    assert "restart due: version 9." in manager.until("STATUS=up: 0 pending, 0 failed (API not asked yet); restart due")
    library.rename(tmp_path / "gone")
    for version in (1, 2, 3):
        host.queue(f"product-{version}", first=version)
    eventually(lambda: host.counts() == {"delivered": 1, "failed": 1, "pending": 1})
    for content in (
        "concurrency = 'many' [",
        'nosuchkey = 1\nproxy = "http://münchen.example:8080"',
        "concurrency = 3",
    ):
        host.config.write_text(content)
        process.send_signal(signal.SIGHUP)
        manager.until("RELOADING=1")
        manager.until("READY=1")
    answers["3"] = accepted
    eventually(lambda: host.counts() == {"delivered": 2, "failed": 1})
    host.close_outbox()
    with open(host.path, "r+b") as file:
        file.write(b"\0" * 100)
    eventually(lambda: "the outbox was damaged" in process.log.read_text())

    assert process.log.read_text().count("import time:") == before
    assert host.counts() == {"delivered": 2, "failed": 1}
    assert host.end(process) == 0
    manager.waiting()
    assert any("restart due: its files are gone" in line for line in manager.lines())
    assert KEY.encode() not in host.said()


# --- the place of the outbox, and the host's sleep


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a disk")
def test_a_disk_mounted_over_the_place_later_is_delivered_from(host_for, serve, manager, tmp_path):
    """What was queued below it comes back when it is unmounted."""
    server = serve(lambda seen: accepted() if seen.event["product_name"] != "below" else refused(503))
    host = host_for(server.url)
    place = tmp_path / "disk"
    place.mkdir()
    path = str(place / "outbox.db")

    def enqueue(product):
        done = host.run("enqueue", "build", "--product", product, "--version", "1", VERSIONER_AGENT_DB=path)
        assert done.returncode == 0, done.stderr

    process = host.start("run", **manager.env, VERSIONER_AGENT_DB=path)
    manager.until("READY=1")
    enqueue("below")
    server.wait_for(1)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "tmpfs", place], check=True)
    try:
        manager.until("READY=1")
        enqueue("above")
        eventually(lambda: "above" in [seen.event["product_name"] for seen in server.requests])
        status = json.loads(host.run("status", "--json", VERSIONER_AGENT_DB=path).stdout)
        assert status["agent"]["pid"] == process.pid
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
    manager.until("READY=1")
    enqueue("later")

    eventually(lambda: "later" in [seen.event["product_name"] for seen in server.requests])
    status = json.loads(host.run("status", "--json", VERSIONER_AGENT_DB=path).stdout)
    assert status["counts"] == {"pending": 1, "delivered": 1, "failed": 0, "exported": 0, "discarded": 0}
    assert process.log.read_text().count("another place lies at") == 2
    assert host.end(process) == 0


def test_after_a_sleep_of_the_host_the_api_is_asked_at_once(host_for, serve, monkeypatch):
    """Suspending a machine takes a machine: here the clock that goes on meanwhile is set ahead."""
    limited = refused(429, retry_after="1800")
    server = serve(lambda seen: limited if seen.number == 0 else accepted())
    host = host_for(server.url)
    host.queue("payments")
    settings = config.resolve({"db": host.path, "api_url": server.url}, {}, [])
    sleeping = {"rate_limited": 3600.0}
    monkeypatch.setattr(agent, "_boot_clock_ahead_s", lambda: sleeping.get(host.health().state, 0.0))

    def stop():
        with contextlib.suppress(AssertionError):
            eventually(lambda: host.counts() == {"delivered": 1})
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop)
    stopping.start()
    agent.Agent(settings, {"VERSIONER_API_KEY": KEY}, lambda: settings).run()
    stopping.join()

    assert host.counts() == {"delivered": 1}
    assert len(server.requests) == 2


# --- what it says last, and of trouble


@pytest.mark.parametrize(
    ("content", "words"),
    [("concurrency = 'many'\n", "concurrency"), ("ca_bundle = '/mnt/late/ca.pem'\n", "can't read certificates from /mnt/late/ca.pem")],
)  # fmt: skip
def test_why_it_ended_is_what_it_said_last(host_for, manager, content, words):
    host = host_for()
    host.config.write_text(content)

    process = host.start("run", **manager.env)

    assert process.wait(30) == 3
    manager.waiting()
    last = [line for line in manager.lines() if line.startswith("STATUS=")][-1]
    assert words in last
    assert "READY=1" not in manager.lines()


def test_an_outcome_that_can_not_be_recorded_is_told(host_for, serve, manager):
    """A member of the group that holds the queue of writers keeps the agent waiting, and people should know."""
    host = host_for(serve().url)
    host.start("run", **manager.env, VERSIONER_AGENT_BUSY_TIMEOUT="0.1")
    manager.until("READY=1")
    with contextlib.closing(WriteQueue(host.path + ".queue")) as queue:
        host.queue("payments")
        assert queue.acquire(10)
        manager.until("STATUS=up: 1 pending, 0 failed (API not asked yet); other writers kept the outbox")

    manager.until("STATUS=up: 0 pending, 0 failed")


@pytest.mark.parametrize("when", ["looking", "mending"])
def test_a_signal_ends_what_takes_long_and_leaves_the_file_as_it_was(host_for, manager, monkeypatch, when):
    host = host_for()
    host.queue("payments", 50)
    host.close_outbox()
    with open(host.path, "r+b") as file:
        file.seek(os.path.getsize(host.path) - 4096)
        file.write(b"\xff" * 4096)
    before = pathlib.Path(host.path).read_bytes()
    monkeypatch.setattr(storage, "INSTRUCTIONS_A_LOOK", 1)
    monkeypatch.setattr(mending, "ROWS_A_SIGN", 1)
    settings = config.resolve({"db": host.path, "api_url": "http://127.0.0.1:9"}, {}, [])
    ending = agent.Agent(settings, manager.env, lambda: settings)
    place, name = (storage.Store, "_ends_statement") if when == "looking" else (mending, "rows_of")
    original = getattr(place, name)

    def told_then(given):
        if not ending._signals:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(given)

    monkeypatch.setattr(place, name, told_then)
    if when == "looking":
        monkeypatch.setattr(mending, "_replace", None)  # not reached

    ending.run()

    assert pathlib.Path(host.path).read_bytes() == before
    assert "READY=1" not in [line for message in manager.waiting() for line in message]
