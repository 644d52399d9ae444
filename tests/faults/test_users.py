"""One outbox, many users: nobody can make it unusable for the others, by whatever umask or death."""

from __future__ import annotations

import grp
import json
import os
import signal
import stat
import subprocess
import sys

import pytest
from accounts import GROUP, MEMBER, OTHER_MEMBER, OUTSIDER, OWNER, copy_packages, why_not
from crash import needs_strace
from host import KEY, eventually
from scripted import accepted

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

#: Who, and with which umask.
USERS = ((OWNER, 0o022), (OWNER, 0o077), (MEMBER, 0o077), (OTHER_MEMBER, 0o022), ("root", 0o022), ("root", 0o077))
IDS = [f"{user}-{umask:03o}" for user, umask in USERS]
ENQUEUE = ("enqueue", "build", "--product", "payments", "--version")


@pytest.fixture
def path(accounts, request):
    return accounts.shared_directory(f"share-{abs(hash(request.node.name))}") / "outbox.db"


def check_shared(path):
    """Every file of the outbox is there for the group, whoever made it."""
    gid = grp.getgrnam(GROUP).gr_gid
    for name in os.listdir(path.parent):
        found = os.stat(path.parent / name)
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, gid), name


def kill_in_the_middle(accounts, user, umask, path):
    """Enqueue as *user*, killed while the database is being written: a hot journal is left behind."""
    # The journal's last sync is the one before the database is written; the first write behind it is the database's.
    probe = accounts.run(user, path, *ENQUEUE, "probe", umask=umask)
    assert probe.returncode == 0, probe.stderr
    tracer = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync")
    inject = ("-e", "inject=fdatasync:signal=KILL:when=4")
    done = accounts.run(user, path, *ENQUEUE, "killed", umask=umask, before=(*tracer, *inject))
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    journal = path.parent / "outbox.db-journal"
    assert journal.read_bytes()[:8] == b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"  # of the file format: it must be rolled back


@needs_strace
@pytest.mark.parametrize("death", ["clean-exit", "sigkill"])
@pytest.mark.parametrize(("first", "umask"), USERS, ids=IDS)
def test_nobody_can_make_the_outbox_unwritable_for_the_others(accounts, path, first, umask, death):
    queued = 1
    if death == "sigkill":
        kill_in_the_middle(accounts, first, umask, path)
    else:
        assert accounts.run(first, path, *ENQUEUE, "first", umask=umask).returncode == 0
    for number, (user, other_umask) in enumerate(USERS):
        done = accounts.run(user, path, *ENQUEUE, str(number), umask=other_umask)
        assert done.returncode == 0, (user, done.stderr)
        queued += 1
    listed = accounts.run(MEMBER, path, "list", "--json")

    check_shared(path)
    records = [json.loads(line) for line in listed.stdout.splitlines()]
    assert len(records) == queued
    assert len({record["queued_by"] for record in records}) == 4


def test_an_outsider_gets_the_group_to_ask_for(accounts, path):
    assert accounts.run(OWNER, path, *ENQUEUE, "1").returncode == 0
    for command in ((*ENQUEUE, "2"), ("list",), ("status",), ("flush",), ("run",), ("retry", "1")):
        done = accounts.run(OUTSIDER, path, *command, VERSIONER_API_KEY=KEY)

        assert done.returncode == 1, command
        said = (done.stdout + done.stderr).decode()
        assert f"{OUTSIDER} is not in the group {GROUP}: `sudo usermod -aG {GROUP} {OUTSIDER}`" in said, command
        assert len(said.splitlines()) == 1
        assert "Traceback" not in said


def test_doctor_tells_an_outsider_which_group_to_join(accounts, path):
    assert accounts.run(OWNER, path, *ENQUEUE, "1").returncode == 0
    done = accounts.run(OUTSIDER, path, "doctor", "--offline", "--json", VERSIONER_API_KEY=KEY)
    found = {each["check"]: each for each in map(json.loads, done.stdout.splitlines())}

    assert done.returncode == 1
    assert done.stderr == b""
    for check in ("outbox", "permissions"):
        assert found[check]["level"] == "error"
        assert f"`sudo usermod -aG {GROUP} {OUTSIDER}`" in found[check]["finding"]
    assert found["key"]["level"] == "ok"


def test_an_outbox_in_a_home_is_private(accounts):
    home = accounts.home(MEMBER)
    path = home / ".local" / "state" / "versioner-agent" / "outbox.db"
    assert accounts.run(MEMBER, "", *ENQUEUE, "1", umask=0, HOME=str(home)).returncode == 0

    assert stat.S_IMODE(os.stat(path.parent).st_mode) == 0o700
    modes = {name: stat.S_IMODE(os.stat(path.parent / name).st_mode) for name in os.listdir(path.parent)}
    assert modes == dict.fromkeys(("outbox.db", "outbox.db-journal", "outbox.db.queue"), 0o600)
    assert accounts.run(OTHER_MEMBER, path, *ENQUEUE, "2").returncode == 1


def test_what_root_makes_in_a_home_belongs_to_its_user(accounts):
    path = accounts.home(MEMBER) / "outbox.db"
    assert accounts.run("root", path, *ENQUEUE, "1").returncode == 0
    done = accounts.run(MEMBER, path, *ENQUEUE, "2")

    assert done.returncode == 0, done.stderr
    assert {os.stat(path.parent / name).st_uid for name in os.listdir(path.parent)} == {os.stat(path.parent).st_uid}


@needs_strace
def test_who_mends_damage_keeps_the_outbox_for_all(accounts, path):
    assert accounts.run(OWNER, path, *ENQUEUE, "1").returncode == 0
    for number, (user, umask) in enumerate(USERS):
        with open(path, "r+b") as file:
            file.write(b"garbage")
        done = accounts.run(user, path, *ENQUEUE, str(number), umask=umask)
        assert done.returncode == 0, done.stderr
        for other, other_umask in USERS:
            assert accounts.run(other, path, "status", umask=other_umask).returncode == 0

    check_shared(path)


def test_root_mends_for_whoever_the_outbox_is_of(accounts, path):
    """In a directory that anybody may use, as /tmp, what belongs to its owner is of no use to others."""
    os.chown(path.parent, 0, 0)
    path.parent.chmod(0o1777)
    assert accounts.run(MEMBER, path, *ENQUEUE, "1").returncode == 0
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"garbage")
    here = {"VERSIONER_API_URL": "http://127.0.0.1:1", "VERSIONER_API_KEY": KEY}
    done = accounts.run("root", path, "flush", "--timeout", "1", **here)

    after = os.stat(path)
    assert b"the outbox was damaged" in done.stderr
    assert after.st_ino != before.st_ino
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert accounts.run(MEMBER, path, *ENQUEUE, "2").returncode == 0


def test_the_owners_agent_delivers_what_members_queue(accounts, path, serve):
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    env = accounts.env(path, VERSIONER_API_URL=server.url, VERSIONER_API_KEY=KEY)
    agent = subprocess.Popen(accounts.command("run"), env=env, stderr=subprocess.DEVNULL, **accounts.who(OWNER, 0o077))
    try:
        for number, (user, umask) in enumerate(USERS):
            assert accounts.run(user, path, *ENQUEUE, str(number), umask=umask).returncode == 0
        server.wait_for(len(USERS))
        eventually(lambda: b"pending      0" in accounts.run(MEMBER, path, "status").stdout)
        flush = accounts.run(MEMBER, path, "flush", VERSIONER_API_URL=server.url, VERSIONER_API_KEY="sk_acme_k9_mine")
    finally:
        agent.terminate()
        agent.wait(30)

    assert flush.returncode == 0
    assert {seen.headers["authorization"] for seen in server.requests} == {f"Bearer {KEY}"}
    check_shared(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be no more than the owner of a directory")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("track", "--status=started", "--gate-timeout=0.3"), 0),
        (("enqueue", "--wait=0.3"), 75),
        (("exec", "--gate"), 0),
    ],
    ids=["track", "enqueue", "exec"],
)
def test_root_waits_for_verdicts_with_a_program_that_only_root_can_read(reachable, tmp_path, words, code):
    """It has stepped down to the outbox's owner by then, who can't load any more of it."""
    command, *options = words
    os.chown(reachable, 65534, 65534)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    copy_packages(private / "lib")
    env = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(private / "lib"), "HOME": str(tmp_path),
        "VERSIONER_AGENT_DB": str(reachable / "outbox.db"), "VERSIONER_API_KEY": "sk_acme_k1_secret",
        "VERSIONER_AGENT_GATE_TIMEOUT": "0.3",
    }  # fmt: skip
    call = (command, "deployment", "--product", "p", "--version", "1", "--environment", "e", *options)

    done = subprocess.run(
        (sys.executable, "-m", "versioner_agent", *call, *(("--", "echo", "RAN") if command == "exec" else ())),
        env=env, cwd="/", capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert b"only its agent delivers from it" in done.stderr
    assert b"internal error" not in done.stderr
