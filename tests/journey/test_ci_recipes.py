"""README's snippets for CI systems and scripts, run as the system runs them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from official import MARKS
from recipes import README, recipe

#: What each system tells of a run, and how it tells the result of the job: [success, failure, cancelled].
RUNS = {
    "github": (
        {
            "GITHUB_REPOSITORY": "acme/payments",
            "GITHUB_SHA": "a" * 40,
            "GITHUB_RUN_ID": "77",
            "GITHUB_RUN_ATTEMPT": "1",
        },
        "VERSIONER_JOB_STATUS",
        ("success", "failure", "cancelled"),
    ),
    "gitlab": (
        {"CI_PROJECT_PATH": "acme/payments", "CI_COMMIT_SHA": "a" * 40, "CI_PIPELINE_ID": "77", "CI_JOB_ID": "1"},
        "CI_JOB_STATUS",
        ("success", "failed", "canceled"),
    ),
    "jenkins": (
        {"GIT_URL": "git@github.com:acme/payments.git", "BUILD_NUMBER": "7", "BUILD_ID": "77", "BUILD_URL": "u"},
        "VERSIONER_JOB_STATUS",
        ("SUCCESS", "FAILURE", "ABORTED"),
    ),
    "circleci": (
        {"CIRCLE_PROJECT_REPONAME": "payments", "CIRCLE_SHA1": "a" * 40, "CIRCLE_WORKFLOW_ID": "77"},
        None,
        ("completed", "failed"),
    ),
    "bitbucket": (
        {"BITBUCKET_REPO_SLUG": "payments", "BITBUCKET_COMMIT": "a" * 40, "BITBUCKET_PIPELINE_UUID": "77"},
        "BITBUCKET_EXIT_CODE",
        ("0", "2"),
    ),
    "azure-devops": (
        {"BUILD_REPOSITORY_NAME": "acme/payments", "BUILD_BUILDNUMBER": "7", "BUILD_BUILDID": "77"},
        "AGENT_JOBSTATUS",
        ("Succeeded", "Failed", "Canceled"),
    ),
    "travis": (
        {"TRAVIS_REPO_SLUG": "acme/payments", "TRAVIS_COMMIT": "a" * 40, "TRAVIS_BUILD_ID": "77"},
        "TRAVIS_TEST_RESULT",
        ("0", "1"),
    ),
}
ENDS = ("completed", "failed", "aborted")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the recipes are for bash")


@pytest.fixture
def shell(host_for, tmp_path):
    """Run shell code on a host whose PATH has the command."""
    host = host_for()
    directory = tmp_path / "bin"
    directory.mkdir()
    programs = {
        "versioner-agent": f'exec {shlex.quote(sys.executable)} -m versioner_agent "$@"',
        "make": 'exit "${MAKE_EXITS:-0}"',
    }
    for name, code in programs.items():
        (directory / name).write_text(f"#!/bin/sh\n{code}\n")
        (directory / name).chmod(0o755)
    (tmp_path / "deploy.sh").write_text('#!/bin/sh\nexit "${MAKE_EXITS:-0}"\n')
    (tmp_path / "deploy.sh").chmod(0o755)

    def run(code, exits=0, **env):
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", code],
            env={**host.env, "PATH": f"{directory}:{host.env['PATH']}", **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == exits, done.stdout + done.stderr
        return done

    run.host = host
    return run


def told(host):
    """(kind, product, status, invoke_id) of every record, the oldest first."""
    found = host.json("list")
    return [(each["kind"], each["product_name"], each["status"], each["invoke_id"]) for each in reversed(found)]


@needs_bash
@pytest.mark.parametrize(
    ("system", "end"), [(system, end) for system, run in RUNS.items() for end in ENDS[: len(run[2])]]
)
def test_a_snippet_tells_start_and_end(shell, system, end):
    variables, result, words = RUNS[system]
    code = recipe(f"ci: {system}")
    commands = re.findall(r"versioner-agent enqueue[^'\n]*", code)
    env = {MARKS[system][0]: MARKS[system][1], **variables}
    word = words[ENDS.index(end)]
    if result is None:  # steps of their own for each end
        commands = [commands[0], *(each for each in commands[1:] if each.endswith(word))]
        assert code.index("when: on_success") < code.index("--status failed") < code.index("when: on_fail")
    else:
        assert ("VERSIONER_JOB_STATUS" in code) == (result == "VERSIONER_JOB_STATUS")

    for number, command in enumerate(commands):
        shell(command, **env, **({result: word} if result and number else {}))

    assert told(shell.host) == [("build", "payments", status, "77") for status in ("started", end)]


@needs_bash
def test_the_snippet_for_rundeck(shell):
    env = {"RD_JOB_ID": "j", "RD_JOB_EXECID": "77", "RD_JOB_NAME": "payments", "RD_OPTION_VERSION": "1.2.3"}

    shell(recipe("ci: rundeck"), **env, RD_OPTION_ENVIRONMENT="production")
    shell(recipe("ci: rundeck"), exits=3, **env, RD_OPTION_ENVIRONMENT="production", MAKE_EXITS="3")

    statuses = [status for _, _, status, _ in told(shell.host)]
    assert statuses == ["started", "completed", "started", "failed"]
    assert {each[1::2] for each in told(shell.host)} == {("payments", "77")}


@needs_bash
def test_the_snippets_for_a_shell(shell):
    shell(recipe("shell: exec"), VERSION="1.2.3")
    shell(recipe("shell: exec"), exits=2, VERSION="1.2.4", MAKE_EXITS="2")
    shell(recipe("shell: three steps"), VERSION="1.2.3")
    shell(recipe("shell: three steps"), VERSION="1.2.3", MAKE_EXITS="2")

    statuses = [status for _, _, status, _ in told(shell.host)]
    assert statuses == ["started", "completed", "started", "failed"] * 2


@needs_bash
def test_the_snippet_for_who_used_curl(shell):
    shell(recipe("curl"), VERSION="1.2.3")

    assert told(shell.host) == [("deployment", "my-service", "completed", None)]


def test_every_system_has_a_snippet():
    for system in MARKS:
        assert f"<!-- ci: {system} -->" in README
