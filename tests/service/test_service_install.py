"""`service install`: everything that is missing is made, nothing that is there is touched, and both are said."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
from pretend import EXECUTABLE, SCRIPT, Pretend, changes, command, tree, work

from versioner_agent import layout, program, service, shipped
from versioner_agent.errors import AgentError
from versioner_agent.program import Program

pytestmark = pytest.mark.usefixtures("usual_umask")
KEY = "sk_acme_k2_installsecret"
UNITS = "etc/systemd/system"


@pytest.fixture
def machine(bare):
    return bare


def install(machine, *, dry_run=False, **how):
    done = work(dry_run=dry_run)
    service.install(machine.site, done, **how)
    return done


# Below a directory: what packages and images get.


def expected_tree(linked=SCRIPT):
    text = shipped.read
    return {
        f"{UNITS}/versioner-agent.service": ("file", 0o644, text(shipped.SERVICE).encode()),
        f"{UNITS}/versioner-agent-key.service": ("file", 0o644, text(shipped.KEY_SERVICE).encode()),
        f"{UNITS}/versioner-agent-key.path": ("file", 0o644, text(shipped.KEY_PATH).encode()),
        f"{UNITS}/multi-user.target.wants/versioner-agent.service": ("link", 0, f"/{UNITS}/versioner-agent.service"),
        f"{UNITS}/paths.target.wants/versioner-agent-key.path": ("link", 0, f"/{UNITS}/versioner-agent-key.path"),
        "etc/sysusers.d/versioner-agent.conf": ("file", 0o644, text(shipped.SYSUSERS).encode()),
        "etc/tmpfiles.d/versioner-agent.conf": ("file", 0o644, text(shipped.TMPFILES).encode()),
        "etc/versioner-agent": ("directory", 0o755, None),
        "etc/versioner-agent/credentials": ("directory", 0o700, None),
        "etc/versioner-agent/config.toml": ("file", 0o644, text(shipped.CONFIG).encode()),
        "var/lib/versioner-agent": ("directory", 0o2770, None),
        "usr/local/bin/versioner-agent": ("link", 0, linked),
        **{
            f"usr/local/{name}": ("file", 0o644, text(name).encode())
            for name in (shipped.MAN_PAGE, *shipped.COMPLETIONS.values())
        },
    }


def test_root_gets_exactly_these_files(tmp_path):
    done = command("service", "install", "--root", tmp_path, "--json")
    found = tree(tmp_path)

    assert done.returncode == 0, done.stderr
    plain = {path: entry for path, entry in found.items() if path in expected_tree() or entry[0] != "directory"}
    assert plain == expected_tree()


def test_root_repeated_changes_nothing_and_says_so(tmp_path):
    assert command("service", "install", "--root", tmp_path).returncode == 0
    before = tree(tmp_path)
    done = command("service", "install", "--root", tmp_path, "--json")
    told = command("service", "install", "--root", tmp_path)

    assert json.loads(done.stdout)["changed"] is False
    assert told.stdout.decode().splitlines()[-1] == "nothing to change"
    assert all(line.startswith("unchanged ") for line in told.stdout.decode().splitlines()[:-1])
    assert tree(tmp_path) == before


def test_root_strips_the_directory_from_a_program_in_it(tmp_path):
    root = str(tmp_path)
    inside = Program(
        (f"{root}/srv/agent/bin/versioner-agent",),
        f"{root}/srv/agent/bin/versioner-agent",
        (f"{root}/srv/agent", "/usr"),
        "",
    )
    archive = Program(
        ("/usr/bin/python3", f"{root}/srv/agent.pyz"), f"{root}/srv/agent.pyz", ("/usr", f"{root}/srv/agent.pyz"), ""
    )
    elsewhere = Program(("/home/me/bin/versioner-agent",), "/home/me/bin/versioner-agent", ("/home/me",), "")

    assert inside.below(root).command == ("/srv/agent/bin/versioner-agent",)
    assert inside.below(root).beyond_usr == ("/srv/agent",)
    assert archive.below(root).command == ("/usr/bin/python3", "/srv/agent.pyz")
    assert elsewhere.below(root).command == (SCRIPT,)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_program_that_is_missing_in_an_image_is_told(tmp_path, is_there):
    machine = Pretend(tmp_path, has_systemd=False, is_image=True)
    machine.program = machine.program._replace(script=SCRIPT)
    if is_there:
        os.makedirs(os.path.dirname(machine.at(SCRIPT)))
        os.symlink("elsewhere", machine.at(SCRIPT))
    warnings = install(machine).warnings

    assert warnings == (
        [] if is_there else [f"{machine.at(SCRIPT)} is missing: put the program there, for the units start it"]
    )


def test_root_runs_no_command(tmp_path):
    machine = Pretend(tmp_path, has_systemd=False, is_image=True, is_root=False)
    install(machine)

    assert machine.commands == []


@pytest.mark.parametrize("more", [("--now",), ("--user",)])
def test_root_goes_with_neither_now_nor_user(tmp_path, more):
    done = command("service", "install", "--root", tmp_path, *more)

    assert done.returncode == 2
    assert tree(tmp_path) == {}


def test_root_takes_a_key_that_only_root_can_read(tmp_path):
    done = command("service", "install", "--root", tmp_path, "--key-file", "-", stdin=f"{KEY}\n".encode())
    credentials = tmp_path / "etc/versioner-agent/credentials"

    assert done.returncode == 0, done.stderr
    assert (credentials / "api_key").read_text() == f"{KEY}\n"
    assert (credentials / "api_key").stat().st_mode & 0o7777 == 0o600
    assert b"installsecret" not in done.stdout + done.stderr
    assert b"stored key" in done.stdout
    assert b"sk_acme_k2_\xe2\x80\xa6" in done.stdout


# On a running system.


def test_a_first_installation_makes_everything_in_an_order_that_works(machine):
    done = install(machine, key=KEY, now=True)
    order = [command for command in machine.commands if command[1] != "show"]

    assert changes(done)[-3:] == [("reload", "systemd"), ("start", shipped.KEY_PATH), ("start", shipped.SERVICE)]
    assert order == [
        ("systemd-sysusers", machine.at("/etc/sysusers.d/versioner-agent.conf")),
        ("systemctl", "daemon-reload"),
        ("systemctl", "start", shipped.KEY_PATH),
        ("systemctl", "--no-block", "start", shipped.SERVICE),
    ]
    expected = expected_tree(EXECUTABLE)
    assert {path: entry for path, entry in tree(machine.root).items() if path in expected} == expected
    assert done.warnings == []


def test_a_second_installation_changes_nothing(machine):
    install(machine, key=KEY, now=True)
    before = tree(machine.root)
    machine.commands.clear()
    done = install(machine, key=KEY, now=True)

    assert changes(done) == []
    assert not done.changed
    assert {command[1] for command in machine.commands} == {"show"}
    assert tree(machine.root) == before


def test_a_dry_run_names_the_same_steps_and_touches_nothing(machine):
    dry = install(machine, dry_run=True, key=KEY, now=True)
    assert tree(machine.root) == {}
    assert {command[1] for command in machine.commands} == {"show"}

    assert changes(install(machine, key=KEY, now=True)) == changes(dry)


def test_an_upgrade_keeps_configuration_and_key_and_restarts(machine):
    install(machine, key=KEY, now=True)
    own = machine.at("/etc/versioner-agent/config.toml")
    with open(own, "a", encoding="utf-8") as file:
        file.write("concurrency = 9\n")
    unit = machine.at(f"/{UNITS}/versioner-agent.service")
    with open(unit, "a", encoding="utf-8") as file:
        file.write("# of an older version\n")
    before = tree(machine.root)
    done = install(machine, now=True)

    assert changes(done) == [("write", unit), ("reload", "systemd"), ("restart", shipped.SERVICE)]
    changed = {path for path, entry in tree(machine.root).items() if before[path] != entry}
    assert changed == {f"{UNITS}/versioner-agent.service"}


def test_without_now_a_running_service_is_left_and_that_is_said(machine):
    install(machine, now=True)
    os.unlink(machine.at(f"/{UNITS}/versioner-agent.service"))
    machine.commands.clear()
    done = install(machine)

    assert not machine.asked("start") + machine.asked("restart")
    assert any("--now" in warning for warning in done.warnings)


def test_an_installation_that_was_cut_short_before_the_reload_is_finished(machine):
    install(machine, now=True)
    machine.behind = {shipped.SERVICE}

    assert changes(install(machine, now=True)) == [("reload", "systemd")]


def test_enabling_again_restarts_nothing(machine):
    install(machine, now=True)
    link = machine.at(f"/{UNITS}/multi-user.target.wants/versioner-agent.service")
    os.unlink(link)

    assert changes(install(machine, now=True)) == [("enable", link), ("reload", "systemd")]


@pytest.mark.parametrize("is_watched", [True, False])
def test_a_new_key_restarts_what_nobody_watches_it_for(machine, is_watched):
    install(machine, now=True)
    machine.states[shipped.KEY_PATH] = "active" if is_watched else "inactive"
    done = install(machine, key=KEY, now=True)

    assert (("restart", shipped.SERVICE) in changes(done)) is not is_watched


def test_a_newer_package_restarts_an_older_process(machine):
    install(machine, now=True)
    boot_us = time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
    machine.started_us = str(int(boot_us + 3600e6))  # started behind the package
    assert changes(install(machine, now=True)) == []
    machine.started_us = "0"  # started with the machine, long before the package
    os.utime(machine.program.marker)

    assert changes(install(machine, now=True)) == [("restart", shipped.SERVICE)]


def test_a_service_that_fails_is_told_with_its_words(machine):
    machine.starts_as = "failed"
    machine.status_text = "the outbox is on a disk that is not mounted"
    with pytest.raises(AgentError, match="failed: the outbox is on a disk") as caught:
        install(machine, now=True)

    assert caught.value.exit_code == 1
    assert caught.value.hint == "journalctl -u versioner-agent -n 20"


def test_a_service_that_does_not_get_active_is_not_waited_for_for_ever(machine):
    machine.states[shipped.SERVICE] = "activating"
    pauses = []
    with pytest.raises(AgentError, match="it is activating"):
        service.wait_until_active(machine.site.machine, "", within_s=0.0, pause=pauses.append)

    assert pauses == []


def test_the_run_before_a_restart_is_not_taken_for_the_new_one(machine):
    machine.states[shipped.SERVICE] = "active"
    machine.invocation = 7
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        machine.invocation += len(pauses) == 3

    service.wait_until_active(machine.site.machine, "7", pause=pause)

    assert len(pauses) == 3


def test_what_a_command_says_is_in_the_error(machine):
    machine.fails["systemd-sysusers"] = "Failed to lock /etc/.pwd.lock\nbusy"
    with pytest.raises(AgentError, match=r"systemd-sysusers .* failed: Failed to lock /etc/.pwd.lock busy"):
        install(machine)


def test_a_masked_service_is_left_masked(machine):
    unit = machine.at(f"/{UNITS}/versioner-agent.service")
    os.makedirs(os.path.dirname(unit))
    os.symlink("/dev/null", unit)
    with pytest.raises(AgentError, match="masked"):
        install(machine)

    assert list(tree(machine.root)) == ["etc", "etc/systemd", UNITS, f"{UNITS}/versioner-agent.service"]


def test_no_systemd_writes_files_and_says_what_is_left(tmp_path):
    machine = Pretend(tmp_path, has_systemd=False)
    done = install(machine)

    assert [command[0] for command in machine.commands] == ["systemd-sysusers"]
    assert done.warnings == ["systemd is not running here: the service is enabled, and starts when it is"]
    assert os.path.islink(machine.at(f"/{UNITS}/multi-user.target.wants/versioner-agent.service"))


def test_no_systemd_makes_now_an_error(tmp_path):
    with pytest.raises(AgentError, match="--now") as caught:
        service.refuse_now_without_systemd(Pretend(tmp_path, has_systemd=False).site.machine)

    assert caught.value.exit_code == 2


def test_a_directory_with_another_mode_is_put_right(machine):
    install(machine)
    credentials = machine.at("/etc/versioner-agent/credentials")
    os.chmod(credentials, 0o755)

    assert changes(install(machine)) == [("directory", credentials)]
    assert os.stat(credentials).st_mode & 0o7777 == 0o700


def test_a_file_with_another_mode_is_put_right(machine):
    install(machine, key=KEY)
    unit, key = machine.at(f"/{UNITS}/versioner-agent.service"), machine.at(layout.SYSTEM.key)
    os.chmod(unit, 0o600)
    os.chmod(key, 0o644)

    assert [step for step in changes(install(machine, key=KEY)) if step[0] != "reload"] == [
        ("write", unit),
        ("key", key),
    ]
    assert [os.stat(path).st_mode & 0o7777 for path in (unit, key)] == [0o644, 0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_put_right(machine):
    install(machine)
    state = machine.at("/var/lib/versioner-agent")
    os.chown(state, 65534, 65534)

    assert changes(install(machine)) == [("directory", state)]
    assert (os.stat(state).st_uid, os.stat(state).st_mode & 0o7777) == (0, 0o2770)


def test_selinux_types_are_given_where_it_is_in_force(tmp_path):
    machine = Pretend(tmp_path, has_selinux=True)
    done = install(machine)
    (labelled,) = machine.asked("restorecon")

    assert ("label", "SELinux") in changes(done)
    assert labelled[:2] == ("restorecon", "-RF")
    assert machine.at(f"/{UNITS}/versioner-agent.service") in labelled
    assert machine.at("/var/lib/versioner-agent") in labelled
    assert changes(install(machine)) == []


def test_selinux_is_not_asked_where_there_is_none(machine):
    install(machine)

    assert not machine.asked("restorecon")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_command_of_somebody_else_stays(machine, kind):
    path = machine.at(layout.SYSTEM.link)
    os.makedirs(os.path.dirname(path))
    if kind == "file":
        with open(path, "w", encoding="utf-8") as file:
            file.write("mine")
    else:
        os.symlink("/home/me/versioner-agent", path)
    before = tree(os.path.dirname(path))
    done = install(machine)

    assert tree(os.path.dirname(path)) == before
    assert done.warnings == [f"{path} is somebody else's and stays: users call {EXECUTABLE}"]


def test_the_link_follows_the_program_to_another_place(machine, tmp_path):
    """The unit that was installed before tells what the link led to."""
    path = machine.at(layout.SYSTEM.link)
    machine.program = program_at(tmp_path / "first")
    install(machine)
    assert os.readlink(path) == machine.program.script
    machine.program = program_at(tmp_path / "moved")
    done = install(machine)

    assert os.readlink(path) == machine.program.script
    assert ("link", path) in changes(done)


def test_what_nobody_can_execute_is_not_linked(machine, tmp_path):
    machine.program = program_at(tmp_path)
    os.chmod(machine.program.script, 0o744)  # as the standard library's zipapp makes it
    done = install(machine)

    assert not os.path.lexists(machine.at(layout.SYSTEM.link))
    assert "chmod 755" in done.warnings[0]


@pytest.mark.parametrize(
    ("written", "warning"),
    [
        ("concurrency = 2\n", "names no `db`"),
        ('db = "/srv/outbox/o.db"\n', "ReadWritePaths=/srv/outbox"),
        ("db = \n", "not valid TOML"),
    ],
)
def test_a_configuration_that_parts_users_and_service_is_told(machine, written, warning):
    install(machine)
    with open(machine.at(layout.SYSTEM.config), "w", encoding="utf-8") as file:
        file.write(written)
    (said, *_) = install(machine).warnings

    assert warning in said


def test_a_drop_in_for_an_outbox_elsewhere_is_enough(machine):
    install(machine)
    with open(machine.at(layout.SYSTEM.config), "w", encoding="utf-8") as file:
        file.write('db = "/srv/outbox/o.db"\n')
    drop_ins = machine.at(f"/{UNITS}/versioner-agent.service.d")
    os.mkdir(drop_ins)
    with open(f"{drop_ins}/disk.conf", "w", encoding="utf-8") as file:
        file.write("[Service]\nReadWritePaths=/srv/outbox\n")

    assert install(machine).warnings == []


# For one user.


def test_a_user_gets_a_private_service(tmp_path, monkeypatch):
    for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    base = tmp_path / "xdg-config"
    done = command("service", "install", "--user", "--json", "--key-file", "-", stdin=KEY.encode())
    found = {path: entry for path, entry in tree(base).items() if entry[0] != "directory"}
    again = command("service", "install", "--user", "--json")

    assert done.returncode == 0, done.stderr
    unit = str(base / "systemd/user/versioner-agent.service")
    assert found["systemd/user/default.target.wants/versioner-agent.service"] == ("link", 0, unit)
    assert found["versioner-agent/config.toml"][1] == 0o600
    assert found["versioner-agent/credentials/api_key"] == ("file", 0o600, f"{KEY}\n".encode())
    assert len(found) == 4
    assert json.loads(again.stdout)["changed"] is False
    status = command("status", "--json", VERSIONER_AGENT_CONFIG=str(base / "versioner-agent/config.toml"))
    assert json.loads(status.stdout)["outbox"]["path"] == str(tmp_path / "xdg-state/versioner-agent/outbox.db")


# Who may, from where, and how it is said.


def program_at(place):
    script = place / "bin" / "versioner-agent"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.touch(mode=0o755)
    return Program((str(script),), str(script), (str(place),), str(script))


def test_a_program_in_a_hidden_place_is_refused(tmp_path):
    with pytest.raises(AgentError, match="it sees nothing of") as caught:
        program.check_readable(program_at(tmp_path), interpreter="/usr/bin/env", hidden=(str(tmp_path),))

    assert "/opt/versioner-agent" in caught.value.hint


def test_an_interpreter_in_a_hidden_place_is_refused_behind_its_link(tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "python").touch()
    (tmp_path / "python").symlink_to(tmp_path / "hidden" / "python")
    with pytest.raises(AgentError, match=f"could not run {tmp_path}/hidden/python"):
        program.check_readable(
            Program(("/usr/bin/env",), "/usr/bin/env", (), "/usr/bin/env"),
            interpreter=str(tmp_path / "python"),
            hidden=(str(tmp_path / "hidden"),),
        )


@pytest.fixture
def readable():
    """A directory that everybody can enter; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="versioner-agent-test-") as directory:
        os.chmod(directory, 0o755)
        yield pathlib.Path(directory)


def test_a_script_that_others_can_execute_is_fine(readable):
    program.check_readable(program_at(readable), interpreter="/usr/bin/env", hidden=())


def test_a_place_that_others_can_not_enter_is_refused(readable):
    place = readable / "closed"
    place.mkdir()
    found = program_at(place / "venv")
    place.chmod(0o750)
    with pytest.raises(AgentError, match=r"may not enter or read .*/closed"):
        program.check_readable(found, interpreter="/usr/bin/env", hidden=())


def test_a_script_that_others_can_not_execute_is_refused(readable):
    found = program_at(readable)
    os.chmod(found.script, 0o744)
    with pytest.raises(AgentError, match="may not execute it"):
        program.check_readable(found, interpreter="/usr/bin/env", hidden=())


def test_a_package_that_others_can_not_read_is_refused(readable):
    (readable / "__init__.py").touch(mode=0o600)
    found = program_at(readable)._replace(marker=str(readable / "__init__.py"))
    with pytest.raises(AgentError, match="may not enter or read"):
        program.check_readable(found, interpreter="/usr/bin/env", hidden=())


def test_a_missing_script_is_refused(tmp_path):
    with pytest.raises(AgentError, match="there is no"):
        program.check_readable(Program(("/none/x",), "/none/x", (), ""), interpreter="/usr/bin/env")


def test_the_hidden_places_are_those_that_the_unit_hides():
    text = shipped.read(shipped.SERVICE)

    assert "\nProtectHome=yes\n" in text
    assert "\nPrivateTmp=yes\n" in text
    assert set(program.HIDDEN) == {"/root", "/home", "/run/user", "/tmp", "/var/tmp"}


def test_the_running_program_is_found_in_its_environment():
    found = program.found()

    assert found.script == os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "versioner-agent")
    assert os.path.abspath(sys.prefix) in found.places


def test_a_zip_archive_is_started_by_its_interpreter(monkeypatch, tmp_path):
    archive = str(tmp_path / "agent.pyz")
    spec = SimpleNamespace(loader=SimpleNamespace(archive=archive))
    monkeypatch.setattr(program.versioner_agent, "__spec__", spec)
    found = program.found()

    assert found.command == (os.path.abspath(sys.executable), archive)
    assert found.script == found.marker == archive
    assert archive in found.places


def test_json_is_one_object_with_these_keys(tmp_path):
    done = command("service", "install", "--root", tmp_path, "--dry-run", "--json")
    (line,) = done.stdout.splitlines()
    told = json.loads(line)

    assert set(told) == {"changed", "steps", "warnings"}
    assert {frozenset(step) for step in told["steps"]} == {frozenset({"action", "target", "changed", "detail"})}
    assert told["changed"] is True
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("link", ["etc/systemd", "var/lib/versioner-agent"])
def test_nothing_is_written_out_of_an_image_through_a_link(tmp_path, link):
    image, elsewhere = tmp_path / "image", tmp_path / "elsewhere"
    (image / link).parent.mkdir(parents=True)
    elsewhere.mkdir(mode=0o700)
    (image / link).symlink_to(elsewhere)

    done = command("service", "install", "--root", str(image))

    assert done.returncode == 1
    assert f"leads out of {image}".encode() in done.stderr
    assert list(elsewhere.iterdir()) == []
    assert elsewhere.stat().st_mode & 0o7777 == 0o700


def test_a_pipe_in_the_place_of_a_configuration_holds_up_nothing(machine):
    os.makedirs(machine.at("/etc/versioner-agent"))
    os.mkfifo(machine.at("/etc/versioner-agent/config.toml"))

    install(machine)


def test_a_service_that_is_to_be_started_again_is_told_at_once(machine, monkeypatch):
    """Its configuration can't be used: waiting for it would take as long as the patience."""
    machine.starts_as = "activating"
    machine.sub_state = "auto-restart"
    machine.status_text = "configuration: nosuchkey"

    with pytest.raises(AgentError, match="did not become active, it failed: configuration: nosuchkey"):
        install(machine, now=True)
