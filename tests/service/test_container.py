"""The machine that the service is installed on in tests is a real one, and nothing of it stays behind."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest
from container import PYTHON, Container, why_not

UNIT = f"""
[Service]
Type=notify
ExecStart={PYTHON} -c "import os, socket, time; print('hello'); \\
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); time.sleep(1000)"
Environment=PYTHONUNBUFFERED=1

[Install]
WantedBy=multi-user.target
"""
LISTENER = "import socket; s = socket.create_server(('127.0.0.1', 7777)); print('listens', flush=True); s.accept()"
CALLER = "import socket, sys; socket.create_connection(('127.0.0.1', 7777), float(sys.argv[1]))"


@pytest.fixture(scope="module")
def machine():
    if reason := why_not():
        pytest.skip(reason)
    with Container() as booted:
        yield booted


def test_a_unit_of_type_notify_starts_and_is_heard(machine):
    machine.write("/etc/systemd/system/hello.service", UNIT)
    machine.run("systemctl", "enable", "--now", "hello.service")

    assert machine.show("hello.service", "ActiveState") == "active"
    said = [entry["MESSAGE"] for entry in machine.journal("hello.service")]
    assert "hello" in said
    assert any(message.startswith("Started hello.service") for message in said)


def test_what_is_enabled_starts_with_the_machine(machine):
    machine.write("/etc/systemd/system/again.service", UNIT)
    machine.run("systemctl", "enable", "again.service")
    assert machine.show("again.service", "ActiveState") == "inactive"

    machine.halt()
    machine.boot()

    assert machine.show("again.service", "ActiveState") == "active"


def test_a_command_runs_as_an_account_in_all_its_groups_and_sees_nothing_of_this_environment(machine, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_HOST", "1")
    machine.run("groupadd", "sharers")
    machine.run("useradd", "--create-home", "--groups", "sharers", "runner")

    told = machine.run("sh", "-c", "id -Gn; umask; pwd; cat; env", input=b"typed\n", user="runner", umask=0o027)

    lines = told.stdout.decode().splitlines()
    assert lines[:4] == ["runner sharers", "0027", "/", "typed"]
    assert "HOME=/home/runner" in lines
    assert "SECRET_OF_THE_HOST=1" not in lines
    assert machine.run("false", check=False).returncode == 1


def test_an_address_that_a_unit_denies_is_out_of_its_reach(machine):
    """Where systemd may not load BPF programs, it only pretends to."""
    listener = machine.start(PYTHON, "-c", LISTENER)
    machine.wait(lambda: b"listens" in listener.log.read_bytes())
    denied = ("systemd-run", "--wait", "--quiet", "--property=IPAddressDeny=any", PYTHON, "-c", CALLER, "0.5")

    assert machine.run(*denied, check=False).returncode == 1
    assert machine.run(PYTHON, "-c", CALLER, "30", check=False).returncode == 0
    assert listener.wait(30) == 0


def test_a_background_process_ends_as_it_is_told(machine):
    process = machine.start("sh", "-c", "trap 'exit 7' TERM; echo set; while :; do sleep 0.1; done")
    machine.wait(lambda: process.log.read_text() == "set\n")

    assert machine.end(process, signal.SIGTERM) == 7


def test_files_go_in_with_folders_left_as_they_are(machine, tmp_path):
    (tmp_path / "etc" / "sudden").mkdir(parents=True)
    (tmp_path / "etc").chmod(0o700)
    (tmp_path / "etc" / "sudden" / "one.conf").write_text("1")

    machine.put(tmp_path, "/")

    assert machine.run("cat", "/etc/sudden/one.conf").stdout == b"1"
    assert machine.run("stat", "--format=%a", "/etc").stdout == b"755\n"
    assert not os.path.exists("/etc/sudden")


def left_of(name):
    """Everything on this machine that has the name of a container."""
    mounts = [line for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    processes = [path for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if name in content(path)]
    folders = [("/sys/fs/cgroup", f"**/{name}*"), ("/run/systemd", f"**/*{name}*"), ("/tmp", f"*{name}*")]
    return [*mounts, *processes, *(found for top, pattern in folders for found in pathlib.Path(top).glob(pattern))]


def content(path):
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process is gone
        return ""


@pytest.mark.parametrize("death", ["in-order", "by-a-failure", "nspawn-killed"])
def test_nothing_is_left_of_a_machine(death):
    if reason := why_not():
        pytest.skip(reason)
    container = Container()
    container.start("sleep", "1000")
    assert left_of(container.name)

    if death == "by-a-failure":
        with pytest.raises(AssertionError, match="no such thing"), container:
            container.run("sh", "-c", "echo no such thing; exit 1")
    elif death == "nspawn-killed":
        container._nspawn.kill()
    container.close()
    container.close()

    assert not left_of(container.name)


def test_a_machine_that_does_not_boot_says_why_and_leaves_nothing():
    if reason := why_not():
        pytest.skip(reason)

    ours = f"va-test-{os.getpid()}-"
    before = left_of(ours)

    with pytest.raises(AssertionError, match="/nonexistent"):
        Container({"/nonexistent": "/mnt"})

    assert left_of(ours) == before
