"""Job files: never seen half-made or unlocked, taken up when their wrapper is dead, harmless whoever planted them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import uuid

import pytest

from versioner_agent import Outbox, events, flush, jobs
from versioner_agent.jobs import End, Job, JobFile
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock, WriteQueue
from versioner_agent.orphans import AGAIN_S, ENDS_A_LOOK, FIND_STATE, LIST_S, UNKNOWN, Orphans
from versioner_agent.storage import Store

FIELDS = {
    "product_name": "payments",
    "version": "1",
    "environment_name": "production",
    "invoke_id": "42",
    "extra_metadata": {"team": "core"},
}


def job(**changes):
    ids = {"started_id": str(uuid.uuid4()), "last_id": str(uuid.uuid4())}
    plain = Job("deployment", dict(FIELDS), "2", started_at=1.8e9, queued_by="alice", command="make", **ids)
    return plain._replace(**changes)


@pytest.fixture
def path(tmp_path):
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return str(directory / "outbox.db")


@pytest.fixture
def ledger(path):
    with contextlib.closing(Store(path, 0.05)) as store:
        made = Ledger(store)
        made.open(create=True)
        yield made


@pytest.fixture
def now():
    """Moments far enough apart for everything to be due."""
    moment = 0.0

    def later():
        nonlocal moment
        moment += LIST_S + AGAIN_S
        return moment

    return later


def begun(path, of=None, *, is_queued=True):
    """A job whose `started` is queued, and its file, held."""
    of = of or job()
    file = JobFile.create(path, of)
    if is_queued:
        with Outbox(path) as outbox:
            outbox.enqueue_all([of.event("started")], run_attempt=of.run_attempt, event_ids=[of.started_id], new=True)
    return of, file


def records(ledger):
    with ledger.store.read() as connection:
        return connection.execute(
            "SELECT event_id, status, queued_by, run_attempt, payload FROM record ORDER BY id"
        ).fetchall()


def statuses(ledger):
    return [row[1] for row in records(ledger)]


# --- a living wrapper's file


@pytest.mark.parametrize(("place", "mode"), [(0o700, 0o600), (0o2770, 0o660), (0o770, 0o600)])
def test_a_job_file_has_the_mode_of_its_place(path, place, mode, umask):
    os.chmod(os.path.dirname(path), place)
    umask(0o077)

    file = JobFile.create(path, job())

    assert os.stat(file.path).st_mode & 0o777 == mode
    file.close()


def test_a_job_file_is_held_and_complete_when_its_name_appears(path, monkeypatch):
    seen = []
    rename = os.rename

    def look(old, new):
        with jobs.taken(old) as found:
            seen.append(found)
        with open(old) as file:
            seen.append(json.loads(file.read())["command"])
        rename(old, new)

    monkeypatch.setattr(os, "rename", look)
    file = JobFile.create(path, job())

    assert seen == [None, "make"]
    assert jobs.names(path) == [os.path.basename(file.path)]
    with jobs.taken(file.path) as found:
        assert found is None
    file.remove()
    assert jobs.names(path) == []


def test_a_job_file_that_can_not_be_finished_leaves_nothing(path, monkeypatch):
    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(OSError, match="no"):
        JobFile.create(path, job())

    assert os.listdir(os.path.dirname(path)) == []


def test_what_a_wrapper_wrote_is_what_is_found_when_it_is_dead(path):
    of, file = begun(path, is_queued=False)
    file.note_started()
    end = End("failed", {"exit_code": 2}, "2026-11-06T15:30:00Z")
    file.note_end(end)
    file.close()

    with jobs.taken(file.path) as found:
        assert found == (of, True, end)
    with jobs.taken(file.path) as _, jobs.taken(file.path) as second:
        assert second is None  # one at a time


def test_the_largest_event_fits_into_its_file(path):
    text = "é\U0001f600" * 20_000
    file = JobFile.create(path, job(fields=FIELDS | {"scm_branch": text, "scm_repository": text[:5000]}))
    file.close()

    with jobs.taken(file.path) as found:
        assert found.job.fields["scm_branch"] == text


@pytest.mark.parametrize("cut", ['{"started": tr', '{"status": "failed", "added": {}', "\0\0\0\0\n", "[1]\n", "{}\n"])
def test_a_note_cut_short_is_none(path, cut):
    of, file = begun(path, is_queued=False)
    file.close()
    with open(file.path, "a") as appended:
        appended.write(cut)

    with jobs.taken(file.path) as found:
        assert found == (of, False, None)


# --- the end that nobody told


def test_the_end_of_a_killed_wrapper_is_queued_as_aborted(path, ledger, now, caplog):
    of, file = begun(path)
    orphans = Orphans(ledger)
    orphans.look(now())
    assert statuses(ledger) == ["started"]
    file.close()

    with caplog.at_level(logging.WARNING):
        orphans.look(now())
        orphans.look(now())

    event_id, status, queued_by, run_attempt, payload = records(ledger)[-1]
    assert statuses(ledger) == ["started", "aborted"]
    assert (event_id, queued_by, run_attempt) == (of.last_id, "alice", "2")
    body = json.loads(payload)
    assert body["invoke_id"] == "42"
    assert body["completed_at"]
    assert body["extra_metadata"]["team"] == "core"
    assert body["extra_metadata"]["error"] == UNKNOWN
    assert jobs.names(path) == []
    (told,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert (told.action, told.record, told.levelname) == (status, 2, "WARNING")


@pytest.mark.parametrize(("reason", "told"), [("blocked", ["started"]), ("invalid", ["started", "aborted"])])
def test_a_job_whose_start_a_rule_refused_has_no_end(path, ledger, now, reason, told):
    """For the API it never began."""
    _, file = begun(path)
    file.note_started()
    file.close()
    with ledger.store.write() as connection:
        connection.execute("UPDATE record SET state = 'failed', reason = ?", (reason,))

    Orphans(ledger).look(now())

    assert statuses(ledger) == told
    assert jobs.names(path) == []


def test_a_flush_that_has_told_an_end_lets_an_agent_in(path, ledger):
    _, file = begun(path)
    file.close()
    with contextlib.closing(FlusherLock(path)) as flushes, contextlib.closing(FlusherLock(path)) as agents:
        flush._tell_ends(ledger, flushes)

        assert statuses(ledger) == ["started", "aborted"]
        assert agents.claim_agent()
        assert agents.claim_delivery()


def test_an_end_that_its_wrapper_knew_is_told_as_it_was(path, ledger, now):
    _, file = begun(path)
    file.note_started()
    file.note_end(End("completed", {"exit_code": 0, "team": "theirs"}, "2026-11-06T15:30:00Z"))
    file.close()

    Orphans(ledger).look(now())

    body = json.loads(records(ledger)[-1][-1])
    assert statuses(ledger) == ["started", "completed"]
    assert body["completed_at"] == "2026-11-06T15:30:00Z"
    assert (body["extra_metadata"]["exit_code"], body["extra_metadata"]["team"]) == (0, "core")


def test_a_job_that_nobody_learned_of_has_no_end(path, ledger, now):
    _, file = begun(path, is_queued=False)
    file.note_end(End("completed", {}, ""))
    file.close()

    Orphans(ledger).look(now())

    assert statuses(ledger) == []
    assert jobs.names(path) == []


def test_an_end_that_is_queued_is_not_queued_again(path, ledger, now):
    of, file = begun(path)
    with Outbox(path) as outbox:
        outbox.enqueue_all([of.event("completed")], event_ids=[of.last_id])
    file.close()

    Orphans(ledger).look(now())

    assert statuses(ledger) == ["started", "completed"]
    assert jobs.names(path) == []


def test_a_job_longer_than_the_retention_is_ended_all_the_same(path, ledger, now):
    """Its `started` is delivered and gone from the outbox; the wrapper had noted it."""
    _, file = begun(path)
    file.note_started()
    file.close()
    with ledger.store.write() as connection:
        connection.execute("DELETE FROM record")

    Orphans(ledger).look(now())

    assert statuses(ledger) == ["aborted"]


def test_an_end_is_queued_once_though_its_file_can_not_be_removed(path, ledger, now, monkeypatch, caplog):
    _, file = begun(path)
    file.close()

    def fail(_):
        raise PermissionError(1, "Operation not permitted")

    orphans = Orphans(ledger)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", fail)
        for _ in range(3):
            orphans.look(now())
    assert statuses(ledger) == ["started", "aborted"]
    assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 1
    orphans.look(now())

    assert statuses(ledger) == ["started", "aborted"]
    assert jobs.names(path) == []


def test_an_outbox_in_trouble_is_told_once_and_tried_again(path, ledger, now, caplog):
    _, file = begun(path)
    file.close()
    orphans = Orphans(ledger)
    with contextlib.closing(WriteQueue(f"{path}.queue")) as queue:
        assert queue.acquire(0.1)
        for _ in range(3):
            orphans.look(now())
    assert [each.action for each in caplog.records if each.levelno == logging.ERROR] == ["outbox_error"]
    assert statuses(ledger) == ["started"]

    orphans.look(now())

    assert statuses(ledger) == ["started", "aborted"]


def test_many_ends_are_queued_some_at_a_time(path, ledger, now):
    for number in range(ENDS_A_LOOK + 1):
        begun(path, job(fields=FIELDS | {"invoke_id": str(number)}))[1].close()
    orphans = Orphans(ledger)
    moment = now()

    orphans.look(moment)
    assert statuses(ledger).count("aborted") == ENDS_A_LOOK
    orphans.look(moment)

    assert statuses(ledger).count("aborted") == ENDS_A_LOOK + 1


@pytest.mark.parametrize("kind", events.KINDS)
def test_an_event_is_found_by_its_run(ledger, kind):
    """There is no index of event ids; a million records must not be looked through."""
    values = ("42", "payments", None if kind == "build" else "production", "id")
    with ledger.store.read() as connection:
        (step,) = connection.execute("EXPLAIN QUERY PLAN " + FIND_STATE, values).fetchall()

    assert "USING INDEX record_run (invoke_id=? AND product_name=? AND environment_name=?)" in step[-1]


# --- how often it is looked


def test_an_unchanged_directory_is_not_listed_again_but_its_jobs_are_looked_at(path, ledger, monkeypatch):
    """A wrapper's death does not change the directory."""
    _, file = begun(path)
    listed = []
    names = jobs.names
    monkeypatch.setattr(jobs, "names", lambda at: listed.append(at) or names(at))
    os.utime(os.path.dirname(path), (1e9, 1e9))
    orphans = Orphans(ledger)
    for moment in (1.0, 4.0, 7.0):
        orphans.look(moment)
    assert len(listed) == 1

    file.close()
    orphans.look(10.0)

    assert statuses(ledger) == ["started", "aborted"]


def test_a_directory_that_has_just_changed_is_listed_again(path, ledger, monkeypatch):
    """Two changes within one tick of the file system's clock look like one."""
    listed = []
    monkeypatch.setattr(jobs, "names", lambda at: listed.append(at) or [])
    orphans = Orphans(ledger)
    os.utime(os.path.dirname(path))

    orphans.look(1.0)
    orphans.look(4.0)

    assert len(listed) == 2


def test_it_is_looked_every_two_seconds(path, ledger, now):
    orphans = Orphans(ledger)
    moment = now()
    orphans.look(moment)
    begun(path)[1].close()

    orphans.look(moment + 1.9)
    assert statuses(ledger) == ["started"]
    orphans.look(moment + 2.0)

    assert statuses(ledger) == ["started", "aborted"]


# --- what others leave there


def planted(path, content=b""):
    name = f"{path}.job-{uuid.uuid4().hex}"
    with open(name, "wb") as file:
        file.write(content)
    return name


def line(**changes):
    return json.dumps({"format": 1, **job()._asdict(), **changes}).encode() + b"\n"


GARBAGE = {
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"hello\n",
    "not UTF-8": b"\xff\xfe\n",
    "an array": b"[]\n",
    "deeply nested": b"[" * 100_000 + b"\n",
    "a large number": b'{"format": ' + b"9" * 5000 + b"}\n",
    "too large": line() + b" " * jobs.MAX_BYTES,
    "no format": json.dumps(job()._asdict()).encode() + b"\n",
    "an old format": line(format=0),
    "another key": line(more=1),
    "no invoke_id": line(fields={name: FIELDS[name] for name in FIELDS if name != "invoke_id"}),
    "fields of another kind": line(kind="build"),
    "an unknown kind": line(kind=["build"]),
    "an unknown field": line(fields=FIELDS | {"extra": 1}),
    "fields that are none": line(fields="fields"),
    "a surrogate": line(fields=FIELDS | {"version": "\ud800"}),
    "metadata that is none": line(fields=FIELDS | {"extra_metadata": [1]}),
    "an id that is none": line(last_id="1"),
    "an id with more": line(last_id=f"{uuid.uuid4()}\n"),
    "one id twice": line(
        last_id="f" * 8 + "-ffff" * 3 + "-" + "f" * 12, started_id="f" * 8 + "-ffff" * 3 + "-" + "f" * 12
    ),
    "a user with a line break": line(queued_by="root\nroot"),
    "a user of great length": line(queued_by="a" * 1000),
    "a command that is none": line(command=None),
    "an attempt that is none": line(run_attempt=2),
    "a time that is none": line(started_at="now"),
    "an infinite time": line(started_at=0).replace(b'"started_at": 0', b'"started_at": 1e999'),
    "a time that is too large": line(started_at=10**400),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_removed_and_told_once(path, ledger, now, caplog, content):
    name = planted(path, content)
    orphans = Orphans(ledger)

    for _ in range(3):
        orphans.look(now())

    assert not os.path.exists(name)
    assert statuses(ledger) == []
    (told,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert os.path.basename(name) in told.getMessage()


def test_the_line_that_the_garbage_is_made_from_is_none(path, ledger):
    """Else the tests above could not fail."""
    with jobs.taken(planted(path, line())) as found:
        assert found.job.command == "make"


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "directory", "hard link", "loop"])
def test_what_is_no_plain_file_is_not_opened(path, ledger, now, caplog, kind, tmp_path):
    name = f"{path}.job-{uuid.uuid4().hex}"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    match kind:
        case "link":
            os.symlink(victim, name)
        case "dangling":
            os.symlink(tmp_path / "nowhere", name)
        case "pipe":
            os.mkfifo(name)
        case "directory":
            os.mkdir(name)
        case "hard link":
            os.link(path, name)
        case "loop":
            os.symlink(name, name)
    orphans = Orphans(ledger)

    for _ in range(3):
        orphans.look(now())

    assert os.path.lexists(name) == (kind in ("directory", "hard link"))
    assert victim.read_text() == "precious"
    assert statuses(ledger) == []
    assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 1


def test_a_later_versions_file_is_left_to_it(path, ledger, now, caplog):
    name = planted(path, b'{"format": 2}\n')

    Orphans(ledger).look(now())

    assert os.path.exists(name)
    assert caplog.records == []


@pytest.mark.parametrize("name", ["x", "A" * 32, "0" * 31, "0" * 33, "0" * 32 + ".old"])
def test_files_of_other_names_are_nobodys_business(path, ledger, now, name):
    other = f"{path}.job-{name}"
    open(other, "w").close()

    Orphans(ledger).look(now())

    assert os.path.exists(other)


@pytest.mark.parametrize(
    ("age_s", "is_held", "is_removed"), [(0, False, False), (3600, True, False), (3600, False, True)]
)
def test_a_file_that_was_never_finished_is_removed_after_a_minute(path, ledger, now, age_s, is_held, is_removed):
    import fcntl

    name = planted(path) + ".new"
    os.rename(name.removesuffix(".new"), name)
    os.utime(name, (os.stat(name).st_mtime - age_s,) * 2)
    with open(name) as file:
        if is_held:
            fcntl.flock(file, fcntl.LOCK_EX)
        Orphans(ledger).look(now())

    assert os.path.exists(name) != is_removed


def test_the_lock_of_a_young_file_is_not_even_tried(path, ledger, now, monkeypatch):
    """Its wrapper is about to take it, and does not wait."""
    import fcntl

    name = planted(path) + ".new"
    os.rename(name.removesuffix(".new"), name)
    tried = []
    monkeypatch.setattr(fcntl, "flock", lambda *args: tried.append(args))

    Orphans(ledger).look(now())

    assert tried == []
