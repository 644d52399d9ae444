"""Across the gap and back: several outboxes, one connected host, verdicts at home."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import sqlite3
import subprocess
import sys
import threading
import time

import exports
import pytest
from crash import COMMAND, DISK, killed_at, needs_strace, points_of
from host import eventually
from scripted import accepted, refused
from specimen import make_tables

from versioner_agent import damage, events, importing, mending, receipts
from versioner_agent.batches import CACHE_KIB, INSERT_BATCH, hand_over_all
from versioner_agent.errors import OutboxError
from versioner_agent.exportfile import Writer
from versioner_agent.importfile import Changed, ExportFile
from versioner_agent.importing import Listener, import_all
from versioner_agent.ledger import Ledger
from versioner_agent.locks import IMPORT_SUFFIX, WriteQueue
from versioner_agent.records import COLUMNS, as_record, is_intact
from versioner_agent.stepping import StepSize
from versioner_agent.storage import Store

IMPORTED = f"SELECT {COLUMNS}, payload FROM record ORDER BY id"


def records_in(path):
    """All records and their payloads; each one's digest is as it must be."""
    found = [(as_record(row[:-1]), row[-1]) for row in exports.sql(path, IMPORTED)]
    assert all(is_intact(*each) for each in found)
    return found


def what_is_in(path):
    """What must be the same whatever happened on the way."""
    return [(r.state, r.origin, r.event_id, r.queued_at, r.queued_by, payload) for r, payload in records_in(path)]


def write_receipts(host, file):
    """Write *file* anew; returns what the command says of it."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(file)
    return exported(host, "--receipts", file)


def exported(host, *arguments):
    done = host.run("export", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def imported(host, *files):
    done = host.run("import", *map(str, files), "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def origin(host_for):
    return host_for()


@pytest.fixture
def connected(host_for, serve):
    """A host that reaches the API; its `server` refuses version 3 of payments."""
    server = serve(
        lambda seen: (
            refused(409, "exists with another SHA")
            if (seen.product, seen.event["version"]) == ("payments", "3")
            else accepted(f"evt-{seen.key}")
        )
    )
    made = host_for(server.url)
    made.server = server
    return made


def test_events_of_two_hosts_are_delivered_once_each_and_a_409_comes_home(host_for, connected, tmp_path):
    first, second = host_for(), host_for()
    first.queue("payments", 4, invoke_id="7")
    exports.export(first.path, tmp_path / "first.jsonl", host="first")
    first.queue("payments", 2, first=5)
    exports.export(first.path, tmp_path / "then.jsonl.gz", host="first")
    second.queue("web", 3, environment_name="production")
    exports.export(second.path, tmp_path / "second.jsonl.gz", host="second")

    done = imported(connected, tmp_path / "then.jsonl.gz", tmp_path / "second.jsonl.gz", tmp_path / "first.jsonl")
    again = imported(connected, tmp_path / "second.jsonl.gz", tmp_path / "first.jsonl")
    assert connected.run("flush", "--timeout", "30").returncode == 4
    told = write_receipts(connected, tmp_path / "receipts.jsonl.gz")

    assert [(each["host"], each["queued"], each["present"]) for each in done] == [
        ("first", 2, 0), ("second", 3, 0), ("first", 4, 0),
    ]  # fmt: skip
    assert [(each["queued"], each["present"]) for each in again] == [(0, 3), (0, 4)]
    payments = [seen for seen in connected.server.requests if seen.product == "payments"]
    assert [seen.event["version"] for seen in payments] == ["1", "2", "3", "4", "5", "6"]
    assert len(connected.server.requests) == 9
    sent = {seen.key: seen.body for seen in connected.server.requests}
    for host in (first, second):
        for record, payload in records_in(host.path):
            assert sent[record.event_id] == payload
    assert told["records"] == 9

    home = first.run("import", str(tmp_path / "receipts.jsonl.gz"))
    (other,) = imported(second, tmp_path / "receipts.jsonl.gz")

    assert home.returncode == 0
    assert b"5 delivered, 1 failed, 3 of other outboxes" in home.stdout
    assert home.stderr == b"refused 3: build payments 3 completed: conflict: exists with another SHA\n"
    assert (other["delivered"], other["failed"], other["others"]) == (3, 0, 6)
    assert first.counts() == {"delivered": 5, "failed": 1}
    record, _, _ = first.record(3)
    assert (record.reason, record.http_status, record.attempts) == ("conflict", 409, 1)
    assert first.record(1)[0].server_id == f"evt-{first.record(1)[0].event_id}"
    (once_more,) = imported(first, tmp_path / "receipts.jsonl.gz")
    assert (once_more["unchanged"], once_more["others"]) == (6, 3)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_round_trip_with_a_stick_that_got_lost(host_for, connected, tmp_path, count):
    """Two batches, one written twice, imported twice by way of a relay: delivered once each in order, and told."""
    origin, relay = host_for(), host_for()
    half = count // 2
    origin._outbox.enqueue_all(build(number) for number in range(1, half + 1))
    first = exported(origin, tmp_path / "lost.jsonl")
    origin._outbox.enqueue_all(build(number) for number in range(half + 1, count + 1))
    exported(origin, tmp_path / "second.jsonl.gz")
    os.remove(tmp_path / "lost.jsonl")
    exported(origin, "--again", first["batch"][:8], tmp_path / "first.jsonl.gz")

    imported(relay, tmp_path / "second.jsonl.gz", tmp_path / "first.jsonl.gz")
    exported(relay, tmp_path / "relay.jsonl")
    imported(connected, tmp_path / "relay.jsonl")
    (again,) = imported(connected, tmp_path / "second.jsonl.gz")
    connected.run("flush", "--timeout", "600", within=900)
    for source, target in ((connected, relay), (relay, origin)):
        write_receipts(source, tmp_path / "receipts.jsonl.gz")
        (told,) = imported(target, tmp_path / "receipts.jsonl.gz")

    assert again["present"] == count - half
    assert [int(seen.event["version"]) for seen in connected.server.requests] == list(range(1, count + 1))
    assert (told["delivered"], told["failed"]) == (count - 1, 1)
    assert origin.counts() == relay.counts() == {"delivered": count - 1, "failed": 1}
    (failed,) = origin.json("list", "--state", "failed")
    assert (failed["version"], failed["reason"]) == ("3", "conflict")
    assert origin.json("status")[0]["exports"] == {"batches": [], "held_products": 0}


def build(number):
    return events.validate("build", {"product_name": "payments", "version": str(number), "status": "ok"})


def test_without_verdicts_no_receipts_are_written(origin, tmp_path):
    for _ in range(2):
        done = origin.run("export", "--receipts", str(tmp_path / "receipts"))
        assert done.returncode == 0
        assert b"no file was written" in done.stderr
        assert os.listdir(tmp_path) == [os.path.basename(origin.directory)]
        origin.queue("payments")


def test_receipts_take_no_place_of_another_file(connected, tmp_path):
    (tmp_path / "file").write_bytes(exports.file_of([exports.event()]))
    imported(connected, tmp_path / "file")
    connected.run("flush", "--timeout", "30")

    done = connected.run("export", "--receipts", str(tmp_path / "file"))

    assert done.returncode == 2
    assert b"is there already" in done.stderr
    assert exports.sql(connected.path, "SELECT count(*) FROM told") == [(0,)]
    for other in (("-",), (), ("x", "--limit", "1"), ("--mark", "12345678")):
        assert connected.run("export", "--receipts", *other).returncode == 2


def test_verdicts_find_records_that_are_only_now_being_marked(origin, connected, tmp_path):
    """An export that was killed behind the update by which all of it counts as exported."""
    origin.queue("payments", 3)
    exported(origin, tmp_path / "file")
    exports.sql(origin.path, "UPDATE record SET state = 'pending'")
    exports.sql(origin.path, "UPDATE export SET state = 'marking', waiting = 3, marked_to = 0")
    imported(connected, tmp_path / "file")
    connected.run("flush", "--timeout", "30")
    write_receipts(connected, tmp_path / "receipts")

    (done,) = imported(origin, tmp_path / "receipts")

    assert (done["delivered"], done["failed"]) == (2, 1)


def test_imported_events_are_known_by_where_they_come_from(origin, connected, tmp_path):
    """The same run, queued on both hosts, is two events; what is queued here is no repeat of what was imported."""
    for host in (origin, connected):
        host.queue("payments", environment_name="production", invoke_id="7")
    exports.export(origin.path, tmp_path / "file", host="origin")
    imported(connected, tmp_path / "file")

    repeat = connected._outbox.enqueue(
        "deployment",
        {"product_name": "payments", "version": "1", "status": "completed", "environment_name": "production", "invoke_id": "7"},
    )  # fmt: skip
    shown = json.loads(connected.run("show", "2", "--json").stdout)

    assert connected.counts() == {"pending": 2}
    assert (repeat.outcome, repeat.id) == ("duplicate", 1)
    assert shown["origin"] == exports.uid_of(origin.path)
    assert shown["origin_host"] == "origin"
    assert b"from         origin (outbox " in connected.run("show", "2").stdout


def test_files_are_merged_by_time_and_each_keeps_its_own_order(connected, tmp_path):
    """The clock of the second host jumps back between its two batches, and within one."""

    def write(name, outbox, times, first_id=1, **header):
        lines = [
            exports.event(first_id + at, queued_at=float(time), origin=outbox, event_id=_uuid(outbox, first_id + at))
            for at, time in enumerate(times)
        ]
        (tmp_path / name).write_bytes(exports.file_of(lines, exports.head(outbox=outbox, **header)))

    one, two = "1" * 32, "2" * 32
    write("a", one, [100, 200, 300], batch="a" * 32)
    write("b", two, [150, 120, 250], batch="b" * 32)
    write("c", two, [110, 400, 500, 600], 4, batch="c" * 32, sequence=2, previous="b" * 32)

    imported(connected, *(tmp_path / name for name in "cab"))

    assert [(r.origin[0], r.queued_at) for r, _ in records_in(connected.path)] == [
        ("1", 100), ("2", 150), ("2", 120), ("1", 200), ("2", 250), ("2", 110), ("1", 300), ("2", 400),
        ("2", 500), ("2", 600),
    ]  # fmt: skip


def _uuid(outbox, number):
    return f"{outbox[0] * 8}-0000-0000-0000-{number:012d}"


def test_a_batch_that_was_written_again_adds_what_is_missing_in_its_order(connected, tmp_path):
    """Of the same batch, the file with more records sets the order."""
    lines = [exports.event(number) for number in range(1, 5)]
    (tmp_path / "all").write_bytes(exports.file_of(lines))
    (tmp_path / "some").write_bytes(exports.file_of(lines[1::2]))

    some, everything = imported(connected, tmp_path / "some", tmp_path / "all")

    assert (some["present"], everything["queued"]) == (2, 4)
    assert [json.loads(payload)["version"] for _, payload in records_in(connected.path)] == ["1", "2", "3", "4"]


def test_a_batch_that_has_not_arrived_is_told_of(connected, tmp_path):
    (tmp_path / "later").write_bytes(exports.file_of([exports.event()], exports.head(previous="c" * 32, sequence=2)))

    done = connected.run("import", str(tmp_path / "later"))
    (tmp_path / "last").write_bytes(
        exports.file_of([exports.event(2)], exports.head(previous=exports.BATCH, batch="d" * 32, sequence=3))
    )
    then = connected.run("import", str(tmp_path / "last"))

    assert done.returncode == then.returncode == 0
    assert b"batch cccccccc of build-7" in done.stderr
    assert b"export --again cccccccc FILE" in done.stderr
    assert then.stderr == b""
    assert connected.counts() == {"pending": 2}


def test_an_outbox_does_not_import_its_own_events(origin, tmp_path):
    origin.queue("payments")
    exports.export(origin.path, tmp_path / "file")

    done = origin.run("import", str(tmp_path / "file"))

    assert done.returncode == 2
    assert b"exported from this very outbox" in done.stderr


def test_an_event_that_comes_back_through_another_outbox_is_here_already(origin, connected, tmp_path):
    origin.queue("payments")
    header = exports.export(origin.path, tmp_path / "file")
    imported(connected, tmp_path / "file")
    exports.export(connected.path, tmp_path / "back")

    (back,) = imported(origin, tmp_path / "back")

    assert (back["queued"], back["present"]) == (0, 1)
    assert json.loads((tmp_path / "back").read_bytes().splitlines()[1])["origin"] == header.outbox


def test_verdicts_come_home_through_a_relay(origin, host_for, connected, tmp_path):
    relay = host_for()
    origin.queue("payments", 3)
    exports.export(origin.path, tmp_path / "one")
    imported(relay, tmp_path / "one")
    exports.export(relay.path, tmp_path / "two")
    imported(connected, tmp_path / "two")
    connected.run("flush", "--timeout", "30")
    write_receipts(connected, tmp_path / "back")

    (at_relay,) = imported(relay, tmp_path / "back")
    write_receipts(relay, tmp_path / "home")
    (at_home,) = imported(origin, tmp_path / "home")

    assert (at_relay["delivered"], at_relay["failed"]) == (at_home["delivered"], at_home["failed"]) == (2, 1)
    assert origin.counts() == {"delivered": 2, "failed": 1}


def test_a_verdict_changes_nothing_but_what_waits_for_it(origin, tmp_path):
    """What is pending again, settled, or was refused, stays; only a delivery overrules a refusal."""
    origin.queue("payments", 6)
    exports.export(origin.path, tmp_path / "file")
    origin.run("retry", "1")
    origin.run("discard", "2")
    ours = exports.uid_of(origin.path)
    ids = [record.event_id for record, _ in records_in(origin.path)]

    def receive(*verdicts):
        lines = [exports.verdict(state=state, origin=ours, event_id=ids[at]) for at, state in enumerate(verdicts)]
        data = exports.file_of(lines, exports.head(content="receipts", sequence=0, batch="e" * 32, outbox="f" * 32))
        (tmp_path / "receipts").write_bytes(data)
        (done,) = imported(origin, tmp_path / "receipts")
        return {name: done[name] for name in receipts.Applied._fields if done[name]}

    assert receive("delivered", "failed", "delivered", "failed", "failed", "discarded") == {
        "delivered": 1, "failed": 2, "discarded": 1, "unchanged": 2,
    }  # fmt: skip
    assert receive("failed", "delivered", "failed", "delivered", "discarded", "failed") == {
        "delivered": 1, "unchanged": 5,
    }  # fmt: skip
    assert [record.state for record, _ in records_in(origin.path)] == [
        "pending", "discarded", "delivered", "delivered", "failed", "discarded",
    ]  # fmt: skip


def test_a_delivery_overrules_the_refusal_of_what_was_retried(origin, tmp_path):
    """The far side delivered it, so the API refused our own as one that it has."""
    origin.queue("payments")
    exports.export(origin.path, tmp_path / "file")
    origin.run("retry", "1")
    exports.sql(origin.path, "UPDATE record SET state = 'failed', reason = 'conflict' WHERE id = 1")
    ours, event_id = exports.uid_of(origin.path), records_in(origin.path)[0][0].event_id
    line = exports.verdict(state="delivered", origin=ours, event_id=event_id)
    head = exports.head(content="receipts", sequence=0, batch="e" * 32, outbox="f" * 32)
    (tmp_path / "receipts").write_bytes(exports.file_of([line], head))

    (done,) = imported(origin, tmp_path / "receipts")

    assert (done["delivered"], origin.counts()) == (1, {"delivered": 1})


def test_verdicts_about_other_outboxes_are_refused(origin, connected, tmp_path):
    origin.queue("payments")
    data = exports.file_of([exports.verdict()], exports.head(content="receipts", sequence=0))
    (tmp_path / "receipts").write_bytes(data)

    for host in (origin, connected):  # the second has no outbox
        done = host.run("import", str(tmp_path / "receipts"))
        assert done.returncode == 2
    assert b"there is no outbox" in done.stderr
    assert not os.path.exists(connected.path)
    assert b"none of the verdicts" in origin.run("import", str(tmp_path / "receipts")).stderr


def test_nonsense_in_a_verdict_is_bounded(origin, tmp_path):
    """Its time is ours where it can't be true; its words are as long as the API's own, and show no key."""
    origin.queue("payments", 2)
    exports.export(origin.path, tmp_path / "file")
    ours = exports.uid_of(origin.path)
    (one, _), (two, _) = records_in(origin.path)
    hostile = "\x1b[31m\u202e" + "sk_acme_k1_secret " + "x" * 5000
    lines = [
        exports.verdict(state="failed", origin=ours, event_id=one.event_id, settled_at=1e200, detail=hostile, code=hostile),
        exports.verdict(origin=ours, event_id=two.event_id, settled_at=-5, server_id=hostile),
    ]  # fmt: skip
    (tmp_path / "receipts").write_bytes(exports.file_of(lines, exports.head(content="receipts", sequence=0)))

    done = origin.run("import", str(tmp_path / "receipts"))

    assert done.returncode == 0
    assert b"\x1b" not in done.stderr
    assert "\u202e".encode() not in done.stderr
    failed, delivered = (record for record, _ in records_in(origin.path))
    assert 1900 < len(failed.detail) <= 2000
    assert len(failed.code) <= 200
    assert len(delivered.server_id) <= 200
    assert b"secret" not in done.stderr
    assert "secret" not in failed.detail + failed.code + delivered.server_id
    assert one.queued_at < failed.settled_at
    assert two.queued_at < delivered.settled_at


def test_many_refusals_are_counted_and_the_journal_has_them_as_errors(origin, tmp_path):
    origin.queue("payments", 25)
    exports.export(origin.path, tmp_path / "file")
    ours = exports.uid_of(origin.path)
    lines = [
        exports.verdict(state="failed", origin=ours, event_id=record.event_id)
        for record, _ in records_in(origin.path)
    ]  # fmt: skip
    (tmp_path / "receipts").write_bytes(exports.file_of(lines, exports.head(content="receipts", sequence=0)))

    with open(tmp_path / "journal", "w+b") as journal:
        found = os.fstat(journal.fileno())
        env = {**origin.env, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        subprocess.run((*COMMAND, "import", str(tmp_path / "receipts")), env=env, stderr=journal, check=True)
        journal.seek(0)
        said = journal.read().decode().splitlines()

    assert len(said) == 21
    assert said[0].startswith("<3>refused 1: build payments 1")
    assert said[-1].startswith("<3>5 more refused")


def test_the_first_telling_counts_for_pruning(origin, connected, tmp_path):
    """A refusal can still become something else; what told often would never be pruned."""
    origin.queue("payments", 3)
    exports.export(origin.path, tmp_path / "file")
    imported(connected, tmp_path / "file")
    connected.run("flush", "--timeout", "30")
    write_receipts(connected, tmp_path / "receipts")
    before = exports.sql(connected.path, "SELECT * FROM told ORDER BY record_id")
    written = write_receipts(connected, tmp_path / "receipts")

    assert [record_id for record_id, _ in before] == [1, 2]
    assert exports.sql(connected.path, "SELECT * FROM told ORDER BY record_id") == before
    assert written["records"] == 3


def test_what_arrives_again_is_kept_until_its_verdict_was_told_again(origin, connected, tmp_path):
    """The origin has taken it back and exported it once more: it would wait for a verdict that was told and pruned."""
    origin.queue("payments", 2)
    exported(origin, tmp_path / "first")
    imported(connected, tmp_path / "first")
    connected.run("flush", "--timeout", "30")
    write_receipts(connected, tmp_path / "lost")
    origin.run("retry", "--state", "exported", "--product", "payments", "--yes")
    exported(origin, tmp_path / "second")
    imported(connected, tmp_path / "second")
    with contextlib.closing(Store(connected.path)) as store:
        assert Ledger(store).prune(time.time() + 1) == 0
    write_receipts(connected, tmp_path / "receipts")
    imported(origin, tmp_path / "receipts")

    assert origin.counts() == {"delivered": 2}
    with contextlib.closing(Store(connected.path)) as store:
        assert Ledger(store).prune(time.time() + 1) == 2


@pytest.fixture
def pruned(origin, connected, tmp_path):
    """A connected host that has delivered one of two records, and forgotten it; the file still lies on the stick."""
    origin.queue("payments", 2)
    exports.export(origin.path, tmp_path / "file")
    imported(connected, tmp_path / "file")
    exports.sql(connected.path, "UPDATE record SET state = 'delivered', settled_at = 1.0 WHERE id = 1")
    write_receipts(connected, tmp_path / "receipts")
    with contextlib.closing(Store(connected.path)) as store:
        assert Ledger(store).prune(time.time() + 1) == 1
    return connected


def test_what_is_pruned_is_not_queued_again_by_the_file_that_it_came_in(pruned, tmp_path):
    (again,) = imported(pruned, tmp_path / "file")

    assert (again["queued"], again["present"]) == (0, 2)
    assert exports.sql(pruned.path, "SELECT id FROM record") == [(2,)]


@pytest.mark.parametrize(("is_lost", "queued"), [(True, 2), (False, 0)])
def test_what_a_damage_took_is_brought_back_by_the_file_that_it_came_in(pruned, tmp_path, is_lost, queued):
    """Better sent twice than not at all: what was lost can't be told from what was pruned."""
    with contextlib.closing(sqlite3.connect(pruned.path)) as connection, connection:
        connection.execute("UPDATE record SET payload = x'00'" if is_lost else "SELECT 1")
    with contextlib.closing(Store(pruned.path)) as store:
        mending._replace(store, "for a test")
    (again,) = imported(pruned, tmp_path / "file")

    assert again["queued"] == queued


def test_several_contents_in_one_call_from_stdin_too(origin, connected, host_for, tmp_path):
    other = host_for()
    origin.queue("payments", 2)
    exports.export(origin.path, tmp_path / "file")
    imported(connected, tmp_path / "file")
    connected.run("flush", "--timeout", "30")
    write_receipts(connected, tmp_path / "receipts")
    other.queue("web")
    exports.export(other.path, tmp_path / "events.gz")

    done = origin.run("import", "-", str(tmp_path / "receipts"), stdin=(tmp_path / "events.gz").read_bytes())

    assert done.returncode == 0, done.stderr
    assert origin.counts() == {"delivered": 2, "pending": 1}
    assert origin.run("import", "-", "-").returncode == 2


def test_a_day_of_files_is_imported_at_once(origin, connected, tmp_path):
    """More of them than a shell lets a process have open at first."""
    origin.queue("a", 40)
    for number in range(40):
        exports.export(origin.path, tmp_path / f"{number:03}.jsonl", limit=1)
    command = f"ulimit -Sn 32; exec {sys.executable} -m versioner_agent import {tmp_path}/*.jsonl"

    done = subprocess.run(("sh", "-c", command), env=connected.env, capture_output=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert connected.counts() == {"pending": 40}


def test_an_event_that_was_damaged_on_the_far_side_can_be_retried(origin, tmp_path):
    """What is here is sound."""
    origin.queue("a")
    exported(origin, tmp_path / "events.jsonl")
    (line,) = [json.loads(each) for each in (tmp_path / "events.jsonl").read_bytes().splitlines()[1:-1]]
    verdict = exports.verdict(
        1, "failed", origin=line["origin"], event_id=line["event_id"], reason="damaged", http_status=None
    )
    (tmp_path / "receipts.jsonl").write_bytes(exports.file_of([verdict], exports.head(content="receipts", sequence=0)))
    imported(origin, tmp_path / "receipts.jsonl")

    assert origin.counts() == {"failed": 1}
    assert origin.run("retry", "1").returncode == 0
    assert origin.counts() == {"pending": 1}


def test_a_dry_run_checks_only(connected, tmp_path):
    (tmp_path / "good").write_bytes(exports.file_of([exports.event()]))
    (tmp_path / "bad").write_bytes(b"bad")

    good = connected.run("import", "--dry-run", str(tmp_path / "good"))
    bad = connected.run("import", "--dry-run", str(tmp_path / "good"), str(tmp_path / "bad"))

    assert (good.returncode, bad.returncode) == (0, 2)
    assert b"the file is sound" in good.stdout
    assert not os.path.exists(connected.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root steps down")
def test_root_reads_files_with_its_own_rights_and_writes_as_the_owner(reachable, tmp_path):
    """The stick is root's alone, the outbox lies in another user's directory; likewise for receipts."""
    state = reachable / "state"
    state.mkdir(mode=0o700)
    os.chown(state, 65534, 65534)
    (tmp_path / "file").write_bytes(exports.file_of([exports.event()]))
    os.chmod(tmp_path / "file", 0o600)
    os.chmod(tmp_path, 0o700)
    path = str(state / "outbox.db")
    env = {**os.environ, "VERSIONER_AGENT_DB": path, "VERSIONER_AGENT_CONFIG": os.devnull}

    for arguments in (("import", "file"), ("import", "-"), ("export", "--receipts", "receipts")):
        if arguments[0] == "export":
            exports.sql(path, "UPDATE record SET state = 'delivered', settled_at = queued_at")
        names = [str(tmp_path / each) if each in ("file", "receipts") else each for each in arguments]
        done = subprocess.run(
            (*COMMAND, *names), env=env, input=(tmp_path / "file").read_bytes(), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr

    assert {os.stat(state / name).st_uid for name in os.listdir(state)} == {65534}
    assert (tmp_path / "receipts").stat().st_uid == 0
    assert exports.sql(path, "SELECT count(*) FROM told") == [(1,)]
    os.chown(path, 0, 0)
    done = subprocess.run((*COMMAND, "import", str(tmp_path / "file")), env=env, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"can't use the outbox" in done.stderr  # root itself could


@pytest.mark.parametrize("kind", ["fifo", "directory", "missing", "denied"])
def test_what_is_no_readable_file_is_named(connected, tmp_path, kind):
    path = tmp_path / "it"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "denied":
        path.symlink_to("it")  # to itself: root may read everything else

    done = connected.run("import", str(path))

    assert done.returncode == (1 if kind == "denied" else 2)
    assert done.stderr.startswith(b"error: ")
    assert str(path).encode() in done.stderr


def test_one_bad_file_keeps_all_from_being_queued(connected, tmp_path):
    (tmp_path / "good").write_bytes(exports.file_of([exports.event()]))
    (tmp_path / "bad").write_bytes(exports.file_of([exports.event()])[:-10])

    done = connected.run("import", str(tmp_path / "good"), str(tmp_path / "bad"))

    assert done.returncode == 2
    assert f"error: {tmp_path / 'bad'}: line 3: it has no end".encode() in done.stderr
    assert not os.path.exists(connected.path)


def test_a_file_that_changes_while_it_is_queued_queues_nothing(connected, tmp_path):
    """The lines that came before the change were staged by then."""
    data = exports.file_of([exports.event(number) for number in range(1, 1201)])
    with open(tmp_path / "file", "w+b") as stream, contextlib.closing(Store(connected.path)) as store:
        stream.write(data)
        stream.flush()
        file = ExportFile("the file", stream)
        file.check()
        os.pwrite(stream.fileno(), b"uid 1", data.rindex(b"uid 0"))

        with pytest.raises(Changed, match="changed while it was being imported"):
            import_all(store, [file], Listener())

    assert connected.counts() == {}
    assert exports.sql(connected.path, "SELECT count(*) FROM record") == [(0,)]
    assert exports.sql(connected.path, "SELECT count(*) FROM batch") == [(0,)]


def test_an_agent_delivers_what_is_imported_while_it_runs(connected, tmp_path):
    """Nothing of a product is sent before all that was imported of it is there: its order is by outbox id."""
    (tmp_path / "file").write_bytes(exports.file_of([exports.event(number) for number in range(1, 601)]))
    agent = connected.agent()

    imported(connected, tmp_path / "file")
    connected.server.wait_for(600, 120)

    assert connected.end(agent) == 0
    assert [int(seen.event["version"]) for seen in connected.server.firsts()] == list(range(1, 601))


def test_two_imports_at_once_queue_everything_once(connected, tmp_path):
    (tmp_path / "file").write_bytes(exports.file_of([exports.event(number) for number in range(1, 1501)]))

    running = [connected.start("import", str(tmp_path / "file"), "--json") for _ in range(3)]

    assert [process.wait(60) for process in running] == [0, 0, 0]
    done = [json.loads(process.log.read_text()) for process in running]
    assert sorted(each["queued"] for each in done) == [0, 0, 1500]
    assert connected.counts() == {"pending": 1500}


def import_with(path, name, acts):
    """Import the file *name*; before its line n, acts[n] is done."""
    with open(name, "rb") as stream, contextlib.closing(Store(path)) as store:
        file = ExportFile(str(name), stream)
        file.check()
        again = file.again

        def acting():
            for number, line in enumerate(again()):
                acts.get(number, lambda: None)()
                yield line

        file.again = acting
        import_all(store, [file], Listener())


def sweep(path, now):
    with contextlib.closing(Store(path)) as store:
        Ledger(store).sweep_batches(now)


def test_an_import_waits_for_another_one_and_says_so(connected, tmp_path):
    (tmp_path / "file").write_bytes(exports.file_of([exports.event()]))
    connected.queue("payments")
    other = WriteQueue(connected.path + IMPORT_SUFFIX)
    assert other.acquire(1)

    try:
        done = connected.run("import", str(tmp_path / "file"), "--busy-timeout", "0.2")
    finally:
        other.close()

    assert done.returncode == 1
    assert b"another import into the outbox" in done.stderr
    assert imported(connected, tmp_path / "file")[0]["queued"] == 1


def test_a_batch_that_was_swept_meanwhile_is_noticed(connected, tmp_path):
    """A clock that jumps makes it look abandoned."""
    (tmp_path / "file").write_bytes(exports.file_of([exports.event(number) for number in range(1, 1201)]))

    with pytest.raises(OutboxError, match="was swept"):
        import_with(connected.path, tmp_path / "file", {700: lambda: sweep(connected.path, 9e9)})

    assert exports.sql(connected.path, "SELECT count(*) FROM record") == [(0,)]


def test_an_import_may_take_hours(connected, tmp_path):
    """What is being staged is not abandoned, however long ago it began."""
    (tmp_path / "file").write_bytes(exports.file_of([exports.event(number) for number in range(1, 1201)]))
    acts = {
        400: lambda: exports.sql(connected.path, "UPDATE batch SET created_at = 1.0"),
        700: lambda: sweep(connected.path, time.time()),
    }

    import_with(connected.path, tmp_path / "file", acts)

    assert connected.counts() == {"pending": 1200}


@pytest.mark.parametrize("version", [1, 2])
def test_an_outbox_of_an_older_schema_is_upgraded(connected, tmp_path, version):
    with contextlib.closing(sqlite3.connect(connected.path)) as connection:
        make_tables(connection, version)
        connection.commit()
    (tmp_path / "file").write_bytes(exports.file_of([exports.event()]))

    done = connected.run("import", str(tmp_path / "file"))

    assert done.returncode == 0, done.stderr
    assert f"is kept as {connected.path}.schema-{version}".encode() in done.stderr
    assert connected.counts() == {"pending": 1}


def test_an_outbox_of_an_older_schema_is_left_to_its_agent(connected, child, tmp_path):
    with contextlib.closing(sqlite3.connect(connected.path)) as connection:
        make_tables(connection, 2)
        connection.commit()
    (tmp_path / "file").write_bytes(exports.file_of([exports.event()]))
    agent = child(
        "import sys; from versioner_agent.locks import FlusherLock; lock = FlusherLock(sys.argv[1])\n"
        "print(lock.claim_agent() and lock.claim_delivery()); input()",
        connected.path,
    )
    assert agent.says() == "True"

    done = connected.run("import", str(tmp_path / "file"))

    assert done.returncode == 1
    assert b"restart its agent" in done.stderr
    assert exports.sql(connected.path, "SELECT count(*) FROM record") == [(0,)]


def test_salvage_gives_an_imported_record_no_identity(origin, connected, tmp_path):
    origin.queue("payments", invoke_id="7")
    exports.export(origin.path, tmp_path / "file")
    imported(connected, tmp_path / "file")
    connected.close_outbox()
    with open(connected.path, "r+b") as file:
        file.write(b"garbage")

    connected.run("flush", "--timeout", "30")

    ((record, _),) = records_in(connected.path)
    assert (record.state, record.identity, record.origin) == ("delivered", None, exports.uid_of(origin.path))
    assert imported(connected, tmp_path / "file")[0]["present"] == 1


def points(command, env, few):
    """Where to kill: at a *few* of each kind of call, from the first one on."""
    found = points_of(command, DISK, env=env)
    by_call = {}
    for call, number in found:
        by_call.setdefault(call, []).append((call, number))
    return [point for each in by_call.values() for point in each[:: max(1, len(each) // few)]]


#: Of each call; with `-m long` every single one.
sometimes = pytest.mark.parametrize("few", [8, pytest.param(10_000, marks=pytest.mark.long)], ids=["few", "everywhere"])


@needs_strace
@sometimes
def test_an_import_killed_anywhere_and_done_again_is_as_if_nothing_had_happened(host_for, connected, tmp_path, few):
    lines = [exports.event(number) for number in range(1, 521)]
    (tmp_path / "file").write_bytes(exports.file_of(lines))
    command = (*COMMAND, "import", str(tmp_path / "file"))
    chosen = points(command, host_for().env, few)
    imported(connected, tmp_path / "file")
    expected = what_is_in(connected.path)
    assert len(expected) == 520
    missed = 0
    for call, number in chosen:
        host = host_for()
        was_killed, _ = killed_at(call, number, command, env=host.env)
        missed += not was_killed
        if os.path.exists(host.path) and exports.sql(host.path, "SELECT count(*) FROM sqlite_schema") != [(0,)]:
            visible = sum(host.counts().values())
            assert visible in (0, 520), (call, number)
        (done,) = imported(host, tmp_path / "file")
        assert done["queued"] + done["present"] == 520
        assert what_is_in(host.path) == expected, (call, number)
        with contextlib.closing(Store(host.path)) as store:
            assert damage.find(store) is None
        host.close_outbox()
    # Steps are as long as the disk allows: the last calls of one run may have no like in another.
    assert missed <= len(chosen) // 10


@needs_strace
@sometimes
def test_receipts_killed_anywhere_and_applied_again_are_as_if_nothing_had_happened(host_for, tmp_path, few):
    origin = host_for()
    origin.queue("payments", 12)
    exports.export(origin.path, tmp_path / "file")
    ours = exports.uid_of(origin.path)
    lines = [
        exports.verdict(
            state="failed" if number % 3 == 0 else "delivered", origin=ours, event_id=record.event_id,
            settled_at=record.queued_at,
        )
        for number, (record, _) in enumerate(records_in(origin.path))
    ]  # fmt: skip
    (tmp_path / "receipts").write_bytes(exports.file_of(lines, exports.head(content="receipts", sequence=0)))
    origin.close_outbox()
    before = {
        name: (pathlib.Path(origin.path).parent / name).read_bytes()
        for name in os.listdir(os.path.dirname(origin.path))
    }
    command = (*COMMAND, "import", str(tmp_path / "receipts"))

    def restored():
        host = host_for()
        host.close_outbox()
        for name, data in before.items():
            (pathlib.Path(host.path).parent / name).write_bytes(data)
        return host

    def settled(path):
        return [(r.id, r.state, r.settled_at, r.reason, r.server_id) for r, _ in records_in(path)]

    chosen = points(command, restored().env, few)
    whole = restored()
    assert whole.run("import", str(tmp_path / "receipts")).returncode == 0
    for call, number in chosen:
        host = restored()
        was_killed, _ = killed_at(call, number, command, env=host.env)
        assert was_killed, (call, number)
        (done,) = imported(host, tmp_path / "receipts")
        assert done["delivered"] + done["failed"] + done["unchanged"] == 12
        assert settled(host.path) == settled(whole.path), (call, number)
        assert exports.sql(host.path, "SELECT count(*) FROM failure") == [(4,)]


def test_what_a_dead_import_has_staged_is_not_taken_for_events_that_are_here(connected, tmp_path):
    (tmp_path / "file").write_bytes(exports.file_of([exports.event(1), exports.event(2)]))
    imported(connected, tmp_path / "file")
    exports.sql(connected.path, INSERT_BATCH, "import", 9e9)
    exports.sql(connected.path, "UPDATE record SET state = 'staged', batch = (SELECT max(id) FROM batch) WHERE id = 2")
    exports.sql(connected.path, "DELETE FROM arrival")

    (done,) = imported(connected, tmp_path / "file")

    assert (done["queued"], done["present"]) == (1, 1)
    assert connected.counts() == {"pending": 2}


def test_what_a_dead_import_has_published_is_queued(connected, tmp_path):
    (tmp_path / "file").write_bytes(exports.file_of([exports.event(1), exports.event(2)]))
    imported(connected, tmp_path / "file")
    exports.sql(connected.path, INSERT_BATCH, "import", 1.0)
    exports.sql(connected.path, "UPDATE batch SET published = 1, waiting = 2")
    exports.sql(connected.path, "UPDATE record SET state = 'staged', batch = (SELECT max(id) FROM batch)")

    (done,) = imported(connected, tmp_path / "file")

    assert done["present"] == 2
    with contextlib.closing(Store(connected.path)) as store:
        hand_over_all(store)
    assert connected.counts() == {"pending": 2}


def test_queuing_goes_on_while_a_large_file_is_imported(connected, tmp_path):
    (tmp_path / "file").write_bytes(exports.file_of([exports.event(number) for number in range(1, 3001)]))
    is_over = threading.Event()
    queued = []

    def queue():
        while not is_over.is_set():
            queued.append(connected.queue("other", first=len(queued) + 1)[0])

    connected.queue("first")
    thread = threading.Thread(target=lambda: [connected.close_outbox(), queue(), connected.close_outbox()])
    connected.close_outbox()
    thread.start()
    try:
        eventually(lambda: queued)
        imported(connected, tmp_path / "file")
    finally:
        is_over.set()
        thread.join()

    assert connected.counts() == {"pending": 3001 + len(queued)}


PEAK = """
import resource, sys
sys.argv = ["versioner-agent", "import", "--json", sys.argv[1]]
from versioner_agent import cli
try:
    cli.main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


#: A small process in between: a child begins with the peak of the one that it was forked from.
PEAK_OF = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


def test_on_a_slow_disk_each_step_does_one(origin, connected, tmp_path, monkeypatch):
    """No transaction goes on once its time is over, neither staging events nor applying verdicts."""
    origin.queue("payments", 20)
    exported(origin, tmp_path / "out")
    seconds = itertools.count()
    for module in (importing, receipts):
        monkeypatch.setattr(module, "StepSize", lambda: StepSize(lambda: float(next(seconds))))
    commits = []
    with contextlib.closing(Store(connected.path)) as store:
        import_file(store, tmp_path / "out", commits, monkeypatch)
    assert len(commits) >= 20

    exports.sql(connected.path, "UPDATE record SET state = 'delivered', settled_at = queued_at")
    write_receipts(connected, tmp_path / "back")
    commits.clear()
    with contextlib.closing(Store(origin.path)) as store:
        import_file(store, tmp_path / "back", commits, monkeypatch)
    assert len(commits) >= 20
    assert origin.counts() == {"delivered": 20}


def import_file(store, path, commits, monkeypatch):
    """Import the file at *path* into *store*; each transaction adds to *commits*."""
    turn = store.turn

    @contextlib.contextmanager
    def counted():
        commits.append(1)
        with turn():
            yield

    monkeypatch.setattr(store, "turn", counted)
    with path.open("rb") as stream:
        file = ExportFile(str(path), stream)
        file.check()
        import_all(store, [file], Listener())


def test_memory_does_not_grow_with_the_file(host_for, tmp_path):
    peaks = []
    for count in (2_000, 20_000):
        with open(tmp_path / "file.gz", "wb") as stream:
            writer = Writer(stream, compressed=True)
            writer.line(exports.head())
            for number in range(1, count + 1):
                writer.line(exports.event(number))
            writer.finish()
        done = subprocess.run(
            [sys.executable, "-c", PEAK_OF, sys.executable, "-c", PEAK, str(tmp_path / "file.gz")],
            env=host_for().env, capture_output=True, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout)["queued"] == count
        peaks.append(int(done.stderr.split()[-1]))

    assert peaks[1] < peaks[0] + CACHE_KIB + 4 * 1024  # the smaller one does not fill the cache
