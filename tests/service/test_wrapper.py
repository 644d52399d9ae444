"""A wrapped command: it is as if nobody was there, whatever it does and whatever becomes of the outbox."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pty
import signal
import subprocess
import sys
import tempfile

import pytest
from host import eventually
from wrapped import FIELDS, events_of, files, run, statuses, wrapped

from versioner_agent import Outbox, wrapper
from versioner_agent.locks import WriteQueue
from versioner_agent.wrapper import Plan

PYTHON = (sys.executable, "-c")
#: Says that it runs, counts the signals it gets for as long as its stdin is open, and says how many there were.
COUNTING = """
import os, signal, sys
seen = []
def handler(number, frame):
    seen.append(signal.Signals(number).name)
    os.write(1, b"got one\\n")
for name in sys.argv[1:]:
    signal.signal(getattr(signal, name), handler)
os.write(1, b"ready\\n")
while True:
    try:
        if not os.read(0, 100):
            break
    except InterruptedError:
        pass
os.write(1, (" ".join(seen) + "\\n").encode())
sys.exit(3 if seen else 0)
"""
DIES = "import os, signal, sys; os.kill(os.getpid(), getattr(signal, sys.argv[1]))"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outbox.db"


@pytest.fixture
def start(path):
    """Start wrapped commands in the background; they are gone in the end."""
    running = []

    def begin(*command, how=None, before=(), **options):
        running.append(
            subprocess.Popen(
                (*before, *wrapped(path, *command, **options)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **(how or {}),
            )
        )
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate(timeout=30)


def finished(process):
    """Close the stdin of a counting command; returns (exit status, the signals that it got)."""
    out, err = process.communicate(timeout=30)
    assert b"Traceback" not in err
    return process.returncode, out.decode().splitlines()[-1].split()


# --- exit codes


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 255])
def test_the_exit_code_is_the_commands(path, code):
    done = run(path, "sh", "-c", f"exit {code}")

    assert done.returncode == code
    (started, _), (ended, body) = events_of(path)
    assert started == "started"
    assert ended == ("failed" if code else "completed")
    assert body["extra_metadata"]["exit_code"] == code
    assert body["extra_metadata"].get("error") == (f"sh exited {code}" if code else None)
    assert done.stderr == b""
    assert files(path) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSEGV", "SIGUSR1"])
def test_a_command_killed_by_a_signal_is_aborted(path, name):
    done = run(path, *PYTHON, DIES, name)

    assert done.returncode == 128 + getattr(signal, name)
    status, body = events_of(path)[-1]
    assert status == "aborted"
    metadata = body["extra_metadata"]
    assert (metadata["signal"], metadata["exit_code"]) == (name, done.returncode)
    assert metadata["error"] == f"{os.path.basename(sys.executable)} was killed by {name}"


def test_a_command_that_does_not_exist_is_127(path):
    done = run(path, "no-such-command", "secret")

    assert done.returncode == 127
    assert done.stderr == b"no-such-command: command not found\n"
    status, body = events_of(path)[-1]
    assert status == "failed"
    assert body["extra_metadata"]["error"] == "no-such-command: command not found"
    assert body["extra_metadata"]["exit_code"] == 127


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_can_not_be_executed_is_126(path, tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("#!/bin/sh\n")
    else:
        target.mkdir()

    done = run(path, target)

    assert done.returncode == 126
    assert done.stderr == b"target: Permission denied\n"
    assert statuses(path) == ["started", "failed"]


def test_a_script_without_an_interpreter_line_is_run_by_sh(path, tmp_path):
    script = tmp_path / "script"
    script.write_text('echo "got $1"; exit 4\n')
    script.chmod(0o755)

    done = run(path, script, "it")

    assert (done.returncode, done.stdout) == (4, b"got it\n")


def test_a_command_without_a_name_is_not_found(path):
    assert run(path, "").returncode == 127
    assert statuses(path) == ["started", "failed"]


# --- what the events say


def test_both_events_are_of_one_run_and_carry_the_users_metadata(path):
    run(path, "true")

    (_, first), (_, last) = events_of(path)
    assert first["invoke_id"] == last["invoke_id"]
    assert first["extra_metadata"]["team"] == last["extra_metadata"]["team"] == "core"
    assert "exit_code" not in first["extra_metadata"]
    assert first["started_at"]
    assert last["completed_at"]


@pytest.mark.parametrize("kind", ["build", "deployment"])
def test_the_duration_has_the_name_that_the_api_documents(path, kind):
    fields = FIELDS | ({"environment_name": "production"} if kind == "deployment" else {})

    run(path, "true", kind=kind, fields=fields)

    duration = events_of(path)[-1][1]["extra_metadata"][f"{kind}_duration_seconds"]
    assert isinstance(duration, float)
    assert duration == round(duration, 3) >= 0


def test_the_users_own_keys_win(path):
    run(path, "false", fields=FIELDS | {"extra_metadata": {"exit_code": "mine", "error": "theirs"}})

    metadata = events_of(path)[-1][1]["extra_metadata"]
    assert (metadata["exit_code"], metadata["error"]) == ("mine", "theirs")
    assert "build_duration_seconds" in metadata


def test_what_would_make_the_event_too_large_is_left_out(path):
    metadata = {"notes": "n" * (100 * 1024 - 30)}

    run(path, "false", fields=FIELDS | {"extra_metadata": metadata})

    status, body = events_of(path)[-1]
    assert status == "failed"
    assert body["extra_metadata"] == metadata


def test_a_second_run_with_the_same_invoke_id_is_no_repeat(path):
    for _ in range(2):
        run(path, "true", fields=FIELDS | {"invoke_id": "42"})

    assert statuses(path) == ["started", "completed"] * 2


def test_arguments_are_never_told(path):
    run(path, "/bin/sh", "-c", "exit 9", "sk_acme_k1_secret")

    assert "secret" not in str(events_of(path))


# --- as if nobody was there


def test_standard_input_and_output_pass_to_the_byte(path):
    data = os.urandom(1_000_000)

    done = run(path, "cat", stdin=data)

    assert done.stdout == data
    assert done.stderr == b""


def test_a_closed_standard_output_is_closed_for_the_command(path):
    code = "import os\ntry: os.fstat(1)\nexcept OSError: os.write(2, b'closed')"
    line = f'exec "$0" "$@" >&{"-"}'

    done = subprocess.run(("sh", "-c", line, *wrapped(path, *PYTHON, code)), stderr=subprocess.PIPE, check=False)

    assert (done.returncode, done.stderr) == (0, b"closed")
    assert statuses(path) == ["started", "completed"]


def test_descriptors_that_are_passed_on_are_passed_through_and_ours_are_not(path):
    """A jobserver's must survive; the lock on the job's file must not."""
    reading, writing = os.pipe()
    command = ("sh", "-c", f"ls /proc/self/fd; echo hello >/proc/self/fd/{writing}")
    try:
        direct, done = (
            subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[writing], check=True)
            for line in (command, wrapped(path, *command))
        )
        assert os.read(reading, 100) == b"hello\nhello\n"
    finally:
        os.close(reading)
        os.close(writing)

    assert done.stdout == direct.stdout


@pytest.mark.parametrize("more", [{}, {"LC_CTYPE": "POSIX"}])
def test_the_environment_is_unchanged(path, more):
    """Python sets LC_CTYPE for itself where there is no other locale."""
    env = {"PATH": os.environ["PATH"], "ODD": "\udcff", "PYTHONPATH": os.pathsep.join(sys.path), **more}

    done = run(path, "env", "-0", how={"env": env})

    shown = dict(line.split(b"=", 1) for line in done.stdout.split(b"\0") if line)
    assert shown == {os.fsencode(name): os.fsencode(value) for name, value in env.items()}


#: Signals 32 and 33, the C library's own, which its posix_spawn(3) leaves ignored.
LIBRARYS_OWN = 0b11 << 31


@pytest.mark.parametrize("ignored", [(), ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM", "SIGUSR1")])
def test_masks_and_ignored_signals_are_the_callers(path, ignored):
    def prepare():
        for name in ignored:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

    def shown(line):
        done = subprocess.run(line, capture_output=True, text=True, preexec_fn=prepare, check=True)
        lines = (words.split(":\t") for words in done.stdout.splitlines())
        return {words[0]: int(words[1], 16) & ~LIBRARYS_OWN for words in lines if words[0] in ("SigIgn", "SigBlk")}

    command = ("cat", "/proc/self/status")
    direct = shown(command)

    assert direct["SigBlk"] == 1 << signal.SIGUSR2 - 1
    assert bool(direct["SigIgn"]) == bool(ignored)
    assert shown(wrapped(path, *command)) == direct


def test_a_parent_that_ignores_its_children_costs_no_exit_code(path):
    done = run(path, "sh", "-c", "exit 7", how={"preexec_fn": lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)})

    assert done.returncode == 7


# --- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_to_the_wrapper_alone_is_passed_on_once(start, path, name):
    process = start(*PYTHON, COUNTING, name)
    assert process.stdout.readline() == b"ready\n"

    process.send_signal(getattr(signal, name))
    assert process.stdout.readline() == b"got one\n"

    assert finished(process) == (3, [name])
    assert statuses(path) == ["started", "aborted"]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_a_signal_that_does_not_stop_a_command_does_not_abort_it(start, path, name):
    process = start(*PYTHON, COUNTING, name)
    process.stdout.readline()

    process.send_signal(getattr(signal, name))
    process.stdout.readline()

    assert finished(process) == (3, [name])
    assert statuses(path) == ["started", "failed"]


def test_a_command_that_succeeds_all_the_same_is_completed(start, path):
    process = start("sh", "-c", "trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done")
    process.stdout.readline()

    process.terminate()

    assert process.wait(30) == 0
    assert statuses(path) == ["started", "completed"]


def test_an_ignored_signal_stays_ignored(start, path):
    """As under nohup."""
    process = start(
        *PYTHON, COUNTING, "SIGUSR1", how={"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    )
    process.stdout.readline()

    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR1)
    process.stdout.readline()

    assert finished(process) == (3, ["SIGUSR1"])
    assert statuses(path) == ["started", "failed"]


def test_a_command_that_tells_us_something_is_not_told_it_back(start, path):
    process = start("sh", "-c", 'trap "echo back" USR1; kill -USR1 $PPID; echo ready; read line; exit 0')
    assert process.stdout.readline() == b"ready\n"

    out, _ = process.communicate(b"go\n", timeout=30)

    assert (process.returncode, out) == (0, b"")


def on_a_terminal(path, *command):
    """Start a wrapped command as the foreground group of a terminal; returns (pid, terminal)."""
    pid, terminal = pty.fork()
    if pid == 0:
        line = wrapped(path, *command)
        os.execv("/bin/sh", ["sh", "-c", '"$@"; echo "status $?"', "sh", *line])
    return pid, terminal


def said(terminal, words, so_far=b""):
    """Read until *words* were said; returns all."""
    while words not in so_far:
        so_far += os.read(terminal, 1000)
    return so_far


def test_a_command_gets_the_terminals_interrupt_once(path):
    """Both are in the foreground group: what the terminal sends must not be passed on."""
    pid, terminal = on_a_terminal(
        path, *PYTHON, "import signal; signal.signal(signal.SIGINT, print)\n" + COUNTING, "SIGINT"
    )
    try:
        seen = said(terminal, b"ready")
        os.write(terminal, b"\x03")
        seen = said(terminal, b"got one", seen)
        os.write(terminal, b"\x04")
        seen = said(terminal, b"SIGINT\r\n", seen)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)

    assert b"SIGINT SIGINT" not in seen
    assert seen.count(b"got one") == 1
    eventually(lambda: statuses(path) == ["started", "aborted"])


def test_a_command_in_a_group_of_its_own_gets_the_terminals_interrupt_too(path):
    """As `timeout` is: the terminal does not reach it."""
    pid, terminal = on_a_terminal(
        path, *PYTHON, "import os, signal; os.setpgrp(); print('ready', flush=True); signal.pause()"
    )
    try:
        seen = said(terminal, b"ready")
        os.write(terminal, b"\x03")
        eventually(lambda: statuses(path) == ["started", "aborted"])
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)

    assert b"Traceback" not in seen


def test_an_alarm_that_was_set_for_the_command_reaches_it(path, start):
    """alarm(2) lives on through execve(2): it is how some scripts bound a command."""
    code = "import os, signal, sys; signal.alarm(1); os.execv(sys.argv[1], sys.argv[1:])"
    line = wrapped(path, "sleep", "600")

    done = subprocess.run((sys.executable, "-c", code, *line), capture_output=True, timeout=60, check=False)

    assert done.returncode == 128 + signal.SIGALRM
    assert statuses(path) == ["started", "aborted"]


def test_a_wrapper_that_leads_its_session_passes_a_hangup_on(path):
    """The kernel tells the leader alone."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable, wrapped(path, "sh", "-c", "trap 'exit 5' HUP; echo ready; while :; do sleep 0.01; done")
        )
    said(terminal, b"ready")
    os.close(terminal)
    try:
        _, status = eventually(lambda: (found := os.waitpid(pid, os.WNOHANG))[0] and found)
    except AssertionError:
        os.killpg(pid, signal.SIGKILL)
        raise

    assert os.waitstatus_to_exitcode(status) == 5
    assert statuses(path) == ["started", "aborted"]


def test_wrapper_and_command_stop_and_go_on_together(start, path):
    process = start("sh", "-c", "echo $$; read line; exit 6", how={"process_group": 0})
    command = int(process.stdout.readline())

    def states():
        found = (pathlib.Path(f"/proc/{pid}/stat").read_text() for pid in (process.pid, command))
        return {words.rpartition(")")[2].split()[0] for words in found}

    os.killpg(process.pid, signal.SIGTSTP)
    eventually(lambda: states() == {"T"})
    os.killpg(process.pid, signal.SIGCONT)
    process.communicate(b"go\n", timeout=30)

    assert process.returncode == 6
    assert statuses(path) == ["started", "failed"]


def held(path):
    """Somebody who writes to the outbox and does not end."""
    queue = WriteQueue(f"{path}.queue")
    assert queue.acquire(0.1)
    return contextlib.closing(queue)


def test_a_signal_while_started_is_queued_ends_it_before_the_command(start, path, tmp_path):
    run(path, "true")
    with held(path):
        process = start("touch", tmp_path / "ran")
        eventually(lambda: files(path) and not files(path)[0].endswith(".new"))
        process.send_signal(signal.SIGTERM)

    assert process.wait(30) == 128 + signal.SIGTERM
    assert not (tmp_path / "ran").exists()
    assert statuses(path)[2:] == ["started", "aborted"]
    assert events_of(path)[-1][1]["extra_metadata"]["error"] == "stopped by SIGTERM before touch was run"
    assert files(path) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_in_the_gate_ends_it_before_the_command(start, path, tmp_path, name):
    process = start("touch", tmp_path / "ran", asked=str(tmp_path / "asked"))
    eventually((tmp_path / "asked").exists)

    process.send_signal(getattr(signal, name))

    assert process.wait(30) == 128 + getattr(signal, name)
    assert not (tmp_path / "ran").exists()
    assert statuses(path) == ["started", "aborted"]
    assert files(path) == []


def test_signals_while_the_last_event_is_queued_do_not_lose_it(start, path):
    process = start("sh", "-c", "echo $$; read line; exit 8")
    process.stdout.readline()
    with held(path):
        process.stdin.write(b"go\n")
        process.stdin.flush()
        (name,) = files(path)
        eventually(lambda: b"completed_at" in (path.parent / name).read_bytes())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)

    assert process.wait(30) == 8
    assert statuses(path) == ["started", "failed"]


# --- the gate


def test_a_gate_for_which_there_is_no_process_keeps_nothing_from_running(path):
    """Of an account that may have none more, a container's limit, or a host without memory."""
    code = "import os, sys; os.fork = lambda: (_ for _ in ()).throw(OSError(11, 'no more processes'))\n"
    line = wrapped(path, "echo", "RAN", gate=5)

    done = subprocess.run((*line[:2], code + line[2], *line[3:]), capture_output=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (0, b"RAN\n")
    assert b"NOT checked against the rules" in done.stderr
    assert statuses(path) == ["started", "completed"]


def test_a_gate_that_refuses_keeps_the_command_from_running(path, tmp_path):
    done = run(path, "touch", tmp_path / "ran", gate=5)

    assert done.returncode == 5
    assert not (tmp_path / "ran").exists()
    assert statuses(path) == ["started"]
    assert files(path) == []


# --- an outbox that can't be used


def check_run_all_the_same(done, lines=2):
    assert done.returncode == 7
    assert done.stdout == b"ran\n"
    assert len(done.stderr.splitlines()) == lines
    assert b"Traceback" not in done.stderr


def forked(path, *command):
    """Run *command* through the wrapper as the user that this process is just now, who may not read our program."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            plan = Plan(
                "build", FIELDS, list(command), lambda: Outbox(path), lambda words: os.write(2, words.encode() + b"\n")
            )
            os._exit(wrapper.run(plan))
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), out.read(), err.read())


def test_a_missing_directory_costs_two_lines(tmp_path):
    check_run_all_the_same(run(tmp_path / "missing" / "outbox.db", "sh", "-c", "echo ran; exit 7"))


def test_an_outbox_that_is_a_directory_costs_two_lines(tmp_path):
    (tmp_path / "outbox.db").mkdir()

    check_run_all_the_same(run(tmp_path / "outbox.db", "sh", "-c", "echo ran; exit 7"))
    assert files(tmp_path / "outbox.db") == []


def test_a_file_that_is_no_outbox_costs_two_lines(path):
    path.write_bytes(b"something else" * 1000)

    check_run_all_the_same(run(path, "sh", "-c", "echo ran; exit 7"))
    assert path.read_bytes() == b"something else" * 1000
    assert files(path) == []


def test_a_directory_that_can_not_be_written_costs_two_lines(unprivileged):
    path = unprivileged / "outbox.db"
    unprivileged.chmod(0o555)

    check_run_all_the_same(forked(path, "sh", "-c", "echo ran; exit 7"))


def test_an_outbox_that_can_not_be_written_costs_two_lines(unprivileged):
    path = unprivileged / "outbox.db"
    with Outbox(path) as outbox:
        outbox.enqueue("build", FIELDS | {"status": "completed"})
    path.chmod(0o444)
    unprivileged.chmod(0o555)

    check_run_all_the_same(forked(path, "sh", "-c", "echo ran; exit 7"))
    assert statuses(path) == ["completed"]


def test_a_busy_outbox_costs_two_lines(path):
    run(path, "true")
    with held(path):
        check_run_all_the_same(run(path, "sh", "-c", "echo ran; exit 7", busy_timeout=0.05))


def test_the_last_event_is_tried_where_started_could_not_be_queued(start, path):
    run(path, "true")
    with held(path):
        process = start("sh", "-c", "echo ran; read line; exit 7", busy_timeout=0.05)
        process.stdout.readline()
    _, err = process.communicate(b"go\n", timeout=30)

    assert process.returncode == 7
    assert len(err.splitlines()) == 1
    assert statuses(path)[2:] == ["failed"]
    assert files(path) == []


def test_an_end_that_could_not_be_queued_is_kept_in_the_jobs_file(start, path):
    process = start("sh", "-c", "echo ran; read line; exit 7", busy_timeout=0.05)
    process.stdout.readline()
    with held(path):
        _, err = process.communicate(b"go\n", timeout=30)

    assert process.returncode == 7
    assert b"it will be, by the agent or the next flush" in err
    assert statuses(path) == ["started"]
    assert len(files(path)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be no more than the owner of a directory")
def test_root_queues_as_the_owner_of_the_directory_and_the_command_stays_roots(reachable):
    os.chown(reachable, 65534, 65534)
    path = reachable / "outbox.db"

    done = run(path, "sh", "-c", f"id -u; id -G; stat -c %u:%a {path}.job-*; exit 3")

    groups = subprocess.run(("id", "-G"), capture_output=True, text=True, check=True).stdout
    assert done.returncode == 3
    assert done.stdout.decode() == f"0\n{groups}65534:600\n"
    assert os.stat(path).st_uid == 65534
    assert statuses(path) == ["started", "failed"]
    assert files(path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be no more than the owner of a directory")
def test_root_uses_nothing_in_somebody_elses_directory_that_its_owner_could_not(reachable):
    path = reachable / "outbox.db"
    run(path, "true")
    os.chown(reachable, 65534, 65534)

    check_run_all_the_same(run(path, "sh", "-c", "echo ran; exit 7"))
    assert statuses(path) == ["started", "completed"]
