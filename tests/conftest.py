"""What every test gets: an environment without this host's settings, and an outbox of its own."""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import signal
import sys
import tempfile

import pytest

sys.path.append(os.path.dirname(__file__))  # the modules beside this one, for tests in every folder

from accounts import Accounts
from bench import Bench
from host import Child, Host, free_port  # found by the line above
from recipes import copy_of_the_repository, follow, why_no_wheels
from scripted import ScriptedServer

from versioner_agent import Outbox, notices

try:
    import hypothesis
except ImportError:  # a developer tool: without it only the property tests are missing
    pass
else:
    # No deadline, for nothing here may fail by the clock; the same examples on every run.
    hypothesis.settings.register_profile("tests", database=None, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("tests")

# A shell starts what it runs in the background with Ctrl-C and Ctrl-\ ignored, and what the tests start would inherit
# that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

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
    """No test sees the settings, the CI system, the proxy or the git work tree of the host it runs on."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES or name.lower() in PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind in ("CONFIG", "STATE", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / f"xdg-{kind.lower()}"))


@pytest.fixture(autouse=True)
def _no_container(monkeypatch):
    """Tests are run in containers too, whose file system is not what they are about."""
    monkeypatch.setattr(notices, "_is_in_container", lambda _: False)


@pytest.fixture(autouse=True)
def _own_logging():
    """No test hears less for what a command in this process has set up."""
    ours = logging.getLogger("versioner_agent")
    before = ours.level, ours.propagate, list(ours.handlers)
    yield
    ours.setLevel(before[0])
    ours.propagate, ours.handlers = before[1:]


@pytest.fixture
def outbox(tmp_path):
    """An outbox that the first enqueue makes."""
    with Outbox(tmp_path / "outbox.db") as opened:
        yield opened


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


@pytest.fixture
def unprivileged():
    """A directory of an ordinary user, as whom the test runs: root may do what permissions forbid."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="versioner-agent-test-"))
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(directory, 65534, 65534)
        os.setegid(65534)
        os.seteuid(65534)
    try:
        yield directory
    finally:
        if is_root:
            os.seteuid(0)
            os.setegid(0)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def reachable():
    """A directory that every user can get to, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="versioner-agent-test-") as directory:
        os.chmod(directory, 0o755)
        yield pathlib.Path(directory)


@pytest.fixture
def child():
    """Start child processes; none outlives the test."""
    running = []

    def start(code, *args):
        running.append(Child(code, *args))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def umask():
    """Set the umask; the old one is back after the test."""
    old = os.umask(0)
    os.umask(old)
    yield os.umask
    os.umask(old)


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(**options):
        made.append(Bench(tmp_path / f"outbox-{len(made)}.db", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def accounts():
    """Real accounts of this machine, for tests that are skipped where there can be none."""
    made = Accounts()
    yield made
    made.close()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """The folder that README's connected machine makes: our wheel, all dependencies', and their hashes.

    Beside it lies the rest of the copy of the repository that it was made in, for recipes that go on from there.
    """
    if reason := why_no_wheels():
        pytest.skip(reason)
    checkout = copy_of_the_repository(tmp_path_factory.mktemp("connected"))
    follow("offline: connected machine", checkout)
    return checkout / "wheels"
