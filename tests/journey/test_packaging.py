"""What README says about hosts without an index: the folder of wheels with their hashes, and the single file."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from host import KEY, eventually
from recipes import ROOT, follow, interpreter, recipe, without_index

ENTRY = ROOT / "versioner_agent" / "__main__.py"
NAME = "versioner-agent.pyz"


@pytest.fixture
def carried(wheels, tmp_path):
    """The folder of wheels on a host that has nothing else."""
    (tmp_path / "host").mkdir()
    return shutil.copytree(wheels, tmp_path / "host" / "wheels")


def test_wheels_alone_install_the_agent_for_every_user(carried, umask):
    umask(0o077)  # as hardened hosts have it for root
    installed = carried.parent / "opt"  # the environment is made beside the wheels instead of in /opt
    instead = {"/opt/versioner-agent": installed}
    follow("offline: build host", carried.parent, env=without_index(), instead=instead)

    asked = [installed / "bin" / "versioner-agent", "--version"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.startswith(
        "versioner-agent, version"
    )


def test_no_wheel_needs_a_compiler_or_a_certain_machine(wheels):
    names = [path.name for path in wheels.iterdir() if path.name != "requirements.txt"]

    assert names
    assert all(name.endswith("-none-any.whl") for name in names), names
    assert len((wheels / "requirements.txt").read_text().splitlines()) == len(names)


def alter(carried):
    (wheel,) = carried.glob("click-*.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("click/another.py", "print('not what was carried')")


def replace_ours(carried):
    (wheel,) = carried.glob("versioner_agent-*.whl")
    wheel.write_bytes((next(carried.glob("h11-*.whl"))).read_bytes())


def lose_a_wheel(carried):
    (wheel,) = carried.glob("h11-*.whl")
    wheel.unlink()


def lose_a_hash(carried):
    path = carried / "requirements.txt"
    lines = [line.split()[0] if line.startswith("idna==") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))


def lose_a_line(carried):
    path = carried / "requirements.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("anyio==")))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (alter, "DO NOT MATCH THE HASHES"),
        (replace_ours, "DO NOT MATCH THE HASHES"),
        (lose_a_wheel, "No matching distribution found for h11"),
        (lose_a_hash, "Hashes are required"),
        (lose_a_line, "all requirements must have their versions pinned"),
    ],
    ids=["altered", "replaced", "missing", "without-hash", "not-listed"],
)
def test_what_is_not_as_it_left_is_refused(carried, wheels, harm, words):
    """Into an environment that is there already: making one for each takes longer than all else."""
    harm(carried)
    made = wheels.parent / "build" / "venv"
    instead = {'"$PYTHON" -m venv /opt/versioner-agent': ":", "/opt/versioner-agent": made}

    refused = follow("offline: build host", carried.parent, env=without_index(), instead=instead, check=False)

    assert refused.returncode != 0
    assert words in refused.stderr
    assert not (made / "bin" / "versioner-agent").exists()


def test_the_service_is_installed_from_the_environment_in_opt():
    assert recipe("offline: service").startswith("/opt/versioner-agent/bin/versioner-agent service install")


@pytest.fixture(scope="module")
def one_file(wheels):
    """The single file, made as README says; its path."""
    follow("one file", wheels.parent, env=without_index())
    return wheels.parent / NAME


@pytest.fixture
def alone(one_file, tmp_path):
    """Run the single file, on a Python without packages or settings, on a host that has nothing else."""
    carried = shutil.copy(one_file, tmp_path)
    env = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LANG": "C.UTF-8", "VERSIONER_API_KEY": KEY,
        "VERSIONER_AGENT_DB": str(tmp_path / "outbox.db"), "VERSIONER_AGENT_CONFIG": os.devnull,
        "VERSIONER_AGENT_MAX_BACKOFF": "0.1",
    }  # fmt: skip
    running = []

    def start(*args, **more):
        command = (interpreter(), "-I", "-S", carried, *args)
        running.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**env, **more}
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def ended(process):
    """Wait for the end of a command; returns what it printed."""
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    return stdout


QUEUE = ("enqueue", "build", "--product", "payments", "--status", "success", "--version")


def test_the_single_file_queues_and_delivers(alone, serve):
    server = serve()
    ended(alone(*QUEUE, "1"))
    assert json.loads(ended(alone("status", "--json")))["counts"]["pending"] == 1

    ended(alone("flush", "--timeout", "30", VERSIONER_API_URL=server.url))

    assert [seen.event["version"] for seen in server.requests] == ["1"]
    assert json.loads(ended(alone("status", "--json")))["counts"]["delivered"] == 1


def test_the_single_file_is_an_agent(alone, serve):
    server = serve()
    agent = alone("run", VERSIONER_API_URL=server.url)
    ended(alone(*QUEUE, "1"))
    server.wait_for(1)
    eventually(lambda: json.loads(ended(alone("status", "--json")))["counts"]["delivered"] == 1)

    agent.terminate()

    ended(agent)


def test_the_single_file_starts_by_its_name(one_file, tmp_path):
    os.symlink(interpreter(), tmp_path / "python3")

    told = subprocess.run([one_file, "--version"], env={"PATH": tmp_path}, capture_output=True, text=True, check=True)

    assert told.stdout.startswith("versioner-agent, version")


def test_the_single_file_has_the_whole_story_too(alone):
    assert "HTTP 409, conflict" in ended(alone("demo"))


def check_refusal(done, version):
    """One line that says what is needed, what is there, and where to get it."""
    assert done.returncode == 1
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert "needs Python 3.11 or newer" in line
    assert f"is Python {version}." in line
    assert "dnf install python3.11" in line
    assert f"python3.11 {NAME}" in line


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.9", "3.10"])
def test_an_old_python_says_what_it_lacks(one_file, version):
    # Where the command is pyenv's, it wants to be told which of its Pythons is meant.
    env = {**os.environ, "PYENV_VERSION": version}
    old = shutil.which(f"python{version}")
    if old is None or subprocess.run([old, "--version"], env=env, capture_output=True, check=False).returncode:
        pytest.skip(f"no Python {version} here")

    check_refusal(subprocess.run([old, one_file, "run"], env=env, capture_output=True, check=False), version)


def test_the_check_of_the_version_comes_before_all_else(one_file):
    """The same as with an old Python, for where there is none."""
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); runpy.run_path(sys.argv[1], run_name='__main__')"
    )

    check_refusal(subprocess.run([sys.executable, "-c", code, one_file], capture_output=True, check=False), "3.9")


def test_the_entry_is_in_the_syntax_of_old_pythons():
    tree = ast.parse(ENTRY.read_text(), feature_version=(3, 4))
    new = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Starred, ast.arg)

    assert not [node for node in ast.walk(tree) if isinstance(node, new)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
