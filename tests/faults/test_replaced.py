"""What people and tools do to an outbox's files while an agent runs: removed, emptied, put back, switched, blocked."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading

import pytest
from host import eventually
from scripted import accepted

from versioner_agent import Outbox, damage, review
from versioner_agent.files import RESERVE_BYTES
from versioner_agent.ledger import Ledger
from versioner_agent.storage import Store

BUILD = {"product_name": "payments", "version": "1", "status": "completed"}
ENQUEUE = ("enqueue", "build", "--product", "payments", "--version")


def arrived(server):
    return sorted(seen.event["version"] for seen in server.requests)


@pytest.fixture
def gate():
    opened = threading.Event()
    yield opened
    opened.set()


@pytest.mark.parametrize("what", ["removed", "emptied", "zeroed", "an older copy"])
def test_an_answer_settles_only_the_record_it_was_sent_for(host_for, serve, gate, what):
    """The file is replaced while a request is under way, and the id is another event's by the time of the answer."""

    def script(seen):
        if seen.event["version"] == "first":
            gate.wait(30)
        return accepted(f"evt-{seen.key}")

    server = serve(script)
    host = host_for(server.url)
    host.queue("other")
    shutil.copy(host.path, f"{host.path}.copy")
    host.run(*ENQUEUE, "first")
    host.agent()
    server.wait_for(2)
    if what == "removed":
        os.remove(host.path)
    elif what == "emptied":
        os.truncate(host.path, 0)
    elif what == "zeroed":
        with open(host.path, "r+b") as file:
            file.write(bytes(os.path.getsize(host.path)))
    else:
        os.replace(f"{host.path}.copy", host.path)
    for version in ("second", "third"):
        assert host.run(*ENQUEUE, version).returncode == 0
    gate.set()

    eventually(lambda: {"second", "third"} <= set(arrived(server)))
    eventually(lambda: "pending" not in host.counts())


def test_an_agent_keeps_its_outbox_when_its_lock_is_removed(host_for, serve):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    agent = host.agent()
    os.remove(f"{host.path}.flusher")
    eventually(lambda: host.presence().has_agent)

    second = host.run("run")
    host.queue("payments", 3)
    eventually(lambda: host.counts() == {"delivered": 3})

    assert second.returncode == 1
    assert f"pid {agent.pid}".encode() in second.stderr
    assert len(server.requests) == 3
    assert host.presence().agent_pid == agent.pid


def test_all_files_removed_under_an_agent_are_made_again_and_it_delivers_on(host_for, serve):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    host.queue("payments")
    agent = host.agent()
    eventually(lambda: host.counts() == {"delivered": 1})
    for name in os.listdir(os.path.dirname(host.path)):
        os.remove(os.path.join(os.path.dirname(host.path), name))
    assert host.run(*ENQUEUE, "again").returncode == 0

    eventually(lambda: "again" in arrived(server))
    assert agent.poll() is None
    assert host.json("status")[0]["agent"] == {"running": True, "pid": agent.pid, "key": "sk_acme_k1_…"}


# --- write-ahead logging


def switch_to_wal(path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute("PRAGMA journal_mode = WAL").fetchall() == [("wal",)]
        connection.execute("ANALYZE")


def test_an_outbox_that_a_tool_switched_to_wal_goes_on_and_is_switched_back(host_for, serve):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    host.queue("payments")
    agent = host.agent()
    eventually(lambda: host.counts() == {"delivered": 1})
    switch_to_wal(host.path)
    for version in ("a", "b"):
        done = host.run(*ENQUEUE, version)
        assert done.returncode == 0, done.stderr
    eventually(lambda: host.counts() == {"delivered": 3})
    assert host.run("doctor", "--offline").returncode == 0
    assert host.end(agent) == 0
    host.close()
    assert host.run(*ENQUEUE, "c").returncode == 0

    with open(host.path, "rb") as file:
        assert file.read(20)[18:] == b"\1\1"
    assert not os.path.exists(f"{host.path}-wal")


@pytest.mark.parametrize("loss", ["missing", "truncated"])
def test_a_log_left_behind_is_not_played_into_the_new_file(host_for, loss):
    host = host_for()
    host.queue("payments", 3)
    host.close()
    with contextlib.closing(sqlite3.connect(host.path, isolation_level=None)) as tool:
        tool.execute("PRAGMA journal_mode = WAL")
        tool.execute("UPDATE record SET queued_by = 'tool'")
        for suffix in ("-wal", "-shm"):
            shutil.copy(host.path + suffix, f"{host.path}{suffix}.kept")
    for suffix in ("-wal", "-shm"):
        os.replace(f"{host.path}{suffix}.kept", host.path + suffix)
    os.remove(host.path) if loss == "missing" else os.truncate(host.path, 20_000)
    for version in ("a", "b"):
        done = host.run(*ENQUEUE, version)
        assert done.returncode == 0, done.stderr

    assert not os.path.exists(f"{host.path}-wal")
    with contextlib.closing(sqlite3.connect(host.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert any(name.endswith("-wal") and ".corrupt-" in name for name in os.listdir(os.path.dirname(host.path)))


def test_a_wal_that_holds_what_was_queued_loses_nothing_when_the_outbox_shrinks(host_for):
    """In write-ahead logging the file is longer than its header says until a checkpoint, which is no damage."""
    host = host_for()
    host.queue("payments", 300, scm_branch="b" * 2000)
    host.close()
    with contextlib.closing(sqlite3.connect(host.path, isolation_level=None)) as tool:
        tool.execute("PRAGMA journal_mode = WAL")
        tool.execute("PRAGMA wal_autocheckpoint = 0")
        tool.execute("DELETE FROM record WHERE id < 250")
        tool.execute("PRAGMA incremental_vacuum(64)").fetchall()
        before = os.path.getsize(f"{host.path}-wal")
        for version in ("a", "b"):
            done = host.run(*ENQUEUE, version)
            assert (done.returncode, done.stderr) == (0, b"")
        assert os.path.getsize(f"{host.path}-wal") - before < RESERVE_BYTES  # there is no journal to be grown
        with contextlib.closing(Outbox(host.path)) as outbox, outbox.store.write() as connection:
            connection.execute("DELETE FROM reserve")
            connection.execute("PRAGMA incremental_vacuum(64)").fetchall()
        assert host.run(*ENQUEUE, "c").returncode == 0

    assert host.counts() == {"pending": 54}
    assert not [name for name in os.listdir(os.path.dirname(host.path)) if ".corrupt-" in name]


# --- pipes and other things that are no files


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal", "-shm", ".flusher", ".queue"])
@pytest.mark.parametrize("command", ["enqueue", "status", "list", "doctor", "flush", "run"])
def test_a_pipe_in_place_of_a_file_holds_nobody_up(host_for, serve, suffix, command):
    server = serve()
    host = host_for(server.url)
    host.queue("payments")
    host.close()
    with contextlib.suppress(FileNotFoundError):
        os.remove(host.path + suffix)
    os.mkfifo(host.path + suffix)
    if command == "run":
        process = host.start("run")
        eventually(lambda: process.poll() is not None or "delivers from" in process.log.read_text())
        host.end(process)
        said = process.log.read_bytes()
    else:
        said = host.run(*((*ENQUEUE, "2") if command == "enqueue" else (command,)), within=20).stderr

    assert b"Traceback" not in said
    assert b"internal error" not in said


def test_a_pipe_in_place_of_the_outbox_of_a_running_agent_does_not_wedge_it(host_for, serve):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    agent = host.agent()
    host.queue("payments")
    eventually(lambda: host.counts() == {"delivered": 1})
    host.close_outbox()
    os.replace(host.path, f"{host.path}.aside")
    os.mkfifo(host.path)
    eventually(lambda: "it is not a regular file" in agent.log.read_text())
    os.remove(host.path)
    os.replace(f"{host.path}.aside", host.path)
    assert host.run(*ENQUEUE, "2").returncode == 0

    eventually(lambda: host.counts() == {"delivered": 2})
    assert host.end(agent) == 0


# --- rows that became something else; the file is too large to be looked through at the start


@pytest.fixture
def large(tmp_path, monkeypatch):
    """An outbox that counts as a large one: damage of it is met, not looked for."""
    with Outbox(tmp_path / "outbox.db") as outbox:
        for number in range(5):
            outbox.enqueue("build", {**BUILD, "version": str(number)})
    monkeypatch.setattr(damage, "CHECKED_BYTES", 1000)
    return str(tmp_path / "outbox.db")


def alter(path, statement):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM destination", "UPDATE tally SET state = 'pendinf' WHERE state = 'pending'", "DELETE FROM tally",
        "UPDATE tally SET n = 'many' WHERE state = 'pending'",
    ],
)  # fmt: skip
def test_rows_that_are_always_there_are_put_right(large, statement):
    alter(large, statement)
    with contextlib.closing(Store(large)) as store:
        ledger = Ledger(store)
        ledger.open(create=True)

        assert ledger.pending() == 5
        assert review.stats(store).counts["pending"] == 5
        assert ledger.head("payments")[0].id == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE destination SET retry_at = 'soon', next_attempt_at = x'00', since = 'x', deliveries = 'few', state = x'41'",
        "UPDATE destination SET last_delivered_at = 'then', reason = x'ff'",
        "UPDATE record SET attempts = 'three', counted = 'two', counted_since = 'x', unanswered = x'00', retries = 'r'",
        "UPDATE record SET queued_at = 'then', held_since = 'x', last_attempt_at = x'00', queued_by = x'ff' WHERE id = 2",
        "UPDATE record SET state = 'failed', settled_at = 'then', late = 'very', http_status = 'ok', detail = x'00' WHERE id = 2",
        "UPDATE record SET version = x'31', environment_name = 5 WHERE id = 3",
        "INSERT INTO attempt (record_id, at, outcome, http_status, detail, duration_s) VALUES (1, 'x', x'00', 'y', 5, 'z')",
        "INSERT INTO meta VALUES ('damage', '{\"at\": \"x\", \"what\": 1, \"kept\": 2, \"salvaged\": 3, \"unreadable\": 4}')",
        "INSERT INTO meta VALUES ('damage', 'junk')",
        "UPDATE sqlite_sequence SET seq = 9223372036854775807",
        "UPDATE sqlite_sequence SET seq = 'x'",
    ],
)  # fmt: skip
def test_values_of_another_type_stop_nobody(host_for, serve, statement):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    host.queue("payments", 5)
    alter(host.path, statement)
    for command in (("status",), ("status", "--json"), ("list",), ("list", "--json"), ("show", "1"), ("show", "2", "--json"),
                    ("doctor", "--offline"), (*ENQUEUE, "new")):  # fmt: skip
        done = host.run(*command)
        assert b"internal error" not in done.stderr, command
        assert done.returncode in (0, 1), command
    flush = host.run("flush", "--timeout", "20")

    assert flush.returncode in (0, 1), flush.stderr  # 1: a record that is damaged was refused
    assert b"internal error" not in flush.stderr
    assert "new" in arrived(server)
    assert "pending" not in host.counts()


def test_a_product_name_that_became_bytes_stops_no_other_product(host_for, serve):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    host.queue("aaa")
    host.queue("zzz")
    alter(host.path, "UPDATE record SET product_name = CAST(product_name AS BLOB) WHERE id = 1")
    assert host.run("flush", "--timeout", "20").returncode == 0

    assert {seen.product for seen in server.requests} == {"aaa", "zzz"}
