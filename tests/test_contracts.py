"""What is written in two places agrees: commands, options, settings, fields, JSON keys, versions, README."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys

import click
import httpcore
import pytest
from recipes import README, ROOT, blocks

import versioner_agent
from versioner_agent import cli, config, delivery, events, importing, outbox, outcomes, receipts, records, steps
from versioner_agent.cli import _common
from versioner_agent.findings import Finding
from versioner_agent.masked import Row
from versioner_agent.sandbox import Sandbox


def commands():
    """Every command with its path, `enqueue build` among them."""
    found = {}
    context = click.Context(cli.root)
    for name in cli.COMMANDS:
        command = cli.root.get_command(context, name)
        found[name] = command
        if isinstance(command, click.Group):
            subs = command.list_commands(context)
            found |= {f"{name} {sub}": command.get_command(context, sub) for sub in subs}
    return found


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_entry_of_the_table_is_a_command_with_help(name):
    command = commands()[name]

    assert command.name == name
    assert command.help


@pytest.mark.parametrize("path", commands())
def test_every_command_and_option_is_in_readme(path):
    assert path.split()[0] in README
    for option in commands()[path].params:
        for word in getattr(option, "opts", []):
            if word.startswith("--"):
                assert f"{word}" in README, f"{path} {word}"


def test_settings_agree_between_table_flags_and_readme():
    found = commands()
    offered = {word for name in ("run", "track deployment") for option in found[name].params for word in option.opts}
    for option in config.OPTIONS:
        flag = f"`{option.flag}`" if option.flag else "none: it would show in `ps`"

        assert f"| `{option.key}` | {flag} | `{option.env}` |" in README
        assert not option.flag or option.flag in offered
    assert len(re.findall(r"^\| `\w+` \| [^|]+ \| `VERSIONER_", README, re.MULTILINE)) == len(config.OPTIONS)


def test_every_setting_is_named_after_its_environment_variable():
    official = {"api_url": "VERSIONER_API_URL", "api_key": "VERSIONER_API_KEY"}
    for option in config.OPTIONS:
        assert option.env == official.get(option.key, f"VERSIONER_AGENT_{option.key.upper()}")


def test_fields_agree_between_table_options_and_readme():
    for kind in events.KINDS:
        options = {word for option in commands()[f"enqueue {kind}"].params for word in option.opts}
        for field in events.FIELDS:
            assert (field.option in options) == (kind in field.kinds)
    for field in events.FIELDS:
        assert f"| `{field.name}` | `{field.option}` |" in README


def test_json_keys_are_in_readme():
    rows = {
        line.split("|")[1].strip(): set(re.findall(r"`(\w+)`", line)) for line in README.splitlines() if "|" in line
    }

    assert set(outbox.Receipt._fields) <= rows["receipt (`enqueue`)"]
    assert {*importing.Queued._fields, *receipts.Applied._fields} <= rows["`import`"]
    assert set(steps.Step._fields) | set(steps.Work().summary()) <= rows["`service`"]
    assert set(records._JSON_KEYS) <= rows["record (`list`, `show`)"]
    assert set(Row._fields) <= rows["setting (`config`)"]
    assert set(Finding._fields) <= rows["finding (`doctor`)"]


def test_every_check_of_doctor_is_in_readme():
    (row,) = [line for line in README.splitlines() if line.startswith("| finding (`doctor`)")]
    modules = ("doctor", "premises", "probing", "servicing")
    sources = "".join((ROOT / "versioner_agent" / f"{name}.py").read_text() for name in modules)

    assert set(re.findall(r'(?:Finding|ok|not_looked_at)\(\s*"(\w+)"', sources)) == set(
        re.findall(r"`(\w+)`", row.partition("`level`")[0])
    ) - {"doctor", "check"}


def test_every_state_of_a_destination_is_in_readme_and_has_advice():
    for state in set(outcomes.STATE_OF.values()):
        assert f"`{state}`" in README
        assert state in outcomes.ADVICE


def test_the_version_is_the_distributions():
    assert versioner_agent.__version__ == importlib.metadata.version("versioner-agent")


def test_public_names_exist():
    for name in versioner_agent.__all__:
        assert getattr(versioner_agent, name)


def test_every_error_of_the_http_library_has_words():
    """A class that a new version adds is named here before it meets a user."""
    leaves = {
        found
        for _, found in inspect.getmembers(httpcore, inspect.isclass)
        if issubclass(found, Exception) and not found.__subclasses__()
    }
    named = set(delivery._WHAT) | {httpcore.ProxyError}
    timeouts = {found for found in leaves if issubclass(found, httpcore.TimeoutException)}

    assert leaves - timeouts - named <= {httpcore.ConnectionNotAvailable}


def test_delivery_and_queuing_take_all_settings_that_have_a_flag():
    assert {"db", *_common.DELIVERY_KEYS, *_common.QUEUING_KEYS} == {
        option.key for option in config.OPTIONS if option.flag
    }


def test_readme_has_exactly_two_set_up_commands():
    assert len(blocks("demo")) == len(blocks("tests")) == 1
    assert README.count("python3 -m venv") == 2


@pytest.fixture
def tour(tmp_path):
    """A shell's environment with the command on its PATH, and the port that README names."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "versioner-agent"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m versioner_agent "$@"\n')
    script.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{directory}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "VERSIONER_AGENT_DB": str(tmp_path / "outbox.db"),
    }


@pytest.mark.skipif(shutil.which("bash") is None, reason="README's tour is for a shell")
def test_the_tour_of_readme_works_as_written(tour, tmp_path):
    with Sandbox() as sandbox:
        for comment, code in blocks("tour"):
            if comment == "tour: sandbox":
                continue
            tour |= {"VERSIONER_API_URL": sandbox.url, "VERSIONER_API_KEY": "sk_sandbox_k1_local"}
            expected = int(comment.rpartition(" ")[2]) if "exits" in comment else 0
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code.replace("8765", str(sandbox.port))],
                env=tour,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )

            assert result.returncode == expected, result.stdout + result.stderr
    assert len(sandbox.events) == 4


def test_the_sandbox_command_of_readme_starts(tour, tmp_path):
    ((_, code),) = blocks("tour: sandbox")
    process = subprocess.Popen(
        code.replace("8765", "0").split(),
        env=tour,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        line = process.stdout.readline()
        process.terminate()

    assert "listening on http://127.0.0.1:" in line
    assert process.returncode == 0


def test_the_python_of_readme_works(tmp_path, monkeypatch, capsys):
    ((_, code),) = blocks("python")
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "README.md", "exec"), {})

    assert capsys.readouterr().out == "queued 1\n"


def test_the_demo_goes_as_told(tour, tmp_path):
    result = subprocess.run(
        ["versioner-agent", "demo"], env=tour, cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
    assert "HTTP 409, conflict" in result.stdout


def test_the_changelog_names_what_is_unreleased():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
