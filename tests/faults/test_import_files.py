"""Export files broken in 500 ways, on full disks, and full of hostile text: refused and nothing written, or harmless."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import subprocess

import exports
import pytest

from versioner_agent import receipts
from versioner_agent.errors import AgentError, OutboxFull
from versioner_agent.exportfile import Writer
from versioner_agent.importfile import ExportFile, open_file
from versioner_agent.importing import Listener, import_all
from versioner_agent.records import COLUMNS, as_record, is_intact
from versioner_agent.storage import Store

TURNS = 500
LINES = [
    exports.event(
        number,
        kind="deployment" if number % 3 == 0 else "build",
        fields={
            "version": f"1.{number}",
            "extra_metadata": {"notes": "ä" * number, "n": [1, 2.5, None, True]},
            **({"environment_name": "production"} if number % 3 == 0 else {}),
            **({"invoke_id": "42"} if number % 2 else {}),
        },
        run_attempt="2" if number % 4 == 0 else None,
    )
    for number in range(1, 13)
]
SEED = int(os.environ.get("SEED", "1"))


def flip(data, dice):
    at = dice.randrange(len(data))
    return data[:at] + bytes((data[at] ^ (1 << dice.randrange(8)),)) + data[at + 1 :]


def cut(data, dice):
    return data[: dice.randrange(len(data))]


def insert(data, dice):
    at = dice.randrange(len(data) + 1)
    return data[:at] + dice.randbytes(dice.choice((1, 1, 3, 100))) + data[at:]


def take_out(data, dice):
    at = dice.randrange(len(data))
    return data[:at] + data[at + dice.choice((1, 1, 5, 200)) :]


def swap(lines, dice):
    one, two = dice.sample(range(len(lines)), 2)
    lines[one], lines[two] = lines[two], lines[one]


def repeat(lines, dice):
    lines.insert(dice.randrange(len(lines)), dice.choice(lines))


def delete(lines, dice):
    del lines[dice.randrange(len(lines))]


def mutated(dice):
    """A broken file, and whether its digest was made to fit again."""
    lines = exports.file_of(LINES).splitlines(keepends=True)
    compress = gzip.compress if dice.random() < 0.4 else bytes
    way = dice.choice((flip, flip, cut, insert, take_out, swap, repeat, delete))
    if dice.random() < 0.4:
        body = lines[:-1]
        if way in (swap, repeat, delete):
            way(body, dice)
        else:
            at = dice.randrange(len(body))
            body[at] = way(body[at], dice)
        return compress(exports.sealed(body)), True
    if way in (swap, repeat, delete):
        way(lines, dice)
        return compress(b"".join(lines)), False
    if dice.random() < 0.5:
        return compress(way(b"".join(lines), dice)), False
    return way(compress(b"".join(lines)), dice), False


def content_of(path):
    rows = exports.sql(path, f"SELECT {COLUMNS}, payload FROM record ORDER BY id")
    assert all(is_intact(as_record(row[:-1]), row[-1]) for row in rows)
    return [(row[1], row[13], row[15], row[-1]) for row in rows]  # event_id, queued_at, origin, payload


def try_import(path, name):
    """Import the file *name* as the command does."""
    with contextlib.closing(Store(path)) as store, contextlib.closing(open_file(name, None)) as file:
        file.check()
        import_all(store, [file], Listener())


def refusal_of(path, name):
    try:
        try_import(path, name)
    except AgentError as exc:
        return exc
    return None


def test_500_mutations_are_refused_or_harmless(tmp_path):
    """What was altered is refused; where the digest fits again, what comes in is still valid, each record sound."""
    whole = str(tmp_path / "whole.db")
    name = str(tmp_path / "file")
    with open(name, "wb") as file:
        file.write(exports.file_of(LINES))
    try_import(whole, name)
    expected = content_of(whole)
    counts = {"refused": 0, "same": 0, "sealed": 0}
    for turn in range(TURNS):
        dice = random.Random(f"{SEED}-{turn}")
        data, is_sealed = mutated(dice)
        with open(name, "wb") as file:
            file.write(data)
        path = str(tmp_path / f"{turn}.db")
        problem = refusal_of(path, name)
        if problem is not None:
            assert problem.exit_code == 2, (turn, problem)
            assert len(problem.message) < 600, turn
            assert not [each for each in os.listdir(tmp_path) if each.startswith(f"{turn}.db")], turn
            counts["refused"] += 1
        elif is_sealed:
            assert len(content_of(path)) <= len(LINES), turn
            counts["sealed"] += 1
        else:
            assert content_of(path) == expected, turn
            counts["same"] += 1

    assert counts["refused"] > TURNS * 0.8, counts


def test_a_broken_file_leaves_an_outbox_as_it_was(host_for, tmp_path):
    """The command itself, on an outbox with a life: exit 2, one error, no traceback, not a byte changed."""
    host = host_for()
    host.queue("payments", 3)
    host.close_outbox()
    with open(host.path, "rb") as file:
        before = file.read()
    refusals = 0
    for turn in range(24):
        data, is_sealed = mutated(random.Random(f"{SEED}-{turn}"))
        if is_sealed:
            continue
        done = host.run("import", "-", stdin=data)
        assert done.returncode in (0, 2)
        assert done.stderr.count(b"error: ") == (done.returncode == 2), done.stderr
        assert b"Traceback" not in done.stderr
        if done.returncode == 0:  # the same content, as the test above has it
            break
        refusals += 1
        with open(host.path, "rb") as file:
            assert file.read() == before

    assert refusals >= 5


def test_a_bomb_is_refused_without_being_unpacked(tmp_path):
    """A gigabyte of one line, in a megabyte: no more is read than a line may have."""
    name = str(tmp_path / "bomb.gz")
    with gzip.open(name, "wb", compresslevel=1) as file:
        file.write(exports.as_line(exports.head()))
        for _ in range(64):
            file.write(b" " * (4 << 20))

    with pytest.raises(AgentError, match="line 2: it is longer than"):
        try_import(str(tmp_path / "outbox.db"), name)
    assert not os.path.exists(tmp_path / "outbox.db")


def test_names_in_a_file_stay_text(host_for, tmp_path):
    """Nothing that another host is called, or a product, moves a cursor or forges a line."""
    host = host_for()
    hostile = "\x1b[2J\u202eevil\u2028 ##[error]x"
    lines = [exports.event(1, fields={"product_name": f"p{hostile}p"}, queued_by=hostile + "\n")]
    header = exports.head(host=hostile + "\nerror: all is lost", previous="a" * 32)
    (tmp_path / "file").write_bytes(exports.file_of(lines, header))
    (tmp_path / "bad").write_bytes(exports.file_of([{**lines[0], hostile + "\n": 1}], header))

    said = b""
    for arguments in (("import", "file"), ("import", "bad"), ("show", "1"), ("list",), ("import", "file", "--json")):
        names = [str(tmp_path / each) if each in ("file", "bad") else each for each in arguments]
        done = host.run(*names)
        said += done.stdout + done.stderr
        assert len(done.stdout.splitlines()) < 30

    assert b"\x1b" not in said
    for character in "\u202e\u2028":
        assert character.encode() not in said
    assert b"\nerror: all is lost" not in said
    assert b"##[error]" not in said


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def fill(directory):
    """Leave not a byte."""
    for size in (64 * 1024, 4096, 1):
        with contextlib.suppress(OSError), open(directory / "filler", "ab", buffering=0) as file:
            while file.write(b"x" * size) == size:
                pass


@pytest.mark.parametrize("has_neighbour", [False, True], ids=["alone", "neighbour"])
def test_what_does_not_fit_on_the_disk_is_not_queued_at_all(small_disk, tmp_path, has_neighbour):
    """What was staged is taken away again, also when somebody else has taken the last byte."""
    name, path = str(tmp_path / "file"), str(small_disk / "outbox.db")
    notes = {"notes": "n" * 8000}
    with open(name, "wb") as stream:
        writer = Writer(stream)
        for line in (exports.head(), *(exports.event(n, fields={"extra_metadata": notes}) for n in range(1, 600))):
            writer.line(line)
        writer.finish()
    small = str(tmp_path / "small-file")
    with open(small, "wb") as file:
        file.write(exports.file_of(LINES[:6], exports.head(batch="1" * 32)))
    try_import(path, small)
    before = content_of(path)

    with contextlib.closing(Store(path)) as store, contextlib.closing(open_file(name, None)) as file:
        file.check()
        again = file.again

        def lines():
            for number, line in enumerate(again()):
                if has_neighbour and number == 150:  # the first transaction takes 1 MiB
                    assert exports.sql(path, "SELECT count(*) > 100 FROM record") == [(1,)]
                    fill(small_disk)
                yield line

        file.again = lines
        with pytest.raises(OutboxFull, match="no space left"):
            import_all(store, [file], Listener())

    assert content_of(path) == before
    assert exports.sql(path, "SELECT count(*) FROM batch") == [(0,)]
    try_import(path, small)


def test_receipts_that_do_not_fit_are_applied_when_there_is_room(tmp_path):
    """A file of receipts that breaks off is no file: the next one tells all again."""
    path = str(tmp_path / "outbox.db")
    name = str(tmp_path / "file")
    with open(name, "wb") as file:
        file.write(exports.file_of(LINES))
    try_import(path, name)
    exports.sql(path, "UPDATE record SET state = 'delivered', settled_at = 1764150000.0, server_id = 'evt'")

    class Full:
        def __init__(self):
            self.left = 1000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return len(data)

    with contextlib.closing(Store(path)) as store:
        with pytest.raises(OSError, match="No space left"):
            receipts.write(store, Full())
        with open(name, "wb") as stream:
            written = receipts.write(store, stream)

    assert exports.sql(path, "SELECT count(*) FROM told") == [(0,)]
    with open(name, "rb") as stream:
        assert ExportFile(name, stream).check().records == written.records == 12
        stream.seek(0)
        assert json.loads(stream.readline())["content"] == "receipts"


def test_a_damaged_verdict_does_not_spoil_the_rest(tmp_path):
    path = str(tmp_path / "outbox.db")
    name = str(tmp_path / "file")
    with open(name, "wb") as file:
        file.write(exports.file_of(LINES))
    try_import(path, name)
    exports.sql(path, "UPDATE record SET state = 'delivered', settled_at = 1764150000.0")
    exports.sql(path, "UPDATE record SET reason = x'ff00', origin = 'no uid' WHERE id = 5")

    with contextlib.closing(Store(path)) as store, open(name, "wb") as stream:
        written = receipts.write(store, stream)
        receipts.mark_told(store, written)

    assert written.records == 11
    assert exports.sql(path, "SELECT count(*) FROM told WHERE record_id = 5") == [(0,)]
