"""Fixtures of the command line tests: `cli` runs a command in this process."""

from __future__ import annotations

import io
import sys
from typing import NamedTuple

import pytest

import versioner_agent.cli


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def db(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
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
