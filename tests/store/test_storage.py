"""The outbox's file: who may use it, what is refused untouched, and what a commit means."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
import sqlite3
import stat
from collections import Counter
from contextlib import closing

import pytest

from versioner_agent import Outbox, files, review, schema, selecting
from versioner_agent.errors import OutboxBusy, OutboxDamaged, OutboxError, OutboxFull
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.storage import OutboxMissing, Store

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
ENQUEUE_MANY = """
import sys
from versioner_agent import Outbox
print("ready"); input()
with Outbox(sys.argv[1], busy_timeout=60) as outbox:
    for n in range(4):
        outbox.enqueue("build", {"product_name": sys.argv[2], "version": str(n), "status": "ok"})
print("done")
"""
HOLD_WRITE = """
import sys
from versioner_agent.storage import Store
store = Store(sys.argv[1])
with store.write(create=True):
    print("held"); input()
store.close()
print("released"); input()
"""


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.endswith(".queue")}


def foreign_database(path, journal_mode="DELETE"):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        connection.execute("CREATE TABLE accounts (id)")
        connection.execute("INSERT INTO accounts VALUES (1)")
        connection.commit()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077], ids=oct)
@pytest.mark.parametrize(("directory", "mode"), [(0o700, 0o600), (0o755, 0o600), (0o2770, 0o660)])
def test_every_file_has_the_mode_of_its_place(tmp_path, umask, directory, mode, mask):
    """In a directory that a group shares all may write, whatever the umask of who came first."""
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(directory)
    umask(mask)
    with Outbox(place / "outbox.db") as outbox:
        outbox.enqueue("build", BUILD)
    lock = FlusherLock(str(place / "outbox.db"))
    lock.claim_delivery()
    lock.close()

    modes = {path.name: mode_of(path) for path in place.iterdir()}
    assert modes == dict.fromkeys(
        ["outbox.db", "outbox.db-journal", "outbox.db.queue", "outbox.db.flusher"], mode
    )  # fmt: skip


def test_missing_directory_is_an_error(tmp_path):
    with (
        Outbox(tmp_path / "a" / "outbox.db") as outbox,
        pytest.raises(OutboxError, match="no such directory") as caught,
    ):
        outbox.enqueue("build", BUILD)

    assert f"check that {tmp_path / 'a'} exists" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_commits_are_synced_and_the_journal_persists(outbox):
    outbox.enqueue("build", BUILD)
    with outbox.store.read() as connection:
        found = [
            connection.execute(f"PRAGMA {name}").fetchall()[0][0]
            for name in ("journal_mode", "synchronous", "auto_vacuum", "application_id", "user_version")
        ]

    assert found == ["persist", 2, 2, schema.APPLICATION_ID, schema.VERSION]


@pytest.mark.parametrize("content", [b"notes\n", b"\x89PNG\r\n" + bytes(5000), b"SQLite format 3\0" + bytes(84), b"x"])
def test_file_that_is_no_outbox_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "outbox.db"
    path.write_bytes(content)
    with Outbox(path) as outbox:
        for use in (lambda: outbox.enqueue("build", BUILD), lambda: review.stats(outbox.store)):
            with pytest.raises(OutboxError, match=r"no outbox|not an outbox"):
                use()

    assert files_of(tmp_path) == {"outbox.db": content}


@pytest.mark.parametrize("journal_mode", ["DELETE", "WAL"])
def test_database_of_another_program_is_left_as_it_is(tmp_path, journal_mode):
    path = tmp_path / "outbox.db"
    foreign_database(path, journal_mode)
    before = files_of(tmp_path)
    with Outbox(path) as outbox:
        for use in (lambda: outbox.enqueue("build", BUILD), lambda: review.stats(outbox.store)):
            with pytest.raises(OutboxError, match="not an outbox") as caught:
                use()
            assert caught.value.hint

    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("version", "journal_mode"), [(0, "PERSIST"), (schema.VERSION + 2, "PERSIST"), (99, "PERSIST"), (99, "WAL")]
)
def test_other_schema_is_left_as_it_is(tmp_path, version, journal_mode):
    path = tmp_path / "outbox.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal_mode}")
        connection.execute(f"PRAGMA user_version = {version}")
    before = files_of(tmp_path)
    with Outbox(path) as outbox:
        for use in (lambda: outbox.enqueue("build", BUILD), lambda: review.stats(outbox.store)):
            with pytest.raises(OutboxError, match=f"has schema {version}"):
                use()

    assert files_of(tmp_path) == before


def test_missing_outbox_is_not_made_by_looking(tmp_path):
    with closing(Store(tmp_path / "outbox.db")) as store:
        with pytest.raises(OutboxMissing), store.read():
            pass
        with pytest.raises(OutboxMissing), store.write():
            pass

    assert list(tmp_path.iterdir()) == []


def test_directory_in_place_of_the_outbox_is_an_error(tmp_path):
    with Outbox(tmp_path) as outbox, pytest.raises(OutboxError):
        outbox.enqueue("build", BUILD)


def test_path_with_characters_of_uris(tmp_path):
    path = tmp_path / "a?b=c%20#d&mode=ro é.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)

    assert path.exists()


def test_link_leads_to_one_set_of_locks(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "outbox.db")
    with Outbox(tmp_path / "link.db") as outbox:
        outbox.enqueue("build", BUILD)

    assert {path.name for path in tmp_path.iterdir()} == {"real", "link.db"}
    assert (tmp_path / "real" / "outbox.db.queue").exists()


def test_block_that_fails_writes_nothing(outbox):
    outbox.enqueue("build", BUILD)

    def fail():
        with outbox.store.write() as connection:
            connection.execute("DELETE FROM record")
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert review.stats(outbox.store).counts["pending"] == 1
    assert outbox.enqueue("build", BUILD).id == 2


def test_waiting_for_other_writers_is_bounded(tmp_path, child):
    path = tmp_path / "outbox.db"
    holder = child(HOLD_WRITE, path)
    assert holder.says() == "held"
    with Outbox(path, busy_timeout=0.05) as outbox:
        with pytest.raises(OutboxBusy, match=r"busy for 0\.05 s"):
            outbox.enqueue("build", BUILD)
        holder.go()
        assert holder.says() == "released"
        outbox.store.busy_timeout = 10

        assert outbox.enqueue("build", BUILD).id == 1


def test_writer_that_is_killed_leaves_nothing_behind(tmp_path, child):
    path = tmp_path / "outbox.db"
    holder = child(HOLD_WRITE, path)
    assert holder.says() == "held"
    holder.kill()
    with Outbox(path) as outbox:
        assert outbox.enqueue("build", BUILD).id == 1


def test_open_reader_of_another_program_is_named_as_a_lock(tmp_path):
    path = tmp_path / "outbox.db"
    with Outbox(path, busy_timeout=0.05) as outbox:
        outbox.enqueue("build", BUILD)
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM record").fetchall()
            with pytest.raises(OutboxBusy, match="was locked"):
                outbox.enqueue("build", BUILD)
            reader.execute("COMMIT")

        assert review.stats(outbox.store).counts["pending"] == 1
        assert outbox.enqueue("build", BUILD).id == 2


def test_thirty_writers_at_once_all_succeed(outbox, child):
    writers = [child(ENQUEUE_MANY, outbox.store.path, f"p{n}") for n in range(30)]
    assert {writer.says() for writer in writers} == {"ready"}
    for writer in writers:
        writer.go()
    assert [writer.says() for writer in writers] == ["done"] * 30

    found = Counter(record.product_name for page in selecting.select(outbox.store) for record in page)
    assert found == {f"p{n}": 4 for n in range(30)}
    with outbox.store.read() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_replaced_file_is_noticed(tmp_path):
    path, other = tmp_path / "outbox.db", tmp_path / "other.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
        with Outbox(other) as second:
            second.enqueue("build", {**BUILD, "product_name": "other"})
        os.replace(other, path)

        assert review.show(outbox.store, 1)[0].product_name == "other"
        assert outbox.enqueue("build", BUILD).id == 2


def test_file_that_is_replaced_while_a_writer_waits_gets_the_event(tmp_path, child):
    path, copy = tmp_path / "outbox.db", tmp_path / "copy.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
        shutil.copy(path, copy)
        holder = child(HOLD_WRITE, path)
        assert holder.says() == "held"
        waiting = child(ENQUEUE_MANY, path, "late")
        assert waiting.says() == "ready"
        waiting.go()
        os.replace(copy, path)
        holder.go()
        assert waiting.says() == "done"

        assert Ledger(outbox.store).pending() == 5


def test_removed_file_is_missing_at_once(tmp_path):
    with Outbox(tmp_path / "outbox.db") as outbox:
        outbox.enqueue("build", BUILD)
        os.remove(tmp_path / "outbox.db")
        with pytest.raises(OutboxDamaged, match="the file is missing"):
            review.stats(outbox.store)


def test_closed_outbox_opens_again(outbox):
    outbox.enqueue("build", BUILD)
    outbox.close()
    outbox.close()

    assert outbox.enqueue("build", BUILD).id == 2


def test_full_disk_is_said_and_leaves_nothing_half_written(outbox):
    outbox.enqueue("build", BUILD)
    ledger = Ledger(outbox.store)
    ledger.keep_reserve()
    with outbox.store.read() as connection:
        ((pages,),) = connection.execute("PRAGMA page_count").fetchall()
        connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    with pytest.raises(OutboxFull, match="no space left"):
        outbox.enqueue("build", {**BUILD, "extra_metadata": {"k": "x" * 90_000}})

    assert review.stats(outbox.store).counts["pending"] == 1
    with outbox.store.read() as connection:
        assert connection.execute("SELECT count(*) FROM reserve").fetchall() == [(1,)]
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "is not in the group share: `sudo usermod -aG share {user}`, then log in again"),
        (["{user}"], "is in the group share since this session began: log in again, or restart the CI runner"),
    ],
)
def test_who_is_outside_of_the_group_gets_the_remedy_in_one_line(tmp_path, monkeypatch, members, said):
    user = pwd.getpwuid(os.geteuid()).pw_name
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o2770)
    group = grp.struct_group(("share", "x", place.stat().st_gid, [each.format(user=user) for each in members]))
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    monkeypatch.setattr(os, "getgroups", list)
    monkeypatch.setattr(os, "getegid", lambda: place.stat().st_gid + 1)

    error = files.unusable(str(place / "outbox.db"), PermissionError(13, "Permission denied"))

    assert said.format(user=user) in error.message
    assert error.hint is None


def test_an_error_of_the_disk_is_said_where_its_free_space_is_asked_for(outbox, monkeypatch):
    """In our words: what delivers goes on after those."""

    def broken(_path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "statvfs", broken)
    with pytest.raises(OutboxError, match=r"can't use the outbox .*: Input/output error"):
        outbox.store.free_space()


def test_a_read_only_place_is_not_taken_for_a_missing_membership(tmp_path):
    """So a runner's unit with ProtectSystem=strict sees it."""
    tmp_path.chmod(0o2770)
    hint = files.access_hint(str(tmp_path / "outbox.db"), OSError(errno.EROFS, "Read-only file system"))

    assert f"ReadWritePaths={tmp_path}" in hint
    assert "group" not in hint


def test_what_a_statement_may_take_back_needs_no_room_on_another_disk(outbox):
    """SQLite keeps it in a file in /var/tmp otherwise, which may be full (https://sqlite.org/tempfiles.html)."""
    with outbox.store.write(create=True) as connection:
        assert connection.execute("PRAGMA temp_store").fetchone() == (2,)
