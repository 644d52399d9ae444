"""Being told of failures and acting on them from the command line: what is printed, and what it exits with."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess

import pytest
from crash import killed_at, needs_strace
from host import COMMAND

from versioner_agent import events, groups
from versioner_agent.outbox import Outbox

WORDS = "exists with a different SHA, " + "and the API has a lot to say about it, " * 10 + "the end"


@pytest.fixture
def outbox(db):
    with Outbox(db, queued_by="ann (uid 7)") as made:
        yield made


@pytest.fixture
def env(db, tmp_path):
    (tmp_path / "config.toml").write_text("")
    return {**os.environ, "VERSIONER_AGENT_DB": str(db), "VERSIONER_AGENT_CONFIG": str(tmp_path / "config.toml")}


def failed(outbox, product="pay", version="1.2.3", reason="conflict", detail=WORDS, late=0, **fields):
    record_id = outbox.enqueue("build", {"product_name": product, "version": version, "status": "ok", **fields}).id
    with outbox.store.write() as connection:
        connection.execute(
            "UPDATE record SET state = 'failed', reason = ?, detail = ?, late = ?, settled_at = 1 WHERE id = ?",
            (reason, detail, late, record_id),
        )
    return record_id


def lines(done):
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def ids(done):
    return [each["id"] for each in lines(done)]


def test_new_failures_are_listed_once_with_all_the_words(cli, outbox):
    failed(outbox)
    failed(outbox, version="1.2.4")
    first = cli("list", "--new", "mail")

    assert first.code == 0
    assert first.out.count(WORDS) == 2
    assert first.out.index("1.2.3") < first.out.index("1.2.4")
    assert cli("list", "--new", "mail", "--state", "failed") == (0, "", "")
    assert ids(cli("list", "--new", "pager", "--json", "--limit", "1")) == [1]
    assert ids(cli("list", "--new", "pager", "--json")) == [2]


def test_nothing_new_says_nothing_at_all(cli, outbox):
    """Or cron would send a mail for it."""
    assert cli("list", "--new", "mail") == (0, "", "")
    outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "ok"})
    assert cli("list", "--new", "mail") == (0, "", "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--new", "mail", "--state", "pending"), "for failed records"),
        (("--groups", "--state", "delivered"), "for failed records"),
        (("--groups", "--new", "mail"), "not both"),
        (("--new", ""), "1 to 100 printable"),
        (("--new", " "), "1 to 100 printable"),
        (("--new", "x" * 101), "1 to 100 printable"),
        (("--new", "a\nb"), "1 to 100 printable"),
        (("--since", "yesterday"), "like 90m, 24h or 7d"),
        (("--reason", "whim"), "is not one of conflict"),
    ],
)
def test_list_refuses_what_makes_no_sense(cli, outbox, args, words):
    done = cli("list", *args)

    assert (done.code, done.out) == (2, "")
    assert words in done.err


@pytest.mark.parametrize("command", ["list", "retry", "discard"])
@pytest.mark.parametrize("option", ["--product", "--version"])
def test_a_name_that_is_no_text_is_a_wrong_call(cli, outbox, command, option):
    """The shell hands over bytes as they are; SQLite takes no such text."""
    done = cli(command, option, os.fsdecode(b"caf\xe9"))

    assert (done.code, done.out) == (2, "")
    assert "not UTF-8" in done.err


def test_list_filters_can_be_combined(cli, outbox):
    failed(outbox)
    failed(outbox, version="2", reason="blocked", late=1)
    failed(outbox, product="other", reason="blocked")

    assert ids(cli("list", "--json", "--version", "1.2.3")) == [3, 1]
    assert ids(cli("list", "--json", "--reason", "late")) == [2]
    assert ids(cli("list", "--json", "--reason", "blocked", "--product", "other", "--since", "1h")) == [3]
    assert ids(cli("list", "--json", "--until", "1h")) == []


def run(*args, env, **how):
    return subprocess.run((*COMMAND, *args), env=env, check=False, timeout=60, **how)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_a_closed_pipe_has_kept_is_told_again(outbox, env, encoding):
    """In a small encoding click writes past the stream, to the bytes below."""
    env["PYTHONIOENCODING"] = encoding
    failed(outbox)
    reader, writer = os.pipe()
    os.close(reader)
    done = run("list", "--new", "mail", env=env, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert (done.returncode, done.stderr) == (0, b"")
    assert WORDS.encode() in run("list", "--new", "mail", env=env, stdout=subprocess.PIPE).stdout


def test_what_nobody_could_hear_is_told_again(outbox, env):
    """A caller that has closed stdout has seen nothing."""
    failed(outbox)
    done = run("list", "--new", "mail", env=env, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))

    assert (done.returncode, done.stderr) == (0, b"")
    assert WORDS.encode() in run("list", "--new", "mail", env=env, stdout=subprocess.PIPE).stdout


def test_what_a_full_disk_has_kept_is_told_again(outbox, env):
    failed(outbox)
    with open("/dev/full", "wb") as full:
        done = run("list", "--new", "mail", env=env, stdout=full, stderr=subprocess.PIPE)

    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert WORDS.encode() in run("list", "--new", "mail", env=env, stdout=subprocess.PIPE).stdout


@needs_strace
def test_what_goes_to_a_file_is_on_its_disk_before_the_cursor_moves(outbox, env, tmp_path):
    failed(outbox)
    outbox.close()
    log = tmp_path / "trace"
    with (tmp_path / "told").open("wb") as told:
        tracer = ("strace", "-y", "-o", str(log), "-e", "trace=write,fsync,pwrite64")
        command = (*tracer, *COMMAND, "list", "--new", "mail")
        assert subprocess.run(command, env=env, stdout=told, timeout=60, check=False).returncode == 0
    calls = log.read_text().splitlines()
    ours = [number for number, call in enumerate(calls) if str(tmp_path / "told") in call]

    names = [calls[number].partition("(")[0] for number in ours]
    assert set(names[:-1]) == {"write"}
    assert names[-1] == "fsync"
    assert any("outbox.db>" in call for call in calls[ours[-1] :])
    assert not any("outbox.db>" in call for call in calls[: ours[-1]])


@needs_strace
def test_killed_after_printing_and_before_moving_it_is_told_again(outbox, env):
    """At least once: whatever the moment, a failure is in the output of this run or of the next."""
    failed(outbox)
    outbox.close()
    command = (*COMMAND, "list", "--new", "mail")
    printed = []
    for number in range(1, 40):
        was_killed, done = killed_at("pwrite64", number, command, env=env)
        if not was_killed:
            break
        assert WORDS.encode() in done.stdout
        printed.append(number)
        with outbox.store.read() as connection:
            seen = connection.execute("SELECT count(*) FROM cursor").fetchone()[0]
        outbox.close()
        if seen:
            break  # it was moved; what was printed before is not told again
    assert printed
    assert run("list", "--new", "mail", env=env, stdout=subprocess.PIPE).stdout == b""


def test_concurrent_runs_of_one_name_tell_each_failure_once(outbox, env):
    for number in range(50):
        failed(outbox, version=str(number), detail="words")
    running = [
        subprocess.Popen((*COMMAND, "list", "--new", "mail", "--json"), env=env, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    told = [json.loads(line)["id"] for each in running for line in each.communicate()[0].splitlines()]

    assert sorted(told) == list(range(1, 51))


@pytest.mark.parametrize(
    "args", [("list", "--new", "mail"), ("list", "--groups"), ("amend", "1", "--set", "version=2")]
)
def test_an_outbox_of_an_older_schema_says_what_to_do(cli, outbox, args):
    failed(outbox)
    outbox.close()
    with sqlite3.connect(outbox.store.path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    done = cli(*args)

    assert (done.code, done.out) == (1, "")
    assert "restart the agent" in done.err
    assert json.loads(cli("status", "--json").out)["failures"] == []
    assert cli("show", "1").code == cli("list", "--product", "pay").code == 0


def test_groups_tell_whose_they_were_first(cli, outbox):
    failed(outbox, built_by="alice", build_url="https://ci/7")
    failed(outbox)
    failed(outbox, reason="blocked", late=1)
    (late, conflict) = lines(cli("list", "--groups", "--json"))

    assert late == {
        "product_name": "pay", "version": "1.2.3", "reason": "blocked", "late": True, "count": 1, "first_id": 3,
        "first_by": "ann (uid 7)", "link": None,
    }  # fmt: skip
    assert conflict["count"] == 2
    text = cli("list", "--groups").out.splitlines()
    assert text == [
        "pay 1.2.3: 1 refused late by a rule (blocked), first by ann (uid 7) (record 3)",
        "pay 1.2.3: 2 refused (conflict), first by alice (record 1) https://ci/7",
    ]
    assert cli("list", "--groups", "--reason", "late").out.splitlines() == text[:1]
    assert cli("list", "--groups", "--limit", "1").out.splitlines() == text[:1]
    assert cli("list", "--groups", "--limit", "1" * 30).out.splitlines() == text
    status = json.loads(cli("status", "--json").out)
    assert sorted(status["failures"], key=lambda group: group["first_id"]) == [conflict, late]
    assert all(f"{' ' * 13}{line}\n" in cli("status").out for line in text)


def test_groups_without_failures_are_none(cli, outbox):
    assert cli("list", "--groups") == (0, "", "no records\n")


def test_status_tells_five_groups_and_how_many_more(cli, outbox):
    for number in range(8):
        failed(outbox, version=str(number))

    out = cli("status").out
    assert out.count("refused (conflict)") == 5
    assert "… and 3 groups: `versioner-agent list --groups`" in out


def test_status_says_that_it_has_not_counted_all(cli, outbox, monkeypatch):
    for _ in range(4):
        failed(outbox)
    monkeypatch.setattr(groups, "PAGE", 1)
    monkeypatch.setattr(groups, "MOST_ROWS", 3)

    out = cli("status").out
    assert "pay 1.2.3: 3 refused" in out
    assert "… and more: only 3 failures were looked at, `versioner-agent list --groups` counts all" in out


def test_retry_by_filter_says_what_it_would_do_and_does_it_with_yes(cli, outbox):
    failed(outbox)
    damaged = failed(outbox, reason="damaged")
    with outbox.store.write() as connection:
        connection.execute("UPDATE record SET payload = payload || ' ' WHERE id = ?", (damaged,))
    failed(outbox, product="other")
    before = cli("retry", "--product", "pay")

    assert before.code == 0
    assert before.err == "nothing was done; --yes does it\n"
    assert before.out.splitlines() == [
        "pay 1.2.3: 1 failed (conflict) would be retried, 1 to 1",
        "pay 1.2.3: 0 failed (damaged) would be retried, 2 to 2, 1 refused",
        "to retry: 1, of records 1 to 2; 1 would be left out",
    ]
    assert lines(cli("retry", "--product", "pay", "--json"))[0]["count"] == 1
    assert ids(cli("list", "--state", "failed", "--json")) == [3, 2, 1]
    assert cli("retry", "--product", "pay", "--yes").out.splitlines()[3:] == ["1 retried, 1 refused"]
    assert ids(cli("list", "--state", "failed", "--json")) == [3, 2]


def test_discard_by_filter_takes_pending_ones_only_where_that_is_said(cli, outbox):
    failed(outbox)
    outbox.enqueue("build", {"product_name": "pay", "version": "9", "status": "ok"})
    assert cli("discard", "--product", "pay", "--yes").code == 0
    assert ids(cli("list", "--state", "pending", "--json")) == [2]
    found = lines(cli("discard", "--product", "pay", "--state", "pending", "--yes", "--json"))

    assert found == [{"id": 2, "outcome": "discarded", "detail": ""}]
    assert ids(cli("list", "--state", "discarded", "--json")) == [2, 1]


@pytest.mark.parametrize(
    "args",
    [
        ("retry",),
        ("retry", "1", "--product", "a"),
        ("retry", "--all-failed", "--product", "a"),
        ("retry", "--state", "pending"),
        ("discard",),
        ("discard", "1", "--reason", "late"),
        ("amend", "--set", "version=2"),
        ("amend", "1"),
        ("amend", "1", "--product", "a", "--set", "version=2"),
        ("amend", "--state", "exported", "--set", "version=2"),
    ],
)
def test_ids_or_a_filter_are_needed_and_not_both(cli, outbox, args):
    failed(outbox)

    assert cli(*args).code == 2
    assert ids(cli("list", "--state", "failed", "--json")) == [1]


def test_amend_shows_the_difference_and_does_it_with_yes(cli, outbox):
    failed(outbox, extra_metadata={"n": 1})
    before = cli("amend", "1", "--set", "version=1.2.4", "--unset", "extra_metadata.n")

    assert before.code == 0
    assert before.out == "1 pay 1.2.3: planned\n  version: 1.2.3 -> 1.2.4\n  extra_metadata.n: 1 -> (none)\n"
    assert "nothing was done; --yes" in before.err
    (found,) = lines(cli("amend", "--product", "pay", "--set", "version=1.2.4", "--yes", "--json"))
    assert found == {
        "id": 1, "outcome": "amended", "amended_by": 2, "changes": {"version": ["1.2.3", "1.2.4"]}, "detail": "",
    }  # fmt: skip
    assert lines(cli("show", "1", "--json"))[0]["amended_by"] == 2
    assert "amended as   2" in cli("show", "1").out
    assert "amends       1" in cli("show", "2").out
    again = cli("amend", "1", "--set", "version=3", "--yes")
    assert (again.code, again.out) == (2, "")
    assert "it was amended as 2" in again.err


def test_amend_lists_all_that_is_wrong(cli, outbox):
    failed(outbox)
    failed(outbox, version="2")
    done = cli("amend", "--product", "pay", "--set", "status=zonk", "--yes")

    assert (done.code, done.out) == (2, "")
    assert done.err.count("unknown status") == 2
    assert ids(cli("list", "--state", "failed", "--json")) == [2, 1]


def test_hostile_text_stays_text(cli, outbox):
    evil = "\x1b[31m\r\nforged 1: line\u202e"
    failed(outbox, product=f"p{evil}", detail=evil, built_by=evil, build_url=evil)
    said = [cli(*args) for args in (("list", "--new", "m"), ("list", "--groups"), ("status",), ("retry", "--state", "failed"),
                                    ("amend", "1", "--set", f"scm_sha=a{evil}"))]  # fmt: skip

    for done in said:
        assert done.code == 0
        assert not any(character in done.out + done.err for character in "\x1b\r\u202e")
        assert not any(line.startswith("forged") for line in done.out.splitlines())


def test_many_are_summed_up(cli, outbox):
    outbox.enqueue_all(
        [events.validate("build", {"product_name": "a", "version": str(n), "status": "ok"}) for n in range(120)]
    )
    with outbox.store.write() as connection:
        connection.execute("UPDATE record SET state = 'failed', reason = 'conflict'")
    done = cli("retry", "--product", "a", "--yes")

    assert done.out.splitlines()[-3:] == ["… and 100 groups", "to retry: 120, of records 1 to 120", "120 retried"]


def test_amend_is_found_where_it_is_needed(cli):
    assert "amend" in cli("--help").out
