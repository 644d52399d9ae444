"""`service set-key`: tried on the API before it replaces a key, stored for root alone, and shown nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
from host import free_port
from pretend import NO_COMMANDS, OLD_KEY, changes, command, tree, work
from scripted import accepted, answer, refused

from versioner_agent import Outbox, layout, removal, service_key, servicing, shipped, steps
from versioner_agent.errors import AgentError, OtherDestination, UsageError
from versioner_agent.ledger import Ledger
from versioner_agent.outcomes import Outcome, no_key
from versioner_agent.storage import Store

pytestmark = pytest.mark.usefixtures("usual_umask")
KEY = "sk_acme_k2_brandnewsecret"
CREDENTIALS = "etc/versioner-agent/credentials"


@pytest.fixture
def machine(installed):
    return installed


def configure(machine, url, more=""):
    with open(machine.at(layout.SYSTEM.config), "w", encoding="utf-8") as file:
        file.write(f'api_url = "{url}"\n{more}')


def stored(machine):
    with open(machine.at(layout.SYSTEM.key), encoding="utf-8") as file:
        return file.read()


def set_key(machine, key=KEY, *, timeout=1.0, force=False, dry_run=False):
    done = work(dry_run=dry_run)
    settings = service_key.settings_of(machine.site, os.environ)
    verdict = service_key.set_key(
        machine.site, done, key, settings=settings, env=os.environ, timeout=timeout, force=force
    )
    return verdict, done


@pytest.fixture
def _takes_keys(machine, monkeypatch):
    """A service that has the key which is stored, as systemd sees to."""
    monkeypatch.setattr(service_key, "CREDENTIAL", layout.SYSTEM.key)


# What the API says.


@pytest.mark.parametrize(
    ("reaction", "word", "is_stored"),
    [
        (refused(422, "product_name: field required"), "accepted", True),
        (refused(400, "bad event"), "accepted", True),
        (refused(401, "Invalid API key"), "refused", False),
        (refused(402, "payment required"), "refused", False),
        (refused(403, "revoked"), "refused", False),
        (answer(401, b"<html>log in</html>"), "none", True),
        (answer(422, b"<html>what?</html>"), "none", True),
        (refused(413, "too large"), "none", True),
        (refused(503, "maintenance"), "none", True),
        (refused(429, "slow down"), "none", True),
        (refused(404, "not found"), "none", True),
        (answer(200, b"<html>welcome</html>"), "none", True),
    ],
)
@pytest.mark.usefixtures("_takes_keys")
def test_only_the_apis_own_refusal_keeps_a_key_out(machine, serve, reaction, word, is_stored):
    server = serve(lambda _: reaction)
    configure(machine, server.url)
    verdict, done = set_key(machine)

    assert verdict.word == word
    assert stored(machine) == (f"{KEY}\n" if is_stored else f"{OLD_KEY}\n")
    assert done.changed == is_stored
    assert {seen.headers["authorization"] for seen in server.requests} == {f"Bearer {KEY}"}


@pytest.mark.usefixtures("_takes_keys")
def test_nothing_that_creates_an_event_is_sent(machine, serve):
    server = serve(lambda _: refused(422, "field required"))
    configure(machine, server.url)
    set_key(machine)
    (seen,) = server.requests

    assert (seen.method, seen.path, seen.body) == ("POST", "/build-events/", b"{}")


@pytest.mark.usefixtures("_takes_keys")
def test_no_server_is_no_verdict(machine):
    configure(machine, f"http://127.0.0.1:{free_port()}")
    verdict, _ = set_key(machine)

    assert verdict.word == "none"
    assert "can't connect" in verdict.detail
    assert stored(machine) == f"{KEY}\n"


def test_the_api_is_asked_again_after_pauses_that_grow(machine, serve):
    server = serve(lambda seen: refused(503, "wait") if seen.number < 3 else refused(422, "field required"))
    configure(machine, server.url)
    pauses = []
    settings = service_key.settings_of(machine.site, os.environ)
    verdict = service_key.ask(settings, KEY, os.environ, 60.0, pause=pauses.append)

    assert verdict.word == "accepted"
    assert pauses == [0.5, 1.0, 2.0]


def test_what_was_not_sent_is_no_verdict():
    assert service_key.verdict_of(no_key("there is none")) == "none"
    assert service_key.verdict_of(Outcome("delivered", "", http_status=201)) == "accepted"


def test_force_stores_what_the_api_refuses(machine, serve, monkeypatch):
    monkeypatch.setattr(service_key, "CREDENTIAL", layout.SYSTEM.key)
    configure(machine, serve(lambda _: refused(401, "Invalid API key")).url)
    verdict, _ = set_key(machine, force=True)

    assert verdict.word == "refused"
    assert stored(machine) == f"{KEY}\n"


def test_the_services_settings_are_used_and_not_the_callers(machine, serve, monkeypatch):
    monkeypatch.setattr(service_key, "CREDENTIAL", layout.SYSTEM.key)
    server, other = serve(lambda _: refused(422, "field required")), serve()
    configure(machine, server.url)
    monkeypatch.setenv("VERSIONER_API_URL", other.url)
    monkeypatch.setenv("VERSIONER_API_KEY", "sk_other_k9_callers")
    set_key(machine)

    assert len(server.requests) == 1
    assert other.requests == []


# Accounts.


def bound_outbox(machine, account):
    path = machine.at("/var/lib/versioner-agent/outbox.db")
    with Outbox(path) as outbox:
        outbox.enqueue("build", {"product_name": "p", "version": "1", "status": "completed"})
    with contextlib.closing(Store(path)) as store, store.write() as connection:
        connection.execute("UPDATE destination SET origin = 'https://api.versioner.io', account = ?", (account,))
    return path


def test_the_key_of_another_account_than_events_wait_for_is_refused(machine, serve):
    server = serve()
    configure(machine, server.url)
    path = bound_outbox(machine, "globex")
    with pytest.raises(OtherDestination, match=r"account globex \(1 pending\).*account acme") as caught:
        set_key(machine)

    assert caught.value.exit_code == 3
    assert "brandnewsecret" not in caught.value.message
    assert server.requests == []
    assert stored(machine) == f"{OLD_KEY}\n"
    with contextlib.closing(Store(path)) as store:
        assert Ledger(store).destination()[0].account == "globex"


@pytest.mark.parametrize(("account", "force"), [("acme", False), (None, False), ("globex", True)])
@pytest.mark.usefixtures("_takes_keys")
def test_a_key_of_the_same_account_or_a_forced_one_is_tried(machine, serve, account, force):
    server = serve(lambda _: refused(422, "field required"))
    configure(machine, server.url)
    bound_outbox(machine, account)

    assert set_key(machine, force=force)[0].word == "accepted"


# Storing, and the service that runs.


@pytest.mark.usefixtures("_takes_keys")
def test_a_key_is_stored_for_root_alone_and_nothing_is_left_beside_it(machine, serve):
    configure(machine, serve(lambda _: refused(422, "field required")).url)
    set_key(machine)

    assert tree(machine.at(f"/{CREDENTIALS}")) == {"api_key": ("file", 0o600, f"{KEY}\n".encode())}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_key_is_replaced_as_a_whole_or_not_at_all(machine, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steps.os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        steps.replace(machine.at(layout.SYSTEM.key), KEY.encode(), 0o600)

    assert tree(machine.at(f"/{CREDENTIALS}")) == {"api_key": ("file", 0o600, f"{OLD_KEY}\n".encode())}


def test_a_key_is_never_readable_for_others_on_its_way(machine, monkeypatch):
    modes = []
    fsync = os.fsync

    def watched(fd):
        modes.append(os.fstat(fd).st_mode & 0o777)
        fsync(fd)

    monkeypatch.setattr(steps.os, "fsync", watched)
    monkeypatch.setattr(steps.os, "fchmod", lambda *_: modes.append(0o600))
    os.umask(0)
    steps.replace(machine.at(layout.SYSTEM.key), KEY.encode(), 0o600)

    assert modes[:2] == [0o600, 0o600]


def test_a_disk_that_is_full_is_told_in_words(machine, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(steps.os, "replace", fail)
    with pytest.raises(AgentError, match=r"can't store key .*: No space left on device"):
        work().write(machine.at(layout.SYSTEM.key), b"x", 0o600, action="key")


@pytest.fixture
def accepting(machine, serve):
    configure(machine, serve(lambda _: refused(422, "field required")).url)
    return machine


@pytest.fixture
def _takes_the_key_on_the_second_look(monkeypatch):
    found = iter([False, True])
    monkeypatch.setattr(service_key, "_has_taken", lambda *_: next(found))


@pytest.mark.usefixtures("_takes_the_key_on_the_second_look")
def test_the_watcher_is_left_to_restart_the_service(accepting):
    _, done = set_key(accepting)

    assert changes(done)[-1] == ("restart", shipped.SERVICE)
    assert not accepting.asked("try-restart")


@pytest.mark.usefixtures("_takes_the_key_on_the_second_look")
def test_without_the_watcher_the_service_is_restarted(accepting):
    accepting.states[shipped.KEY_PATH] = "inactive"
    set_key(accepting)

    assert accepting.asked("try-restart") == [("systemctl", "--no-block", "try-restart", shipped.SERVICE)]


def test_a_service_that_does_not_take_the_key_is_told(accepting, monkeypatch):
    monkeypatch.setattr(service_key, "TAKEN_S", 0.0)
    _, done = set_key(accepting)

    assert done.warnings == [f"{shipped.SERVICE} has not taken the key yet: systemctl status {shipped.SERVICE}"]


def test_a_stopped_service_stays_stopped(accepting):
    accepting.states[shipped.SERVICE] = "inactive"
    _, done = set_key(accepting)

    assert [step.action for step in done.steps] == ["key"]
    assert {command[1] for command in accepting.commands} == {"show"}


@pytest.mark.usefixtures("_takes_keys")
def test_the_same_key_again_changes_nothing(accepting):
    set_key(accepting)
    accepting.commands.clear()
    _, done = set_key(accepting)

    assert not done.changed
    assert {command[1] for command in accepting.commands} == {"show"}


def test_a_dry_run_asks_and_stores_nothing(accepting):
    verdict, done = set_key(accepting, dry_run=True)

    assert verdict.word == "accepted"
    assert done.changed
    assert stored(accepting) == f"{OLD_KEY}\n"
    assert {command[1] for command in accepting.commands} == {"show"}


def test_without_an_installation_the_next_action_is_named(machine):
    removal.uninstall(machine.site, work(), os.environ, purge=True)
    with pytest.raises(AgentError) as caught:
        set_key(machine)

    assert "service install" in caught.value.hint


# What is no key.


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"sk_a_b one two", "holds characters"),
        (b"sk_a_b\nsk_c_d", "is more than one line"),
        ("sk_ä".encode(), "holds characters"),
        (b"sk_a\0b", "holds characters"),
        (b"\xff\xfe", "holds characters"),
        (b"x" * 4097, "is over 4096 bytes"),
    ],
)
def test_what_is_no_key_is_refused_without_quoting_it(tmp_path, content, problem):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem) as caught:
        service_key.read_given(str(path))

    assert caught.value.exit_code == 2
    assert "sk_" not in caught.value.message


def test_what_is_no_file_does_not_hold_us_up(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "pipe", "/dev/zero", tmp_path / "none"):
        with pytest.raises(UsageError, match="can't read the key from"):
            service_key.read_given(str(name))


def test_a_pipe_that_never_ends_does_not_hold_us_up(tmp_path):
    with subprocess.Popen(["yes", "sk_acme_k1_x"], stdout=subprocess.PIPE) as endless:
        done = subprocess.run(
            (sys.executable, "-m", "versioner_agent", "service", "install", "--root", tmp_path, "--key-file", "-"),
            stdin=endless.stdout, capture_output=True, check=False, timeout=60, env={**os.environ, **NO_COMMANDS},
        )  # fmt: skip
        endless.kill()

    assert done.returncode == 2
    assert b"is over 4096 bytes" in done.stderr


def test_a_pipe_without_a_key_is_not_waited_for_for_ever(monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr(service_key, "STDIN_S", 0.0)
    with open(reading, encoding="ascii") as file, open(writing, "wb"):
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(UsageError, match="no key came on stdin"):
            service_key.read_given("-")


# The command line, for one user: it touches nothing of the machine's.


def user_service(tmp_path, url):
    assert command("service", "install", "--user").returncode == 0
    path = tmp_path / "xdg-config/versioner-agent/config.toml"
    path.write_text(path.read_text().replace('#api_url = "https://api.versioner.io"', f'api_url = "{url}"'))
    return tmp_path / "xdg-config/versioner-agent/credentials/api_key"


@pytest.mark.parametrize(
    ("reaction", "code", "words"),
    [
        (refused(422, "field required"), 0, "sk_acme_k2_… was accepted by {url}"),
        (refused(401, "no such key"), 4, "sk_acme_k2_… was refused by {url}: no such key"),
        (refused(503, "maintenance"), 75, "{url} gave no verdict on sk_acme_k2_… in time: maintenance"),
    ],
)
def test_the_exit_code_is_the_verdict_and_the_key_is_shown_nowhere(tmp_path, monkeypatch, serve, reaction, code, words):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    server = serve(lambda _: reaction)
    key_file = user_service(tmp_path, server.url)
    given = tmp_path / "given"
    given.write_text(f"{KEY}\n")
    done = command("service", "set-key", given, "--user", "--timeout", "1")
    as_json = command("service", "set-key", "--user", "--timeout", "1", "--json", stdin=KEY.encode())

    assert done.returncode == as_json.returncode == code, done.stderr
    assert words.format(url=server.url) in (done.stdout + done.stderr).decode()
    for said in (done.stdout, done.stderr, as_json.stdout, as_json.stderr):
        assert b"brandnewsecret" not in said
    assert key_file.exists() == (code != 4)
    told = json.loads(as_json.stdout)
    assert set(told) == {"key", "api", "verdict", "detail", "changed", "steps", "warnings"}
    assert (told["key"], told["api"]) == ("sk_acme_k2_…", server.url)


def test_a_users_agent_delivers_with_the_key_that_was_set(tmp_path, monkeypatch, serve):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    server = serve(lambda seen: refused(422, "field required") if seen.body == b"{}" else accepted())
    key_file = user_service(tmp_path, server.url)
    assert command("service", "set-key", "--user", stdin=KEY.encode()).returncode == 0
    assert command("enqueue", "build", "--product", "p", "--version", "1").returncode == 0
    assert command("flush", "--timeout", "20").returncode == 0

    assert server.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert key_file.parent.stat().st_mode & 0o777 == 0o700


def test_a_configuration_that_does_not_name_the_key_is_told(tmp_path, monkeypatch, serve):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    server = serve(lambda _: refused(422, "field required"))
    user_service(tmp_path, server.url)
    (tmp_path / "xdg-config/versioner-agent/config.toml").write_text(f'api_url = "{server.url}"\n')
    done = command("service", "set-key", "--user", stdin=KEY.encode())

    assert done.returncode == 0
    assert b"api_key_file = " in done.stderr


def test_a_proxy_that_only_the_unit_names_is_used_for_the_trial(machine):
    """As a drop-in gives it, so that its password is in no file that everybody reads."""
    machine.environment = 'VERSIONER_AGENT_CONFIG=/etc/x VERSIONER_AGENT_PROXY=http://me:pw@proxy:3128 "A=b c"'

    unit = servicing.environment(machine.site.machine)
    settings = service_key.settings_of(machine.site, {"HTTPS_PROXY": "http://shells:1"}, unit)

    assert unit["A"] == "b c"
    assert settings.proxy == "http://me:pw@proxy:3128"
    machine.environment = '"not closed'
    assert servicing.environment(machine.site.machine) == {}
