"""`service uninstall`: what was installed goes, what is people's stays, and no undelivered event is destroyed unasked."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
from pretend import SCRIPT, changes, command, tree, work

from versioner_agent import Outbox, layout, removal, shipped
from versioner_agent.errors import AgentError, OutboxBusy, UsageError
from versioner_agent.locks import WriteQueue
from versioner_agent.program import Program
from versioner_agent.storage import Store

pytestmark = pytest.mark.usefixtures("usual_umask")
BUILD = {"product_name": "p", "version": "1", "status": "completed"}
STATE = "var/lib/versioner-agent"


@pytest.fixture
def machine(installed):
    return installed


def uninstall(machine, *, dry_run=False, **how):
    done = work(dry_run=dry_run)
    removal.uninstall(machine.site, done, os.environ, **how)
    return done


def queue(machine, name="outbox.db", state="pending"):
    """Put an event into an outbox of the state directory."""
    with Outbox(machine.at(f"/{STATE}/{name}")) as outbox:
        outbox.enqueue("build", BUILD)
    if state != "pending":
        with contextlib.closing(Store(machine.at(f"/{STATE}/{name}"))) as store, store.write() as connection:
            connection.execute("UPDATE record SET state = ?", (state,))


def names(machine):
    return {path for path, entry in tree(machine.root).items() if entry[0] != "directory"}


def test_what_was_installed_goes_and_what_is_peoples_stays(machine):
    queue(machine)
    done = uninstall(machine)

    outbox = {f"{STATE}/outbox.db{suffix}" for suffix in ("", "-journal", ".queue")}
    assert names(machine) == outbox | {"etc/versioner-agent/config.toml", "etc/versioner-agent/credentials/api_key"}
    kept = {step.target for step in done.steps if step.action == "keep"}
    assert kept == {
        machine.at("/var/lib/versioner-agent"),
        machine.at("/etc/versioner-agent/config.toml"),
        machine.at("/etc/versioner-agent/credentials/api_key"),
        "account versioner-agent",
    }


def test_the_watching_of_the_key_ends_first(machine):
    uninstall(machine)

    assert [command[1:] for command in machine.commands if command[1] != "show"] == [
        ("stop", shipped.KEY_PATH),
        ("stop", shipped.SERVICE),
        ("daemon-reload",),
        ("reset-failed", shipped.SERVICE),
    ]


def test_uninstalling_nothing_changes_nothing(machine):
    uninstall(machine)
    machine.commands.clear()
    again = uninstall(machine)

    assert not again.changed
    assert not machine.asked("daemon-reload")


@pytest.mark.parametrize("how", [{}, {"purge": True}, {"purge": True, "yes": True}])
def test_a_dry_run_names_the_same_steps_and_touches_nothing(machine, how):
    before = tree(machine.root)
    dry = uninstall(machine, dry_run=True, **how)
    assert tree(machine.root) == before
    assert {command[1] for command in machine.commands} == {"show"}

    real = uninstall(machine, **how)
    assert changes(dry) == changes(real)
    assert [step.target for step in dry.steps if step.action == "keep"] == [
        step.target for step in real.steps if step.action == "keep"
    ]


def test_purge_removes_outbox_configuration_and_key(machine):
    queue(machine, state="delivered")
    os.mkdir(machine.at(f"/{STATE}/old"))
    done = uninstall(machine, purge=True)

    assert names(machine) == set()
    assert not os.path.exists(machine.at(f"/{STATE}"))
    assert not os.path.exists(machine.at("/etc/versioner-agent"))
    assert [step.target for step in done.steps if step.action == "keep"] == ["account versioner-agent"]


@pytest.mark.parametrize("name", ["outbox.db", "another.db"])
@pytest.mark.parametrize("state", ["pending", "failed", "exported"])
def test_purge_refuses_undelivered_events_and_touches_nothing(machine, state, name):
    queue(machine, name, state)
    before = tree(machine.root)
    with pytest.raises(UsageError, match=rf"{name} holds undelivered events \(.*1 {state}") as caught:
        uninstall(machine, purge=True)

    assert caught.value.exit_code == 2
    assert [command for command in machine.commands if command[1] != "show"] == []
    assert tree(machine.root) == before


def test_yes_purges_undelivered_events(machine):
    queue(machine)
    uninstall(machine, purge=True, yes=True)

    assert not os.path.exists(machine.at(f"/{STATE}"))


@pytest.mark.parametrize("content", [b"garbage", b""], ids=["garbage", "empty"])
def test_a_damaged_outbox_may_hold_undelivered_events(machine, content):
    queue(machine, state="delivered")
    with open(machine.at(f"/{STATE}/outbox.db"), "wb") as file:
        file.write(content)
    before = tree(machine.root)
    with pytest.raises(UsageError, match="may hold undelivered events"):
        uninstall(machine, purge=True)

    assert tree(machine.root) == before
    uninstall(machine, purge=True, yes=True)
    assert names(machine) == set()


def test_an_event_queued_before_the_stop_is_not_destroyed(machine):
    """It is seen by the second look, and what was stopped runs again; here one is queued at each of two stops."""
    queue(machine, state="delivered")
    machine.on_stop = lambda: queue(machine)
    before = names(machine)
    with pytest.raises(UsageError, match="2 pending"):
        uninstall(machine, purge=True)

    assert names(machine) == before
    assert machine.states[shipped.SERVICE] == machine.states[shipped.KEY_PATH] == "active"


def test_nothing_is_removed_while_somebody_queues(machine, monkeypatch):
    queue(machine, state="delivered")
    monkeypatch.setattr(removal, "QUEUE_S", 0.05)
    with contextlib.closing(WriteQueue(machine.at(f"/{STATE}/outbox.db.queue"))) as writer:
        assert writer.acquire(1)
        with pytest.raises(OutboxBusy):
            uninstall(machine, purge=True)
        assert f"{STATE}/outbox.db" in names(machine)

        uninstall(machine, purge=True, yes=True)  # who holds it for ever does not keep root from it
    assert not os.path.exists(machine.at(f"/{STATE}"))


def test_nobody_can_queue_into_what_is_being_removed(machine, monkeypatch):
    """The queue of writers goes last: until then every writer waits."""
    queue(machine, state="delivered")
    with open(machine.at(f"/{STATE}/outbox.db.schema-1"), "w", encoding="utf-8"):
        pass
    removed = []
    unlink = os.unlink

    def watched(path, **how):
        removed.append(os.path.basename(path))
        if removed[-1] == "outbox.db":
            with contextlib.closing(WriteQueue(machine.at(f"/{STATE}/outbox.db.queue"))) as writer:
                assert not writer.acquire(0.05)
        unlink(path, **how)

    monkeypatch.setattr(removal.os, "unlink", watched)
    uninstall(machine, purge=True)

    in_state = [name for name in removed if name.startswith("outbox.db")]
    assert sorted(in_state[:-1]) == ["outbox.db", "outbox.db-journal", "outbox.db.schema-1"]
    assert in_state[-1] == "outbox.db.queue"


def test_an_event_queued_into_a_new_outbox_meanwhile_stays(machine, monkeypatch):
    rmdir = os.rmdir

    def raced(path, **how):
        queue(machine)
        rmdir(path, **how)

    monkeypatch.setattr(removal.os, "rmdir", raced)
    done = uninstall(machine, purge=True)

    assert f"{STATE}/outbox.db" in names(machine)
    assert any("stays" in warning for warning in done.warnings)


def test_an_outbox_elsewhere_is_left_and_named(machine, tmp_path):
    elsewhere = tmp_path / "disk" / "outbox.db"
    elsewhere.parent.mkdir()
    with Outbox(elsewhere) as outbox:
        outbox.enqueue("build", BUILD)
    with open(machine.at("/etc/versioner-agent/config.toml"), "w", encoding="utf-8") as file:
        file.write(f'db = "{elsewhere}"\n')
    done = uninstall(machine, purge=True)

    assert elsewhere.exists()
    assert ("keep", str(elsewhere)) in [(step.action, step.target) for step in done.steps]


def test_what_a_link_in_the_place_of_the_state_directory_leads_to_is_left(machine, tmp_path):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    os.rmdir(machine.at(f"/{STATE}"))
    os.symlink(elsewhere, machine.at(f"/{STATE}"))
    uninstall(machine, purge=True)

    assert (elsewhere / "precious").exists()
    assert not os.path.lexists(machine.at(f"/{STATE}"))


def test_links_in_the_state_directory_are_not_followed(machine, tmp_path):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    os.symlink(elsewhere, machine.at(f"/{STATE}/linked"))
    os.symlink(elsewhere / "precious", machine.at(f"/{STATE}/linked-file"))
    uninstall(machine, purge=True)

    assert (elsewhere / "precious").exists()
    assert not os.path.lexists(machine.at(f"/{STATE}"))


def test_a_command_of_somebody_else_stays(machine):
    path = machine.at(layout.SYSTEM.link)
    os.unlink(path)
    os.symlink("/home/me/versioner-agent", path)
    uninstall(machine)

    assert os.readlink(path) == "/home/me/versioner-agent"


def test_the_link_of_another_version_of_the_program_is_ours(machine):
    """The unit that is installed names it."""
    os.unlink(machine.at(layout.SYSTEM.link))
    os.symlink(SCRIPT, machine.at(layout.SYSTEM.link))
    machine.program = Program(("/srv/x/bin/versioner-agent",), "/srv/x/bin/versioner-agent", (), machine.program.marker)
    uninstall(machine)

    assert not os.path.lexists(machine.at(layout.SYSTEM.link))


def test_a_failing_command_is_told(machine):
    machine.fails["stop"] = "Failed to stop: Access denied"
    with pytest.raises(AgentError, match="Access denied"):
        uninstall(machine)


def test_root_and_user_are_undone_by_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    for where in (("--root", tmp_path / "image"), ("--user",)):
        (tmp_path / "image").mkdir(exist_ok=True)
        assert command("service", "install", *where).returncode == 0
        done = command("service", "uninstall", "--purge", "--json", *where)
        again = command("service", "uninstall", "--purge", "--json", *where)

        assert done.returncode == again.returncode == 0, done.stderr
        assert json.loads(done.stdout)["changed"] is True
        assert json.loads(again.stdout) == json.loads(again.stdout) | {"changed": False, "warnings": []}
    assert {entry[0] for entry in tree(tmp_path).values()} == {"directory"}


def test_yes_without_purge_is_a_mistake(tmp_path):
    assert command("service", "uninstall", "--yes", "--root", tmp_path).returncode == 2


def test_a_refusal_exits_2_and_says_how_many(tmp_path):
    assert command("service", "install", "--root", tmp_path).returncode == 0
    with Outbox(tmp_path / STATE / "outbox.db") as outbox:
        outbox.enqueue("build", BUILD)
    done = command("service", "uninstall", "--purge", "--root", tmp_path)

    assert done.returncode == 2
    assert b"1 pending, 0 failed, 0 exported" in done.stderr
    assert b"hint: " in done.stderr


def test_nothing_is_removed_where_systemd_does_not_answer(machine):
    """Else an agent that runs would be left without its outbox."""
    before = tree(machine.root)
    machine.fails["show"] = "Connection timed out"

    with pytest.raises(AgentError, match="Connection timed out"):
        uninstall(machine, purge=True, yes=True)

    assert tree(machine.root) == before
