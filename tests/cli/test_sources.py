"""Where an event's fields come from: the call, the environment, the CI system, git; and when nothing may fail a job."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3

import pytest
from official import MARKS

BUILD = ("enqueue", "build", "--product", "payments", "--version", "1.2.3")
GITHUB = {
    "GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "acme/payments", "GITHUB_SHA": "a" * 40, "GITHUB_RUN_ID": "77",
    "GITHUB_RUN_ATTEMPT": "1", "GITHUB_REF_NAME": "main", "GITHUB_SERVER_URL": "https://github.com",
}  # fmt: skip
LINK = "https://github.com/acme/payments/actions/runs/77"
#: What tells one attempt of a run from the next, and what both share.
ATTEMPTS = {
    "github": ({"GITHUB_RUN_ID": "7"}, "GITHUB_RUN_ATTEMPT"),
    "gitlab": ({"CI_PIPELINE_ID": "7"}, "CI_JOB_ID"),
    "jenkins": ({"BUILD_ID": "7"}, "BUILD_URL"),
    "circleci": ({"CIRCLE_WORKFLOW_ID": "7"}, "CIRCLE_WORKFLOW_JOB_ID"),
    "bitbucket": ({"BITBUCKET_PIPELINE_UUID": "{7}", "BITBUCKET_STEP_UUID": "{s}"}, "BITBUCKET_STEP_RUN_NUMBER"),
    "azure-devops": ({"BUILD_BUILDID": "7", "SYSTEM_STAGEATTEMPT": "1", "SYSTEM_JOBID": "j"}, "SYSTEM_JOBATTEMPT"),
    "travis": ({"TRAVIS_BUILD_ID": "7"}, "TRAVIS_JOB_ID"),
    "rundeck": ({"RD_JOB_EXECID": "7", "RD_JOB_SERVERURL": "https://rd"}, "RD_JOB_RETRYATTEMPT"),
}


@pytest.fixture
def env(monkeypatch, tmp_path):
    """Set variables, in a directory that git knows nothing of."""
    monkeypatch.chdir(tmp_path)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def payload(db, record_id=1):
    connection = sqlite3.connect(db)
    try:
        return json.loads(connection.execute("SELECT payload FROM record WHERE id = ?", (record_id,)).fetchone()[0])
    finally:
        connection.close()


def outcome(done):
    assert done.code == 0, done
    return json.loads(done.out)["outcome"]


# --- one attempt, and the next


@pytest.mark.parametrize("system", MARKS)
@pytest.mark.parametrize("kind", ["build", "deployment"])
def test_a_repeated_step_is_queued_once_and_a_rerun_again(cli, env, system, kind):
    shared, attempt = ATTEMPTS[system]
    env({MARKS[system][0]: MARKS[system][1], **shared, attempt: "1"})
    call = ("enqueue", kind, "--product", "p", "--version", "1", "--status", "started", "--json")
    call += ("--environment", "e") if kind == "deployment" else ()

    assert [outcome(cli(*call)) for _ in range(2)] == ["queued", "duplicate"]
    env({attempt: "2"})
    assert [outcome(cli(*call)) for _ in range(2)] == ["queued", "duplicate"]


# --- layers


def test_a_ci_run_needs_no_more_than_a_word(cli, db, env):
    env(GITHUB)
    assert cli("enqueue", "build", "--status", "started").code == 0

    body = payload(db)
    body.pop("started_at")
    metadata = body.pop("extra_metadata")
    assert body == {
        "product_name": "payments", "version": "a" * 8, "status": "started", "scm_sha": "a" * 40, "scm_branch": "main",
        "scm_repository": "acme/payments", "invoke_id": "77", "source_system": "github", "build_url": LINK,
    }  # fmt: skip
    assert metadata["vi_gh_run_attempt"] == "1"


def test_a_deployments_link_is_sent_under_both_names(cli, db, env):
    env(GITHUB)
    assert cli("enqueue", "deployment", "--environment", "production").code == 0

    body = payload(db)
    assert (body["build_url"], body["deploy_url"]) == (LINK, LINK)
    assert "scm_branch" not in body  # the official client sends none


def test_options_go_before_variables_and_these_before_the_ci_system(cli, db, env):
    env({**GITHUB, "VERSIONER_PRODUCT": "from-env", "VERSIONER_SCM_SHA": "b" * 40, "VERSIONER_STATUS": "failed"})

    assert cli("enqueue", "build", "--scm-sha", "c" * 40, "--scm-branch", "").code == 0
    body = payload(db)
    found = (body["product_name"], body["scm_sha"], body["scm_branch"], body["version"], body["status"])
    assert found == ("from-env", "c" * 40, "main", "a" * 8, "completed")


def test_a_body_goes_before_everything_and_is_completed(cli, db, env):
    env({**GITHUB, "VERSIONER_PRODUCT": "from-env", "VERSIONER_BUILD_NUMBER": "9"})

    done = cli("enqueue", "json", "-v", stdin=b'{"product_name": "mine", "version": "1", "status": "ok"}')
    assert done.code == 0
    body = payload(db)
    assert (body["product_name"], body["version"], body["build_number"]) == ("mine", "1", "9")
    assert body["scm_sha"] == "a" * 40
    assert "note: build_number = 9 (from VERSIONER_BUILD_NUMBER)" in done.err


def test_nothing_is_detected_where_that_was_asked_for(cli, db, env):
    env(GITHUB)
    assert cli(*BUILD, "--no-detect").code == 0

    assert set(payload(db)) == {"product_name", "version", "status", "completed_at", "extra_metadata"}
    assert not {name for name in payload(db)["extra_metadata"] if not name.startswith("vi_agent_")}


def test_verbose_shows_what_was_detected_and_from_where(cli, env):
    env(GITHUB)
    done = cli("enqueue", "build", "-v")

    assert "note: detected CI system: github" in done.err
    assert f"note: scm_sha = {'a' * 40} (from GITHUB_SHA)" in done.err
    assert "note: run attempt = 1" in done.err


def test_a_strange_name_in_the_environment_does_not_fail_a_build(cli, db, env):
    env({**GITHUB, "GITHUB_REF_NAME": "caf\udce9", "GITHUB_ACTOR": "\x1b[2J"})
    done = cli("enqueue", "build", "-v")

    assert done.code == 0
    assert payload(db)["scm_branch"] == "caf\ufffd"
    assert "\x1b" not in done.err


# --- --status auto


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({"VERSIONER_JOB_STATUS": "failure"}, "failed"),
        ({"GITLAB_CI": "true", "CI_JOB_STATUS": "canceled"}, "aborted"),
        ({"TF_BUILD": "True", "AGENT_JOBSTATUS": "SucceededWithIssues"}, "completed"),
        ({"BITBUCKET_BUILD_NUMBER": "1", "BITBUCKET_EXIT_CODE": "137"}, "failed"),
        ({"TRAVIS": "true", "TRAVIS_TEST_RESULT": "0"}, "completed"),
        ({"GITLAB_CI": "true", "CI_JOB_STATUS": "success", "VERSIONER_JOB_STATUS": "ABORTED"}, "aborted"),
    ],
)
def test_the_jobs_result_is_taken_over(cli, db, env, variables, status):
    env(variables)
    assert cli(*BUILD, "--status", "auto").code == 0
    assert cli("track", *BUILD[1:], "--status=AUTO").code == 0

    assert payload(db)["status"] == payload(db, 2)["status"] == status


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "VERSIONER_JOB_STATUS"),
        ({"GITHUB_ACTIONS": "true"}, "${{ job.status }}"),
        ({"GITLAB_CI": "true", "CI_JOB_STATUS": "running"}, "after_script"),
        ({"TRAVIS": "true", "TRAVIS_TEST_RESULT": "broken"}, "TRAVIS_TEST_RESULT"),
        ({"VERSIONER_JOB_STATUS": "wat"}, "VERSIONER_JOB_STATUS"),
    ],
)
def test_a_result_that_is_not_known_exits_2_and_names_what_to_pass(cli, db, env, variables, words):
    env(variables)
    done = cli(*BUILD, "--status", "auto")

    assert done.code == 2
    assert words in done.err
    assert not db.exists()


# --- nothing may fail a job


def missing_directory(db, tmp_path):
    return ("--db", str(tmp_path / "nowhere" / "outbox.db"))


def broken_configuration(db, tmp_path):
    (tmp_path / "bad.toml").write_text("concurency = 3\n")
    return ("--config", str(tmp_path / "bad.toml"))


def somebody_elses_file(db, tmp_path):
    db.write_bytes(b"x" * 5000)
    return ()


@pytest.mark.parametrize("trouble", [missing_directory, broken_configuration, somebody_elses_file])
@pytest.mark.parametrize("command", ["enqueue", "track"])
def test_best_effort_turns_trouble_into_one_line(cli, db, tmp_path, monkeypatch, trouble, command):
    call = (command, *BUILD[1:], *trouble(db, tmp_path))
    assert cli(*call).code in (1, 3)

    done = cli(*call, "--best-effort")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("warning: the event was NOT queued: ")
    assert done.err.count("\n") == 1
    monkeypatch.setenv("VERSIONER_AGENT_BEST_EFFORT", "1")
    assert cli(*call).code == 0


def test_best_effort_can_be_a_hosts_setting(cli, db, tmp_path):
    (tmp_path / "soft.toml").write_text("best_effort = true\n")

    done = cli(*BUILD, "--config", str(tmp_path / "soft.toml"), *missing_directory(db, tmp_path))
    assert done.code == 0


@pytest.mark.parametrize("said", ["environment", "file"])
def test_best_effort_can_be_refused_by_the_call(cli, db, tmp_path, monkeypatch, said):
    (tmp_path / "soft.toml").write_text("best_effort = true\n" if said == "file" else "")
    if said == "environment":
        monkeypatch.setenv("VERSIONER_AGENT_BEST_EFFORT", "true")
    call = (*BUILD, "--config", str(tmp_path / "soft.toml"), *missing_directory(db, tmp_path))

    assert (cli(*call).code, cli(*call, "--best-effort=false").code) == (0, 1)


def test_a_deployment_that_could_not_be_queued_was_not_checked(cli, db, tmp_path):
    start = ("track", "deployment", *BUILD[2:], "--environment=e", "--status=started", "--best-effort")
    start += missing_directory(db, tmp_path)

    done = cli(*start)
    assert (done.code, "NOT checked against the rules" in done.err) == (0, True)
    assert cli(*start, "--fail-on-api-error").code == 75


def test_an_invalid_event_is_an_error_even_so(cli, db):
    assert cli("enqueue", "build", "--product", "p", "--best-effort").code == 2
    assert cli(*BUILD, "--status", "wat", "--best-effort").code == 2
    assert cli("enqueue", "json", "--best-effort", stdin=b"{").code == 2


def test_a_locked_outbox_is_waited_for_as_long_as_was_said(cli, db):
    cli(*BUILD)
    queue = os.open(f"{db}.queue", os.O_RDWR)
    try:
        fcntl.flock(queue, fcntl.LOCK_EX)

        done = cli(*BUILD, "--busy-timeout", "0.2")
        assert done.code == 1
        assert "busy for 0.2 s" in done.err
        assert cli(*BUILD, "--busy-timeout", "0.2", "--best-effort").code == 0
    finally:
        os.close(queue)


# --- the official client's options


def test_the_options_of_the_official_client_are_taken(cli, db, env):
    done = cli(
        "--api-url=http://127.0.0.1:9", "track", "--debug=false", "build", "--product=p", "--version=1",
        "--fail-on-api-error=false", "--ui-url=http://u",
    )  # fmt: skip

    assert done.code == 0
    assert "note: --fail-on-api-error=false" in done.err
    assert cli("--verbose", "track", "deployment", *BUILD[2:], "--environment=e", "--skip-preflight-checks").code == 0
    assert payload(db, 2)["skip_preflight_checks"] is True
    assert cli("track", "deployment", *BUILD[2:], "--environment=e", "--skip-preflight-checks=false").code == 0
    assert "skip_preflight_checks" not in payload(db, 3)


def test_a_template_whose_variable_is_unset_is_as_if_nothing_was_said(cli, db, env):
    done = cli("track", "build", *BUILD[2:], "--api-key=", "--api-url=", "--scm-sha=", "--extra-metadata=")

    assert (done.code, done.err) == (0, "")


def test_a_report_of_a_failure_may_hold_any_bytes(cli, db):
    assert cli(*BUILD, "--status=failed", "--error", "x" * 200_000 + "\udce9").code == 0
    assert cli(*BUILD, "--status=failed", "--error", "caf\udce9").code == 0

    assert len(payload(db)["extra_metadata"]["error"]) == 10_000
    assert payload(db, 2)["extra_metadata"]["error"] == "caf?"


@pytest.mark.parametrize("word", ["nan", "-1", "soon", "inf", "1e9"])
def test_a_wait_that_would_never_end_is_refused(cli, db, word):
    assert cli(*BUILD, f"--wait={word}").code == 2
    assert not db.exists()


def test_the_official_clients_file_is_named_where_something_is_missing(cli, tmp_path):
    assert "hint" not in cli("track", "build").err
    (tmp_path / "config.yaml").write_text("product: payments\n")

    done = cli("track", "build")
    assert done.code == 2
    assert "hint: config.yaml of the official client is not read" in done.err


@pytest.mark.parametrize("words", [("track",), ("exec",), ("enqueue",), ()])
def test_without_a_command_the_help_is_readable(cli, words):
    done = cli(*words)

    assert "\nOptions:\n" in done.out + done.err


def test_a_key_on_the_command_line_is_warned_of_and_kept_nowhere(cli, db, env):
    done = cli("track", "build", *BUILD[2:], "--api-key=sk_acme_k1_verysecret")

    assert done.code == 0
    assert "warning: --api-key is visible in process lists" in done.err
    assert "verysecret" not in done.out + done.err
    assert b"verysecret" not in b"".join(file.read_bytes() for file in db.parent.iterdir())


def test_what_is_neither_true_nor_false_is_named(cli, env):
    env({"VERSIONER_FAIL_ON_API_ERROR": "maybe"})
    done = cli("track", "build", *BUILD[2:])

    assert done.code == 2
    assert "VERSIONER_FAIL_ON_API_ERROR: must be true or false" in done.err


def test_version_says_the_same_as_the_option(cli):
    assert cli("version").out == cli("--version").out
