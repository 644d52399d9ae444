"""The command line as a whole: help, versions, completion, and errors as exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from host import COMMAND

import versioner_agent.cli
from versioner_agent.cli import COMMANDS

SCRIPT = os.path.join(os.path.dirname(sys.executable), "versioner-agent")


def test_help_imports_no_command(host_for):
    code = (
        "import sys; sys.argv = ['versioner-agent', '--help']\n"
        "import atexit, json\n"
        "atexit.register(lambda: print(json.dumps([m for m in sys.modules if m.startswith('versioner_agent')])))\n"
        "from versioner_agent.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=host_for().env, capture_output=True, timeout=60, check=True)

    loaded = json.loads(done.stdout.splitlines()[-1])
    assert sorted(loaded) == ["versioner_agent", "versioner_agent.cli", "versioner_agent.errors"]


def test_help_lists_every_command_in_order(cli):
    out = cli("--help").out

    places = [out.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert all(entry.summary in out for entry in COMMANDS.values())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_every_command_has_help(cli, name):
    done = cli(name, "--help")

    assert done.code == 0
    assert done.out.startswith(f"Usage: versioner-agent {name} ")
    assert "\\b" not in done.out  # the mark of a block that is not to be wrapped


@pytest.mark.parametrize(("given", "meant"), [("enque", "enqueue"), ("stats", "status"), ("lst", "list")])
def test_a_mistyped_command_is_answered_with_the_one_meant(cli, given, meant):
    done = cli(given)

    assert done.code == 2
    assert f"Did you mean '{meant}'?" in done.err


def test_a_command_of_nobody_exits_2(cli):
    done = cli("qqqqq")

    assert done.code == 2
    assert "No such command 'qqqqq'" in done.err
    assert "Did you mean" not in done.err


def test_version_is_that_of_the_package(host_for):
    done = host_for().run("--version")

    assert done.returncode == 0
    assert done.stdout.decode() == f"versioner-agent, version {versioner_agent.__version__}\n"


@pytest.mark.skipif(not os.path.exists(SCRIPT), reason="the console script is not installed beside this Python")
def test_the_console_script_and_the_module_say_the_same(host_for):
    host = host_for()
    script = subprocess.run([SCRIPT, "--help"], env=host.env, capture_output=True, timeout=60, check=True)

    assert script.stdout == host.run("--help").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(host_for, shell):
    done = host_for().run(_VERSIONER_AGENT_COMPLETE=f"{shell}_source")

    assert done.returncode == 0, done.stderr
    assert b"_VERSIONER_AGENT_COMPLETE" in done.stdout


def test_commands_are_completed(host_for):
    done = host_for().run(_VERSIONER_AGENT_COMPLETE="bash_complete", COMP_WORDS="versioner-agent st", COMP_CWORD="1")

    assert done.stdout.split() == [b"plain,status"]


def test_without_a_command_help_is_shown(host_for):
    done = host_for().run()

    assert done.returncode in (0, 2)
    assert b"Usage: versioner-agent" in done.stdout + done.stderr


@pytest.mark.parametrize("command", [("status",), ("list",), ("enqueue", "build", "--product", "p", "--version", "1")])
def test_bad_configuration_exits_3_and_names_its_source(host_for, command):
    host = host_for()
    host.config.write_text('concurency = 3\ntimeout = "long"\n')

    done = host.run(*command)

    assert done.returncode == 3
    assert f"{host.config}:1: unknown key 'concurency'; did you mean 'concurrency'?\n".encode() in done.stderr
    assert f"{host.config}:2: timeout: must be a number from 0.1 to 600\n".encode() in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_internal_error_is_one_line_with_keys_masked(cli, monkeypatch):
    from versioner_agent import review

    def fail(*_):
        raise RuntimeError("bug near sk_acme_k1_secret")

    monkeypatch.setattr(review, "stats", fail)
    done = cli("status")

    assert done.code == 1
    assert "internal error: RuntimeError: bug near sk_acme_***" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", [("--help",), ("list", "--json"), ("status",)])
def test_a_full_stdout_is_no_traceback(host_for, command):
    host = host_for()
    host.queue("payments")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            (*COMMAND, *command), stdout=full, stderr=subprocess.PIPE, env=host.env, timeout=60, check=False
        )

    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert done.returncode in (0, 1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_name_that_the_terminal_cannot_show_ends_nothing(host_for, encoding):
    host = host_for()
    done = host.run(
        *("enqueue", "build", "--product", "păyments", "--version", "1"), PYTHONIOENCODING=encoding, LANG="C.UTF-8"
    )

    assert done.returncode == 0, done.stderr
    # click itself takes an ASCII stream for UTF-8.
    assert ("p\u0103yments".encode() if encoding == "ascii" else rb"p\u0103yments") in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "koi8-r", "utf-8"])
@pytest.mark.parametrize("command", [(), ("list",)], ids=["enqueue", "list"])
def test_json_is_json_in_every_encoding(host_for, encoding, command):
    host = host_for()
    name = "x\U0001f600é\u202e"
    done = host.run("enqueue", "build", "--product", name, "--version", "1", "--json", PYTHONIOENCODING=encoding)
    if command:
        done = host.run(*command, "--json", PYTHONIOENCODING=encoding)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8"))["product_name"] == name


# --- streams that are lost


@pytest.fixture
def dead_pipe():
    """The end of a pipe that nobody reads from."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("stderr", ["dead pipe", "full"])
def test_talk_that_nobody_can_hear_keeps_no_event_from_being_queued(host_for, dead_pipe, stderr):
    host = host_for()
    enqueue = (*COMMAND, "enqueue", "build", "--product", "p", "--version", "1", "-v")

    with open("/dev/full", "wb") as full:
        heard_by = dead_pipe if stderr == "dead pipe" else full
        done = subprocess.run(enqueue, stderr=heard_by, stdout=dead_pipe, env=host.env, timeout=60, check=False)
        wrong = subprocess.run(
            (*enqueue, "--status", "nonsense"), stderr=heard_by, env=host.env, timeout=60, check=False
        )

    assert done.returncode == 0
    assert host.counts() == {"pending": 1}
    assert wrong.returncode == 2


@pytest.mark.parametrize("lost", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("command", "code"), [(("flush", "--timeout", "0", "--json"), 75), (("config", "--check", "/", "--json"), 3)]
)
def test_a_reader_that_left_does_not_change_the_exit_code(host_for, dead_pipe, lost, command, code):
    host = host_for()
    host.queue("payments")

    done = subprocess.run((*COMMAND, *command), **{lost: dead_pipe}, env=host.env, timeout=60, check=False)

    assert done.returncode == code


def test_an_installation_whose_reader_leaves_is_finished(host_for, dead_pipe, tmp_path):
    (tmp_path / "image").mkdir()
    command = (*COMMAND, "service", "install", "--root", str(tmp_path / "image"))

    done = subprocess.run(command, stdout=dead_pipe, env=host_for().env, timeout=60, check=False)

    assert done.returncode == 0
    assert (tmp_path / "image/etc/versioner-agent/config.toml").exists()


def test_a_line_that_a_full_disk_did_not_take_is_not_the_last_one():
    class Disk(io.StringIO):
        is_full = True

        def write(self, text):
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    disk = Disk()
    stream = versioner_agent.cli._Sturdy(disk, OSError)

    stream.write("lost")
    disk.is_full = False
    stream.write("said")

    assert disk.getvalue() == "said"


def test_a_reader_that_left_is_no_error_in_a_small_encoding_either(host_for, dead_pipe):
    """Click writes past the text stream there."""
    host = host_for()
    host.queue("payments")

    for command in (("list",), ("--help",)):
        env = {**host.env, "PYTHONIOENCODING": "ascii"}
        assert subprocess.run((*COMMAND, *command), stdout=dead_pipe, env=env, timeout=60, check=False).returncode == 0


def test_an_interrupt_while_it_loads_leaves_no_traceback(host_for, tmp_path):
    """Ctrl-C in the first moments of any command, taken where the command line begins to load."""
    (tmp_path / "click").mkdir()
    (tmp_path / "click" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")

    done = host_for().run("status", PYTHONPATH=f"{tmp_path}:{os.pathsep.join(sys.path)}")

    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
