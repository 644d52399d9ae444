"""The files for systemd: valid, hardened, adapted to where the program is, and in step with the settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from versioner_agent import config, shipped, units

ROOT = Path(__file__).parent.parent.parent
UNITS = (shipped.SERVICE, shipped.KEY_PATH, shipped.KEY_SERVICE, shipped.USER_SERVICE)
EXPOSURE = 12  # tenths: what systemd-analyze calls OK ends at 19

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def analyze(*words, **env):
    return subprocess.run(
        ("systemd-analyze", *words), capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


@pytest.fixture
def startable(tmp_path):
    """Copies of the units whose program exists."""
    script = tmp_path / "bin" / "versioner-agent"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)

    def write(name, text=None):
        place = tmp_path / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(units.adapted(text or shipped.read(name), [str(script)], [str(tmp_path)]))
        return place

    for name in UNITS:
        write(name)
    return write


@needs_analyze
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong_with_a_unit(startable, tmp_path, name):
    whose = ("--user",) if name == shipped.USER_SERVICE else ("--system",)
    found = analyze(
        "verify", *whose, "--man=no", "--recursive-errors=no", startable(name), XDG_RUNTIME_DIR=str(tmp_path)
    )

    assert (found.returncode, found.stderr) == (0, "")


@needs_analyze
def test_a_mistake_in_a_unit_is_found(startable):
    """What the test above would say of one."""
    unit = startable(shipped.SERVICE, shipped.read(shipped.SERVICE).replace("UMask=", "Umask="))

    assert analyze("verify", "--man=no", "--recursive-errors=no", unit).returncode == 1


@needs_analyze
def test_the_service_is_exposed_no_more_than_it_needs(startable):
    found = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", startable(shipped.SERVICE))

    assert found.returncode == 0, found.stdout
    # A value that can't be parsed is reported here and nowhere else.
    assert "ignoring" not in found.stderr


@needs_analyze
def test_the_limit_of_exposure_is_a_tight_one(startable):
    text = shipped.read(shipped.SERVICE).replace("RestrictNamespaces=yes\n", "").replace("CapabilityBoundingSet=\n", "")

    assert analyze("security", "--offline=true", f"--threshold={EXPOSURE}", startable(shipped.SERVICE, text)).returncode


def test_the_program_where_the_units_expect_it_changes_nothing():
    for name in UNITS:
        text = shipped.read(name)

        assert units.adapted(text, [units.SHIPPED_SCRIPT], [units.SHIPPED_PREFIX]) == text


def test_another_place_is_named_in_command_and_exec_paths():
    text = units.adapted(
        shipped.read(shipped.SERVICE), ["/usr/bin/python3", "/srv/my apps/50%/a$b.pyz"], ["/srv/my apps"]
    )

    assert 'ExecStart=/usr/bin/python3 "/srv/my apps/50%%/a$$b.pyz" run\n' in text
    assert 'ExecPaths=-/usr -/lib -/lib64 -/bin "-/srv/my apps"\n' in text
    assert units.SHIPPED_PREFIX not in text


def test_a_units_command_is_read_back():
    for given in (["/opt/x/bin/versioner-agent"], ["/usr/bin/python3", "/srv/agent.pyz"]):
        assert units.started(units.adapted(shipped.read(shipped.SERVICE), given, [])) == given[-1]
    assert units.started("[Service]\nExecStart=/bin/true\n") is None


def test_the_service_reads_roots_file_alone_and_the_outbox_comes_from_there():
    text = shipped.read(shipped.SERVICE)

    assert f"\nEnvironment={config.ENV_CONFIG}={config.SYSTEM_FILE}\n" in text
    assert "VERSIONER_AGENT_DB" not in text


def test_directories_and_account_agree_between_the_files():
    unit = shipped.read(shipped.SERVICE)
    made = {entry.path: entry for entry in units.directories(shipped.read(shipped.TMPFILES))}
    account = re.findall(r"^u (\S+) - \"[^\"]+\" - \S+$", shipped.read(shipped.SYSUSERS), re.MULTILINE)

    assert made["/var/lib/versioner-agent"] == ("/var/lib/versioner-agent", 0o2770, account[0], account[0])
    assert made["/etc/versioner-agent/credentials"][1:] == (0o700, "root", "root")
    for line in (
        f"User={account[0]}",
        f"Group={account[0]}",
        "StateDirectory=versioner-agent",
        "StateDirectoryMode=2770",
    ):
        assert f"\n{line}\n" in unit
    assert "LoadCredential=api_key:/etc/versioner-agent/credentials/api_key\n" in unit


def test_the_example_configuration_is_valid_and_names_the_shared_outbox(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(shipped.read(shipped.CONFIG))
    settings = config.load({}, {}, str(path))

    assert settings.db == "/var/lib/versioner-agent/outbox.db"
    assert [option.key for option in config.OPTIONS if settings.is_explicit(option.key)] == ["db"]


def test_the_example_configuration_names_every_setting_with_its_default():
    text = shipped.read(shipped.CONFIG)
    named = {}
    for key, value in re.findall(r"^#?(\w+) = (.*)$", text, re.MULTILINE):
        named[key] = tomllib.loads(f"value = {value}")["value"]

    assert set(named) == {option.key for option in config.OPTIONS} - {"api_key"}
    for option in config.OPTIONS:
        if option.key not in ("api_key", "db"):
            assert named[option.key] == (option.default if option.default is not None else "")
            assert option.help in text.replace("\n# ", " ")


def test_a_users_configuration_names_the_users_key_and_no_outbox(tmp_path):
    key = str(tmp_path / 'a "b' / "api_key")
    path = tmp_path / "config.toml"
    path.write_text(units.configuration_of_user(shipped.read(shipped.CONFIG), key))
    settings = config.load({}, {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}, str(path))

    assert [option.key for option in config.OPTIONS if settings.is_explicit(option.key)] == ["api_key_file"]
    assert settings.api_key_file == key
    assert "/etc/" not in path.read_text()
    assert "/var/" not in path.read_text()


def test_the_files_are_read_from_a_zip_archive(tmp_path):
    """As from a wheel: there they lie inside the package."""
    archive = tmp_path / "agent.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (ROOT / "versioner_agent").glob("*.py"):
            file.write(path, f"versioner_agent/{path.name}")
        for name in (*UNITS, shipped.CONFIG):
            file.write(ROOT / "systemd" / name, f"versioner_agent/systemd/{name}")
    code = f"from versioner_agent import shipped; print([len(shipped.read(name)) for name in {(*UNITS, shipped.CONFIG)!r}])"
    found = subprocess.run(
        (sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(archive)!r}); {code}"),
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip

    assert found.stdout.strip() == str([len(shipped.read(name)) for name in (*UNITS, shipped.CONFIG)])


def test_the_wheel_takes_the_files_along():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]

    assert build["wheel"]["force-include"] == {"systemd": "versioner_agent/systemd"}
    assert "systemd" in build["sdist"]["include"]
