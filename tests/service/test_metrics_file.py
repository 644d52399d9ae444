"""The agent's own file of metrics: there while it lives, with its loop's time, and gone when it is."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sqlite3
import stat
import time

import pytest
from exposition import has, read, value
from host import eventually
from scripted import refused

from versioner_agent import metrics_file
from versioner_agent.locks import FlusherLock
from versioner_agent.metrics_file import OURS, WRITE_S, MetricsFile


@pytest.fixture
def target(tmp_path):
    (tmp_path / "collector").mkdir()
    return tmp_path / "collector" / "versioner.prom"


@pytest.fixture
def ours(outbox, target):
    """The agent's part, driven by hand; it writes about an outbox with one event."""
    outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})
    made = MetricsFile(outbox.store.path, 1.0)
    made.name(str(target))
    return made


@pytest.fixture
def agent_for(host_for, target, serve):
    """Start an agent that writes to the target, and wait until it has."""

    def start(host=None, **env):
        host = host or host_for(serve().url)
        process = host.agent(VERSIONER_AGENT_METRICS_FILE=str(target), **env)
        eventually(target.exists)
        return host, process

    return start


def metrics_of(target):
    return read(target.read_text())


def test_it_is_written_at_once_and_then_every_15_seconds(ours, target, monkeypatch):
    for now, wall, expected in ((100.0, 7.0, 7.0), (100.1, 8.0, 7.0), (114.9, 8.0, 7.0), (115.0, 9.0, 9.0)):
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        ours.tell(now)

        assert value(metrics_of(target), "last_loop_timestamp_seconds") == expected
    assert WRITE_S == 15.0


def test_it_has_everything_that_the_command_has_and_the_loop(ours, target):
    ours.tell(0.0)
    found = metrics_of(target)

    assert value(found, "records", state="pending") == 1
    assert has(found, "build_info")
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_an_outbox_that_cannot_be_read_does_not_silence_the_loop(ours, outbox, target):
    with open(outbox.store.path, "r+b") as file:
        file.write(b"nonsense" * 100)

    ours.tell(0.0)

    assert value(metrics_of(target), "outbox_readable") == 0
    assert has(metrics_of(target), "last_loop_timestamp_seconds")


def test_without_a_name_nothing_is_written(ours, target):
    ours.name(None)
    ours.tell(0.0)

    assert os.listdir(target.parent) == []


def test_under_another_name_the_old_file_is_gone(ours, target):
    ours.tell(0.0)
    other = target.with_name("other.prom")
    ours.name(str(other))
    assert os.listdir(target.parent) == []

    ours.tell(0.1)
    ours.name(str(other))

    assert os.listdir(target.parent) == ["other.prom"]


def test_what_somebody_else_wrote_is_not_removed(ours, target):
    ours.tell(0.0)
    metrics_file.replace(str(target), OURS.decode(), outbox="/nowhere/outbox.db", synced=True)

    ours.name(None)

    assert target.read_bytes() == OURS


def test_what_keeps_it_from_being_written_is_said_once_and_tried_again(ours, target, caplog):
    target.parent.rmdir()
    with caplog.at_level(logging.ERROR):
        for now in (0.0, 15.0, 30.0):
            ours.tell(now)
    assert [record.message for record in caplog.records] == [
        f"can't write metrics to {target}: No such file or directory; trying again"
    ]

    target.parent.mkdir()
    ours.tell(45.0)
    assert value(metrics_of(target), "records", state="pending") == 1
    target.unlink()
    target.mkdir()
    with caplog.at_level(logging.ERROR):
        ours.tell(60.0)
    assert len(caplog.records) == 2, "another time is said again"


def test_an_agent_writes_it_and_removes_it_on_stop(agent_for, target):
    host, process = agent_for()
    found = metrics_of(target)

    assert value(found, "agent_running") == 1
    assert abs(value(found, "last_loop_timestamp_seconds") - time.time()) < 60
    assert host.end(process, signal.SIGTERM) == 0
    assert os.listdir(target.parent) == []


def test_an_agent_that_is_killed_leaves_it_for_the_alert(agent_for, target):
    host, process = agent_for()

    host.end(process, signal.SIGKILL)

    assert has(metrics_of(target), "last_loop_timestamp_seconds")


def test_it_is_written_while_the_destination_is_down(agent_for, host_for, target, serve):
    host = host_for(serve(lambda _: refused(503, "later")).url)
    host.queue("payments", 5)
    assert host.run("flush", "--timeout", "0.3").returncode == 75
    assert host.health().state == "down"

    agent_for(host)

    found = metrics_of(target)
    assert value(found, "records", state="pending") == 5
    assert value(found, "destination_state", state="down") == 1


def test_it_is_written_by_an_agent_that_waits_for_a_flush(host_for, target):
    host = host_for()
    host.queue("payments")
    with contextlib.closing(FlusherLock(host.path)) as flush:
        assert flush.claim_delivery()
        process = host.start("run", VERSIONER_AGENT_METRICS_FILE=str(target))
        eventually(target.exists)
        assert value(metrics_of(target), "agent_running") == 1

        assert host.end(process) == 0
    assert os.listdir(target.parent) == []


def test_a_second_agent_leaves_the_firsts_alone(agent_for, target):
    host, _ = agent_for()
    before = target.stat().st_ino

    second = host.start("run", VERSIONER_AGENT_METRICS_FILE=str(target))

    assert second.wait(30) == 1
    assert target.stat().st_ino == before


def test_a_place_where_it_may_not_write_stops_no_delivery(host_for, serve, tmp_path):
    host = host_for(serve().url)
    process = host.agent(VERSIONER_AGENT_METRICS_FILE=str(tmp_path / "missing" / "versioner.prom"))

    host.queue("payments", 3)

    eventually(lambda: host.counts() == {"delivered": 3})
    assert process.log.read_text().count("can't write metrics to") == 1
    assert host.end(process) == 0


def test_a_reload_moves_it_and_takes_it_away(host_for, serve, target):
    host = host_for(serve().url)
    host.config.write_text(f'metrics_file = "{target}"\n')
    process = host.agent()
    eventually(target.exists)
    other = target.with_name("other.prom")

    host.config.write_text(f'metrics_file = "{other}"\n')
    process.send_signal(signal.SIGHUP)
    eventually(other.exists)
    assert not target.exists()
    host.config.write_text("metrics_file = 7\n")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: "the old configuration stays" in process.log.read_text())
    assert other.exists()
    host.config.write_text("")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: not other.exists())

    assert host.end(process) == 0


def test_the_outbox_is_never_taken_for_it(host_for, serve):
    host = host_for(serve().url)
    process = host.agent(VERSIONER_AGENT_METRICS_FILE=host.path)
    eventually(lambda: "that name belongs to the outbox" in process.log.read_text())

    host.queue("payments", 2)

    eventually(lambda: host.counts() == {"delivered": 2})
    assert host.end(process) == 0
    assert host.counts() == {"delivered": 2}


def test_an_outbox_that_is_kept_locked_does_not_keep_the_loop_waiting(outbox, target):
    """Were it waited for as long as others may wait, this would take ten minutes."""
    outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})
    outbox.store.disconnect()
    file = MetricsFile(outbox.store.path, 600.0)
    file.name(str(target))
    with contextlib.closing(sqlite3.connect(outbox.store.path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        file.tell(time.monotonic())

    assert value(metrics_of(target), "outbox_readable") == 0
