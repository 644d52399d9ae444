"""`enqueue` is called thousands of times a day: what it imports is fixed by set, not by clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = {
    "hashlib", "platformdirs",
    "asyncio", "http.server", "httpcore", "httpx", "importlib.metadata", "logging", "pathlib", "secrets", "ssl",
    "subprocess",
}  # fmt: skip
#: Needed only to find files that nobody named.
FILES = {"tomllib"}

RUN = """
import json, sys
from versioner_agent import cli
sys.argv = ["versioner-agent", *json.loads(sys.argv[1])]
try:
    cli.main()
except SystemExit as exit:
    assert not exit.code, exit.code
sys.stderr.write(json.dumps(sorted(sys.modules)))
"""


def loaded(arguments, **env):
    """The modules in memory after a command."""
    result = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(result.stderr.splitlines()[-1]))


def test_help_imports_no_command():
    modules = loaded(["--help"])

    assert not (HEAVY | FILES) & modules
    assert not {name for name in modules if name.startswith("versioner_agent.cli.")}


@pytest.mark.parametrize("kind", ["build", "deployment"])
def test_enqueue_imports_only_what_it_uses(kind, tmp_path):
    """With both files named in the environment, neither is looked for."""
    environment = ["--environment", "production"] if kind == "deployment" else []
    arguments = ["enqueue", kind, "--product", "p", "--version", "1", *environment]

    modules = loaded(
        arguments,
        VERSIONER_AGENT_DB=str(tmp_path / "outbox.db"),
        VERSIONER_AGENT_CONFIG=str(tmp_path / "none.toml"),
    )

    assert not (HEAVY | FILES) & modules
    assert "versioner_agent.ledger" not in modules
    assert "versioner_agent.delivery" not in modules
    assert "versioner_agent.toml_lines" not in modules


def test_enqueue_does_not_look_for_lines_in_a_good_file(tmp_path):
    (tmp_path / "config.toml").write_text(f'db = "{tmp_path}/outbox.db"\ntimeout = 5\n')

    modules = loaded(
        ["enqueue", "build", "--product", "p", "--version", "1"],
        VERSIONER_AGENT_CONFIG=str(tmp_path / "config.toml"),
    )

    assert "tomllib" in modules
    assert not (HEAVY | {"versioner_agent.toml_lines"}) & modules


def test_the_package_itself_imports_nothing():
    code = "import sys; before = set(sys.modules); import versioner_agent; print(len(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert int(result.stdout) <= 3
