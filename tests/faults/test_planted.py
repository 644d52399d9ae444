"""In a directory that a group shares, a member may plant what they like: it must not reach files elsewhere."""

from __future__ import annotations

import contextlib
import os
import struct

import pytest
from accounts import OTHER_MEMBER, OWNER, why_not
from crash import needs_strace

from versioner_agent import Outbox, doctor, mending
from versioner_agent.errors import OutboxError
from versioner_agent.files import has_hot_journal, inode_of
from versioner_agent.locks import FlusherLock
from versioner_agent.privileges import as_owner_of
from versioner_agent.storage import Store

needs_accounts = pytest.mark.skipif(bool(why_not()), reason=why_not())
BUILD = {"product_name": "payments", "version": "1", "status": "completed"}
ENQUEUE = ("enqueue", "build", "--product", "payments", "--version")
MAGIC = bytes.fromhex("d9d505f920a163d7")


def super_journal(victim, pages):
    """A journal to roll back that changes nothing, and names *victim* to be deleted (SQLite's file format, section 3)."""
    name = os.fsencode(victim)
    header = (MAGIC + struct.pack(">5I", 0, 1, pages, 512, 4096)).ljust(512, b"\0")
    tail = struct.pack(">I", 0x40000000 // 4096 + 1) + name + struct.pack(">II", len(name), sum(name)) + MAGIC
    return header + tail


def plant(path, victim):
    journal = path.with_name(path.name + "-journal")
    journal.unlink(missing_ok=True)
    journal.write_bytes(super_journal(victim, path.stat().st_size // 4096))
    journal.chmod(0o660)
    os.chown(journal, -1, path.stat().st_gid)


def test_sqlite_itself_deletes_what_such_a_journal_names(tmp_path):
    """Else the tests below could not fail."""
    import sqlite3

    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "outbox.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
    plant(path, victim)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("SELECT count(*) FROM record").fetchone()

    assert not victim.exists()


@needs_accounts
def test_a_planted_journal_deletes_nothing_of_roots(accounts, tmp_path):
    path = accounts.shared_directory("planted") / "outbox.db"
    assert accounts.run(OWNER, path, *ENQUEUE, "1").returncode == 0
    victim = accounts.place / "roots"
    victim.write_text("precious")
    for command in (
        ("status",),
        ("list",),
        (*ENQUEUE, "2"),
        ("retry", "1"),
        ("doctor", "--deep", "--offline"),
        ("flush", "--timeout", "0"),
    ):
        plant(path, victim)
        done = accounts.run("root", path, *command)

        assert done.returncode == 1, command
        assert b"was not written by versioner-agent" in done.stdout + done.stderr
        assert victim.exists(), command


@needs_accounts
def test_a_planted_journal_deletes_nothing_of_another_member(accounts):
    path = accounts.shared_directory("planted-member") / "outbox.db"
    assert accounts.run(OWNER, path, *ENQUEUE, "1").returncode == 0
    victim = accounts.home(OTHER_MEMBER) / "authorized_keys"
    victim.write_text("precious")
    plant(path, victim)

    done = accounts.run(OTHER_MEMBER, path, *ENQUEUE, "2")

    assert done.returncode == 1
    assert b"look who may write there, and move it away" in done.stderr
    assert victim.exists()


@needs_accounts
@needs_strace
@pytest.mark.parametrize(
    "command",
    [
        (*ENQUEUE, "1"),
        ("status",),
        ("status", "--json"),
        ("list", "--json"),
        ("show", "1"),
        ("retry", "9"),
        ("discard", "9"),
        ("flush", "--timeout", "0"),
        ("doctor", "--deep", "--offline"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("state", ["new", "used", "damaged", "planted"])
def test_root_has_no_more_power_over_files_than_the_outboxs_owner(accounts, tmp_path, command, state):
    """Whatever else SQLite, or a race, could be made to do; and its program may be readable for root alone."""
    path = accounts.shared_directory(f"as-owner-{state}-{'-'.join(command)}") / "outbox.db"
    if state != "new":
        accounts.run(OWNER, path, *ENQUEUE, "1")
    if state == "damaged":
        path.write_bytes(b"\0" * 8192)
    if state == "planted":
        path.with_name("outbox.db.queue").unlink()
        path.with_name("outbox.db.queue").symlink_to(tmp_path)
    trace = tmp_path / "trace"
    watched = ("strace", "-f", "-e", "trace=setresuid,setresgid,setgroups,openat", "-o", str(trace))
    done = accounts.run("root", path, *command, before=watched)
    calls = trace.read_text().splitlines()
    dropped = next(number for number, call in enumerate(calls) if "setresuid(-1, " in call)

    assert b"internal error" not in done.stderr
    assert "setgroups(0, " in "".join(calls[:dropped])
    assert not [call for call in calls[:dropped] if "outbox.db" in call]
    assert not [call for call in calls[dropped:] if ".py" in call and "ENOENT" not in call]
    assert command[0] != "enqueue" or not [call for call in calls if "/httpx/" in call]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has power to give up")
@pytest.mark.parametrize("refused", ["setgroups", "setegid", "seteuid"])
def test_root_without_the_capability_to_step_down_works_on(reachable, monkeypatch, refused):
    os.chown(reachable, 65534, 65534)
    before = (os.geteuid(), os.getegid(), os.getgroups())
    original = getattr(os, refused)

    def refuse(given):
        if refused == "setgroups" or given != 0:
            raise PermissionError(1, "Operation not permitted")
        original(given)

    monkeypatch.setattr(os, refused, refuse)
    with as_owner_of(str(reachable)):
        assert (os.geteuid(), os.getegid(), os.getgroups()) == before

    assert (os.geteuid(), os.getegid(), os.getgroups()) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has power to give up")
def test_a_directory_that_its_owner_can_not_get_to_is_used_by_root(tmp_path):
    """As a container's root finds it, where a folder of the host is mounted below /root."""
    place = tmp_path / "closed" / "work"
    place.mkdir(parents=True)
    place.parent.chmod(0o700)
    os.chown(place, 65534, 65534)

    with as_owner_of(str(place)):
        assert os.geteuid() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has power to give up")
def test_power_is_given_up_for_a_block(reachable):
    secret = reachable / "secret"
    secret.touch(mode=0o600)
    place = reachable / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    before = (os.geteuid(), os.getegid(), os.getgroups())

    with as_owner_of(str(place)):
        assert (os.geteuid(), os.getegid(), os.getgroups()) == (65534, 65534, [])
        with pytest.raises(PermissionError):
            secret.read_text()
    with as_owner_of(str(reachable)), as_owner_of(str(reachable / "missing")):
        assert os.geteuid() == 0

    assert (os.geteuid(), os.getegid(), os.getgroups()) == before


def test_a_journal_of_our_own_is_one(tmp_path):
    path = tmp_path / "outbox.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)

    assert not has_hot_journal(str(path))
    with open(f"{path}-journal", "r+b") as journal:
        journal.write(MAGIC)
    assert has_hot_journal(str(path))


@pytest.mark.parametrize("planted", ["link", "dangling link", "file"])
def test_the_damaged_file_is_kept_under_no_name_that_somebody_took(tmp_path, planted):
    source, victim, name = tmp_path / "outbox.db", tmp_path / "victim", tmp_path / "outbox.db.corrupt-1"
    source.write_text("damaged")
    if planted != "dangling link":
        victim.write_text("theirs")
    name.write_text("theirs") if planted == "file" else name.symlink_to(victim)

    with pytest.raises(FileExistsError):
        mending._keep(str(source), str(name))

    assert mending._free_name(str(name)) == f"{name}-2"
    assert not victim.exists() or victim.read_text() == "theirs"


def test_a_name_is_taken_by_a_journal_too(tmp_path):
    (tmp_path / "outbox.db.corrupt-1-journal").touch()

    assert mending._free_name(str(tmp_path / "outbox.db.corrupt-1")).endswith("corrupt-1-2")


@pytest.mark.parametrize("planted", ["journal", "copy"])
def test_where_links_can_not_be_made_none_is_followed_either(tmp_path, monkeypatch, planted):
    """The agent can read its API key: no link to that must get a copy of it into the shared directory."""
    secret, source, name = (
        tmp_path / "api_key",
        tmp_path / "outbox.db-journal",
        tmp_path / "outbox.db.corrupt-1-journal",
    )
    secret.write_text("sk_acme_k1_secret")
    if planted == "journal":
        source.symlink_to(secret)
    else:
        source.write_text("journal")
        name.symlink_to(secret)

    def no_links(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OSError):  # noqa: PT011  # which one is the kernel's business
        mending._keep(str(source), str(name))

    assert secret.read_text() == "sk_acme_k1_secret"
    assert planted == "copy" or not name.exists()


def test_a_copy_is_made_where_links_can_not(tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "outbox.db").write_bytes(b"damaged" * 10_000)

    mending._keep(str(tmp_path / "outbox.db"), str(tmp_path / "kept"))

    assert (tmp_path / "kept").read_bytes() == b"damaged" * 10_000


@pytest.mark.parametrize("planted", ["link", "file"])
def test_only_the_file_that_is_open_is_cut(tmp_path, planted):
    path, victim = tmp_path / "outbox.db", tmp_path / "victim"
    victim.write_bytes(b"x" * 1000)
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
        store = outbox.store
        with store.read():
            pass
        os.rename(path, tmp_path / "moved")
        path.symlink_to(victim) if planted == "link" else os.link(victim, path)
        if planted == "link":
            with pytest.raises(OSError, match="symbolic"):
                mending._truncated(store, 10)
        else:
            os.close(mending._truncated(store, 10))

    assert victim.stat().st_size == 1000


def test_whose_agent_is_there_is_not_read_through_a_link(tmp_path):
    """Opening what it leads to may be enough to do harm, as with a watchdog's device."""
    with contextlib.closing(FlusherLock(str(tmp_path / "other"))) as other:
        assert other.claim_agent()
        (tmp_path / "outbox.db.flusher").symlink_to(other.path)

        assert not FlusherLock(str(tmp_path / "outbox.db")).presence().has_agent


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
def test_doctor_looks_through_no_link_that_another_user_made(tmp_path):
    secret, planted = tmp_path / "secret", tmp_path / "outbox.db"
    secret.write_text("root:x:")
    planted.symlink_to(secret)
    os.lchown(planted, 12345, 12345)
    found, _ = doctor.outbox(
        doctor.case_of({"db": str(planted)}, {}, os.devnull), doctor.Key(None, ""), 0.0, deep=False
    )

    assert found[0].level == "error"
    assert "a symbolic link made by uid 12345" in found[0].finding


def test_a_new_outbox_is_not_built_through_a_link(tmp_path, monkeypatch):
    path, victim = tmp_path / "outbox.db", tmp_path / "victim"
    victim.touch()
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
    made = mending.create_beside

    def swapped(side):
        fd = made(side)
        os.unlink(side)
        os.symlink(victim, side)
        return fd

    monkeypatch.setattr(mending, "create_beside", swapped)
    path.write_bytes(b"\0" * 8192)
    store = Store(path)
    with contextlib.closing(store), pytest.raises(OutboxError, match="took"):
        mending.mend(store, store.damaged("for a test", inode_of(str(path))))

    assert victim.stat().st_size == 0


@needs_accounts
def test_roots_own_file_in_the_directory_of_another_is_told_with_the_remedy(accounts):
    """As a backup leaves it that root put back."""
    path = accounts.shared_directory("put-back") / "outbox.db"
    assert accounts.run(OWNER, path, *ENQUEUE, "1").returncode == 0
    for each in path.parent.iterdir():
        os.chown(each, 0, 0)
        each.chmod(0o600)

    done = accounts.run("root", path, *ENQUEUE, "2")

    assert done.returncode == 1
    assert b"must own what is in it too (chown)" in done.stderr
