"""`check`: its exit code and line for each condition, each on an outbox that is in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from scripted import refused

from versioner_agent.cli.check import check
from versioner_agent.locks import FlusherLock
from versioner_agent.storage import Store

OK, WARNING, CRITICAL, UNKNOWN = range(4)
#: The guidelines' form: label=value[unit];warning;critical;minimum;maximum, thresholds as ranges.
FIGURE = re.compile(r"[a-z_]+=-?[0-9.]+(s|B|c)?;([0-9]*:?)?;([0-9]*:?)?;[0-9]*(;[0-9]*)?")


@pytest.fixture
def agent(host_for):
    """A host whose agent seems to run: its lock is held."""
    host = host_for()
    lock = FlusherLock(host.path)
    assert lock.claim_agent()
    with contextlib.closing(lock):
        yield host


def judged(code, told, err):
    """Return the exit code and the words of a line that is as the guidelines want it."""
    assert err == ""
    assert told.endswith("\n")
    assert len(told.splitlines()) == 1
    words, bar, data = told.rstrip("\n").partition(" | ")
    assert "|" not in words
    assert words.startswith(f"VERSIONER {('OK', 'WARNING', 'CRITICAL', 'UNKNOWN')[code]} - ")
    assert bool(bar) == bool(data)
    assert all(FIGURE.fullmatch(figure) for figure in data.split())
    return code, words.partition(" - ")[2]


def run(host, *args, **env):
    """Run the command as a monitoring system does."""
    done = host.run("check", *args, **env)
    return judged(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def checked(cli, monkeypatch):
    """Run the command in this process, which is faster."""

    def run(host, *args, **env):
        for name, value in {**host.env, **env}.items():
            monkeypatch.setenv(name, value)
        return judged(*cli("check", *args))

    return run


def change(host, *statements):
    with contextlib.closing(Store(host.path)) as store, store.write() as connection:
        for statement in statements:
            connection.execute(statement)


def test_nothing_queued_yet_is_ok(checked, host_for):
    assert checked(host_for()) == (OK, "no outbox yet: it is made by the first event")


def test_a_healthy_outbox_is_ok(agent):
    agent.queue("payments", 3)

    assert run(agent) == (OK, "3 pending, 0 failed, the API is unknown")


EXPORTED = """
    INSERT INTO export (id, uid, created_at, state) VALUES (1, 'u', {}, 'marked');
    UPDATE record SET state = 'exported', batch = -1 WHERE id = 1
"""
AGO = "strftime('%s', 'now') - {}"
#: Statements -> options that set other limits, level, how the words begin.
CONDITIONS = {
    "pending": ("", ["--pending-warning", "2"], WARNING, "3 events pending (more than 2)"),
    "many pending": ("", ["--pending-critical", "2"], CRITICAL, "3 events pending (more than 2)"),
    "old": (f"UPDATE record SET queued_at = {AGO.format(7300)}", [], WARNING, "the oldest pending event waits for 2 h"),
    "very old": (f"UPDATE record SET queued_at = {AGO.format(100_000)}", [], CRITICAL, "the oldest pending event waits for 1 d"),
    "old, and that is usual": (f"UPDATE record SET queued_at = {AGO.format(100_000)}", ["--age-critical", "7d", "--age-warning", "none"], OK, "3 pe"),
    "failed": ("UPDATE record SET state = 'failed', reason = 'conflict' WHERE id = 1", [], WARNING, "1 event failed"),
    "failed, of some": ("UPDATE record SET state = 'failed' WHERE id < 3", ["--failed-critical", "1"], CRITICAL, "2 events failed"),
    "disk": ("", ["--free-warning", "999999G"], WARNING, ""),
    "disk nearly full": ("", ["--free-critical", "999999G"], CRITICAL, ""),
    "unauthorized": ("UPDATE destination SET state = 'unauthorized', reason = 'no|such\nkey', since = 1", [], CRITICAL, "the API is unauthorized since "),
    "misrouted": ("UPDATE destination SET state = 'misrouted'", [], CRITICAL, "the API is misrouted"),
    "down": (f"UPDATE destination SET state = 'down', since = {AGO.format(980)}", [], WARNING, "the API is down since 16 min"),
    "down for a while": (f"UPDATE destination SET state = 'down', since = {AGO.format(500)}", [], OK, "3 pending"),
    "a proxy": (f"UPDATE destination SET state = 'proxy', since = {AGO.format(100_000)}", [], WARNING, "the API is proxy since 1 d"),
    "a portal": (f"UPDATE destination SET state = 'not_authentic', since = {AGO.format(100_000)}", [], WARNING, "the API is not_authentic since 1 d"),
    "slowed down": (f"UPDATE destination SET state = 'rate_limited', since = {AGO.format(100_000)}", [], WARNING, "the API is rate_limited since 1 d"),
    "past damage": ("INSERT INTO meta VALUES ('damage', '{}')", [], WARNING, "the outbox was damaged"),
    "no receipt": (
        EXPORTED.format(AGO.format(3_000_000)),
        [], WARNING, "1 exported batch has no receipt, the oldest for 34 d",
    ),
    "no receipt, and none comes": (
        EXPORTED.format(0),
        ["--receipt-warning", "none"], OK, "2 pending",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("statements", "options", "level", "words"), CONDITIONS.values(), ids=CONDITIONS)
def test_each_condition_has_its_exit_code(checked, agent, statements, options, level, words):
    agent.queue("payments", 3)
    change(agent, *filter(None, statements.split(";")))

    code, told = checked(agent, *options)

    assert code == level, told
    assert told.startswith(words)


def test_no_agent_is_critical_only_while_events_wait(checked, host_for):
    host = host_for()
    host.queue("payments")
    assert checked(host) == (CRITICAL, "events are pending and no agent is running")
    assert checked(host, "--no-agent")[0] == OK
    change(host, "UPDATE record SET state = 'delivered'")

    assert checked(host) == (WARNING, "no agent is running")
    assert checked(host, "--no-agent")[0] == OK
    with contextlib.closing(FlusherLock(host.path)) as flush:
        assert flush.claim_delivery()
        assert checked(host)[0] == OK


def test_a_refusal_by_a_real_server_is_a_warning(host_for, serve):
    host = host_for(serve(lambda _: refused(409, "other SHA")).url)
    host.queue("payments")
    assert host.run("flush").returncode == 4

    assert run(host, "--no-agent") == (WARNING, "1 event failed (`versioner-agent list --state failed`)")


def test_a_key_that_a_real_server_refuses_is_critical(host_for, serve):
    host = host_for(serve(lambda _: refused(401, "no such key")).url)
    host.queue("payments")
    host.run("flush", "--timeout", "0.5")

    code, told = run(host, "--no-agent")

    assert code == CRITICAL
    assert re.match(r"the API is unauthorized since \d+ s: .*no such key", told)


BROKEN = {
    "overwritten": lambda path: path.write_bytes(b"x" * 9000),
    "cut": lambda path: os.truncate(path, 5000),
    "emptied": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("break_it", BROKEN.values(), ids=BROKEN)
def test_an_outbox_that_is_broken_is_critical(checked, host_for, break_it):
    host = host_for()
    host.queue("payments", 3)
    host.close_outbox()
    break_it(host.directory / "state" / "outbox.db")

    code, told = checked(host)

    assert code == CRITICAL, told
    assert host.path in told


def test_a_directory_that_is_not_there_is_critical(checked, host_for, tmp_path):
    """An outbox that somebody named lies on a disk that may not be mounted."""
    missing = str(tmp_path / "disk" / "outbox.db")

    code, told = checked(host_for(), VERSIONER_AGENT_DB=missing)

    assert (code, told.partition(";")[0]) == (CRITICAL, f"there is no directory {tmp_path}/disk: is its disk mounted?")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what others may not read")
def test_an_outbox_that_only_others_may_read_is_unknown_and_names_the_group(host_for, reachable):
    host = host_for()
    host.queue("payments")
    host.close_outbox()
    shared = reachable / "state"
    shutil.copytree(host.directory / "state", shared)
    os.chown(shared, 0, 1)
    shared.chmod(0o2770)
    code = (
        "import os, sys\n"
        "import versioner_agent.checking, versioner_agent.gauges, grp, pwd\n"
        "from versioner_agent import cli\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"sys.argv = ['versioner-agent', 'check', '--db', {str(shared / 'outbox.db')!r}]\n"
        "cli.main()"
    )
    config = reachable / "config.toml"
    config.touch()
    env = {**host.env, "HOME": "/", "VERSIONER_AGENT_CONFIG": str(config)}

    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (UNKNOWN, "")
    assert done.stdout.startswith("VERSIONER UNKNOWN - can't use the outbox ")
    assert "is not in the group daemon: `sudo usermod -aG daemon nobody`" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give an outbox to another user")
def test_root_sees_no_more_than_the_owner_of_the_outbox(host_for, reachable):
    host = host_for()
    os.chown(reachable, 65534, 65534)
    env = {"VERSIONER_AGENT_DB": str(reachable / "outbox.db")}
    assert host.run("enqueue", "build", "--product", "p", "--version", "1", **env).returncode == 0
    assert run(host, "--no-agent", **env)[0] == OK
    os.chown(reachable / "outbox.db", 0, 0)

    assert run(host, "--no-agent", **env)[0] == UNKNOWN


BAD_CALLS = {
    "an unknown option": (["--bogus"], "No such option"),
    "no value": (["--age-warning"], "requires an argument"),
    "not a time": (["--age-warning", "soon"], "'--age-warning': 'soon': must be a time as 90, 90m, 24h or 7d, or none"),
    "not a size": (["--free-critical", "5%"], "must be a size"),
    "a negative count": (["--pending-warning", "-5"], "must be a whole number"),
    "an argument": (["now"], "unexpected extra argument"),
    "hostile": (["--pending-warning", "1|2\n3"], r"'1/2\n3': must be a whole number"),
    "a directory as a file": (["--config", "/"], "configuration: "),
}  # fmt: skip


@pytest.mark.parametrize(("args", "words"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_what_is_wrong_with_the_call_is_unknown(checked, host_for, args, words):
    """Exit 2, as other commands have it, would say CRITICAL to a monitoring system."""
    code, told = checked(host_for(), *args)

    assert code == UNKNOWN
    assert words in told


def test_a_broken_configuration_is_unknown_and_told_in_a_line(agent):
    agent.config.write_text("concurency = 3\ntimeout = 'x'\n")

    code, told = run(agent)

    assert code == UNKNOWN
    assert "concurency" in told
    assert "timeout" in told


def test_an_error_of_our_own_is_unknown(cli, monkeypatch):
    monkeypatch.setattr(check, "callback", lambda **_: 1 / 0)

    done = cli("check")

    assert (done.code, done.out) == (
        UNKNOWN,
        "VERSIONER UNKNOWN - internal error: ZeroDivisionError: division by zero\n",
    )


def test_an_outbox_that_somebody_keeps_locked_is_unknown_in_time(checked, host_for, child):
    host = host_for()
    host.queue("payments")
    keeper = child(
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('BEGIN EXCLUSIVE'); print('locked'); input()",
        host.path,
    )
    assert keeper.says() == "locked"

    code, told = checked(host)

    assert code == UNKNOWN
    assert "was locked for 2 s" in told


def test_help_is_help(host_for):
    done = host_for().run("check", "--help")

    assert done.returncode == 0
    assert b"--pending-warning LIMIT" in done.stdout


def test_check_changes_nothing(checked, agent):
    agent.queue("payments")
    before = json.dumps(agent.json("status")[0]["counts"])
    files = sorted(os.listdir(agent.directory / "state"))

    checked(agent)

    assert json.dumps(agent.json("status")[0]["counts"]) == before
    assert sorted(os.listdir(agent.directory / "state")) == files


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_line_that_cannot_be_written_is_unknown_and_no_warning(host_for):
    host = host_for()
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            (sys.executable, "-m", "versioner_agent", "check"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=host.env,
            check=False,
        )

    assert (done.returncode, done.stderr) == (UNKNOWN, b"")
