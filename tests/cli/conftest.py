"""Fixtures of the command line tests: `cli` runs a command in this process, `host_for` gives real processes."""

from __future__ import annotations

import io
import os
import sys
from typing import NamedTuple

import pytest

_TESTS = os.path.dirname(os.path.dirname(__file__))
sys.path.append(os.path.join(_TESTS, "journey"))
sys.path.append(os.path.join(_TESTS, "service"))

from host import Host, free_port  # noqa: E402  # found by the lines above
from scripted import ScriptedServer  # noqa: E402

import versioner_agent.cli  # noqa: E402


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def db(tmp_path):
    return tmp_path / "state" / "outbox.db"


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path, db):
    """Run a command in this process, errors mapped to exit codes as `main` does."""
    config = tmp_path / "config.toml"
    config.write_text("")
    monkeypatch.setenv("VERSIONER_AGENT_DB", str(db))
    monkeypatch.setenv("VERSIONER_AGENT_CONFIG", str(config))
    for name in ("VERSIONER_API_URL", "VERSIONER_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*args, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["versioner-agent", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = versioner_agent.cli._run()
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture
def serve():
    """Start scripted servers; all of them are stopped in the end."""
    running = []

    def start(*args, **kwargs):
        running.append(ScriptedServer(*args, **kwargs))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def host_for(tmp_path):
    """Make hosts that deliver to a URL; their processes are gone in the end."""
    made = []

    def make(api_url=None):
        directory = tmp_path / f"host-{len(made)}"
        directory.mkdir()
        made.append(Host(directory, api_url or f"http://127.0.0.1:{free_port()}"))
        return made[-1]

    yield make
    for each in made:
        each.close()
