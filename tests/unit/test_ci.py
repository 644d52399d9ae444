"""What is read from a CI system's variables."""

from __future__ import annotations

import random

import official
import pytest

from versioner_agent import ci, events, sources

SHA = "0123456789abcdef0123456789abcdef01234567"
#: What each system sets, as a job sees it.
ENVIRONMENTS = {
    "github": {
        "CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "acme/payments", "GITHUB_SHA": SHA,
        "GITHUB_REF_NAME": "feature/x", "GITHUB_RUN_NUMBER": "7", "GITHUB_RUN_ID": "1658821493",
        "GITHUB_SERVER_URL": "https://github.com", "GITHUB_ACTOR": "octocat", "GITHUB_RUN_ATTEMPT": "2",
        "GITHUB_WORKFLOW": "CI", "GITHUB_HEAD_REF": "",
    },
    "gitlab": {
        "CI": "true", "GITLAB_CI": "true", "CI_PROJECT_PATH": "acme/backend/payments", "CI_COMMIT_SHA": SHA,
        "CI_COMMIT_REF_NAME": "main", "CI_PIPELINE_IID": "12", "CI_PIPELINE_ID": "4711",
        "CI_PIPELINE_URL": "https://gitlab.example/acme/backend/payments/-/pipelines/4711", "GITLAB_USER_LOGIN": "jane",
        "GITLAB_USER_EMAIL": "jane@example.com", "GITLAB_USER_NAME": "Jane Doe", "CI_JOB_ID": "99",
    },
    "jenkins": {
        "JENKINS_URL": "https://ci.example/", "GIT_URL": "git@git.example:acme/payments.git", "GIT_COMMIT": SHA,
        "GIT_BRANCH": "origin/main", "BUILD_NUMBER": "42", "BUILD_ID": "42",
        "BUILD_URL": "https://ci.example/job/payments/42/", "JOB_NAME": "payments", "BUILD_USER": "jane",
        "BUILD_USER_EMAIL": "jane@example.com", "NODE_NAME": "built-in",
    },
    "circleci": {
        "CI": "true", "CIRCLECI": "true", "CIRCLE_PROJECT_USERNAME": "acme", "CIRCLE_PROJECT_REPONAME": "payments",
        "CIRCLE_SHA1": SHA, "CIRCLE_BRANCH": "", "CIRCLE_TAG": "v1.2.3", "CIRCLE_BUILD_NUM": "5",
        "CIRCLE_WORKFLOW_ID": "w-1", "CIRCLE_BUILD_URL": "https://circleci.com/gh/acme/payments/5",
        "CIRCLE_USERNAME": "jane", "CIRCLE_WORKFLOW_JOB_ID": "j-1", "CIRCLE_NODE_INDEX": "0", "CIRCLE_JOB": "build",
    },
    "bitbucket": {
        "CI": "true", "BITBUCKET_BUILD_NUMBER": "8", "BITBUCKET_REPO_FULL_NAME": "acme/payments",
        "BITBUCKET_REPO_SLUG": "payments", "BITBUCKET_COMMIT": SHA, "BITBUCKET_BRANCH": "main",
        "BITBUCKET_PIPELINE_UUID": "{p}", "BITBUCKET_STEP_UUID": "{s}", "BITBUCKET_WORKSPACE": "acme",
    },
    "azure-devops": {
        "TF_BUILD": "True", "BUILD_REPOSITORY_NAME": "acme/payments", "BUILD_SOURCEVERSION": SHA,
        "BUILD_SOURCEBRANCHNAME": "main", "BUILD_BUILDNUMBER": "20261106.1", "BUILD_BUILDID": "77",
        "BUILD_BUILDURI": "vstfs:///Build/Build/77", "BUILD_REQUESTEDFOR": "Jane Doe",
        "BUILD_REQUESTEDFOREMAIL": "jane@example.com", "SYSTEM_JOBATTEMPT": "1", "SYSTEM_JOBID": "g",
        "AGENT_NAME": "agent 1",
    },
    "travis": {
        "CI": "true", "TRAVIS": "true", "TRAVIS_REPO_SLUG": "acme/payments", "TRAVIS_COMMIT": SHA[:7],
        "TRAVIS_BRANCH": "main", "TRAVIS_BUILD_NUMBER": "3", "TRAVIS_BUILD_ID": "30",
        "TRAVIS_BUILD_WEB_URL": "https://app.travis-ci.com/acme/payments/builds/30", "TRAVIS_JOB_ID": "31",
    },
    "rundeck": {
        "RD_JOB_ID": "u-1", "RD_JOB_EXECID": "15", "RD_JOB_SERVERURL": "https://rundeck.example",
        "RD_JOB_PROJECT": "ops", "RD_JOB_NAME": "deploy payments", "RD_JOB_USER_NAME": "jane",
        "RD_JOB_RETRYATTEMPT": "0",
    },
}  # fmt: skip
#: What a build is told from them, but for `source_system`.
BUILDS = {
    "github": {
        "product_name": "payments", "version": "01234567", "scm_repository": "acme/payments", "scm_sha": SHA,
        "scm_branch": "feature/x", "build_number": "7", "invoke_id": "1658821493",
        "build_url": "https://github.com/acme/payments/actions/runs/1658821493", "built_by": "octocat",
    },
    "gitlab": {
        "product_name": "payments", "version": "01234567", "scm_repository": "acme/backend/payments", "scm_sha": SHA,
        "scm_branch": "main", "build_number": "12", "invoke_id": "4711",
        "build_url": "https://gitlab.example/acme/backend/payments/-/pipelines/4711", "built_by": "jane",
        "built_by_email": "jane@example.com", "built_by_name": "Jane Doe",
    },
    "jenkins": {
        "product_name": "payments", "version": "42", "scm_repository": "git.example/acme/payments", "scm_sha": SHA,
        "scm_branch": "origin/main", "build_number": "42", "invoke_id": "42",
        "build_url": "https://ci.example/job/payments/42/", "built_by": "jane", "built_by_email": "jane@example.com",
    },
    "circleci": {
        "product_name": "payments", "version": "01234567", "scm_repository": "acme/payments", "scm_sha": SHA,
        "scm_branch": "v1.2.3", "build_number": "5", "invoke_id": "w-1",
        "build_url": "https://circleci.com/gh/acme/payments/5", "built_by": "jane",
    },
    "bitbucket": {
        "product_name": "payments", "version": "01234567", "scm_repository": "acme/payments", "scm_sha": SHA,
        "scm_branch": "main", "build_number": "8", "invoke_id": "{p}",
        "build_url": "https://bitbucket.org/acme/payments/pipelines/results/8",
    },
    "azure-devops": {
        "product_name": "payments", "version": "20261106.1", "scm_repository": "acme/payments", "scm_sha": SHA,
        "scm_branch": "main", "build_number": "20261106.1", "invoke_id": "77", "build_url": "vstfs:///Build/Build/77",
        "built_by": "Jane Doe", "built_by_email": "jane@example.com",
    },
    "travis": {
        "product_name": "payments", "version": "0123456", "scm_repository": "acme/payments", "scm_sha": "0123456",
        "scm_branch": "main", "build_number": "3", "invoke_id": "30",
        "build_url": "https://app.travis-ci.com/acme/payments/builds/30",
    },
    "rundeck": {
        "product_name": "deploy payments", "version": "15", "build_number": "15", "invoke_id": "15",
        "build_url": "https://rundeck.example/project/ops/execution/show/15", "built_by": "jane",
    },
}  # fmt: skip
METADATA = {
    "github": {"vi_gh_workflow": "CI", "vi_gh_run_attempt": "2"},
    "gitlab": {
        "vi_gl_pipeline_id": "4711", "vi_gl_job_id": "99",
        "vi_gl_pipeline_url": "https://gitlab.example/acme/backend/payments/-/pipelines/4711",
    },
    "jenkins": {
        "vi_jenkins_job_name": "payments", "vi_jenkins_build_url": "https://ci.example/job/payments/42/",
        "vi_jenkins_node_name": "built-in",
    },
    "circleci": {
        "vi_circle_workflow_id": "w-1", "vi_circle_workflow_job_id": "j-1", "vi_circle_job_name": "build",
        "vi_circle_node_index": "0",
    },
    "bitbucket": {
        "vi_bb_pipeline_uuid": "{p}", "vi_bb_step_uuid": "{s}", "vi_bb_workspace": "acme", "vi_bb_repo_slug": "payments",
    },
    "azure-devops": {"vi_azure_build_id": "77", "vi_azure_agent_name": "agent 1"},
    "travis": {"vi_travis_build_id": "30", "vi_travis_job_id": "31"},
    "rundeck": {
        "vi_rd_job_id": "u-1", "vi_rd_job_execid": "15", "vi_rd_job_serverurl": "https://rundeck.example",
        "vi_rd_job_project": "ops", "vi_rd_job_name": "deploy payments",
    },
}  # fmt: skip
ATTEMPTS = {
    "github": "2", "gitlab": "99", "jenkins": "https://ci.example/job/payments/42/", "circleci": "j-1:0",
    "bitbucket": "{s}:", "azure-devops": ":1:g", "travis": "31", "rundeck": "https://rundeck.example:0",
}  # fmt: skip

VARIABLES = official.variables()
#: Hard for one variable or another.
VALUES = [
    "", "", "true", "True", "1", "x", SHA, SHA[:7], "acme/payments", "acme/a/b", "acme", "/", "a/", "/b", "wide ünïcode",
    "bad \udcff\udc80 bytes", "git@git.example:acme/payments.git", "https://git.example:8443/acme/payments.git",
    "http://https://x.git", "https://jane@git.example/x.git", "ssh://git@git.example:22/acme/payments.git",
    "x.git.git", "a:b:c", "{GITHUB_SHA}", "{0.__class__}", "%s",
]  # fmt: skip


def values_of(kind, env):
    return {name: value for name, (value, _) in sources.fields_of(kind, ci.detect(env)).items()}


@pytest.mark.parametrize("system", ENVIRONMENTS)
def test_a_build_is_told_by_its_system(system):
    detected = ci.detect(ENVIRONMENTS[system])

    assert detected.system == system
    assert values_of("build", ENVIRONMENTS[system]) == {**BUILDS[system], "source_system": system}
    assert detected.metadata == METADATA[system]
    assert detected.run_attempt == ATTEMPTS[system]


@pytest.mark.parametrize("system", ENVIRONMENTS)
def test_a_deployment_is_told_the_same_in_its_own_words(system):
    """No branch, `deployed_by…`, and the link under both names, as the official client sends it."""
    told = {name.replace("built", "deployed"): value for name, value in BUILDS[system].items() if name != "scm_branch"}

    found = values_of("deployment", ENVIRONMENTS[system])

    assert found == {**told, "source_system": system, "deploy_url": told["build_url"]}


@pytest.mark.parametrize("kind", events.KINDS)
@pytest.mark.parametrize("system", ENVIRONMENTS)
def test_every_field_told_is_one_that_the_kind_has(kind, system):
    assert set(values_of(kind, ENVIRONMENTS[system])) <= set(events.FIELDS_OF[kind])


@pytest.mark.parametrize("system", ENVIRONMENTS)
def test_every_value_names_the_variables_it_came_from(system):
    """With them alone it is the same."""
    env = ENVIRONMENTS[system]
    for field, (value, variables) in sources.fields_of("build", ci.detect(env)).items():
        named = variables.split(", ")
        assert set(named) <= set(env)
        rest = {name: env[name] for name in named} | {ci._SYSTEMS[system].sign: env[ci._SYSTEMS[system].sign]}
        assert values_of("build", rest)[field] == value


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", events.KINDS)
def test_any_environment_is_read_as_the_official_client_does(kind, seed):
    """Against eight plain functions, with none, one and several systems at once."""
    dice = random.Random(seed)
    for _ in range(50):
        names = dice.sample(VARIABLES, dice.randrange(len(VARIABLES) + 1))
        env = {name: dice.choice(VALUES) for name in names}
        for system in dice.sample(sorted(ENVIRONMENTS), dice.choice((0, 1, 1, 1, 2, 3))):
            env |= {name: value for name, value in ENVIRONMENTS[system].items() if dice.random() < 0.8}

        detected = ci.detect(env)

        found = (detected.system, values_of(kind, env), detected.metadata, detected.run_attempt)
        assert found == official.expected(kind, env), env


@pytest.mark.parametrize("env", [{}, {"CI": "true"}, dict.fromkeys(VARIABLES, "")], ids=["none", "CI", "empty"])
def test_outside_ci_nothing_is_told(env):
    assert ci.detect(env) == sources.NOTHING
    assert sources.fields_of("build", sources.NOTHING) == sources.fields_of("deployment", sources.NOTHING) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GITHUB_ACTIONS", "True"),
        ("GITHUB_ACTIONS", "1"),
        ("GITLAB_CI", "yes"),
        ("CIRCLECI", "TRUE"),
        ("TF_BUILD", "true"),
    ],
)
def test_a_sign_has_its_own_spelling(name, value):
    assert ci.detect({name: value}) == sources.NOTHING


def test_the_signs_are_those_of_the_table():
    assert tuple(system.sign for system in ci._SYSTEMS.values()) == sources.SIGNS


def test_of_several_systems_the_first_of_the_table_is_it():
    """A runner of one may be started by a job of another."""
    together = {}
    for system in reversed(ENVIRONMENTS):
        together |= ENVIRONMENTS[system]
        assert ci.detect(together).system == system


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://git.example/acme/payments.git", "git.example/acme/payments"),
        ("http://git.example/acme/payments", "git.example/acme/payments"),
        ("git@git.example:acme/payments.git", "git.example/acme/payments"),
        ("https://git.example:8443/acme/payments.git", "git.example/8443/acme/payments"),
        ("https://jane@git.example/acme/payments.git", "jane@git.example/acme/payments"),
        ("ssh://git@git.example/acme/payments.git", "ssh///git@git.example/acme/payments"),
        ("git@git.example:acme@home/payments", "git.example/acme@home/payments"),
        ("https://git.example:8443/acme@home/payments", "git.example/8443/acme@home/payments"),
        ("https://[fd00::1]/acme/payments", "[fd00/:1]/acme/payments"),
    ],
)  # fmt: skip
def test_jenkins_repository_is_normalized_as_the_official_client_does(url, sent):
    env = {**ENVIRONMENTS["jenkins"], "GIT_URL": url}

    assert values_of("build", env)["scm_repository"] == official.expected("build", env)[1]["scm_repository"] == sent


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://jane:s3cret@git.example/acme/payments.git", "git.example/acme/payments"),
        ("https://ghp_s3cretofthirtysixcharacters@git.example/acme/payments.git", "git.example/acme/payments"),
        ("https://:s3cret@git.example/acme/payments.git", "git.example/acme/payments"),
        ("https://jane:@git.example/acme/payments.git", "git.example/acme/payments"),
        ("https://jane:s3@cret@git.example:8443/acme/payments", "git.example/8443/acme/payments"),
        ("https://ja@ne:s3cret@git.example/acme/payments", "git.example/acme/payments"),
        ("http://jane:s3?cr#et@git.example/acme/payments", "git.example/acme/payments"),
        ("HTTPS://jane:s3cret@git.example/x", "HTTPS///git.example/x"),
        (" https://jane:s3cret@git.example/x", " https///git.example/x"),
        ("ssh://jane:s3cret@git.example/acme/payments", "ssh///git.example/acme/payments"),
        ("https:///jane:s3cret@git.example/x", "/git.example/x"),
        ("jane:s3cret@git.example/acme/payments", "git.example/acme/payments"),
        ("jane:s3cret@git.example/x?from=https://a@b", "git.example/x"),
        ("https://git.example/acme/payments.git?private_token=s3cret", "git.example/acme/payments"),
    ],
)
def test_a_password_in_the_repository_is_never_sent(url, sent):
    """The one deviation from the official client, which sends it."""
    assert values_of("build", {**ENVIRONMENTS["jenkins"], "GIT_URL": url})["scm_repository"] == sent


def test_bytes_that_are_not_utf_8_do_not_fail_a_build():
    env = {**ENVIRONMENTS["github"], "GITHUB_REF_NAME": "f\udcfcr-\udce2\udc82", "GITHUB_JOB": "\udcff"}

    detected = ci.detect(env)

    assert detected.values["scm_branch"] == ("f\ufffdr-\ufffd\ufffd", "GITHUB_REF_NAME")
    assert detected.metadata["vi_gh_job"] == "\ufffd"
    events.validate("build", {**values_of("build", env), "status": "completed", "extra_metadata": detected.metadata})


def test_jenkins_run_is_told_by_its_job_where_it_has_no_url():
    env = {**ENVIRONMENTS["jenkins"], "BUILD_URL": ""}

    assert ci.detect(env).run_attempt == "payments"
    assert ci.detect({"JENKINS_URL": "x"}).run_attempt is None
