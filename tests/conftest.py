"""What every test gets: an environment without this host's settings, and an outbox of its own."""

from __future__ import annotations

import os

import pytest

from versioner_agent import Outbox

try:
    import hypothesis
except ImportError:  # a developer tool: without it only the property tests are missing
    pass
else:
    # No deadline, for nothing here may fail by the clock; the same examples on every run.
    hypothesis.settings.register_profile("tests", database=None, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("tests")

#: Beginnings of the names that the agent, CI systems and systemd give their variables.
PREFIXES = (
    "AGENT_", "BITBUCKET_", "BUILD_", "CI_", "CIRCLE", "GITHUB_", "GITLAB_", "JENKINS_", "RD_", "RUNNER_", "SYSTEM_",
    "TRAVIS", "VERSIONER_", "XDG_",
)  # fmt: skip
NAMES = (
    "CI", "CREDENTIALS_DIRECTORY", "EXECUTOR_NUMBER", "GIT_BRANCH", "GIT_COMMIT", "GIT_URL", "INVOCATION_ID",
    "JOB_NAME", "JOURNAL_STREAM", "NODE_NAME", "NOTIFY_SOCKET", "SSL_CERT_DIR", "SSL_CERT_FILE", "STATE_DIRECTORY",
    "TF_BUILD", "WATCHDOG_PID", "WATCHDOG_USEC",
)  # fmt: skip
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    """No test sees the settings, the CI system or the proxy of the host it runs on."""
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES or name.lower() in PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in ("CONFIG", "STATE", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / f"xdg-{kind.lower()}"))


@pytest.fixture
def outbox(tmp_path):
    """An outbox that the first enqueue makes."""
    with Outbox(tmp_path / "outbox.db") as opened:
        yield opened
