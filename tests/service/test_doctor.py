"""`doctor` names what is wrong: staged problems of this host, the outbox, the network and the API."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import json
import os
import signal
import socket
import sqlite3
import threading
import time

import pytest
from authority import Authority, needs_openssl
from host import KEY, eventually
from scripted import answer, closed, hanging, raw, refused

from versioner_agent import doctor, premises, probing, schema, servicing
from versioner_agent.findings import Finding, exit_code, ok, total
from versioner_agent.installed import Watch
from versioner_agent.ledger import Ledger
from versioner_agent.locks import QUEUE_SUFFIX, FlusherLock
from versioner_agent.machine import Machine, Ran
from versioner_agent.sdnotify import Notifier
from versioner_agent.storage import Store
from versioner_agent.vitals import Vitals

DAY_S = 86_400.0
PORTAL = b"<html><title>Welcome to Hotel Wi-Fi</title></html>"
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:30 / /mnt/my\\040share rw,relatime - nfs4 server:/export rw
24 22 0:31 / /run rw,nosuid - tmpfs tmpfs rw
25 22 0:32 / /srv rw - overlay overlay rw,lowerdir=/a
26 22 8:2 / /srv rw - xfs /dev/sdb1 rw
nonsense
"""


def api(health=None, event=None):
    """A script: what /health and an event are answered with."""
    health = health or answer(200, {"status": "ok"})
    event = event or refused(422, "product_name: field required")
    return lambda seen: health if seen.path.endswith("/health") else event


@pytest.fixture
def host(host_for, serve):
    server = serve(api())
    made = host_for(server.url)
    made.server = server
    return made


def examine(host, *args, code=None, **env):
    """Run doctor; returns its findings by check, the worst of each, and holds it to what it promises."""
    done = host.run("doctor", *args, "--json", **env)
    assert done.stderr == b"", done.stderr
    assert b"Traceback" not in done.stdout
    assert KEY.encode() not in done.stdout
    found = {}
    for each in (json.loads(line) for line in done.stdout.splitlines()):
        assert list(each) == list(Finding._fields)
        assert each["level"] == "ok" or each["finding"]
        if found.get(each["check"], {}).get("level") != "error":
            found[each["check"]] = each
    levels = {each["level"] for each in found.values()}
    has_damage = found.get("damage", {}).get("level") == "warning"
    assert done.returncode == int("error" in levels or has_damage)
    return found


def not_ok(found):
    """What was found besides the file system, for tests may lie in memory; that has tests of its own."""
    return {check: each["level"] for check, each in found.items() if each["level"] != "ok" and check != "file_system"}


# --- a host on which all is well


def test_a_sound_host_gets_no_advice(host):
    host.queue("payments")
    host.agent()
    eventually(lambda: host.health().state != "unknown")
    found = examine(host)

    assert not_ok(found) == {}
    assert {"configuration", "outbox", "permissions", "file_system", "free_space", "sqlite", "destination", "agent", "pending",
            "key", "proxy", "dns", "tcp", "tls", "health", "key_accepted"} <= set(found)  # fmt: skip
    assert "api_url http://127.0.0.1" in found["configuration"]["finding"]
    assert "(VERSIONER_API_URL)" in found["configuration"]["finding"]
    assert found["key"]["finding"] == "sk_acme_k1_… (VERSIONER_API_KEY)"
    assert found["key_accepted"]["finding"] == "the API takes the key (HTTP 422 to an empty event)"


def test_the_text_is_aligned_and_ends_with_a_sum(host):
    host.server.script = api(event=refused(401, "Invalid API key"))
    lines = host.run("doctor").stdout.decode().splitlines()

    assert lines[-1] in ("1 error", "1 error, 1 warning")  # the file system's, where tests lie in memory
    (at,) = [number for number, line in enumerate(lines) if line.startswith("error    key_accepted  ")]
    assert lines[at + 1].startswith(f"{'':<22} check the API key")


def test_offline_asks_nobody(host):
    found = examine(host, "--offline")

    assert not {"proxy", "dns", "tcp", "tls", "health", "key_accepted"} & set(found)
    assert host.server.requests == []


def test_trying_the_key_sends_one_empty_event_and_the_key_nowhere_else(host):
    examine(host)

    health, event = host.server.requests
    assert (health.method, health.path, "authorization" in health.headers) == ("GET", "/health", False)
    assert (event.method, event.path, event.body) == ("POST", "/build-events/", b"{}")
    assert event.headers["authorization"] == f"Bearer {KEY}"


def test_only_errors_and_unacknowledged_damage_make_it_exit_1():
    warning, error = Finding("x", "warning", "w", "do"), Finding("x", "error", "e", "do")

    assert exit_code([ok("x", "fine"), warning]) == 0
    assert exit_code([warning, error]) == 1
    assert exit_code([Finding("damage", "warning", "w")]) == 1
    assert total([ok("x", "fine")]) == "nothing to do"
    assert total([warning, error, error]) == "2 errors, 1 warning"


# --- configuration


def test_a_configuration_that_cannot_be_used_is_a_finding_and_the_rest_is_looked_at(host):
    host.queue("payments")
    host.config.write_text('concurency = 3\ntimeout = "soon"\n')
    done = host.run("doctor", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]

    assert done.returncode == 1
    problems = [each["finding"] for each in found if each["check"] == "configuration"]
    assert [f"{host.config}:1" in problems[0], f"{host.config}:2" in problems[1]] == [True, True]
    assert {each["check"]: each["finding"] for each in found}[
        "network"
    ] == "not looked at: timeout can't be used as it is configured"
    assert {each["check"]: each["level"] for each in found}["outbox"] == "ok"
    assert host.server.requests == []


def test_an_unreadable_configuration_sends_the_key_nowhere_and_looks_at_no_other_outbox(host):
    host.config.write_text("this is not TOML")
    found = examine(host, VERSIONER_AGENT_DB="", VERSIONER_API_URL="")

    assert found["configuration"]["level"] == "error"
    assert found["network"]["finding"].startswith("not looked at: api_url may be in a configuration file")
    assert found["outbox"]["finding"].startswith("not looked at: db ")
    assert host.server.requests == []


def test_a_ca_bundle_that_is_missing_is_named(host):
    found = examine(host, VERSIONER_AGENT_CA_BUNDLE="/nonexistent.pem")

    assert "ca_bundle: can't read certificates from /nonexistent.pem" in found["configuration"]["finding"]


# --- the outbox and its place


def test_a_damaged_file_is_named_and_left_as_it_is(host):
    host.queue("payments")
    host.close_outbox()
    with open(host.path, "r+b") as file:
        file.write(b"garbage" * 100)
    with open(host.path, "rb") as file:
        before = file.read()
    found = examine(host)

    assert found["outbox"]["level"] == "error"
    assert "is damaged" in found["outbox"]["finding"]
    with open(host.path, "rb") as file:
        assert file.read() == before


def test_past_damage_exits_1_until_it_is_acknowledged(host):
    host.queue("payments")
    host.close_outbox()
    with open(host.path, "r+b") as file:
        file.write(b"garbage" * 10)
    host.run("flush", "--timeout", "0")
    found = examine(host)
    done = host.run("doctor", "--acknowledge")

    assert found["damage"]["level"] == "warning"
    assert "doctor --acknowledge" in found["damage"]["action"]
    assert done.returncode == 0
    assert "damage" not in examine(host)


def test_an_outbox_of_a_newer_schema_is_named(host):
    host.queue("payments")
    host.close_outbox()
    alter(host.path, f"PRAGMA user_version = {schema.VERSION + 1}")

    assert "events are queued and not delivered" in examine(host)["outbox"]["finding"]


@pytest.mark.parametrize("version", range(1, schema.VERSION))
def test_an_outbox_that_its_agent_has_not_upgraded_yet_is_looked_at(host_for, version):
    host = host_for()
    make_older(host.path, version)
    found = examine(host, "--offline")
    done = host.run("doctor", "--acknowledge")

    assert list(not_ok(found)) == ["outbox"]
    assert found["outbox"]["level"] == "warning"
    assert "restart the agent, which upgrades it" in found["outbox"]["action"]
    assert {"outbox", "sqlite", "destination", "agent", "pending"} <= set(found)
    assert done.returncode == 0


def test_a_directory_that_is_missing_is_named(host):
    found = examine(host, "--offline", VERSIONER_AGENT_DB=str(host.directory / "gone" / "outbox.db"))

    assert found["permissions"]["finding"] == f"there is no directory {host.directory}/gone"


def test_an_outbox_that_nobody_has_made_yet_is_no_problem(host):
    assert not_ok(examine(host, "--offline")) == {}


@pytest.mark.parametrize(
    ("directory", "file", "level", "words"),
    [
        (0o777, 0o600, "warning", "anybody can delete or replace"),
        (0o770, 0o600, "warning", "a group can write"),
        (0o2770, 0o600, "error", "closed to the group"),
        (0o700, 0o604, "warning", "anybody on this host can read"),
    ],
)
def test_wrong_permissions_are_named_with_the_command_that_corrects_them(host, directory, file, level, words):
    host.queue("payments")
    os.chmod(os.path.dirname(host.path), directory)
    os.chmod(host.path, file)
    found = examine(host, "--offline")["permissions"]

    assert found["level"] == level
    assert words in found["finding"]
    assert found["action"].startswith(("chmod", "chgrp"))


def test_what_this_user_cannot_write_is_named(unprivileged):
    place = unprivileged / "state"
    place.mkdir()
    (place / "outbox.db").write_bytes(b"")
    (place / "outbox.db").chmod(0o400)
    (found,) = [
        each for each in premises.examine(str(place / "outbox.db"), is_named=True) if each.check == "permissions"
    ]
    place.chmod(0o500)
    (closed_,) = [
        each for each in premises.examine(str(place / "outbox.db"), is_named=True) if each.check == "permissions"
    ]
    place.chmod(0o700)

    assert (found.level, closed_.level) == ("error", "error")
    assert "can't be written" in found.finding
    assert "Permission denied" in closed_.finding


@pytest.mark.parametrize(
    ("directory", "level", "words"),
    [
        ("/mnt/my share/outbox", "warning", "nfs4 (mounted at /mnt/my share), a network file system"),
        ("/run/outbox", "warning", "in memory: events are lost with a reboot"),
        ("/srv", "ok", "/srv is on xfs"),
        ("/srvother", "ok", "ext4 (mounted at /)"),
        ("/var/lib/versioner-agent", "ok", "ext4"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(directory, level, words):
    found = premises.file_system(directory, MOUNTS)

    assert found.level == level
    assert words in found.finding


def test_a_layer_over_an_image_and_a_table_that_tells_nothing():
    table = MOUNTS.replace("26 22 8:2 / /srv rw - xfs /dev/sdb1 rw\n", "")

    assert "lost with the container" in premises.file_system("/srv/x", table).finding
    assert premises.file_system("/srv/x", "").level == "warning"


@pytest.mark.parametrize(
    ("free", "total_", "inodes", "level"),
    [
        (10**10, 10**11, 10**6, "ok"), (10**10, 10**11, None, "ok"), (50 * 2**20, 10**9, None, "warning"),
        (10**9, 10**11, None, "warning"), (10**10, 10**11, 5, "warning"), (10**5, 10**11, None, "error"), (10**10, 10**11, 0, "error"),
    ],
)  # fmt: skip
def test_free_space_is_judged_by_size_share_and_inodes(free, total_, inodes, level):
    assert premises.space(free, total_, inodes).level == level


def test_a_failing_disk_is_a_finding(host, monkeypatch):
    host.queue("payments")

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(premises.os, "lstat", fail)
    monkeypatch.setattr(premises.os, "statvfs", fail)
    found = {each.check: each for each in premises.examine(os.path.realpath(host.path), is_named=True)}

    assert found["permissions"].level == "error"
    assert "Input/output error" in found["permissions"].finding
    assert found["free_space"].level == "warning"


def test_a_disk_that_was_mounted_again_read_only_is_called_that(host, monkeypatch):
    """access(2) refuses it as it does a permission, which would send people to chmod."""
    host.queue("payments")
    whole = os.statvfs

    def read_only(path):
        found = whole(path)
        return os.statvfs_result((*found[:8], found.f_flag | os.ST_RDONLY, found.f_namemax))

    monkeypatch.setattr(os, "statvfs", read_only)
    (found,) = (each for each in premises.examine(os.path.realpath(host.path), is_named=True) if each.level == "error")

    assert (found.check, found.finding.rpartition(": ")[2]) == ("permissions", "Read-only file system")


def test_a_read_only_view_of_a_disk_that_others_write_to_is_no_read_only_disk(monkeypatch, tmp_path):
    """As of a service with ProtectSystem=strict."""
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(premises, "MOUNTS", str(table))
    for view, whole, expected in (("ro", "rw", False), ("rw", "ro", True), ("rw", "rw,emergency_ro", True)):
        table.write_text(f"30 22 8:1 / / {view},relatime shared:1 - ext4 /dev/sda1 {whole}\n")
        assert premises.is_read_only("/var/lib") is expected


# --- other processes, and what waits


def test_who_keeps_the_outbox_locked_is_named(host, child):
    host.queue("payments")
    code = "import sys; from versioner_agent.locks import WriteQueue; q = WriteQueue(sys.argv[1]); q.acquire(5); print('held'); input()"
    holder = child(code, host.path + QUEUE_SUFFIX)
    assert holder.says() == "held"
    found = examine(host, "--offline", VERSIONER_AGENT_BUSY_TIMEOUT="0.2")

    assert found["outbox"]["level"] == "error"
    assert f"locked by pid {holder.process.pid} (" in found["outbox"]["finding"]


def test_a_lock_that_waits_or_is_on_another_file_names_nobody():
    table = "1: FLOCK  ADVISORY  WRITE 7 08:01:99 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 8 08:01:99 0 EOF\n2: OFDLCK ADVISORY  WRITE -1 08:01:99 0 0\n"

    assert premises.lockers(table, {"08:01:99"}) == {7}
    assert premises.lockers(table, {"08:01:98"}) == set()


def test_an_agent_that_is_stopped_is_named(host):
    process = host.agent()
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: premises.is_stopped(process.pid))
    found = examine(host)["agent"]
    status = host.run("status").stdout.decode()
    process.send_signal(signal.SIGCONT)

    assert found["level"] == "error"
    assert found["action"] == f"kill -CONT {process.pid}"
    assert f"STOPPED by a signal (pid {process.pid}): `kill -CONT {process.pid}`" in status


def test_an_agent_that_died_leaves_events_that_wait_and_says_so(host):
    process = host.agent()
    host.end(process, signal.SIGKILL)
    host.queue("payments")

    found = examine(host)
    assert found["agent"]["level"] == "warning"
    assert found["agent"]["finding"] == "none runs, and 1 pending"


def test_an_agent_that_holds_the_lock_and_tries_nothing_is_named(host, child):
    """Something waits for two hours, and whoever holds the lock has not shown since."""
    host.queue("payments")
    host.close_outbox()
    code = "import sys; from versioner_agent.locks import FlusherLock; l = FlusherLock(sys.argv[1]); l.claim_agent(); print('held'); input()"
    assert child(code, host.path).says() == "held"
    alter(host.path, f"UPDATE record SET queued_at = {time.time() - 7200}")
    os.utime(f"{host.path}.flusher", (time.time() - 7200,) * 2)
    found = examine(host)

    assert found["agent"]["level"] == "error"
    assert "has tried nothing for 2 h, 1 pending" in found["agent"]["finding"]
    assert b"the agent has tried nothing for 2 h" in host.run("check").stdout
    assert found["pending"]["level"] == "warning"


def test_an_agent_whose_events_wait_for_a_receipt_is_not_to_be_restarted(host):
    """Behind an exported record its product waits for the far side, not for the agent."""
    host.queue("payments", 2)
    host.close_outbox()
    alter(host.path, f"UPDATE record SET queued_at = {time.time() - 7200}")
    alter(host.path, "UPDATE record SET state = 'exported', batch = -1 WHERE id = 1")
    host.agent()
    os.utime(f"{host.path}.flusher", (time.time() - 7200,) * 2)

    assert examine(host)["agent"]["level"] == "ok"
    assert host.run("check", "--age-warning", "none").returncode == 0


def test_an_agent_that_has_lent_delivering_for_long_is_not_to_be_restarted(host):
    """A million events take their time on a slow stick."""
    host.queue("payments")
    host.close_outbox()
    alter(host.path, f"UPDATE record SET queued_at = {time.time() - 7200}")
    lock = FlusherLock(host.path)
    assert lock.claim_borrow()
    host.start("run")
    eventually(lambda: host.presence().has_agent)
    os.utime(f"{host.path}.flusher", (time.time() - 7200,) * 2)

    found = examine(host)["agent"]
    checked = host.run("check", "--age-warning", "none")
    lock.close()

    assert (found["level"], f"lent to an export (pid {os.getpid()})" in found["finding"]) == ("ok", True)
    assert checked.returncode == 0, checked.stdout


def test_an_idle_agent_shows_that_it_would_try(host):
    """Else what is imported or retried after a quiet hour, queued long ago, looks as if an agent that hangs had it."""
    host.queue("payments")
    lock, idle, signs = FlusherLock(host.path), [False], []
    assert lock.claim_agent()
    with contextlib.closing(Store(host.path)) as store:
        vitals = Vitals(Notifier({}), Ledger(store), lock, Watch(), lambda: None, lambda: "", lambda _: idle[-1])
        vitals.tell(1000.0)
        for now, is_idle in ((1100.0, False), (1102.0, True), (1104.0, True), (1164.0, True)):
            idle.append(is_idle)
            os.utime(lock.path, (1, 1))
            vitals.tell(now)
            signs.append(os.stat(lock.path).st_mtime > 1)
    lock.close()

    assert signs == [False, True, False, True]


def test_a_destination_that_needs_a_person_is_an_error_while_events_wait(host):
    host.queue("payments")
    host.close_outbox()
    alter(host.path, "UPDATE destination SET origin = 'https://a.example', state = 'misrouted', reason = 'a page'")
    wrong = examine(host, "--offline")["destination"]
    alter(host.path, f"UPDATE destination SET origin = 'http://127.0.0.1:{host.server.port}'")
    waiting = examine(host, "--offline")["destination"]

    assert (wrong["level"], waiting["level"]) == ("error", "error")
    assert "1 pending events are for https://a.example" in wrong["finding"]
    assert "misrouted: a page" in waiting["finding"]


def test_exports_without_a_receipt_are_told_after_a_month(host):
    host.queue("payments", 2)
    host.close_outbox()
    for number, days in enumerate((40, 10), start=1):
        alter(
            host.path,
            f"INSERT INTO export (uid, created_at, state) VALUES ('{number}', {time.time() - days * DAY_S}, 'marked')",
        )
        alter(host.path, f"UPDATE record SET state = 'exported', batch = -{number} WHERE id = {number}")

    assert examine(host, "--offline")["exports"]["finding"] == "1 exported batch has no receipt, the oldest for 40 d"


# --- another machine


@pytest.fixture
def elsewhere(host):
    """An outbox with an event in it, made on another machine."""
    host.queue("payments")
    host.close_outbox()
    alter(host.path, f"UPDATE outbox SET machine = '{'0' * 32}'")
    return host


def test_an_outbox_made_on_another_machine_is_told_until_it_is_acknowledged(elsewhere):
    found = examine(elsewhere)
    (status,) = elsewhere.json("status")
    text = elsewhere.run("status").stdout
    elsewhere.agent()
    said = eventually(lambda: elsewhere.said() if b"made on another machine" in elsewhere.said() else b"")
    done = elsewhere.run("doctor", "--acknowledge", "--json")

    assert found["machine"]["level"] == "warning"
    assert "1 pending here may be delivered from there too" in found["machine"]["finding"]
    assert status["outbox"]["other_machine"] is True
    assert b"made on another machine" in text
    assert b"warning" in said
    assert [json.loads(line)["check"] for line in done.stdout.splitlines()] == ["damage", "machine"]
    assert "machine" not in examine(elsewhere)
    assert elsewhere.json("status")[0]["outbox"]["other_machine"] is False


def test_a_machine_or_an_outbox_without_a_name_says_nothing(host, monkeypatch):
    host.queue("payments")
    host.close_outbox()
    alter(host.path, "UPDATE outbox SET machine = NULL")

    assert "machine" not in examine(host, "--offline")
    assert host.json("status")[0]["outbox"]["other_machine"] is False


def test_who_delivers_notes_the_machine_in_an_outbox_that_does_not_know_it(host):
    host.queue("payments")
    host.close_outbox()
    before = machine_of(host.path)
    alter(host.path, "UPDATE outbox SET machine = NULL")
    host.run("flush", "--timeout", "0")

    assert machine_of(host.path) == before


# --- the key


def test_a_key_that_is_missing_malformed_or_open_to_others_is_named(host):
    file = host.directory / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    missing = examine(host, VERSIONER_API_KEY="")["key"]
    offline = examine(host, "--offline", VERSIONER_API_KEY="")["key"]
    malformed = examine(host, "--offline", VERSIONER_API_KEY="hunter2hunter2")["key"]
    garbage = examine(host, "--offline", VERSIONER_API_KEY="sk_acme_k1 _x")["key"]
    gone = examine(host, "--offline", VERSIONER_API_KEY="", VERSIONER_AGENT_API_KEY_FILE=str(file) + "s")["key"]

    assert (missing["level"], offline["level"]) == ("error", "warning")
    assert malformed["finding"] == "the key in VERSIONER_API_KEY is not of the form sk_ACCOUNT_…"
    assert "holds characters that no key has" in garbage["finding"]
    assert "does not exist" in gone["finding"]
    (host.directory / "empty").touch()
    empty = examine(host, VERSIONER_API_KEY="", VERSIONER_AGENT_API_KEY_FILE=str(host.directory / "empty"))["key"]
    assert (empty["level"], empty["finding"].partition(" (")[2]) == ("error", f"{host.directory}/empty is empty)")
    shown = host.run(
        "doctor", "--offline", VERSIONER_API_KEY="", VERSIONER_AGENT_API_KEY_FILE=str(file)
    ).stdout.decode()
    assert "can be read by others than its owner (mode 0644)" in shown
    assert KEY not in shown


def test_the_services_key_is_looked_for_where_the_outbox_is_the_services(host, tmp_path):
    state = os.path.dirname(os.path.realpath(host.path))
    (tmp_path / "api_key").write_text(f"{KEY}\n")
    case = doctor.case_of({}, {**host.env, "VERSIONER_API_KEY": ""}, None)
    service = doctor.layout.SYSTEM._replace(state=state, key=str(tmp_path / "api_key"))

    assert doctor.key_of(case, service) == doctor.Key(KEY, str(tmp_path / "api_key"))
    assert doctor.key_of(case).key is None


def test_an_outbox_on_another_disk_is_the_services_where_its_configuration_says_so(host, tmp_path):
    (tmp_path / "api_key").write_text(f"{KEY}\n")
    service = doctor.layout.SYSTEM._replace(config=str(host.config), key=str(tmp_path / "api_key"))
    host.config.write_text(f'db = "{host.path}"\n')
    env = {**host.env, "VERSIONER_API_KEY": ""}
    case = doctor.case_of({}, env, None)

    assert doctor.key_of(case, service) == doctor.Key(KEY, service.key)
    assert not doctor.is_services(doctor.case_of({"db": host.path + "s"}, env, None), service)
    assert not doctor.is_services(case)


def test_the_services_way_is_that_of_its_unit_and_not_of_the_shell(host):
    unit = {"VERSIONER_API_URL": "https://other.example", "https_proxy": "http://units:1", "VERSIONER_AGENT_DB": "/x",
            "VERSIONER_AGENT_CONFIG": "/x", "HOME": "/x"}  # fmt: skip
    case = doctor.case_of({}, {**host.env, "HTTPS_PROXY": "http://shells:1", "no_proxy": "*"}, None)
    env = doctor.environment_of(case, unit)

    assert {name for name, value in env.items() if host.env.get(name) != value} == {"VERSIONER_API_URL", "https_proxy"}
    assert "VERSIONER_API_KEY" not in env
    assert env["https_proxy"] == "http://units:1"
    assert doctor.environment_of(case, {}) == case.env


def test_a_member_who_cannot_see_the_key_is_told_which_one_the_agent_uses(host):
    host.agent()
    eventually(lambda: host.presence().agent_key)
    found = examine(host, VERSIONER_API_KEY="")

    assert found["key"]["finding"] == "the agent uses sk_acme_k1_…; not looked at here (root can)"
    assert not_ok(found) == {}


def test_a_member_is_sent_to_root_for_the_services_key(unprivileged):
    case = doctor.Case(doctor.Settings({"api_key_file": None}, {"api_key_file": "x"}), {}, [], [])
    nobody = FlusherLock(str(unprivileged / "outbox.db")).presence()
    (found,) = doctor.key(case, doctor.Key(None, doctor.layout.SYSTEM.key, "can't read it"), nobody, offline=False)

    assert (found.level, found.action) == ("warning", "sudo versioner-agent doctor")


@pytest.mark.parametrize(
    ("reaction", "level", "words"),
    [
        (refused(401, "Invalid API key"), "error", "the API refuses the key (HTTP 401: Invalid API key)"),
        (refused(403, "no write access"), "error", "refuses the key"),
        (refused(400, "bad"), "ok", "takes the key"),
        (refused(503, "busy"), "warning", "says nothing of the key (HTTP 503: busy)"),
        (answer(200, {"id": "evt-1"}), "warning", "says nothing of the key (HTTP 200)"),
        (refused(404, "Not Found"), "error", "the event API is not there: HTTP 404"),
        (answer(403, PORTAL), "error", "the event API is not there"),
        (refused(401, f"bad key {KEY}"), "error", "bad key ***"),
        (closed(), "warning", "no answer"),
    ],
)  # fmt: skip
def test_what_the_api_says_of_the_key(host, reaction, level, words):
    host.server.script = api(event=reaction)
    found = examine(host)["key_accepted"]

    assert found["level"] == level
    assert words in found["finding"]


# --- the network


def test_a_name_that_nobody_knows_is_named_and_nothing_after_it_is_tried(host):
    found = examine(host, VERSIONER_API_URL="https://api.nowhere.invalid")

    assert found["dns"]["level"] == "error"
    assert "api.nowhere.invalid" in found["dns"]["finding"]
    assert not {"tcp", "tls", "health", "key_accepted"} & set(found)


def test_a_resolver_that_hangs_ends_in_time(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(60))
    monkeypatch.setattr(probing, "STEP_S", 0.1)
    found, addresses = probing._dns(probing.Way("api.example", 443))
    release.set()

    assert addresses == []
    assert found[0].finding == "the name api.example was not resolved in time"


def test_a_closed_port_is_named_with_its_address(host):
    host.server.stop()
    found = examine(host)

    assert found["tcp"]["level"] == "error"
    assert f"127.0.0.1 port {host.server.port}: Connection refused" in found["tcp"]["finding"]
    assert "health" not in found


def test_one_address_of_several_that_does_not_answer_is_a_warning(host):
    found = probing._tcp(probing.Way("api", host.server.port), ["127.0.0.1", "127.0.0.2"])

    assert found.level == "warning"
    assert "127.0.0.2" in found.finding


@pytest.mark.parametrize(
    ("reaction", "level", "words"),
    [
        (answer(500, {"detail": "oops"}), "warning", "/health answers HTTP 500"),
        (answer(404, {"detail": "Not Found"}), "warning", "/health answers HTTP 404"),
        (answer(200, PORTAL), "error", "what answers is not the API: HTTP 200 with text/html"),
        (answer(302, b"", location="http://wifi.example/login"), "error", "redirected to http://wifi.example/login"),
        (answer(511, PORTAL), "error", "what answers is not the API"),
        (hanging(), "error", "no complete answer"),
        (raw(b"\x00\x01garbage\r\n\r\n"), "error", "not HTTP"),
        (answer(200, b"{" * 100_000), "error", "what answers is not the API"),
    ],
)
def test_what_answers_in_place_of_the_api_gets_no_key(host, reaction, level, words):
    host.server.script = api(health=reaction)
    found = examine(host, VERSIONER_AGENT_TIMEOUT="1")

    assert found["health"]["level"] == level
    assert words in found["health"]["finding"]
    if level == "error":
        assert not [seen for seen in host.server.requests if "authorization" in seen.headers]


@pytest.mark.parametrize(
    ("ahead_s", "level", "words"),
    [(0, "ok", ""), (900, "warning", "ahead of"), (-900, "warning", "behind"), (90 * DAY_S, "error", "90 d ahead of")],
)
def test_the_clock_is_held_against_the_apis(host, ahead_s, level, words):
    date = email.utils.formatdate(time.time() - ahead_s - 2, usegmt=True)
    host.server.script = api(health=answer(200, {"status": "ok"}, date=date))
    found = examine(host)["clock"]

    assert found["level"] == level
    assert words in found["finding"]


def test_a_clock_before_this_program_was_made_is_wrong():
    (found,) = doctor.clock(0.0)

    assert found.level == "error"
    assert "1970-01-01" in found.finding


def test_a_proxy_is_named_with_its_variable_and_without_its_password(host, serve):
    proxy = serve(lambda _: refused(407, "who are you?"))
    url = f"http://user:pa55word@127.0.0.1:{proxy.port}"
    where = {"VERSIONER_API_URL": "https://api.example", "https_proxy": url}
    done = host.run("doctor", "--json", **where)
    found = examine(host, **where)

    assert found["proxy"]["finding"] == f"http://***@127.0.0.1:{proxy.port} (https_proxy)"
    assert found["health"]["level"] == "error"
    assert "refused: 407" in found["health"]["finding"]
    assert "proxy" in found["health"]["action"]
    assert b"pa55word" not in done.stdout
    assert not [seen for seen in proxy.requests if KEY in str(seen)]


@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTPS_PROXY"])
def test_a_proxy_that_is_down_is_named(host, variable):
    host.server.stop()
    where = f"127.0.0.1:{host.server.port}"
    found = examine(host, VERSIONER_API_URL="https://api.example", **{variable: where})

    assert found["proxy"]["finding"] == f"http://{where} ({variable})"
    assert found["tcp"]["level"] == "error"
    assert found["tcp"]["finding"].endswith(": Connection refused (the proxy's)")
    assert "whether the proxy runs" in found["tcp"]["action"]


# --- TLS


@pytest.fixture
def authority(tmp_path):
    place = tmp_path / "authority"
    place.mkdir()
    return Authority(place)


@needs_openssl
@pytest.mark.parametrize(
    ("names", "days", "is_known", "level", "words", "action"),
    [
        (["IP:127.0.0.1"], 90, True, "ok", "certificate issued by Example, Example Test Authority, valid for 89 d", ""),
        (["IP:127.0.0.1"], 10, True, "warning", "valid for 9 d", "have it renewed"),
        (["IP:127.0.0.1"], -1, True, "error", "certificate has expired", "have it renewed"),
        (["IP:127.0.0.1"], 90, False, "error", "(issued by Example Test Authority) is not trusted", "ca_bundle"),
        (["DNS:other.example"], 90, True, "error", "is not trusted", "correct api_url"),
    ],
)
def test_certificates(host_for, serve, authority, names, days, is_known, level, words, action):
    server = serve(api(), tls=authority.context(names=names, days=days))
    host = host_for(server.url)
    trusted = {"VERSIONER_AGENT_CA_BUNDLE": str(authority.certificate)} if is_known else {}
    found = examine(host, **trusted)

    assert found["tls"]["level"] == level
    assert words in found["tls"]["finding"]
    assert action in found["tls"]["action"]
    assert ("key_accepted" in found) == (level != "error")
    assert [seen.path for seen in server.requests] == (["/health", "/build-events/"] if level != "error" else [])


def test_a_port_without_tls_is_no_matter_of_certificates(host):
    def answer_in_plain():
        for _ in ("the look at TCP", "the look at TLS"):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                while connection.recv(4096):  # or it would be reset before the answer is read
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_in_plain, daemon=True)
        thread.start()
        found = examine(host, VERSIONER_API_URL=f"https://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(30)

    assert found["tls"]["level"] == "error"
    assert "does not speak TLS" in found["tls"]["action"]


# --- the service

SHOWN = {
    "LoadState": "loaded", "UnitFileState": "enabled", "ActiveState": "active", "SubState": "running", "NRestarts": "0",
    "StatusText": "up: 0 pending", "NeedDaemonReload": "no",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "ok", "active (running): up: 0 pending"),
        ({"NRestarts": "4"}, "ok", "restarted 4 times"),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, "error", "activating (auto-restart)"),
        ({"ActiveState": "inactive", "SubState": "dead"}, "error", "inactive"),
        ({"LoadState": "masked"}, "error", "masked"),
        ({"StatusText": "up; restart due: version 9 is installed, 8 is running"}, "warning", "restart due"),
        ({"NeedDaemonReload": "yes"}, "warning", "changed on disk"),
        ({"UnitFileState": "disabled"}, "warning", "does not start at boot"),
    ],
)
def test_the_unit_is_judged_by_what_systemd_says(change, level, words):
    found = servicing.judged({**SHOWN, **change})

    assert found.level == level
    assert words in found.finding
    assert bool(found.action) == (level != "ok")


def test_what_a_stopped_service_said_last_is_not_told():
    found = servicing.judged(
        {**SHOWN, "ActiveState": "inactive", "SubState": "dead", "StatusText": "stopping: waiting"}
    )

    assert found.finding == "versioner-agent.service is inactive (dead)"


@pytest.mark.parametrize(
    ("ran", "levels"),
    [
        (Ran(0, "LoadState=not-found\nActiveState=inactive\n"), []),
        (Ran(1, err="Failed to connect to bus"), ["warning"]),
        (Ran(0, "".join(f"{name}={value}\n" for name, value in SHOWN.items())), ["ok"]),
    ],
)
def test_a_service_that_is_not_there_is_no_finding(ran, levels):
    machine = Machine(run=lambda _: ran, account=lambda *_: None, is_root=True, has_systemd=True)

    assert [each.level for each in servicing.examine(machine)] == levels
    assert servicing.examine(machine._replace(has_systemd=False)) == []


# --- helpers


def alter(path, statement):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def machine_of(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT machine FROM outbox").fetchone()[0]


def make_older(path, version):
    """An outbox as an earlier release made it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size = 4096")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for statement in schema.statements(version):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {version}")
    os.chmod(path, 0o600)
    with contextlib.closing(Store(path)) as store, store.write():
        pass
