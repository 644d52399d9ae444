"""The service on a machine with a real systemd: installed offline, used by CI users, killed, hung, upgraded, removed.

One machine for all of them; each test leaves the service running, with the API there and nothing pending.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess

import pytest
from container import Container, why_not
from recipes import copy_of_the_repository, recipe

BIN = "/opt/versioner-agent/bin/versioner-agent"
UNIT = "versioner-agent.service"
UNITS = ("versioner-agent.service", "versioner-agent-key.path", "versioner-agent-key.service")
CONFIG = "/etc/versioner-agent/config.toml"
KEY_FILE = "/etc/versioner-agent/credentials/api_key"
STATE = "/var/lib/versioner-agent"
SECRET = "onlyforthisservice"
KEY = f"sk_acme_k1_{SECRET}"
API = "http://127.0.0.1:8765"
RESOLVED_LATER = "api.versioner.test"
HOLD = "from versioner_agent.locks import FlusherLock\nimport sys\nprint(FlusherLock(sys.argv[1]).claim_delivery(), flush=True)\nsys.stdin.read()"


class Site:
    """The machine, its service, its users and the API that they deliver to."""

    def __init__(self, machine):
        self.machine = machine
        self.key = KEY
        self.api = None
        self._versions = iter(range(1, 10_000))

    def sh(self, script, **how):
        return self.machine.run("bash", "-euc", script, **how)

    def agent(self, *args, **how):
        return self.machine.run("versioner-agent", *args, **how)

    def show(self, name):
        return self.machine.show(UNIT, name)

    def start_api(self, *options):
        self.api = self.machine.start(BIN, "sandbox", "--port", "8765", "--key", self.key, *options)
        self.machine.wait(lambda: "listening" in self.api.log.read_text())

    def stop_api(self):
        if self.api is not None:
            self.machine.end(self.api)
        self.api = None

    def enqueue(self, user="ci", product="my-service", umask=0o022, **how):
        """Queue one event as a CI job does: no option on where to, no variable; returns its version."""
        version = f"1.0.{next(self._versions)}"
        self.agent("enqueue", "build", "--product", product, "--version", version, user=user, umask=umask, **how)
        return version

    def delivered(self):
        """The versions that the API of the moment has, in the order in which they came."""
        # Asked again and again: by what starts in no time, not by a Python.
        asked = r"exec 3<>/dev/tcp/127.0.0.1/8765; printf 'GET /events HTTP/1.0\r\n\r\n' >&3; cat <&3"
        found = json.loads(self.machine.run("bash", "-c", asked).stdout.partition(b"\r\n\r\n")[2])
        events = found if isinstance(found, list) else found["events"]
        return [event["payload"]["version"] for event in events]

    def arrive(self, versions):
        self.machine.wait(lambda: set(versions) <= set(self.delivered()))

    def status(self, user="ci"):
        return json.loads(self.agent("status", "--json", user=user).stdout)

    def records(self, product):
        """A product's records, the newest first."""
        lines = self.agent("list", "--json", "--product", product, user="ci").stdout.splitlines()
        return [json.loads(line) for line in lines]

    def says(self, words):
        """Wait until systemd's line on the service has these words (a regular expression); returns the line."""
        return self.machine.wait(lambda: re.search(words, self.show("StatusText")) and self.show("StatusText"))

    def restarted_since(self, pid):
        return self.machine.wait(
            lambda: self.show("MainPID") not in ("0", pid) and self.show("ActiveState") == "active"
        )

    def said(self, priority=None):
        """What the agent itself said in the journal, of one priority where that is given."""
        return [
            entry["MESSAGE"]
            for entry in self.machine.journal(UNIT)
            if entry.get("_COMM") != "systemd" and priority in (None, entry.get("PRIORITY"))
        ]


@pytest.fixture(scope="module")
def site(wheels):
    """A build host: README's offline installation, the service with its key, two CI users in the group, one not."""
    if reason := why_not():
        pytest.skip(reason)
    with Container() as machine:
        made = Site(machine)
        machine.put(wheels, "/root/wheels")
        made.sh(f"cd /root\n{recipe('offline: build host')}", timeout=300)
        made.sh(recipe("offline: service"))
        for user in ("ci", "ci-private", "outsider"):
            machine.run("useradd", "--create-home", user)
        for user in ("ci", "ci-private"):
            machine.run("usermod", "-aG", "versioner-agent", user)
        made.start_api()
        text = machine.path(CONFIG).read_text()
        machine.write(CONFIG, f'api_url = "{API}"\nmax_backoff = 1\n{text}')
        machine.run("systemctl", "reload", UNIT)
        made.agent("service", "set-key", "-", input=KEY.encode())
        yield made


def test_it_is_active_under_its_own_account(site):
    assert site.show("ActiveState") == "active"
    assert site.show("Type") == "notify"
    assert site.machine.run("systemctl", "is-enabled", *UNITS[:2]).stdout.split() == [b"enabled"] * 2
    pid = site.show("MainPID")
    assert site.sh(f"stat -c %U:%G /proc/{pid}").stdout == b"versioner-agent:versioner-agent\n"
    site.says(r"^up: 0 pending, 0 failed( \(API not asked yet\))?$")


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_clean_and_hard(site, unit):
    site.machine.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"/etc/systemd/system/{unit}")
    if unit == UNIT:
        site.machine.run(
            "systemd-analyze", "security", "--offline=true", "--threshold=12", f"/etc/systemd/system/{unit}"
        )
        site.machine.run("systemd-analyze", "security", "--threshold=12", unit)


def test_jobs_of_any_umask_enqueue_with_no_option_and_no_variable(site):
    versions = []
    for user, umask in (("ci-private", 0o077), ("ci", 0o022), ("ci", 0o077), ("ci-private", 0o022)):
        versions += [site.enqueue(user, umask=umask)]

    site.arrive(versions)
    assert [version for version in site.delivered() if version in versions] == versions
    assert site.status()["outbox"]["path"] == f"{STATE}/outbox.db"
    modes = site.sh(f"stat -c '%a %G' {STATE} {STATE}/*").stdout.decode().splitlines()
    assert modes[0] == "2770 versioner-agent"
    assert set(modes[1:]) == {"660 versioner-agent"}


def test_an_outsider_gets_the_remedy_in_one_line(site):
    for command in (("enqueue", "build", "--product", "p", "--version", "1"), ("list",), ("retry", "1"), ("status",)):
        done = site.agent(*command, user="outsider", check=False)

        assert done.returncode == 1
        (line,) = done.stderr.decode().splitlines()
        assert "`sudo usermod -aG versioner-agent outsider`" in line


def test_members_see_and_retry_what_was_refused(site):
    enqueue = ("enqueue", "build", "--product", "twice", "--version", "1", "--scm-sha")
    site.agent(*enqueue, "aaa", user="ci")
    site.agent(*enqueue, "bbb", user="ci")
    failed = site.machine.wait(lambda: site.agent("list", "--json", "--state", "failed", user="ci-private").stdout)
    record = json.loads(failed)
    assert record["reason"] == "conflict"
    assert record["queued_by"].startswith("ci (uid ")
    site.says("up: 0 pending, 1 failed")
    assert any(f"refused {record['id']}" in line for line in site.said(priority="3"))

    site.agent("retry", str(record["id"]), user="ci-private")
    site.machine.wait(
        lambda: json.loads(site.agent("show", "--json", str(record["id"]), user="ci").stdout)["attempts"] == 2
    )
    site.machine.wait(lambda: site.status()["counts"]["pending"] == 0)
    site.agent("discard", str(record["id"]), user="ci")
    site.says("up: 0 pending, 0 failed")


def test_a_job_in_a_hardened_unit_of_its_own_is_told_the_line_that_it_needs(site):
    """As CI runners run: README names the line."""
    run = ("systemd-run", "--quiet", "--wait", "--pipe", "-p", "User=ci", "-p", "ProtectSystem=strict")
    enqueue = ("versioner-agent", "enqueue", "build", "--product", "p", "--version", "1.0.0-hardened")

    refused = site.machine.run(*run, *enqueue, check=False)
    site.machine.run(*run, "-p", f"ReadWritePaths={STATE}", *enqueue)

    assert refused.returncode == 1
    assert f"ReadWritePaths={STATE}" in (refused.stderr + refused.stdout).decode()
    site.arrive(["1.0.0-hardened"])


def test_a_jobs_gate_asks_the_rules_through_the_service(site):
    """A member has no key: the service asks, and what a rule says is the job's exit code."""
    site.stop_api()
    site.start_api("--blocked", "frozen")
    start = ("track", "deployment", "--product", "gated", "--version", "1", "--status=started", "--gate-timeout=50")

    allowed = site.agent(*start, "--environment=open", user="ci")
    forbidden = site.agent(*start, "--environment=frozen", user="ci", check=False)

    assert b"allowed" in allowed.stderr
    assert (forbidden.returncode, b"NO_DEPLOY_WINDOW" in forbidden.stderr) == (5, True)
    site.agent("discard", *re.findall(r"blocked (\d+):", forbidden.stderr.decode()), user="ci")


def test_the_service_tells_the_end_of_a_job_that_was_killed(site):
    wrapped = "versioner-agent exec build --product wrapped --version 1 -- sleep 3600"
    job = site.machine.start("runuser", "-u", "ci", "--", *wrapped.split())
    site.machine.wait(lambda: site.sh("pgrep -x sleep || true").stdout)

    site.sh("pkill -KILL -f '^/opt/versioner-agent/bin/python.* exec build'; pkill -x sleep")
    site.machine.end(job)
    site.machine.wait(lambda: len(site.records("wrapped")) == 2)
    records = site.records("wrapped")
    assert [record["status"] for record in records] == ["aborted", "started"]
    assert len({record["invoke_id"] for record in records}) == 1
    assert records[0]["queued_by"].startswith("ci (uid ")
    site.machine.wait(lambda: site.status()["counts"]["pending"] == 0)
    assert site.sh(f"ls {STATE} | grep job- || true").stdout == b""


def test_the_key_is_for_the_service_alone(site):
    pid = site.show("MainPID")
    assert site.sh(f"stat -c '%a %U' {KEY_FILE} $(dirname {KEY_FILE}) $(dirname {CONFIG}) {CONFIG}").stdout.decode().splitlines() == [
        "600 root", "700 root", "755 root", "644 root",
    ]  # fmt: skip
    for path in (KEY_FILE, f"/run/credentials/{UNIT}/api_key", f"/proc/{pid}/environ"):
        for user in ("ci", "outsider"):
            assert site.machine.run("cat", path, user=user, check=False).returncode != 0, (path, user)
    for script in (
        f"tr '\\0' '\\n' </proc/{pid}/environ; tr '\\0' ' ' </proc/{pid}/cmdline; systemctl show {UNIT}; ps -u versioner-agent -ww -o args,environ",
        f"cat {STATE}/* {CONFIG}", "journalctl --no-pager --all", "versioner-agent config; versioner-agent config --json",
        "grep -rl onlyforthisservice /etc /var/lib /var/log /tmp /opt/versioner-agent/bin || true",
    ):  # fmt: skip
        said = site.sh(script).stdout.decode(errors="replace")
        assert SECRET not in said.replace(KEY_FILE, ""), script
    assert site.sh(f"grep -rl {SECRET} /etc /var /tmp || true").stdout.decode().split() == [KEY_FILE]
    assert site.status()["agent"]["key"] == "sk_acme_k1_…"


def test_it_is_active_only_when_it_holds_the_lock(site):
    site.machine.run("systemctl", "stop", UNIT)
    holder = subprocess.Popen(
        site.machine._inside(["/opt/versioner-agent/bin/python", "-c", HOLD, f"{STATE}/outbox.db"], "ci", None),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout.readline() == b"True\n"
        site.machine.run("systemctl", "start", "--no-block", UNIT)
        site.says(r"^waiting for a flush \(pid \d+\) to hand over$")
        assert site.show("ActiveState") == "activating"
        holder.stdin.close()

    site.machine.wait(lambda: site.show("ActiveState") == "active")
    site.says("^up: ")


def test_a_second_agent_names_the_first(site):
    done = site.agent("run", user="ci", check=False)

    assert done.returncode == 1
    assert f"another agent (pid {site.show('MainPID')})" in done.stderr.decode()


def test_killed_it_comes_back_and_nothing_is_lost(site):
    site.stop_api()
    site.start_api("--latency", "0.05")
    pid = site.show("MainPID")
    before = [site.enqueue(product=f"product-{number % 4}") for number in range(20)]
    site.machine.wait(lambda: set(before) & set(site.delivered()))

    site.machine.run("systemctl", "kill", "-s", "KILL", "--kill-whom=main", UNIT)
    while_down = [site.enqueue(product="while-down")]
    site.restarted_since(pid)

    site.arrive([*before, *while_down])
    counts = site.status()["counts"]
    assert (counts["pending"], counts["failed"]) == (0, 0)


def test_one_that_hangs_is_ended_by_the_watchdog_and_started_again(site):
    with drop_in(site, "[Service]\nWatchdogSec=2s\n"):
        pid = site.show("MainPID")

        site.machine.run("kill", "-STOP", pid)
        versions = [site.enqueue()]
        site.restarted_since(pid)

        site.arrive(versions)
        assert any("Watchdog timeout" in entry["MESSAGE"] for entry in site.machine.journal(UNIT))


def test_an_idle_one_is_left_alone_by_the_watchdog(site):
    with drop_in(site, "[Service]\nWatchdogSec=1s\n"):
        pid = site.show("MainPID")
        seen = site.show("WatchdogTimestampMonotonic")

        for _ in range(4):
            seen = site.machine.wait(lambda seen=seen: (new := site.show("WatchdogTimestampMonotonic")) != seen and new)

        assert site.show("MainPID") == pid


@contextlib.contextmanager
def drop_in(site, content):
    """Run the service with more settings for a while."""
    path = f"/run/systemd/system/{UNIT}.d/test.conf"
    site.machine.write(path, content)
    site.sh(f"systemctl daemon-reload; systemctl restart {UNIT}")
    try:
        yield
    finally:
        site.sh(f"rm {path}; systemctl daemon-reload; systemctl restart {UNIT}")


def test_a_reload_takes_what_is_right_and_leaves_what_is_not(site):
    good = site.machine.path(CONFIG).read_text()
    pid = site.show("MainPID")

    site.machine.write(CONFIG, f"{good}\nconcurrency = 'many'\nnosuchkey = 1\n")
    site.machine.run("systemctl", "reload", UNIT)
    line = site.says("reload failed, the old configuration stays")
    assert "concurrency" in line
    assert "nosuchkey" in line
    assert site.show("ActiveState") == "active"
    assert any("the old configuration stays" in said for said in site.said(priority="3"))
    site.machine.write(CONFIG, good)
    site.machine.run("systemctl", "reload", UNIT)

    site.says("^up: 0 pending, 0 failed")
    site.arrive([site.enqueue()])
    assert site.show("MainPID") == pid


def test_it_stops_in_time_with_a_request_under_way(site):
    with drop_in(site, "[Service]\nTimeoutStopSec=10s\n"):
        site.stop_api()
        site.start_api("--latency", "600")
        version = site.enqueue()
        site.machine.wait(lambda: site.machine.run("sh", "-c", "ss -Htn state established dport = :8765").stdout)

        site.machine.run("systemctl", "stop", UNIT)

        assert site.show("Result") == "success"
        assert site.show("ExecMainStatus") == "0"
        site.machine.end(site.api, number=9)
        site.start_api()
    site.arrive([version])


def test_status_says_since_when_the_api_is_away(site):
    site.stop_api()
    versions = [site.enqueue() for _ in range(3)]

    site.says(r"^API unreachable since \d\d:\d\d, 3 pending, (next try in \d+ s|trying now)$")
    shown = site.machine.run("systemctl", "status", "--no-pager", UNIT).stdout.decode()
    assert 'Status: "API unreachable since ' in shown
    site.start_api()

    site.arrive(versions)
    site.says("^up: 0 pending, 0 failed")


def test_a_name_that_resolves_only_later_is_found(site):
    """As it is with a resolver that comes up after us; the outbox has nothing pending, so that it may move."""
    good = site.machine.path(CONFIG).read_text()
    hosts = site.machine.path("/etc/hosts").read_text()
    site.machine.write(CONFIG, "allow_insecure_http = true\n" + good.replace("127.0.0.1", RESOLVED_LATER))
    site.machine.run("systemctl", "restart", UNIT)
    version = site.enqueue()
    site.says("^API unreachable since ")

    site.machine.write("/etc/hosts", f"{hosts}127.0.0.1 {RESOLVED_LATER}\n")

    site.arrive([version])
    site.says("^up: 0 pending")
    site.machine.write("/etc/hosts", hosts)
    site.machine.write(CONFIG, good)
    site.machine.run("systemctl", "restart", UNIT)


def test_a_key_replaced_by_hand_is_taken_by_itself(site):
    """As configuration management does it; the API takes only the new one from now on."""
    site.stop_api()
    site.key = f"sk_acme_k2_{SECRET}"
    site.start_api()
    version = site.enqueue()
    site.says("^API key refused since ")
    pid = site.show("MainPID")

    site.machine.run("install", "-m", "600", "/dev/stdin", KEY_FILE, input=site.key.encode())
    site.restarted_since(pid)

    site.arrive([version])
    site.machine.wait(lambda: site.status()["agent"]["key"] == "sk_acme_k2_…")


def test_a_new_key_starts_nothing_that_somebody_stopped(site):
    site.machine.run("systemctl", "stop", UNIT)
    before = site.machine.show("versioner-agent-key.service", "InvocationID")

    site.machine.run("install", "-m", "600", "/dev/stdin", KEY_FILE, input=site.key.encode())
    site.machine.wait(lambda: site.machine.show("versioner-agent-key.service", "InvocationID") != before)
    site.machine.wait(lambda: site.machine.show("versioner-agent-key.service", "ActiveState") == "inactive")

    assert site.show("ActiveState") == "inactive"
    site.machine.run("systemctl", "start", UNIT)


def test_set_key_waits_for_the_verdict_and_keeps_a_key_that_works(site):
    refused = site.agent("service", "set-key", "-", input=f"sk_acme_k3_{SECRET}".encode(), check=False)
    assert refused.returncode == 4
    assert b"sk_acme_k3_" in refused.stderr + refused.stdout
    assert site.machine.path(KEY_FILE).read_text().strip() == site.key

    site.stop_api()
    site.key = f"sk_acme_k4_{SECRET}"
    site.start_api()
    taken = site.agent("service", "set-key", "-", input=site.key.encode())
    assert "sk_acme_k4_…" in (taken.stdout + taken.stderr).decode()
    assert SECRET.encode() not in taken.stdout + taken.stderr + refused.stdout + refused.stderr
    site.arrive([site.enqueue()])


def test_a_repeat_of_the_installation_changes_nothing(site):
    pid = site.show("MainPID")

    done = json.loads(site.agent("service", "install", "--now", "--json").stdout)

    assert done["changed"] is False
    assert site.show("MainPID") == pid


def test_an_upgrade_over_a_full_outbox_keeps_everything(site, wheels, tmp_path):
    site.stop_api()
    versions = [site.enqueue() for _ in range(5)]
    configuration = site.machine.path(CONFIG).read_text()
    pid = site.show("MainPID")
    newer = copy_of_the_repository(tmp_path)
    init = newer / "versioner_agent" / "__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', init.read_text()))
    pip = wheels.parent / "build" / "venv" / "bin" / "pip"
    subprocess.run([pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheels", newer], check=True)
    site.machine.put(tmp_path / "wheels", "/root/newer")

    site.sh("/opt/versioner-agent/bin/pip install --no-index --no-deps /root/newer/*.whl")
    assert "version 9.9.9 is installed" in site.says("restart due: ")
    assert site.show("MainPID") == pid
    done = json.loads(site.agent("service", "install", "--now", "--json").stdout)
    assert done["changed"] is True

    assert site.show("MainPID") != pid
    assert "restart due" not in site.says("^API unreachable")
    site.start_api()
    site.arrive(versions)
    assert site.machine.path(CONFIG).read_text() == configuration
    assert b"9.9.9" in site.agent("--version").stdout


def test_it_starts_with_the_machine_and_delivers_what_waits(site):
    site.stop_api()
    versions = [site.enqueue() for _ in range(3)]
    site.machine.halt()
    site.machine.boot()
    site.api = None
    assert site.show("ActiveState") == "active"

    site.start_api()

    site.arrive(versions)


def test_uninstalling_leaves_the_outbox_and_purging_asks_for_what_was_not_delivered(site):
    site.stop_api()
    site.enqueue()

    refused = site.agent("service", "uninstall", "--purge", check=False)
    assert refused.returncode == 2
    assert b"1 pending" in refused.stderr
    assert site.show("ActiveState") == "active"
    done = json.loads(site.agent("service", "uninstall", "--json").stdout)
    assert done["changed"] is True
    assert site.show("LoadState") == "not-found"
    assert not list(site.machine.path("/etc/systemd/system").rglob("versioner-agent*"))
    assert site.machine.path(f"{STATE}/outbox.db").exists()
    assert site.machine.path(KEY_FILE).exists()
    again = json.loads(site.machine.run(BIN, "service", "uninstall", "--json").stdout)
    assert again["changed"] is False

    refused = site.machine.run(BIN, "service", "uninstall", "--purge", check=False)
    assert refused.returncode == 2
    site.machine.run(BIN, "service", "uninstall", "--purge", "--yes")
    assert not site.machine.path(STATE).exists()
    assert not site.machine.path("/etc/versioner-agent").exists()


def test_a_user_has_one_of_their_own(site):
    """Under a manager of the user's, on a machine without the system's service."""
    machine = site.machine
    machine.run("useradd", "--create-home", "dev")
    uid = machine.run("id", "-u", "dev").stdout.decode().strip()
    runtime = f"/run/user/{uid}"
    machine.run("install", "-d", "-m", "700", "-o", "dev", runtime)
    machine.run("systemctl", "start", f"user@{uid}.service")
    how = {"user": "dev", "env": {"XDG_RUNTIME_DIR": runtime}}
    site.start_api()

    done = json.loads(machine.run(BIN, "service", "install", "--user", "--now", "--json", **how).stdout)
    assert done["changed"] is True
    config = machine.path("/home/dev/.config/versioner-agent/config.toml")
    config.write_text(f'api_url = "{API}"\n{config.read_text()}')
    machine.run("systemctl", "--user", "reload", UNIT, **how)
    machine.run(BIN, "service", "set-key", "--user", "-", input=site.key.encode(), **how)
    machine.run(BIN, "enqueue", "build", "--product", "own", "--version", "1.0.0-dev", user="dev")

    site.arrive(["1.0.0-dev"])
    shown = ("systemctl", "--user", "show", "--value", "-p", "StatusText", UNIT)
    machine.wait(lambda: machine.run(*shown, **how).stdout.startswith(b"up: 0 pending"))
    assert machine.path("/home/dev/.local/state/versioner-agent").stat().st_mode & 0o777 == 0o700
    machine.run("systemd-analyze", "--user", "verify", "--man=no", "--recursive-errors=no", UNIT, **how)
    machine.run(BIN, "service", "uninstall", "--user", "--purge", **how)
    assert not machine.path("/home/dev/.local/state/versioner-agent").exists()
