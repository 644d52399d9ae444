"""`config`: every setting, its value and where it comes from; and the check of a file before it is put in place."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from versioner_agent import config as configuration
from versioner_agent.cli._common import (
    DELIVERY_KEYS,
    echo,
    echo_json,
    given_flags,
    json_option,
    settings_options,
    table,
)
from versioner_agent.errors import ConfigError, UsageError
from versioner_agent.masked import rows
from versioner_agent.text import harmless, mask_keys, printable
from versioner_agent.urls import proxy_for, without_password

if TYPE_CHECKING:
    from versioner_agent.config import Key, Settings
    from versioner_agent.configfile import File, Problem


@click.command()
@click.option(
    "--check", "checked", metavar="FILE", help="Only say what is wrong with this file, taken alone; - reads stdin."
)
@settings_options(*DELIVERY_KEYS)
@json_option
def config(checked: str | None, as_json: bool, verbose: bool, **options: Any) -> int:
    """Show every setting, its value and its source, as `run` would take them with the same options.

    Exits 3 with all problems where there are any. Of the API key only the part that is no secret is shown, and of a
    proxy's URL no password.

    \b
    versioner-agent config
    versioner-agent config --check /etc/versioner-agent/config.toml
    """
    if checked is not None:
        if any(value is not None for value in options.values()):
            raise UsageError("--check looks at one file alone: leave out --config and the settings")
        return _check(checked, as_json=as_json)
    from versioner_agent import binding  # noqa: PLC0415  # knows the API's side too

    files = configuration.read_files(os.environ, options["config"])
    if verbose or not as_json:
        for line in _looked_for(files, options["config"]):
            click.echo(printable(line), err=True)
    flags = given_flags(options)
    settings = configuration.load_from(flags, os.environ, files)
    configuration.refuse(_unusable(settings, flags, os.environ, files))
    binding.sending(settings, os.environ, binding.Account(None))[0].close()
    key = configuration.find_key(settings, os.environ)
    found = rows(settings, key, {file.name: file for file in files})
    if as_json:
        for row in found:
            echo_json(row._asdict())
    else:
        for line in table([[printable(cell) for cell in row.cells] for row in found], ("key", "value", "source")):
            echo(line)
    for note in _notes(settings, key):
        click.echo(harmless(f"note: {note}"), err=True)
    return 0


def _check(name: str, *, as_json: bool) -> int:
    file = _checked_file(name)
    problems = configuration.check(file)
    if not problems:
        settings = configuration.resolve({}, {}, [file])
        problems = _unusable(settings, {}, {}, [file])
        if words := configuration.key_problem(settings.api_key or ""):
            problems.append(configuration.located("api_key", words, {}, {}, [file]))
    if as_json:
        shown = [
            {"line": problem.line, "problem": mask_keys(problem.words), "hint": problem.hint} for problem in problems
        ]
        echo_json({"file": file.name, "ok": not problems, "problems": shown})
        return ConfigError.exit_code if problems else 0
    configuration.refuse(problems)
    echo(f"{printable(file.name)}: ok")
    return 0


def _unusable(settings: Settings, flags: Mapping[str, Any], env: Mapping[str, str], files: list[File]) -> list[Problem]:
    """Return what else `run` would refuse: names that lead nowhere, certificates that can't be read."""
    from versioner_agent.delivery import Sender, Target  # noqa: PLC0415
    from versioner_agent.urls import proxy_for  # noqa: PLC0415

    proxy = proxy_for(configuration.DEFAULT_API_URL, (settings.proxy, ""), {})
    targets = {
        "api_url": Target(settings.api_url),
        "ca_bundle": Target(configuration.DEFAULT_API_URL, ca_bundle=settings.ca_bundle),
        "proxy": Target(configuration.DEFAULT_API_URL, proxy=proxy),
    }
    problems = []
    for key, target in targets.items():
        if settings.is_explicit(key):
            try:
                Sender(target, lambda: None).close()
            except ConfigError as exc:
                words = exc.problems[0].removeprefix(f"{key}: ")
                problems.append(configuration.located(key, words, flags, env, files))
    return problems


def _checked_file(name: str) -> File:
    from versioner_agent import configfile  # noqa: PLC0415

    if name == "-":
        return configfile.file_of("<stdin>", sys.stdin.buffer.read(configfile.MAX_FILE_BYTES + 1))
    file = configfile.read_file(name)
    if file.state != "not there":
        return file
    return file._replace(problem=configfile.Problem(f"can't read {name}: there is no such file"))


def _looked_for(files: list[File], flag: str | None) -> list[str]:
    """Say which files were looked for, and who named them: a slip in that name makes a missing file, no error."""
    named = "--config" if flag else configuration.ENV_CONFIG if os.environ.get(configuration.ENV_CONFIG) else ""
    by = f" (named by {named}; no other is looked for)" if named else ""
    return [f"file {file.name}{by}: {file.state}" for file in files]


def _notes(settings: Settings, key: Key) -> list[str]:
    """Say what is no fault of the settings, but decides whether anything is delivered."""
    notes = []
    if key.problem:
        notes.append(f"no API key: {key.problem}")
    proxy = proxy_for(settings.api_url, (settings.proxy, settings.no_proxy), os.environ)
    if proxy and not settings.proxy:
        notes.append(f"the environment's proxy is used: {without_password(proxy)}")
    return notes
