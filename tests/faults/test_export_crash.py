"""SIGKILL at every write, sync and rename of an export: no event is without a file or a place in the outbox."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import sqlite3

import pytest
from crash import COMMAND, killed_at, needs_strace, points_of, sweep, traced
from specimen import records_of

from versioner_agent.stepping import FIRST_STEP

pytestmark = needs_strace
CALLS = ("pwrite64", "fdatasync", "fsync", "write", "linkat", "rename", "renameat", "renameat2", "unlinkat")
#: Of what fits into one step, at every point that the sweep chooses; of what takes several, at some of them.
SIZES = pytest.mark.parametrize(("events", "every"), [(5, 1), (3 * FIRST_STEP, 7)], ids=["one step", "steps"])


def checked(path):
    """The event ids in an export file that is complete, as every file under its own name must be."""
    lines = path.read_bytes().splitlines(keepends=True)
    trailer = json.loads(lines[-1])
    assert trailer == {"trailer": True, "count": len(lines) - 2,
                       "sha256": hashlib.sha256(b"".join(lines[:-1])).hexdigest()}  # fmt: skip
    return [json.loads(line)["event_id"] for line in lines[1:-1]]


def restored(host, pristine):
    """Put the outbox back as it was before any export."""
    host.close_outbox()
    for name in os.listdir(os.path.dirname(host.path)):
        os.unlink(os.path.join(os.path.dirname(host.path), name))
    for name, data in pristine.items():
        with open(os.path.join(os.path.dirname(host.path), name), "wb") as file:
            file.write(data)


def states_of(path):
    return collections.Counter(kept.state for kept in records_of(path).values())


def counts_of(host):
    host.close_outbox()
    return host.counts()


@sweep
@SIZES
def test_an_export_killed_anywhere_leaves_a_whole_file_or_none(host_for, tmp_path, chosen, events, every):
    """What is marked is in a whole file; what is not is still pending, and the next export has it."""
    host = host_for()
    host.queue("a", events - 1)
    host.queue("b")
    host.close_outbox()
    state = os.path.dirname(host.path)
    pristine = {path.name: path.read_bytes() for path in pathlib.Path(state).iterdir()}
    ids = [kept.event_id for _, kept in sorted(records_of(host.path).items())]
    first, second = tmp_path / "events.jsonl", tmp_path / "next.jsonl"
    command = (*COMMAND, "export", str(first))
    points = points_of(command, CALLS, env=host.env)
    assert {call for call, _ in points} >= {"pwrite64", "fdatasync", "fsync", "linkat", "unlinkat"}
    found = collections.Counter()
    missed = 0
    for call, number in chosen(points) if chosen is list else chosen(points)[::every]:
        restored(host, pristine)
        for path in (first, second):
            path.unlink(missing_ok=True)
        was_killed, _ = killed_at(call, number, command, env=host.env)
        missed += not was_killed
        if first.exists():
            assert checked(first) == ids
        counts = counts_of(host)
        assert counts in ({"pending": events}, {"exported": events}), (call, number, counts)
        assert first.exists() or "pending" in counts, (call, number)
        done = host.run("export", str(second))
        assert done.returncode == 0, (call, number, done.stderr)
        assert (checked(second) if second.exists() else []) == (ids if "pending" in counts else []), (call, number)
        assert counts_of(host) == {"exported": events}
        with contextlib.closing(sqlite3.connect(host.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert set(connection.execute("SELECT state FROM record")) == {("exported",)}
            assert connection.execute("SELECT sum(awaited), sum(waiting) FROM export").fetchone() == (events, 0)
        found[(first.exists(), next(iter(counts)))] += 1
    assert set(found) == {(False, "pending"), (True, "pending"), (True, "exported")}
    # Where steps are as long as the disk allows, the last calls of one run may have no like in another.
    assert missed <= (events > FIRST_STEP) * sum(found.values()) // 10


def test_a_file_left_by_an_export_that_was_killed_before_marking_is_replaced(host_for, tmp_path):
    host = host_for()
    host.queue("a", 2)
    command = (*COMMAND, "export", str(tmp_path / "events.jsonl"))
    syncs = [number for call, number in points_of(command, ("fsync",), env=host.env)]
    host.run("retry", "1", "2")
    (tmp_path / "events.jsonl").unlink()

    was_killed, _ = killed_at("fsync", syncs[-1], command, env=host.env)

    assert was_killed
    assert (host.counts(), (tmp_path / "events.jsonl").exists()) == ({"pending": 2}, True)
    assert host.run("export", str(tmp_path / "events.jsonl")).returncode == 0
    assert len(checked(tmp_path / "events.jsonl")) == 2


def test_the_file_is_synced_before_it_has_its_name_and_the_name_before_anything_is_marked(host_for, tmp_path):
    host = host_for()
    host.queue("a")
    calls = ("openat", "fsync", "fdatasync", "linkat")

    done, seen = traced((*COMMAND, "export", str(tmp_path / "events.jsonl")), calls, env=host.env)

    assert done.returncode == 0
    directory = next(line.rpartition("= ")[2] for name, line in seen if f'"{tmp_path}"' in line and name == "openat")
    file = next(line.rpartition("= ")[2] for name, line in seen if '.part"' in line and name == "openat")
    steps = [line.split(" ")[0].rstrip(",") for name, line in seen if name != "openat"]
    named = next(at for at, (name, _) in enumerate([each for each in seen if each[0] != "openat"]) if name == "linkat")
    assert steps[named - 1 : named + 2 : 2] == [f"fsync({file})", f"fsync({directory})"]
    assert any(step.startswith("fdatasync") for step in steps[named + 2 :])
