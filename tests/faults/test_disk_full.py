"""A real file system of 4 MB, filled to the last byte: queuing fails loudly, delivering goes on, and queuing comes back."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import threading

import pytest
from host import eventually
from scripted import accepted, refused

from versioner_agent import Outbox
from versioner_agent.errors import OutboxFull
from versioner_agent.events import validate as event

MB = 1024 * 1024

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a small file system"
)


class SmallDisk:
    """A tmpfs; `fill` leaves no byte, `neighbour` eats every byte that becomes free."""

    def __init__(self, path):
        self.path = path
        self._stop = threading.Event()
        self._neighbour = None
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", path], check=True)

    def fill(self):
        for size in (64 * 1024, 4096, 1):
            with contextlib.suppress(OSError), open(self.path / "filler", "ab", buffering=0) as file:
                while file.write(b"x" * size) == size:
                    pass

    def neighbour(self):
        def eat():
            while not self._stop.wait(0.002):
                if os.statvfs(self.path).f_bavail:
                    self.fill()

        self._neighbour = threading.Thread(target=eat)
        self._neighbour.start()

    def free(self):
        """Stop the neighbour and remove what was filled in."""
        self._stop.set()
        if self._neighbour is not None:
            self._neighbour.join()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path / "filler")

    def unmount(self):
        self._stop.set()
        if self._neighbour is not None:
            self._neighbour.join()
        subprocess.run(["umount", "--lazy", self.path], check=True)


@pytest.fixture
def host(host_for, serve):
    """A host whose outbox lies on a disk of its own; `host.server` gets its events."""
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    made = host_for(server.url)
    made.server = server
    made.disk = SmallDisk(made.directory / "state")
    yield made
    made.close()
    made.disk.unmount()


def queue_until_full(host, notes, most=100_000):
    """Queue until it is refused, or *most* events; returns how many were accepted.

    By the hundred at first, which is quicker, and one by one where an array could be refused as a whole.
    """
    events = (
        event("build", {
            "product_name": f"p{number % 9}", "version": str(number), "status": "ok",
            "extra_metadata": {"notes": "n" * notes},
        })
        for number in itertools.count()
    )  # fmt: skip
    count = 0
    with Outbox(host.path) as outbox, contextlib.suppress(OutboxFull):
        while count < most:
            is_roomy = count and os.statvfs(host.disk.path).f_bavail * 4096 > 1.5 * MB + 200 * notes
            several = min(100 if is_roomy else 1, most - count)
            outbox.enqueue_all(list(itertools.islice(events, several)))
            count += several
    return count


def check_sound(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def enqueue(host, *args):
    return host.run("enqueue", "build", "--product", "late", "--version", "1", *args)


@pytest.mark.parametrize(
    ("notes", "has_neighbour"),
    [(0, False), (300, True), (8000, True), (90_000, False)],
    ids=["0-alone", "300-beside-a-neighbour", "8000-beside-a-neighbour", "90000-alone"],
)
def test_a_full_disk_refuses_loudly_drains_and_accepts_again(host, notes, has_neighbour):
    """Filled by the outbox itself. What was delivered leaves room for new events, though nobody frees any."""
    count = queue_until_full(host, notes)
    host.disk.fill()
    assert os.statvfs(host.disk.path).f_bavail == 0
    refused_ = enqueue(host)
    assert refused_.returncode == 1
    assert b"no space left" in refused_.stderr
    assert b"hint: free some space" in refused_.stderr
    assert host.counts() == {"pending": count}
    check_sound(host.path)
    if has_neighbour:
        host.disk.neighbour()

    agent = host.agent()
    eventually(lambda: host.counts() == {"delivered": count}, within=60)

    assert agent.poll() is None
    assert len(host.server.requests) == len(host.server.firsts()) == count
    assert enqueue(host).returncode == 0
    eventually(lambda: host.counts() == {"delivered": count + 1})
    check_sound(host.path)
    assert host.end(agent) == 0
    assert b"Traceback" not in host.said()


@pytest.mark.parametrize("has_neighbour", [False, True], ids=["alone", "beside-a-neighbour"])
def test_a_disk_that_others_filled_keeps_no_delivery_from_being_recorded(host, has_neighbour):
    count = queue_until_full(host, 400, most=300)
    host.disk.fill()
    if has_neighbour:
        host.disk.neighbour()
    agent = host.agent()
    eventually(lambda: host.counts() == {"delivered": count}, within=60)

    assert len(host.server.requests) == count == 300
    host.disk.free()
    assert enqueue(host).returncode == 0
    eventually(lambda: host.counts() == {"delivered": count + 1})
    assert host.end(agent) == 0


@pytest.mark.parametrize(("status", "state", "notes"), [(409, "failed", 0), (503, "pending", 300)])
def test_refusals_and_failures_are_recorded_on_a_full_disk_too(host, status, state, notes):
    host.server.script = lambda _: refused(status, "words " * 300)
    count = queue_until_full(host, notes)
    host.disk.fill()
    host.disk.neighbour()
    agent = host.agent()
    if state == "failed":
        eventually(lambda: host.counts() == {"failed": count}, within=60)
        assert len(host.server.requests) == count
        record, payload, _ = host.record(count)
        assert (record.reason, record.http_status) == ("conflict", 409)
        assert host.record(1)[0].detail.startswith("words words")
        assert json.loads(payload)["version"] == str(count - 1)
    else:
        eventually(lambda: host.record(1)[0].attempts > 3, within=60)
        host.server.script = lambda seen: accepted(f"evt-{seen.key}")
        eventually(lambda: host.counts() == {"delivered": count}, within=60)
    assert agent.poll() is None
    check_sound(host.path)


def test_an_array_that_does_not_fit_is_not_queued_at_all(host):
    queue_until_full(host, 400, most=300)
    events = [{"product_name": "p", "version": str(n), "status": "ok", "build_url": "u" * 900} for n in range(4000)]

    done = host.run("enqueue", "json", "--kind", "build", stdin=json.dumps(events).encode())

    assert done.returncode == 1
    assert b"no space left" in done.stderr
    assert host.counts() == {"pending": 300}
    check_sound(host.path)


@pytest.mark.parametrize(("count", "notes"), [(900, 300), (20, 90_000)])
def test_a_published_batch_is_handed_over_on_a_full_disk(host, count, notes):
    with Outbox(host.path) as outbox, outbox.store.write(create=True) as connection:
        connection.execute(
            "INSERT INTO batch (kind, created_at, published, waiting) VALUES ('enqueue', 1, 1, ?)", (count,)
        )
    assert queue_until_full(host, notes, most=count) == count
    with Outbox(host.path) as outbox:
        for record_id in range(1, count + 1):  # one by one, for a journal of them all would not fit
            with outbox.store.write() as connection:
                connection.execute("UPDATE record SET state = 'staged', batch = 1 WHERE id = ?", (record_id,))
    host.disk.fill()
    host.disk.neighbour()

    host.agent()

    eventually(lambda: host.counts() == {"delivered": count}, within=60)
    assert len(host.server.requests) == count


def test_damage_on_a_full_disk_waits_for_room_and_says_so(host):
    queue_until_full(host, 400, most=300)
    with open(host.path, "r+b") as file:
        file.write(b"garbage")
    host.disk.fill()

    process = host.start("run")
    eventually(lambda: "no space left" in process.log.read_text())
    refused_ = enqueue(host)
    host.disk.free()
    eventually(lambda: "the outbox was damaged" in process.log.read_text(), within=60)
    eventually(lambda: host.counts() == {"delivered": 300}, within=60)

    assert refused_.returncode == 1
    assert b"Traceback" not in refused_.stderr
    assert process.poll() is None
    assert [name for name in os.listdir(host.disk.path) if ".mending" in name] == []


def test_a_read_only_file_system_is_said(host):
    host.queue("payments")
    host.close()
    subprocess.run(["mount", "-o", "remount,ro", host.disk.path], check=True)
    try:
        for command in (("enqueue", "build", "--product", "p", "--version", "2"), ("flush",), ("run",)):
            done = host.run(*command)

            assert done.returncode == 1, command
            assert b"error: can't use" in done.stderr
            assert b"ead-only file system" in done.stderr
            assert b"Traceback" not in done.stderr
        assert host.counts() == {"pending": 1}
        checked = host.run("check", "--no-agent")
        assert (checked.returncode, b"lies on a read-only file system" in checked.stdout) == (2, True)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", host.disk.path], check=True)


def test_what_waits_on_a_full_disk_can_be_exported_to_another(host, tmp_path):
    count = queue_until_full(host, 400, most=300)
    host.disk.fill()

    done = host.run("export", str(tmp_path / "events.jsonl"))

    assert done.returncode == 0, done.stderr
    assert host.counts() == {"exported": count}
    assert len((tmp_path / "events.jsonl").read_bytes().splitlines()) == count + 2
    check_sound(host.path)
