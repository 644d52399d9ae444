"""How options may be spelled: as the official client has them, and so that no value is taken for an option."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from versioner_agent.cli import EarlyGroup
from versioner_agent.cli._spelling import Bare, SpelledCommand, as_truth, truth_of


def parsed(*args):
    @click.command(cls=SpelledCommand)
    @click.option("-q", "--quiet", is_flag=True)
    @click.option("--name")
    @click.option("--wait", cls=Bare, bare="60", type=click.FloatRange(min=0))
    @click.option("--fail", cls=Bare, bare="true", callback=as_truth)
    @click.argument("rest", nargs=-1)
    def command(**found):
        click.echo(json.dumps(found))

    done = CliRunner().invoke(command, args)
    return json.loads(done.output) if done.exit_code == 0 else done.exit_code


def found(**changes):
    return {"quiet": False, "name": None, "wait": None, "fail": None, "rest": [], **changes}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), {}),
        (("--wait",), {"wait": 60}),
        (("--wait=2.5",), {"wait": 2.5}),
        (("--wait", "file"), {"wait": 60, "rest": ["file"]}),
        (("--wait", "2.5", "7"), {"wait": 2.5, "rest": ["7"]}),
        (("--fail", "0"), {"fail": True, "rest": ["0"]}),
        (("--fail",), {"fail": True}),
        (("--fail=false",), {"fail": False}),
        (("--fail=F", "--fail=1"), {"fail": True}),
        (("--quiet=true",), {"quiet": True}),
        (("-q=false",), {"quiet": False}),
        (("--quiet", "--quiet=0"), {"quiet": True}),
        (("--name", "--wait"), {"name": "--wait"}),
        (("--name=--wait", "--wait"), {"name": "--wait", "wait": 60}),
        (("--name", "--quiet=no"), {"name": "--quiet=no"}),
        (("--", "--wait", "--quiet=false"), {"rest": ["--wait", "--quiet=false"]}),
    ],
)
def test_each_spelling_is_understood(args, expected):
    assert parsed(*args) == found(**expected)


@pytest.mark.parametrize("args", [("--quiet=maybe",), ("--fail=",), ("--fail=2",), ("--wait=soon",), ("--quiet=",)])
def test_what_is_neither_true_nor_false_exits_2(args):
    assert parsed(*args) == 2


@pytest.mark.parametrize("word", ["1", "t", "T", "TRUE", "true", "True"])
def test_go_takes_this_for_true(word):
    assert truth_of(word) is True


@pytest.mark.parametrize("word", ["0", "f", "F", "FALSE", "false", "False"])
def test_go_takes_this_for_false(word):
    assert truth_of(word) is False


@pytest.mark.parametrize(
    ("args", "seen"),
    [
        (("-v", "inner", "x"), ["-v", "x"]),
        (("--api-url", "http://h", "--api-key=k", "inner"), ["--api-url", "http://h", "--api-key=k"]),
        (("--verbose=false", "inner", "-v"), ["--verbose=false", "-v"]),
        (("inner", "--config", "f"), ["--config", "f"]),
    ],
)
def test_options_before_a_command_are_the_commands(args, seen):
    @click.group(cls=EarlyGroup)
    def group():
        pass

    @group.command(context_settings={"ignore_unknown_options": True})
    @click.argument("rest", nargs=-1, type=click.UNPROCESSED)
    def inner(rest):
        click.echo(json.dumps(rest))

    assert json.loads(CliRunner().invoke(group, args).output) == seen


def test_an_option_before_a_command_that_does_not_have_it_is_refused(cli):
    done = cli("--api-key", "sk_acme_k1_secret", "status")

    assert done.code == 2
    assert "No such option" in done.err
    assert "secret" not in done.err


def test_early_options_reach_a_command_of_a_group(cli):
    done = cli("-v", "enqueue", "build", "--product", "p", "--version", "1")

    assert done.code == 0
    assert "outbox" in done.err
