"""The machine as it is: commands that run or do not, accounts, and a person at a terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from pretend import NO_COMMANDS

from versioner_agent import machine
from versioner_agent.errors import AgentError

KEY = b"sk_acme_k7_typedsecret"
#: Runs a command on a terminal of its own; what comes on stdin is typed there.
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def test_a_command_is_run_with_what_it_says():
    ran = machine.this_machine().run(("/bin/sh", "-c", "echo out; echo err >&2; exit 3"))

    assert ran == (3, "out\n", "err\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("versioner-agent-no-such-command",), "there is no versioner-agent-no-such-command on this machine"),
        (("/dev/null",), "Permission denied"),
        (("/bin/sh", "-c", "echo two >&2; echo lines >&2; exit 1"), "two lines"),
        (("/bin/sh", "-c", "exit 9"), "exit status 9"),
        (("/bin/sh", "-c", r"printf '\377' >&2; exit 1"), "\ufffd"),
    ],
)
def test_a_command_that_fails_is_told_in_one_line(command, words, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)  # without directories that this user may not search
    with pytest.raises(AgentError) as caught:
        machine.this_machine().must(*command)

    assert caught.value.message.endswith(f"failed: {words}")
    assert "\n" not in caught.value.message


def test_a_command_reads_nothing_of_ours():
    assert machine.this_machine().run(("/bin/cat",)) == (0, "", "")


def test_a_users_systemd_is_asked_for_as_such():
    asked = []
    mine = machine.this_machine(user=True)._replace(run=lambda command: asked.append(command) or machine.Ran(0))
    mine.must_systemctl("daemon-reload")
    mine.shown("x.service", "ActiveState")

    assert asked == [
        ("systemctl", "--user", "daemon-reload"),
        ("systemctl", "--user", "show", "--property=ActiveState", "x.service"),
    ]


def test_accounts_are_this_machines():
    here = machine.this_machine()

    assert here.account("root", "root") == (0, 0)
    assert here.account("versioner-agent-none", "root") is None


def test_what_is_below_a_directory_has_no_systemd_and_no_selinux(tmp_path):
    image = machine.this_machine(root=str(tmp_path))

    assert (image.has_systemd, image.has_selinux, image.is_image) == (False, False, True)
    assert image.at("/etc") == f"{tmp_path}/etc"


def typed(question, answer, *arguments):
    """Run a command on a terminal and type *answer* when it asks *question*; returns code and screen."""
    process = subprocess.Popen(
        (sys.executable, "-c", ON_A_TERMINAL, sys.executable, "-m", "versioner_agent", *arguments),
        env={**os.environ, **NO_COMMANDS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        screen = b""
        while question not in screen:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, screen
            screen += piece
        # Not before it asked: what is typed early is thrown away, so that it is not shown.
        process.stdin.write(answer + b"\n")
        process.stdin.flush()
        screen += process.stdout.read()
    return process.returncode, screen


def test_a_person_is_asked_for_a_missing_key_without_showing_it(tmp_path):
    code, screen = typed(b"API key (empty: later): ", KEY, "service", "install", "--user")

    assert code == 0, screen
    assert b"typedsecret" not in screen
    assert "sk_acme_k7_…".encode() in screen
    assert (tmp_path / "xdg-config/versioner-agent/credentials/api_key").read_bytes() == KEY + b"\n"


def test_an_empty_answer_means_later(tmp_path):
    code, screen = typed(b"API key (empty: later): ", b"", "service", "install", "--user")

    assert code == 0, screen
    assert b"set-key --user" in screen
    assert not (tmp_path / "xdg-config/versioner-agent/credentials/api_key").exists()


def test_set_key_asks_a_person_and_refuses_what_is_no_key():
    code, screen = typed(b"API key: ", b"two words", "service", "set-key", "--user")

    assert code == 2
    assert b"two words" not in screen
    assert b"the key from the terminal holds characters that no key has" in screen
