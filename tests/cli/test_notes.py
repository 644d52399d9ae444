"""Warnings and errors where people look: lines on stderr, annotations in GitHub Actions."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from versioner_agent.cli import _notes

ENQUEUE = ("enqueue", "build", "--product", "payments", "--version")
REFUSED = "1 event of payments was refused, see versioner-agent list --state failed"


@pytest.fixture
def in_actions(monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")


def said(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err


def refuse(db, product="payments"):
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("UPDATE record SET state = 'failed' WHERE product_name = ?", (product,))
        connection.commit()


@pytest.mark.parametrize("value", [None, "false", "1", ""])
def test_notes_are_lines_on_stderr(capsys, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("GITHUB_ACTIONS", value)
    _notes.warn("100 % of it")
    _notes.problem("refused: 409, conflict", "versions are immutable")

    assert said(capsys) == "warning: 100 % of it\nerror: versions are immutable\n"


def test_in_github_actions_they_are_annotations(capsys, in_actions):
    _notes.warn("see: this, and that")
    _notes.problem("refused", "versions are immutable")

    assert said(capsys) == (
        "::warning title=versioner-agent::see: this, and that\n::error title=refused::versions are immutable\n"
    )


def test_what_has_a_meaning_in_a_command_is_escaped(capsys, in_actions):
    """By GitHub's documentation: in the message percent signs, in a property colons and commas too."""
    _notes.problem("50%: a,b", "50%: a,b %0A::error::x")

    assert said(capsys) == "::error title=50%25%3A a%2Cb::50%25: a,b %250A::error::x\n"


@pytest.mark.parametrize("break_", ["\n", "\r", "\r\n", "\x85", "\u2028", "\x0b"])
@pytest.mark.parametrize("where", ["lines", "actions"])
def test_no_value_starts_a_line_of_its_own(capsys, monkeypatch, break_, where):
    if where == "actions":
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
    hostile = f"x{break_}::add-mask::y{break_}\x1b[2J"
    _notes.warn(hostile)
    _notes.problem(hostile, hostile)

    lines = said(capsys).splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert [line.startswith("::") for line in lines] == [where == "actions"] * 2
    assert not any(line.startswith("::add-mask") for line in lines)


def test_a_line_break_of_its_own_is_escaped_once(in_actions, capsys):
    _notes.warn("a\nb")

    assert said(capsys) == "::warning title=versioner-agent::a\\nb\n"


@pytest.mark.parametrize("value", ["true", "false"])
def test_keys_are_masked(capsys, monkeypatch, value):
    monkeypatch.setenv("GITHUB_ACTIONS", value)
    _notes.warn("HTTP 401: sk_acme_k1_topsecret")
    _notes.problem("sk_acme_k1_topsecret", "not sk_acme_k1_topsecret")

    assert "topsecret" not in said(capsys)


def test_enqueue_says_each_warning_once(cli, db):
    cli(*ENQUEUE, "1")
    refuse(db)
    bodies = b"\n".join(b'{"product_name": "payments", "version": "%d", "status": "ok"}' % n for n in range(3))

    done = cli("enqueue", "json", stdin=bodies)

    assert (done.code, done.err) == (0, f"warning: {REFUSED}\n")
    assert done.out.count("queued") == 3


def test_enqueue_annotates_in_github_actions_and_keeps_stdout_for_data(cli, db, in_actions):
    cli(*ENQUEUE, "1")
    refuse(db)

    done = cli(*ENQUEUE, "2", "--json")

    assert (done.code, done.err) == (0, f"::warning title=versioner-agent::{REFUSED}\n")
    assert json.loads(done.out)["warnings"] == [REFUSED]


def test_a_product_that_is_named_like_a_command_gives_none(cli, db, in_actions):
    name = "x\n::error::owned %0A::error::owned"
    cli("enqueue", "build", "--product", name, "--version", "1")
    refuse(db, name)

    (line,) = cli("enqueue", "build", "--product", name, "--version", "2").err.splitlines()

    assert line.startswith("::warning title=versioner-agent::1 event of x\\n::error::owned %250A::error::owned was")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_an_event_is_queued_where_nobody_hears_the_warnings(host_for, redirection):
    import subprocess

    from host import COMMAND

    host = host_for()
    host.queue("payments")
    refuse(host.path)
    line = f"{' '.join(COMMAND)} {' '.join(ENQUEUE)} 2 {redirection}"

    done = subprocess.run(["/bin/sh", "-c", line], env=host.env, capture_output=True, timeout=60, check=False)

    assert done.returncode == 0
    assert host.counts() == {"failed": 1, "pending": 1}
