"""What people and processes see of damage: `status`, `doctor`, an enqueue that meets it, and SIGKILL in the middle."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from crash import COMMAND, needs_strace
from host import eventually
from scripted import accepted
from specimen import Specimen, records_of

from versioner_agent import Outbox, damage, mending, review, schema
from versioner_agent.errors import OutboxError
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.storage import Store

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
ENQUEUE_MANY = """
import sys
from versioner_agent import Outbox
outbox = Outbox(sys.argv[1], busy_timeout=60)
print("ready"); input()
for n in range(40):
    outbox.enqueue("build", {"product_name": sys.argv[2], "version": str(n), "status": "ok"})
    if n == 10: print("on")
print("done")
"""


def corrupt(path, at=0, content=b"\xff" * 40):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def kept_files(path):
    directory = os.path.dirname(path)
    return sorted(name for name in os.listdir(directory) if ".corrupt-" in name)


@pytest.fixture
def host(host_for, serve):
    made = host_for(serve(lambda seen: accepted(f"evt-{seen.key}")).url)
    made.queue("payments", 3)
    return made


def test_an_enqueue_does_not_write_over_what_lies_behind_the_end_that_the_header_names(host):
    """SQLite goes by the number of pages in the header (https://sqlite.org/fileformat2.html), and starts there."""
    for number in range(4, 8):
        host.queue("payments", first=number, scm_branch="b" * 20_000)
    host.close()
    with open(host.path, "rb") as file:
        count = int.from_bytes(file.read(32)[28:])
    corrupt(host.path, at=28, content=(count - 3).to_bytes(4))
    done = host.run("enqueue", "build", "--product", "payments", "--version", "8", "--scm-branch", "b" * 20_000)

    assert done.returncode == 0
    assert b"the outbox was damaged: " in done.stderr
    assert [json.loads(kept.payload)["version"] for kept in records_of(host.path).values()] == list("12345678")


@pytest.mark.parametrize("who", ["enqueue", "flush", "run"])
def test_a_file_that_was_not_cut_after_a_commit_is_cut_and_nothing_more(host, who):
    """SQLite shortens a file behind its commit; who is killed in between leaves an end that belongs to nobody."""
    host.close()
    with open(host.path, "ab") as file:
        file.write(b"old copies" * 2000)
    before = os.stat(host.path)
    assert host.run("status").returncode == 0
    assert host.run("doctor", "--offline").returncode == 0
    if who == "run":
        host.agent()
        eventually(lambda: host.counts() == {"delivered": 3})
    elif who == "flush":
        assert host.run("flush").returncode == 0
        assert host.counts() == {"delivered": 3}
    else:
        done = host.run("enqueue", "build", "--product", "payments", "--version", "4")
        assert (done.returncode, done.stderr) == (0, b"")
        assert host.counts() == {"pending": 4}

    assert os.stat(host.path).st_ino == before.st_ino
    assert os.stat(host.path).st_size < before.st_size or who == "flush"
    assert kept_files(host.path) == []


# --- the agent, `flush`, `status`, `doctor`


@pytest.mark.parametrize("command", ["run", "flush"])
def test_who_delivers_mends_first_and_says_so(host, command):
    corrupt(host.path)
    if command == "run":
        process = host.agent()
        eventually(lambda: host.counts() == {"delivered": 3})
        said = process.log.read_text()
    else:
        done = host.run("flush")
        assert done.returncode == 0
        said = done.stderr.decode()

    assert host.counts() == {"delivered": 3}
    assert "the outbox was damaged: file is not a database; records saved: 3 pending; unreadable: 0" in said
    assert "Traceback" not in said
    assert len([name for name in kept_files(host.path) if not name.endswith("-journal")]) == 1


def test_nobody_looks_through_a_file_whose_agent_has_done_so(host, tmp_path, monkeypatch):
    """Looking keeps builds from queuing, and an export beside an agent must not."""
    monkeypatch.setattr(mending, "find", lambda _: pytest.fail("looked"))
    with contextlib.closing(FlusherLock(host.path)) as agent, contextlib.closing(Store(host.path)) as store:
        assert agent.claim_agent()
        assert Ledger(store).open(create=False) is None


def test_status_tells_of_damage_until_somebody_has_acknowledged_it(host):
    corrupt(host.path)
    assert host.run("flush").returncode == 0
    (told,) = host.json("status")
    text = host.run("status").stdout.decode()
    findings = [json.loads(line) for line in host.run("doctor", "--offline", "--json").stdout.splitlines()]
    (finding,) = [each for each in findings if each["level"] != "ok" and each["check"] != "file_system"]
    doctor = host.run("doctor", "--offline").returncode
    acknowledged = host.run("doctor", "--acknowledge")
    (after,) = host.json("status")

    assert told["damage"]["salvaged"] == {"pending": 3}
    assert os.path.exists(told["damage"]["kept"])
    assert "DAMAGED" in text
    assert "doctor --acknowledge" in text
    assert (finding["check"], finding["level"]) == ("damage", "warning")
    assert doctor == 1
    assert acknowledged.returncode == 0
    assert b"acknowledged" in acknowledged.stdout
    assert after["damage"] is None
    assert host.run("doctor", "--offline").returncode == 0
    assert os.path.exists(told["damage"]["kept"])


def test_doctor_says_that_a_newer_outbox_is_not_delivered_by_this_program(host):
    host.close()
    with contextlib.closing(sqlite3.connect(host.path)) as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    done = host.run("doctor", "--offline")

    assert done.returncode == 1
    told = f"has schema {schema.VERSION + 1}, this versioner-agent knows {schema.VERSION}; it is left as it is"
    assert f"{told}: events are queued and not" in done.stdout.decode()


def test_doctor_finds_damage_and_leaves_it_as_it_is(host):
    corrupt(host.path)
    with open(host.path, "rb") as file:
        before = file.read()

    done = host.run("doctor", "--offline")

    assert done.returncode == 1
    assert b"error" in done.stdout
    with open(host.path, "rb") as file:
        assert file.read() == before
    assert kept_files(host.path) == []


def test_damage_before_the_last_was_acknowledged_is_counted(host):
    for _ in range(3):
        with contextlib.closing(sqlite3.connect(host.path, isolation_level=None)) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute("UPDATE record SET state = 'qending' WHERE id = 1")
        with contextlib.closing(Store(host.path)) as store:
            Ledger(store).open(create=True)

    assert host.json("status")[0]["damage"]["earlier"] == 2
    assert host.counts() == {"pending": 3}


def test_commands_that_only_look_say_what_is_wrong_and_who_mends_it(host):
    corrupt(host.path)
    for command in (("status",), ("list",), ("show", "1"), ("retry", "--all-failed"), ("discard", "1")):
        done = host.run(*command)

        assert done.returncode == 1
        assert b"is damaged" in done.stderr
        assert b"the agent, a flush or the next enqueue" in done.stderr
        assert b"Traceback" not in done.stderr


# --- an enqueue that meets damage


def test_an_enqueue_saves_what_is_there_and_adds_its_own(host):
    corrupt(host.path)

    done = host.run("enqueue", "build", "--product", "payments", "--version", "9")

    assert done.returncode == 0
    assert done.stdout.startswith(b"queued 4:")
    assert b"warning: the outbox was damaged" in done.stderr
    assert host.counts() == {"pending": 4}


@pytest.mark.parametrize("loss", ["missing", "empty"])
def test_an_outbox_that_vanished_is_damage_and_no_fresh_start(host, loss):
    os.remove(host.path) if loss == "missing" else os.truncate(host.path, 0)

    done = host.run("enqueue", "build", "--product", "payments", "--version", "9")

    assert done.returncode == 0
    assert f"the file is {loss}".encode() in done.stderr
    assert host.json("status")[0]["damage"]["what"] == f"the file is {loss}"


def test_an_enqueue_leaves_a_large_damaged_outbox_to_who_delivers(host, monkeypatch):
    monkeypatch.setattr(damage, "CHECKED_BYTES", 1000)
    corrupt(host.path)
    with Outbox(host.path) as outbox, pytest.raises(OutboxError, match="is damaged") as caught:
        outbox.enqueue("build", BUILD)

    assert "flush" in caught.value.hint
    assert kept_files(host.path) == []


def test_enqueues_that_race_with_the_replacement_lose_nothing(host, child):
    writers = [child(ENQUEUE_MANY, host.path, f"racer-{number}") for number in range(4)]
    for writer in writers:
        assert writer.says() == "ready"
        writer.go()
    for writer in writers:
        assert writer.says() == "on"
    with contextlib.closing(Store(host.path)) as store:
        ledger = Ledger(store)
        for _ in range(5):
            with store.write():
                corrupt(host.path, at=70)  # while nobody else writes
            ledger.open(create=True)
    for writer in writers:
        assert writer.says() == "done"

    assert host.counts() == {"pending": 163}
    assert len({kept.event_id for kept in records_of(host.path).values()}) == 163


# --- a disk that fails: what it can't read just now is not gone


@pytest.mark.parametrize("lasting", ["", "+"], ids=["once", "from-then-on"])
@pytest.mark.parametrize("moment", range(10))
@needs_strace
def test_a_disk_that_cannot_be_read_costs_no_record(host, moment, lasting):
    """When the disk is back, everything is there, in the very same file."""
    host.close()
    before = os.stat(host.path).st_ino
    fails = ("-e", "trace=pread64", "-e", f"inject=pread64:error=EIO:when={2 * moment + 1}{lasting}")
    strace = ("strace", "-f", "-qq", "-o", os.devnull, "-P", host.path, *fails)
    command = (*COMMAND, "enqueue", "build", "--product", "payments", "--version", "4")
    done = subprocess.run((*strace, *command), env=host.env, capture_output=True, timeout=60, check=False)

    assert b"Traceback" not in done.stderr
    assert kept_files(host.path) == []
    assert os.stat(host.path).st_ino == before
    assert set("123") <= {json.loads(kept.payload)["version"] for kept in records_of(host.path).values()}
    if done.returncode:
        assert done.returncode == 1
        assert b"look at the disk" in done.stderr
        assert host.counts() == {"pending": 3}


def test_a_damaged_file_of_which_a_part_cannot_be_read_stays_as_it_is(host, monkeypatch):
    host.close()
    corrupt(host.path)
    pread = os.pread

    def failing(fd, size, at):
        if at == 4096 * 9:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, size, at)

    with contextlib.closing(Store(host.path)) as store:
        monkeypatch.setattr(os, "pread", failing)
        with pytest.raises(OutboxError, match="Input/output error"):
            Ledger(store).open(create=True)
        assert [name for name in os.listdir(os.path.dirname(host.path)) if "corrupt" in name or "mending" in name] == []
        monkeypatch.undo()
        assert Ledger(store).open(create=True).salvaged == {"pending": 3}


# --- SIGKILL


KILL_AT = """
import os, signal, sys
from versioner_agent.ledger import Ledger
from versioner_agent.storage import Store
count = 0
def audit(event, args):
    global count
    if event in ("os.link", "os.remove", "os.rename", "open", "os.chown", "shutil.copyfile", "sqlite3.connect/handle"):
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
Ledger(Store(sys.argv[1])).open(create=True)
"""


def test_a_replacement_that_is_killed_is_done_by_the_next(tmp_path, tmp_path_factory):
    """At every file operation of it, one after the other."""
    specimen = Specimen(tmp_path_factory.mktemp("sound"), 700_000, 5)
    path = specimen.copy_to(tmp_path)
    corrupt(path)
    point = killed = 0
    while True:
        point += 1
        done = subprocess.run([sys.executable, "-c", KILL_AT, path, str(point)], check=False)
        if done.returncode == 0:
            break
        killed += 1
        assert os.path.exists(path)

    assert killed > 8
    assert records_of(path) == specimen.kept
    assert not os.path.exists(f"{path}.mending")
    with contextlib.closing(Store(path)) as store:
        assert review.stats(store).damage.salvaged
        assert damage.find(store) is None


def test_no_journal_of_an_outbox_that_is_gone_is_taken_for_the_new_ones(host):
    """SQLite plays a journal that a killed process left into whatever file lies beside it."""
    host.close()
    killed = "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN');"
    killed += "c.execute('PRAGMA cache_size = 1'); c.execute('UPDATE record SET detail = zeroblob(90000)'); os._exit(0)"
    subprocess.run([sys.executable, "-c", killed, host.path], check=True)
    with open(host.path + "-journal", "rb") as file:
        assert file.read(8).hex() == "d9d505f920a163d7"  # of a transaction to roll back
    os.remove(host.path)

    assert host.run("flush").returncode == 0

    assert [name for name in kept_files(host.path) if name.endswith("-journal")]
    with contextlib.closing(sqlite3.connect(host.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM record").fetchone() == (0,)
