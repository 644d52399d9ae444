"""Files of others, planted links, and an environment that means no good: nothing of theirs is touched or used."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import re
import sqlite3
import stat

import pytest
from accounts import GROUP, MEMBER, OTHER_MEMBER, OUTSIDER, OWNER, why_not

from versioner_agent import Outbox
from versioner_agent.errors import OutboxError
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.storage import Store

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
ENQUEUE = ("enqueue", "build", "--product", "payments", "--version", "1")
needs_accounts = pytest.mark.skipif(bool(why_not()), reason=why_not())


def everything(directory):
    """All files below *directory* with content, mode and owner."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            about = os.lstat(path)
            with open(path, "rb") as file:
                found[path] = (file.read(), about.st_mode, about.st_uid, about.st_mtime_ns)
    return found


# --- places that are no outbox


@pytest.fixture
def host(host_for):
    return host_for()


def place_of(host, kind):
    """Make a place of *kind*; returns the path that is named as the outbox."""
    directory = host.directory / kind
    if kind == "missing":
        return directory / "outbox.db"
    directory.mkdir()
    path = directory / "outbox.db"
    if kind == "directory":
        path.mkdir()
        (path / "notes").write_text("mine")
    elif kind == "diary":
        path.write_text("dear diary\n" * 400)
    elif kind == "database":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE accounts (id)")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there is no such directory"), ("directory", "that is a directory: name a file in it"),
        ("diary", "not an outbox of versioner-agent; it is left as it is"), ("database", "not an outbox of versioner-agent"),
    ],
)  # fmt: skip
def test_a_place_that_is_no_outbox_is_left_as_it_is(host, kind, words):
    path = place_of(host, kind)
    before = everything(host.directory)
    for command in (
        ENQUEUE,
        ("run",),
        ("flush",),
        ("status",),
        ("list",),
        ("doctor", "--offline"),
        ("retry", "--all-failed"),
    ):
        if (kind, *command) == ("missing", "run"):
            continue  # its disk may be mounted late: it waits
        done = host.run(*command, VERSIONER_AGENT_DB=str(path))

        is_harmless = kind == "missing" and command[0] not in ("enqueue", "retry", "doctor")
        assert done.returncode == (0 if is_harmless else 1), command
        assert b"Traceback" not in done.stderr
        if command in (ENQUEUE, ("run",)):
            assert b"hint: " in done.stderr
            assert re.search(words, done.stderr.decode()), done.stderr
        assert everything(host.directory) == before, command


def test_a_directory_that_forbids_it_is_named(unprivileged):
    (unprivileged / "closed").mkdir(mode=0o500)
    with Outbox(unprivileged / "closed" / "outbox.db") as outbox, pytest.raises(OutboxError) as caught:
        outbox.enqueue("build", BUILD)

    assert "Permission denied" in caught.value.message
    assert f"check the permissions of {unprivileged / 'closed'}" in caught.value.hint
    assert os.listdir(unprivileged / "closed") == []


# --- links


@pytest.mark.parametrize("suffix", [".queue", ".flusher", "-journal", ".mending"])
def test_a_symbolic_link_in_place_of_a_side_file_is_not_followed(tmp_path, suffix):
    path, victim = str(tmp_path / "outbox.db"), tmp_path / "victim"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
    victim.write_bytes(b"precious" * 1000)
    if os.path.lexists(path + suffix):
        os.remove(path + suffix)
    os.symlink(victim, path + suffix)
    with open(path, "r+b") as file:
        file.write(b"garbage")
    with Outbox(path) as outbox, contextlib.suppress(OutboxError, OSError):
        outbox.enqueue("build", BUILD)
        Ledger(outbox.store).open(create=True)
        FlusherLock(path).claim_delivery()

    assert victim.read_bytes() == b"precious" * 1000


def test_what_shares_a_side_file_by_a_hard_link_is_not_written_to(tmp_path):
    path, victim = str(tmp_path / "outbox.db"), tmp_path / "victim"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
    victim.write_bytes(b"precious" * 1000)
    os.link(victim, path + ".flusher")
    lock = FlusherLock(path)

    assert lock.claim_delivery()
    assert victim.read_bytes() == b"precious" * 1000
    lock.close()


@needs_accounts
class TestShared:
    """In a directory that a group shares, a member may plant what it likes."""

    @pytest.fixture
    def path(self, accounts, request):
        return accounts.shared_directory(f"files-{abs(hash(request.node.name))}") / "outbox.db"

    @pytest.mark.parametrize("user", ["root", OWNER, OTHER_MEMBER])
    @pytest.mark.parametrize("target", ["there", "not there"])
    def test_a_planted_link_is_not_followed(self, accounts, path, user, target):
        """Neither written through, nor made at the end of it with the rights of who came along."""
        home = accounts.home(user if user != "root" else OWNER)
        victim = home / "victim.db"
        if target == "there":
            assert accounts.run(user, victim, *ENQUEUE).returncode == 0
        before = everything(home)
        os.symlink(victim, path)
        os.lchown(path, pwd.getpwnam(MEMBER).pw_uid, grp.getgrnam(GROUP).gr_gid)

        for command in (ENQUEUE, ("status",), ("run",)):
            done = accounts.run(user, path, *command, VERSIONER_API_KEY="sk_acme_k1_x")
            if command != ("status",) or target == "there":
                assert done.returncode == 1, command
                assert b"is a symbolic link made by uid" in done.stderr
        assert everything(home) == before

    def test_a_link_of_the_administrator_is_followed(self, accounts, path):
        elsewhere = accounts.shared_directory("elsewhere") / "outbox.db"
        os.symlink(elsewhere, path)
        for user in (OWNER, MEMBER, "root"):
            assert accounts.run(user, path, *ENQUEUE).returncode == 0

        assert os.listdir(path.parent) == ["outbox.db"]
        assert elsewhere.exists()

    def test_the_directory_of_somebody_else_stays_theirs(self, accounts):
        home = accounts.home(MEMBER)
        os.chmod(home, 0o755)
        before = everything(home)

        done = accounts.run(OUTSIDER, home / "outbox.db", *ENQUEUE)

        assert done.returncode == 1
        assert b"Permission denied" in done.stderr
        assert f"check the permissions of {home}".encode() in done.stderr
        assert everything(home) == before


# --- modes and the environment


def test_what_is_kept_of_a_damaged_outbox_is_as_private_as_it_was(tmp_path):
    path = tmp_path / "outbox.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", BUILD)
    with open(path, "r+b") as file:
        file.write(b"garbage")
    with contextlib.closing(Store(path)) as store:
        Ledger(store).open(create=True)

    modes = {name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)}
    assert len(modes) == 5
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(
    "env",
    [
        {"HOME": ""}, {"HOME": "/nonexistent"}, {"HOME": "relative"}, {"USER": "x" * 100_000}, {"LOGNAME": "a\nb"},
        {"LANG": "C", "LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"TZ": "../../etc/passwd"},
        {"TMPDIR": "/nonexistent"}, {"SQLITE_TMPDIR": "/nonexistent"}, {"XDG_STATE_HOME": "relative"}, {"COLUMNS": "-5"},
        {"SSL_CERT_FILE": "/nonexistent"}, {"http_proxy": "http://127.0.0.1:9"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"},
        {"VERSIONER_AGENT_BUSY_TIMEOUT": ""}, {"VERSIONER_API_URL": ""},
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_hostile_environment_does_not_keep_an_event_from_being_queued(host, env):
    done = host.run(*ENQUEUE, "--scm-branch", "zürich", "--json", **env)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["id"] == 1
    assert b"Traceback" not in done.stderr
    record, payload, _ = host.record(1)
    assert json.loads(payload)["scm_branch"] == "zürich"
    assert len(record.queued_by) < 100


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("VERSIONER_AGENT_DB", "/dev/null/x", 1), ("VERSIONER_AGENT_DB", "/proc/self/mem", 1), ("VERSIONER_AGENT_DB", " ", 3),
        ("VERSIONER_AGENT_CONFIG", "/dev/null/x", 3), ("VERSIONER_AGENT_CONFIG", "/", 3), ("VERSIONER_API_URL", "::", 3),
        ("VERSIONER_AGENT_BUSY_TIMEOUT", "nan", 3), ("VERSIONER_AGENT_BUSY_TIMEOUT", "1e999", 3),
        ("VERSIONER_AGENT_CONCURRENCY", "9" * 5000, 3), ("VERSIONER_AGENT_LOG_LEVEL", "%s%n", 3),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(host, name, value, code):
    done = host.run(*ENQUEUE, **{name: value})

    assert done.returncode == code
    assert done.stderr.startswith(b"error: ")
    assert b"Traceback" not in done.stderr
    assert len(done.stderr) < 7000
