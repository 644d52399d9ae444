"""README's runbooks, followed as they are written, on real files with real agents."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from host import COMMAND, eventually
from recipes import follow
from scripted import accepted, refused

from versioner_agent.storage import Store

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "flock", "install"))),
    reason="the runbooks are for a shell with flock and install",
)


@pytest.fixture
def server(serve):
    return serve(lambda _: refused(503, "busy"))


@pytest.fixture
def host(host_for, server):
    """A host whose API is down, with three events in its outbox, and the command on its PATH."""
    made = host_for(server.url)
    programs = made.directory / "bin"
    programs.mkdir()
    script = programs / "versioner-agent"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    script.chmod(0o755)
    made.env["PATH"] = f"{programs}:{made.env['PATH']}"
    made.queue("payments", 3)
    return made


def recover(server):
    """The API is there again."""
    server.script = lambda seen: accepted(f"evt-{seen.key}")


def arrived(server):
    return [seen.event["version"] for seen in server.firsts() if seen.method == "POST" and seen.body != b"{}"]


def crash(host):
    """Kill an agent, so that what belongs to the outbox is left as a crash leaves it."""
    agent = host.agent()
    eventually(lambda: host.health().state == "down")
    agent.kill()
    agent.wait(30)
    host.close_outbox()


def test_a_moved_outbox_delivers_in_the_new_place_and_nothing_twice(host, server):
    crash(host)
    place = os.path.dirname(host.path)
    new = host.directory / "other disk"
    host.env["VERSIONER_AGENT_DB"] = str(new / "outbox.db")
    before = host.run("enqueue", "build", "--product", "payments", "--version", "early")
    done = follow(
        "runbook: move", host.directory, env=host.env,
        instead={"OLD=/var/lib/versioner-agent": f"OLD='{place}'", "NEW=/srv/outbox": f"NEW='{new}'"},
    )  # fmt: skip
    recover(server)
    after = host.run("enqueue", "build", "--product", "payments", "--version", "4")
    flush = host.run("flush")

    assert before.returncode == 1  # told, instead of queued where nobody looks
    assert b"there is no such directory" in before.stderr or b"check that" in before.stderr
    assert "the whole file is sound" in done.stdout
    assert after.returncode == flush.returncode == 0
    assert arrived(server) == ["1", "2", "3", "4"]
    assert os.stat(new).st_mode == os.stat(f"{place}.moved").st_mode
    assert not os.path.exists(place)


def backed_up(host):
    backup = host.directory / "backup.db"
    follow(
        "runbook: backup", host.directory, env=host.env,
        instead={"OUTBOX=/var/lib/versioner-agent/outbox.db": f"OUTBOX='{host.path}'", "BACKUP=/backup/outbox.db": f"BACKUP='{backup}'"},
    )  # fmt: skip
    return backup


def restore(host, backup, instead=None):
    return follow(
        "runbook: restore", host.directory, env=host.env, check=False,
        instead={
            "OUTBOX=/var/lib/versioner-agent/outbox.db": f"OUTBOX='{host.path}'", "BACKUP=/backup/outbox.db": f"BACKUP='{backup}'",
            "-m 660": "-m 600", **(instead or {}),
        },
    )  # fmt: skip


def test_a_restored_backup_delivers_again_with_the_same_keys_and_lacks_what_came_later(host, server):
    backup = backed_up(host)
    recover(server)
    assert host.run("flush").returncode == 0
    host.queue("payments", first=4)
    host.close_outbox()
    first = {seen.event["version"]: seen.key for seen in server.requests if seen.body != b"{}"}
    done = restore(host, backup)
    counts = host.counts()
    assert host.run("flush").returncode == 0

    assert done.returncode == 0, done.stdout + done.stderr
    assert "the whole file is sound" in done.stdout
    assert counts == {"pending": 3}
    again = [seen for seen in server.requests if seen.body != b"{}"][3:]
    assert {seen.event["version"]: seen.key for seen in again} == first
    with contextlib.closing(Store(f"{host.path}.before/outbox.db")) as store, store.read() as connection:
        assert connection.execute("SELECT count(*) FROM record").fetchone() == (4,)


def test_a_crash_before_the_restore_leaves_no_journal_that_is_taken_for_the_new_files(host):
    """A hot journal beside the restored file would be rolled back into it."""
    backup = backed_up(host)
    host.close_outbox()
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('PRAGMA cache_size = 1');"
        "c.execute('BEGIN IMMEDIATE'); c.execute('UPDATE record SET queued_by = hex(zeroblob(9000))'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, host.path], check=False).returncode == 9
    assert os.path.getsize(f"{host.path}-journal")
    done = restore(host, backup)

    assert done.returncode == 0, done.stdout + done.stderr
    assert os.path.exists(f"{host.path}.before/outbox.db-journal")
    assert host.counts() == {"pending": 3}


def test_a_job_that_queues_in_the_middle_of_a_restore_waits_and_loses_nothing(host):
    """Between the old file and the restored one there is none: whoever queued then would make another."""
    backup = backed_up(host)
    host.close_outbox()
    gap = 'touch inside; until [ -e go ]; do sleep 0.02; done; mv "$1.restored" "$1"'
    with ThreadPoolExecutor(1) as pool:
        restoring = pool.submit(restore, host, backup, {'mv "$1.restored" "$1"': gap})
        eventually((host.directory / "inside").exists)
        job = host.start("enqueue", "build", "--product", "payments", "--version", "late")
        eventually(lambda: job.poll() is not None or waits_for(f"{host.path}.queue"))
        (host.directory / "go").touch()
        done = restoring.result()

    assert done.returncode == 0, done.stdout + done.stderr
    assert job.wait(30) == 0
    assert host.counts() == {"pending": 4}
    assert host.json("status")[0]["damage"] is None


def waits_for(path):
    """Tell whether somebody waits for the lock on *path* (proc_locks(5))."""
    with open("/proc/locks") as file:
        return any("->" in line and f":{os.stat(path).st_ino} " in line for line in file)


def test_a_clone_starts_afresh_without_taking_the_missing_file_for_damage(host, server):
    crash(host)
    with contextlib.closing(sqlite3.connect(host.path, isolation_level=None)) as connection:
        connection.execute(f"UPDATE outbox SET machine = '{'0' * 32}'")
    warned = host.run("doctor", "--offline")
    place = os.path.dirname(host.path)
    follow(
        "runbook: clone", host.directory, env=host.env, instead={"PLACE=/var/lib/versioner-agent": f"PLACE='{place}'"}
    )
    recover(server)
    queued = host.run("enqueue", "build", "--product", "payments", "--version", "new")
    assert host.run("flush").returncode == 0

    assert b"the outbox was made on another machine; 3 pending here may be delivered from there too" in warned.stdout
    assert (queued.returncode, queued.stderr) == (0, b"")
    assert arrived(server)[-1] == "new"
    assert host.counts() == {"delivered": 1}
    assert host.json("status")[0]["outbox"]["other_machine"] is False
