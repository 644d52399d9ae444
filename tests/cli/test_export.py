"""`export`: what is in the file, what is refused, and what counts as exported when."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess

import pytest
from exports import sql
from host import COMMAND, eventually
from scripted import accepted, hanging, refused

from versioner_agent import config, exporting, review, schema
from versioner_agent.errors import LockHeld, UsageError
from versioner_agent.locks import FlusherLock
from versioner_agent.newfile import NewFile


def parsed(data):
    """The header, the lines between and the trailer of an export, after checking what the trailer says."""
    lines = data.splitlines(keepends=True)
    header, *between, trailer = map(json.loads, lines)
    assert trailer == {
        "trailer": True,
        "count": len(between),
        "sha256": hashlib.sha256(b"".join(lines[:-1])).hexdigest(),
    }
    return header, between, trailer


def versions(path):
    return [(line["product_name"], line["version"]) for line in parsed(path.read_bytes())[1]]


@pytest.fixture
def host(host_for):
    return host_for()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "events.jsonl"


def test_a_file_holds_header_records_in_order_and_trailer(host, file):
    host.queue("a", 2)
    host.queue("b", environment_name="prod", invoke_id="run-1")

    done = host.run("export", str(file), "--json")

    header, lines, trailer = parsed(file.read_bytes())
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list(header) == ["format", "format_version", "content", "outbox", "host", "batch", "sequence", "previous",
                            "created_at", "agent_version"]  # fmt: skip
    assert (header["format"], header["format_version"], header["content"]) == ("versioner-agent export", 1, "events")
    assert (header["sequence"], header["previous"], header["host"]) == (1, None, os.uname().nodename)
    assert told == {"batch": header["batch"], "file": str(file), "records": 3, "sha256": trailer["sha256"],
                    "first_id": 1, "last_id": 3}  # fmt: skip
    for line, record_id in zip(lines, (1, 2, 3), strict=True):
        record, payload, _ = host.record(record_id)
        assert line["payload"].encode() == payload
        assert (line["queued_at"], line["origin"]) == (record.queued_at, header["outbox"])
        for key in ("id", "event_id", "kind", "product_name", "version", "environment_name", "status", "invoke_id",
                    "run_attempt", "queued_by"):  # fmt: skip
            assert line[key] == getattr(record, key)
    assert host.counts() == {"exported": 3}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_compressed_file_holds_the_same(host, tmp_path):
    host.queue("a", 3)

    done = host.run("export", str(tmp_path / "events.jsonl.gz"), "--json")

    data = (tmp_path / "events.jsonl.gz").read_bytes()
    assert parsed(gzip.decompress(data))[2]["sha256"] == json.loads(done.stdout)["sha256"]
    assert data[4:8] == bytes(4), "a time in it would make every export another file"


def test_product_and_limit_choose(host, tmp_path):
    host.queue("a", 3)
    host.queue("b", 3)

    assert host.run("export", "--product", "b", str(tmp_path / "1")).returncode == 0
    assert host.run("export", "--limit", "2", str(tmp_path / "2")).returncode == 0
    assert host.run("export", str(tmp_path / "3")).returncode == 0

    assert versions(tmp_path / "1") == [("b", "1"), ("b", "2"), ("b", "3")]
    assert versions(tmp_path / "2") == [("a", "1"), ("a", "2")]
    assert versions(tmp_path / "3") == [("a", "3")]
    headers = [parsed((tmp_path / name).read_bytes())[0] for name in "123"]
    assert [header["previous"] for header in headers] == [None, headers[0]["batch"], headers[1]["batch"]]
    assert [header["sequence"] for header in headers] == [1, 2, 3]


@pytest.mark.parametrize("made", [True, False])
def test_nothing_pending_makes_no_file(host, file, made):
    if made:
        (record_id,) = host.queue("a")
        host.run("discard", "--yes", str(record_id))

    done = host.run("export", str(file))

    assert (done.returncode, done.stdout) == (0, b"")
    assert b"nothing is pending; no file was written" in done.stderr
    assert not file.exists()
    assert not [name for name in os.listdir(file.parent) if name.endswith(".part")]


def test_a_damaged_record_is_left_out_and_failed(host, file):
    host.queue("a", 3)
    with host._outbox.store.write() as connection:
        connection.execute(
            "UPDATE record SET payload = CAST(replace(payload, 'completed', 'c0mpleted') AS BLOB) WHERE id = 2"
        )

    done = host.run("export", str(file))

    assert done.returncode == 0
    assert b"record 2 is damaged and was left out" in done.stderr
    assert versions(file) == [("a", "1"), ("a", "3")]
    assert host.record(2)[0].reason == "damaged"
    assert host.counts() == {"exported": 2, "failed": 1}


def test_nothing_but_damaged_records_makes_no_file(host, file):
    host.queue("a")
    with host._outbox.store.write() as connection:
        connection.execute("UPDATE record SET payload = x'7b7d'")

    done = host.run("export", str(file))

    assert done.returncode == 1
    assert b"all that was pending is damaged" in done.stderr
    assert not file.exists()


def foreign(file, host, host_for):
    file.write_text("mine\n")


def another_outboxes(file, host, host_for):
    other = host_for()
    other.queue("x")
    assert other.run("export", str(file)).returncode == 0


def awaited(file, host, host_for):
    host.queue("x")
    assert host.run("export", str(file)).returncode == 0


def written_to_stdout(file, host, host_for):
    host.queue("x")
    file.write_bytes(host.run("export", "-").stdout)


@pytest.mark.parametrize("there", [foreign, another_outboxes, awaited, written_to_stdout])
def test_a_file_of_use_is_not_replaced(host, host_for, file, there):
    there(file, host, host_for)
    host.queue("a")
    content, counts = file.read_bytes(), host.counts()

    done = host.run("export", str(file))

    assert (done.returncode, done.stdout) == (2, b"")
    assert b"nothing was done" in done.stderr
    assert (file.read_bytes(), host.counts()) == (content, counts)


def test_a_file_whose_records_all_have_a_verdict_is_replaced(host, file):
    host.queue("a", 2)
    host.run("export", str(file))
    host.run("discard", "1", "2")
    host.queue("b")

    assert host.run("export", str(file)).returncode == 0
    assert versions(file) == [("b", "1")]


def test_of_two_exports_to_one_file_the_second_is_refused(host, file):
    """Both have found the place free before the first one wrote."""
    host.queue("a", 2)
    with host_lock(host):
        both = [host.start("export", "--limit", "1", str(file)) for _ in range(2)]
        eventually(lambda: len(list(file.parent.glob(".*.part"))) == 2)

    assert sorted(each.wait(30) for each in both) == [0, 2]
    assert b"which is still of use; nothing was done" in host.said()
    assert versions(file) == [("a", "1")]
    assert host.counts() == {"pending": 1, "exported": 1}


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_takes_no_place_that_was_taken_meanwhile(file, monkeypatch, has_links):
    def link(*_, **__):
        raise PermissionError  # as on a stick

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    with NewFile(str(file)) as mine, NewFile(str(file)) as theirs:
        mine.file.write(b"mine")
        theirs.place()
        with pytest.raises(UsageError, match="is there already"):
            mine.place()
        assert file.read_bytes() == b""
        mine.place(replaces=True)

    assert file.read_bytes() == b"mine"
    assert os.listdir(file.parent) == [file.name]


def test_a_file_that_is_being_marked_is_not_taken_for_one_that_was_cut_short(host, file):
    """Two exports may replace what a dead one left: the second finds what the first one wrote."""
    host.queue("a", 2)
    host.run("export", str(file))
    sql(host.path, "UPDATE export SET state = 'open', digest = NULL")
    sql(host.path, "UPDATE record SET state = 'pending'")
    with host_lock(host):
        both = [host.start("export", "--limit", "1", str(file)) for _ in range(2)]
        eventually(lambda: len(list(file.parent.glob(".*.part"))) == 2)

    assert sorted(each.wait(30) for each in both) == [0, 2]
    assert versions(file) == [("a", "1")]
    assert host.counts() == {"pending": 1, "exported": 1}


def test_a_file_of_a_clone_is_not_replaced(host, host_for, file):
    """It has the same outbox in its header."""
    clone = host_for()
    host.queue("a")
    host.close_outbox()
    shutil.copy(host.path, clone.path)
    clone.queue("b")
    assert clone.run("export", str(file)).returncode == 0
    content = file.read_bytes()

    done = host.run("export", str(file))

    assert done.returncode == 2
    assert b"does not know" in done.stderr
    assert (file.read_bytes(), host.counts()) == (content, {"pending": 1})


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "device"])
def test_what_is_no_file_is_refused(host, file, kind):
    host.queue("a")
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to("elsewhere")

    done = host.run("export", "/dev/full" if kind == "device" else str(file))

    assert done.returncode == 2
    assert b"is no regular file" in done.stderr
    assert host.counts() == {"pending": 1}


def test_a_directory_that_is_missing_is_an_error_and_marks_nothing(host, file):
    host.queue("a")

    done = host.run("export", str(file / "events.jsonl"))

    assert done.returncode == 1
    assert b"can't write" in done.stderr
    assert host.counts() == {"pending": 1}


@pytest.mark.parametrize(
    "wrong",
    [[], ["--mark", "0" * 64, "f"], ["--again", "1", "-"], ["-", "--json"], ["--again", "1", "--limit", "1", "f"],
     ["--limit", "0", "f"], ["--mark", "abc"], ["--mark", "0" * 64], ["--again", "7", "f"], ["--again", "nonsense", "f"]],
)  # fmt: skip
def test_what_makes_no_sense_exits_2(host, wrong):
    host.queue("a")

    assert host.run("export", *wrong).returncode == 2
    assert host.counts() == {"pending": 1}


@pytest.mark.parametrize("args", [["--product", b"\xff", "f"], ["--mark", b"\xff" * 9], ["--again", b"\xff" * 9, "f"]])
def test_names_that_are_no_text_exit_2(host, args):
    host.queue("a")

    done = host.run("export", *args)

    assert (done.returncode, b"not UTF-8" in done.stderr) == (2, True)


def test_a_file_may_have_any_name(host, tmp_path):
    host.queue("a")
    name = os.fsencode(tmp_path) + b"/\xff\n\x1b[31m" + b"x" * 200

    done = host.run("export", name)

    assert (done.returncode, done.stderr) == (0, b"")
    assert os.path.exists(name)
    assert b"\x1b" not in done.stdout + host.run("status").stdout
    assert host.json("status")[0]["exports"]["batches"][0]["left"] == 1


def digest_of(done):
    return parsed(done.stdout)[2]["sha256"]


def test_stdout_marks_nothing_until_it_is_told_to(host):
    host.queue("a", 3)

    done = host.run("export", "-")

    digest = digest_of(done)
    assert host.counts() == {"pending": 3}
    assert f"versioner-agent export --mark {digest}".encode() in done.stderr
    marked = host.run("export", "--mark", digest[:8])
    assert (marked.returncode, marked.stdout[:28]) == (0, b"marked 3 of 3 records as exp")
    assert host.counts() == {"exported": 3}
    again = host.run("export", "--mark", digest)
    assert (again.returncode, b"marked as exported already" in again.stdout) == (0, True)


def test_marking_takes_only_what_was_written_and_still_waits(host, file):
    """One is discarded, one exported otherwise, one queued since."""
    host.queue("a", 2)
    host.queue("b")
    done = host.run("export", "-")
    host.run("discard", "--yes", "1")
    host.run("export", "--product", "b", str(file))
    host.queue("a", first=3)

    marked = host.json("export", "--mark", digest_of(done))

    assert [(each["records"], each["marked"]) for each in marked] == [(3, 1)]
    assert [host.record(number)[0].state for number in (1, 2, 3, 4)] == ["discarded", "exported", "exported", "pending"]
    assert host.record(3)[0].batch == -2


def test_a_reader_that_leaves_makes_nothing_markable(host):
    host.queue("a", 300)
    code = 'versioner() { "$@"; echo "exit $?" >&2; }; versioner "$@" | head -c 100 >/dev/null'
    done = subprocess.run(
        ["sh", "-c", code, "sh", *COMMAND, "export", "-"], env=host.env, capture_output=True, check=False
    )

    assert b"exit 1" in done.stderr
    assert b"can't write to stdout" in done.stderr
    with host._outbox.store.read() as connection:
        assert connection.execute("SELECT state, digest FROM export").fetchall() == [("open", None)]
    assert host.counts() == {"pending": 300}


def test_who_has_read_the_digest_can_mark_by_it_though_the_export_is_killed(host):
    """Nothing has to be written into the outbox behind what its reader has seen."""
    host.queue("a", 300)
    with subprocess.Popen((*COMMAND, "export", "-"), stdout=subprocess.PIPE, env=host.env) as export:
        export.stdout.peek()
        with host._outbox.store.turn():
            digest = parsed(export.stdout.read())[2]["sha256"]
            export.kill()

    assert host.run("export", "--mark", digest).stdout[:32] == b"marked 300 of 300 records as exp"
    assert host.counts() == {"exported": 300}


def test_who_can_not_be_told_of_an_export_is_told_that_it_counts(host, file):
    host.queue("a", 2)
    with open("/dev/full", "wb") as full:
        done = subprocess.run((*COMMAND, "export", str(file)), stdout=full, stderr=subprocess.PIPE, env=host.env,
                              check=False)  # fmt: skip

    assert done.returncode == 1
    assert f"{file} is complete, and its records count as exported".encode() in done.stderr
    assert sql(host.path, "SELECT DISTINCT state FROM record") == [("exported",)]


def test_a_closed_stdout_is_no_reader(host):
    host.queue("a")
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *COMMAND, "export", "-"], env=host.env, capture_output=True,
                          check=False)  # fmt: skip

    assert (done.returncode, b"stdout is closed" in done.stderr) == (2, True)
    assert host.counts() == {"pending": 1}


def test_no_room_for_what_is_to_go_to_stdout_marks_nothing_and_writes_nothing(host, small_disk):
    host.queue("a", 300)

    done = host.run("export", "-", TMPDIR=str(small_disk))

    assert (done.returncode, done.stdout) == (1, b"")
    assert b"into %s first: No space left on device" % bytes(small_disk) in done.stderr
    assert b"set TMPDIR" in done.stderr
    assert host.counts() == {"pending": 300}


def test_a_batch_is_written_once_more_with_what_has_no_verdict(host, tmp_path):
    host.queue("a", 3)
    host.run("export", str(tmp_path / "lost"))
    host.run("discard", "2")
    before = parsed((tmp_path / "lost").read_bytes())[0]

    assert host.run("export", "--again", before["batch"][:8], str(tmp_path / "new")).returncode == 0
    assert host.run("export", "--again", "1", str(tmp_path / "new")).returncode == 0

    header, lines, _ = parsed((tmp_path / "new").read_bytes())
    assert header == before
    assert [line["id"] for line in lines] == [1, 3]
    host.run("discard", "1", "3")
    done = host.run("export", "--again", "1", str(tmp_path / "more"))
    assert (done.returncode, b"waits for a verdict any more" in done.stderr) == (2, True)
    assert not (tmp_path / "more").exists()


def test_a_batch_that_was_not_marked_is_not_written_again(host, file):
    host.queue("a")
    host.run("export", "-")

    assert host.run("export", "--again", "1", str(file)).returncode == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a few hundred records."""
    path = tmp_path / "stick"
    path.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a small file system can't be mounted")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_at_the_far_end_marks_nothing(host, small_disk):
    host.queue("a", 300)

    done = host.run("export", str(small_disk / "events.jsonl"))

    assert (done.returncode, b"can't write" in done.stderr) == (1, True), done.stderr
    assert host.counts() == {"pending": 300}
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_removes_what_is_half_written(host, tmp_path, number, code):
    """The export waits for one who delivers, with its file open."""
    host.queue("a")
    with host_lock(host):
        process = host.start("export", str(tmp_path / "events.jsonl"))
        eventually(lambda: host.presence().has_borrower)
        assert [name for name in os.listdir(tmp_path) if name.endswith(".part")]

        assert host.end(process, number) == code

    assert not [name for name in os.listdir(tmp_path) if name.endswith((".part", ".jsonl"))]
    assert host.counts() == {"pending": 1}


def host_lock(host):
    lock = FlusherLock(host.path)
    assert lock.claim_delivery()
    return contextlib.closing(lock)


def test_one_who_never_lends_is_named(host, file):
    host.queue("a")
    with host_lock(host):
        done = host.run("export", str(file), VERSIONER_AGENT_TIMEOUT="0.1")

    assert done.returncode == 1
    assert f"pid {os.getpid()} delivers from this outbox".encode() in done.stderr
    assert not file.exists()


def test_status_lists_batches_and_counts_what_is_held(host, tmp_path):
    host.queue("a", 2)
    host.queue("b")
    host.run("export", "--product", "a", str(tmp_path / "1"))
    host.run("export", str(tmp_path / "2"))
    host.run("discard", "1")

    (status,) = host.json("status")
    text = host.run("status").stdout.decode()

    first, second = status["exports"]["batches"]
    assert list(first) == ["number", "batch", "created_at", "age_s", "records", "left", "file"]
    assert (first["number"], first["records"], first["left"], first["file"]) == (1, 2, 1, str(tmp_path / "1"))
    assert (second["number"], second["records"], second["left"]) == (2, 1, 1)
    assert status["exports"]["held_products"] == 2
    assert status["counts"]["exported"] == 2
    assert "without a receipt: 2 batches" in text
    assert "1 of 2 left" in text


def test_retry_says_that_the_far_side_may_send_it_too(host, file):
    host.queue("a")
    host.run("export", str(file))

    done = host.run("retry", "1")

    assert b"1 retried: whoever imports the file" in done.stdout
    assert host.record(1)[0].idempotency_key == host.record(1)[0].event_id
    assert host.counts() == {"pending": 1}


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("retry", "1"), 0, b"sends it too"),
        (("discard", "1", "--yes"), 0, b"sends it all the same"),
        (("amend", "1", "--set", "version=2", "--yes"), 2, b"it is exported"),
    ],
)
def test_what_a_dead_export_has_marked_is_exported_for_who_repairs(host, file, command, code, words):
    """It was killed before it had turned the records themselves."""
    host.queue("a", 2)
    host.run("export", str(file))
    sql(host.path, "UPDATE record SET state = 'pending'")
    sql(host.path, "UPDATE export SET state = 'marking', waiting = 2, awaited = 0, marked_to = 0")
    assert host.counts() == {"exported": 2}

    done = host.run(*command)

    assert done.returncode == code
    assert words in done.stdout + done.stderr


@pytest.mark.parametrize("command", [("discard", "1", "--yes"), ("amend", "1", "--set", "version=2", "--yes")])
def test_who_gives_up_what_was_written_and_not_marked_is_told_that_it_may_be_sent(host, command):
    host.queue("a", 2)
    host.run("export", "--limit", "1", "-")

    done = host.run(*command)
    other = host.run(command[0], "2", *command[2:])

    assert b"whoever imports that sends it all the same" in done.stdout
    assert other.returncode == 0
    assert b"sends it" not in other.stdout


def test_a_held_product_is_not_delivered_until_it_is_let_go(host_for, serve, file):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    host.queue("a", 2)
    host.run("export", str(file))
    host.queue("a", first=3)
    host.queue("b")

    done = host.run("flush", "--timeout", "600")

    assert done.returncode == 75
    assert b"1 event is still queued: exported records of the same products go first" in done.stderr
    assert [seen.product for seen in server.requests] == ["b"]
    host.run("retry", "1")
    host.run("discard", "2")
    assert host.run("flush").returncode == 0
    assert [(seen.product, seen.event["version"]) for seen in server.requests[1:]] == [("a", "1"), ("a", "3")]


def test_waiting_for_an_event_that_is_held_ends_at_once(host_for, serve, file):
    host = host_for(serve().url)
    host.queue("a")
    host.run("export", str(file))

    done = host.run("enqueue", "build", "--product", "a", "--version", "2", "--wait=600")

    assert done.returncode == 75
    assert b"exported records of the same products go first" in done.stderr


def test_further_exports_of_a_held_product_keep_its_order(host, tmp_path):
    host.queue("a", 2)
    host.run("export", str(tmp_path / "1"))
    host.queue("a", first=3)

    assert host.run("export", str(tmp_path / "2")).returncode == 0
    assert versions(tmp_path / "2") == [("a", "3")]


def spill(host, file, *args, **env):
    return host.run("flush", "--spill", str(file), *args, **env)


def test_a_spill_takes_what_was_not_delivered(host_for, serve, file):
    host = host_for(f"http://127.0.0.1:{closed_port()}")
    host.queue("a", 3)

    done = spill(host, file, "--timeout", "0.2", "--json")

    assert done.returncode == 0
    assert f"spilled 3 records to {file}".encode() in done.stderr
    told = json.loads(done.stdout)
    assert (told["pending"], told["spilled"]["records"]) == (0, 3)
    assert len(versions(file)) == 3
    assert host.counts() == {"exported": 3}


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_spill_without_a_key_exports_all(host, file):
    host.queue("a", 2)

    done = spill(host, file, VERSIONER_API_KEY="")

    assert (done.returncode, b"there is no API key" in done.stderr) == (0, True)
    assert host.counts() == {"exported": 2}


def test_with_everything_delivered_nothing_is_spilled(host_for, serve, file):
    host = host_for(serve().url)
    host.queue("a", 2)

    assert (spill(host, file).returncode, file.exists()) == (0, False)


def test_a_refusal_shows_in_the_exit_code_of_a_spill(host_for, serve, file):
    host = host_for(serve(lambda seen: refused(422) if seen.product == "bad" else refused(503)).url)
    host.queue("bad")
    host.queue("a")

    assert spill(host, file, "--timeout", "0.5").returncode == 4
    assert versions(file) == [("a", "1")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_flush_and_not_the_spill(host_for, serve, file, number):
    server = serve(lambda seen: hanging() if seen.number else accepted())
    host = host_for(server.url)
    host.queue("a", 3)
    process = host.start("flush", "--timeout", "600", "--spill", str(file), VERSIONER_AGENT_TIMEOUT="1")
    server.wait_for(2)

    assert host.end(process, number) == 0
    assert [version for _, version in versions(file)] == ["2", "3"]
    assert host.counts() == {"delivered": 1, "exported": 2}


def test_who_ends_a_job_signals_again_and_has_the_spill_all_the_same(host_for, serve, file):
    """SIGINT, then SIGTERM while a request is under way, then more of them while the file is written."""
    host = host_for(serve(lambda _: hanging()).url)
    host.queue("a", 2000)
    process = host.start("flush", "--timeout", "600", "--spill", str(file), VERSIONER_AGENT_TIMEOUT="2")
    eventually(lambda: host.health().state != "unknown" or host.record(1)[2])
    process.send_signal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    eventually(lambda: list(file.parent.glob(".*.part")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)

    assert process.wait(30) == 0
    assert len(versions(file)) == 2000
    assert host.counts() == {"exported": 2000}


def test_a_spill_that_fails_exits_1(host, file):
    host.queue("a")

    done = spill(host, file / "no" / "where", VERSIONER_API_KEY="")

    assert done.returncode in (1, 2)
    assert host.counts() == {"pending": 1}


@pytest.mark.parametrize("why", ["shared", "taken"])
def test_a_spill_that_can_be_foreseen_to_fail_delivers_nothing(host_for, serve, file, why):
    server = serve()
    host = host_for(server.url)
    host.queue("a")
    if why == "shared":
        os.chmod(host.path, 0o660)
    else:
        file.write_text("mine")

    done = spill(host, file)

    assert done.returncode == 2
    assert (b"versioner-agent export FILE" in done.stderr) == (why == "shared")
    assert (server.requests, host.counts()) == ([], {"pending": 1})


def test_an_outbox_of_an_older_schema_is_upgraded_by_an_export(host, file):
    with contextlib.closing(sqlite3.connect(host.path)) as connection:
        for statement in schema.statements(2):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 2")
        connection.commit()
    assert review.stats(host._outbox.store).exports.batches == []
    host.queue("a")
    assert host.run("export", "--mark", "0" * 64).returncode == 2

    assert host.run("export", str(file)).returncode == 0
    assert host.counts() == {"exported": 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_root_writes_the_file_as_root_and_uses_the_outbox_as_its_owner(reachable):
    """The owner of the outbox could not even look into the place of the file."""
    state, place = reachable / "state", reachable / "place"
    for directory in (state, place):
        directory.mkdir(mode=0o700)
    os.chown(state, 65534, 65534)
    env = {**os.environ, "VERSIONER_AGENT_DB": str(state / "outbox.db"), "VERSIONER_AGENT_CONFIG": os.devnull}

    def run(*args):
        return subprocess.run((*COMMAND, *args), env=env, capture_output=True, check=False)

    assert run("enqueue", "build", "--product", "a", "--version", "1").returncode == 0

    done = run("export", str(place / "events.jsonl"))

    assert done.returncode == 0, done.stderr
    assert (place / "events.jsonl").stat().st_uid == 0
    assert {path.stat().st_uid for path in state.iterdir()} == {65534}


def test_an_export_whose_lock_was_taken_away_says_what_to_do_with_its_file(outbox, tmp_path, monkeypatch):
    outbox.enqueue("build", {"product_name": "p", "version": "1", "status": "completed"})
    monkeypatch.setattr(FlusherLock, "renew", lambda _: False)
    settings = config.load({"db": outbox.store.path}, {}, "/dev/null")

    with pytest.raises(LockHeld) as told:
        exporting.export(settings, str(tmp_path / "events.jsonl"))

    assert "complete, but nothing was marked" in told.value.message
    assert told.value.hint.startswith("delete it and export again")
    assert review.stats(outbox.store).counts["pending"] == 1
