"""How a job ended, as the variables of its CI system tell it."""

from __future__ import annotations

import pytest

from versioner_agent import ci, events, sources
from versioner_agent.errors import ValidationError


def status(env, system=""):
    return ci.job_status(env, sources.NOTHING._replace(system=system))


def refused(env, system=""):
    with pytest.raises(ValidationError) as caught:
        status(env, system)
    (problem,) = caught.value.problems
    assert problem.isprintable()
    return problem


JENKINS = {
    "SUCCESS": "completed",
    "UNSTABLE": "failed",
    "FAILURE": "failed",
    "ABORTED": "aborted",
    "NOT_BUILT": "aborted",
}
GITHUB = {"success": "completed", "failure": "failed", "cancelled": "aborted", "skipped": "aborted"}
GITLAB = {"success": "completed", "failed": "failed", "canceled": "aborted"}
AZURE = {"Succeeded": "completed", "SucceededWithIssues": "completed", "Canceled": "aborted", "Failed": "failed"}


@pytest.mark.parametrize(
    ("variable", "system", "words"),
    [
        ("VERSIONER_JOB_STATUS", "jenkins", JENKINS), ("VERSIONER_JOB_STATUS", "github", GITHUB),
        ("CI_JOB_STATUS", "gitlab", GITLAB), ("AGENT_JOBSTATUS", "azure-devops", AZURE),
    ],
    ids=["jenkins", "github", "gitlab", "azure"],
)  # fmt: skip
@pytest.mark.parametrize("kind", events.KINDS)
def test_each_systems_own_words_are_known(variable, system, words, kind):
    for word, canonical in words.items():
        found = status({variable: word}, system)
        assert found == word
        assert events.canonical_status(kind, found) == canonical


@pytest.mark.parametrize("variable", ["BITBUCKET_EXIT_CODE", "TRAVIS_TEST_RESULT"])
@pytest.mark.parametrize(
    ("code", "word"),
    [("0", "completed"), ("00", "completed"), ("+0", "completed"), ("1", "failed"), ("10", "failed"), ("255", "failed"), ("-1", "failed"), (" 0\n", "completed"), ("9" * 5000, "failed")],
    ids=ascii,
)  # fmt: skip
def test_an_exit_code_is_a_status(variable, code, word):
    assert status({variable: code}) == word


@pytest.mark.parametrize("code", ["zero", "0x0", "1.0", "-", "\u0660", "\udcff", "0 0"], ids=ascii)
def test_another_exit_code_is_refused(code):
    problem = refused({"BITBUCKET_EXIT_CODE": code}, "bitbucket")

    assert problem.startswith("status: BITBUCKET_EXIT_CODE is ")
    assert "not an exit code" in problem


def test_the_users_own_word_comes_first():
    env = {
        "VERSIONER_JOB_STATUS": "aborted", "CI_JOB_STATUS": "success", "AGENT_JOBSTATUS": "Failed",
        "BITBUCKET_EXIT_CODE": "0", "TRAVIS_TEST_RESULT": "1",
    }  # fmt: skip

    assert status(env, "gitlab") == "aborted"


def test_the_detected_systems_variable_comes_next_and_any_where_there_is_none():
    """A stray variable of another system must not tell how this job ended."""
    env = {
        "CI_JOB_STATUS": "success",
        "AGENT_JOBSTATUS": "Canceled",
        "BITBUCKET_EXIT_CODE": "0",
        "TRAVIS_TEST_RESULT": "1",
    }

    assert status(env, "travis") == "failed"
    assert status(env, "bitbucket") == "completed"
    assert status(env, "azure-devops") == "Canceled"
    assert status(env) == "success"
    assert status({**env, "CI_JOB_STATUS": ""}) == "Canceled"
    assert "job.status" in refused(env, "github")
    assert "after_script" in refused({**env, "CI_JOB_STATUS": ""}, "gitlab")


@pytest.mark.parametrize("word", ["running", "started", "pending", "deploying"])
def test_a_job_that_has_not_ended_has_no_status(word):
    """GitLab says `running` in `script:`; taken as it is, a failing job would be told as completed or not at all."""
    problem = refused({"CI_JOB_STATUS": word}, "gitlab")

    assert "CI_JOB_STATUS" in problem
    assert "the job has not ended" in problem
    assert "final in after_script" in problem


def test_the_users_own_word_must_be_an_end_too():
    assert "has not ended" in refused({"VERSIONER_JOB_STATUS": "started"}, "github")
    assert "after_script" not in refused({"VERSIONER_JOB_STATUS": "started"}, "github")
    assert "did you mean 'success'?" in refused({"VERSIONER_JOB_STATUS": "succes"})
    assert "one of success, failed, aborted" in refused({"VERSIONER_JOB_STATUS": "\x1b[31m" + "x" * 9999})


@pytest.mark.parametrize(
    ("system", "says"),
    [
        ("github", "VERSIONER_JOB_STATUS: ${{ job.status }}"), ("gitlab", "after_script"),
        ("jenkins", "VERSIONER_JOB_STATUS=${currentBuild.currentResult} in post { always { … } }"),
        ("circleci", "when: on_fail"), ("bitbucket", "after-script"), ("azure-devops", "$(Agent.JobStatus)"),
        ("travis", "after_script"), ("rundeck", "error handlers"), ("", "VERSIONER_JOB_STATUS with success, failed or aborted"),
    ],
)  # fmt: skip
def test_without_a_status_the_message_says_what_to_pass(system, says):
    problem = refused({"VERSIONER_JOB_STATUS": ""}, system)

    assert problem.startswith("status: auto needs ")
    assert says in problem
