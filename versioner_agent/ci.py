"""What a CI system's variables say of an event: the systems as a table, each with what names it and what it tells.

The table follows the official client, whose payloads ours must equal. Pure: the environment comes in as a mapping. An
empty variable counts as one that is not set, and bytes that are not UTF-8 become U+FFFD, as that client sends them: a
branch with a strange name must not fail a build.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from versioner_agent.errors import ValidationError
from versioner_agent.events import ENDED, KINDS, canonical_status, nearest
from versioner_agent.sources import NOTHING, Detected
from versioner_agent.values import shown

#: How much of a commit's id becomes the version (characters).
SHORT_SHA = 8
#: A user's name in a remote's URL that is this long (characters) is taken for a token.
LEAST_TOKEN = 20


class _Source(NamedTuple):
    """A value's variables: the first that is set, or a template that needs all of its own; *made* of what they hold."""

    text: str
    made: Callable[[str], str] = str


class _System(NamedTuple):
    sign: str  # the variable that gives the system away
    word: str | None  # what it must hold; None: anything
    values: dict[str, str | _Source]
    metadata: dict[str, str]
    run_attempt: str | tuple[str, ...]  # the first variable that is set, or all of them joined


def _last_part(repository: str) -> str:
    return repository.rpartition("/")[2]


def _second_of_two(repository: str) -> str:
    parts = repository.split("/")
    return parts[1] if len(parts) == 2 else ""


def _short(sha: str) -> str:
    return sha[:SHORT_SHA]


def _jenkins_repository(url: str) -> str:
    """Return a remote's URL as the official client sends it, and never a password in it."""
    url = _without_password(url).removeprefix("https://").removeprefix("http://").removeprefix("git@")
    return url.removesuffix(".git").replace(":", "/", 1)


def _jenkins_product(url: str) -> str:
    return _last_part(_jenkins_repository(url)).removesuffix(".git")


def _without_password(url: str) -> str:
    """Return *url* without `user:password@`, token or query; a user alone stays, for the official client sends it.

    Up to the last `@` before the path, as curl reads it: a password may hold one itself. Without a scheme, a colon
    behind the first `@` begins a path (`git@host:owner/repo`).
    """
    url = re.sub(r"\A(?:([^/@]*://+)|(?=[^/@]*:))[^/:]*:[^/]*@", r"\1", url)
    url = re.sub(rf"\A([^/@:]*://+)[^/@]{{{LEAST_TOKEN},}}@", r"\1", url)
    return re.sub(r"[?#].*", "", url, flags=re.DOTALL)


#: In the order in which they are looked for.
_SYSTEMS = {
    "github": _System(
        "GITHUB_ACTIONS",
        "true",
        {
            "product_name": _Source("GITHUB_REPOSITORY", _second_of_two),
            "version": _Source("GITHUB_SHA", _short),
            "scm_repository": "GITHUB_REPOSITORY",
            "scm_sha": "GITHUB_SHA",
            "scm_branch": "GITHUB_REF_NAME",
            "build_number": "GITHUB_RUN_NUMBER",
            "invoke_id": "GITHUB_RUN_ID",
            "link": "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}/actions/runs/{GITHUB_RUN_ID}",
            "by": "GITHUB_ACTOR",
        },
        {
            "vi_gh_workflow": "GITHUB_WORKFLOW",
            "vi_gh_job": "GITHUB_JOB",
            "vi_gh_run_attempt": "GITHUB_RUN_ATTEMPT",
            "vi_gh_event_name": "GITHUB_EVENT_NAME",
            "vi_gh_ref": "GITHUB_REF",
            "vi_gh_head_ref": "GITHUB_HEAD_REF",
            "vi_gh_base_ref": "GITHUB_BASE_REF",
        },
        "GITHUB_RUN_ATTEMPT",
    ),
    "gitlab": _System(
        "GITLAB_CI",
        "true",
        {
            "product_name": _Source("CI_PROJECT_PATH", _last_part),
            "version": _Source("CI_COMMIT_SHA", _short),
            "scm_repository": "CI_PROJECT_PATH",
            "scm_sha": "CI_COMMIT_SHA",
            "scm_branch": "CI_COMMIT_REF_NAME",
            "build_number": "CI_PIPELINE_IID",
            "invoke_id": "CI_PIPELINE_ID",
            "link": "CI_PIPELINE_URL",
            "by": "GITLAB_USER_LOGIN",
            "by_email": "GITLAB_USER_EMAIL",
            "by_name": "GITLAB_USER_NAME",
        },
        {
            "vi_gl_pipeline_id": "CI_PIPELINE_ID",
            "vi_gl_pipeline_url": "CI_PIPELINE_URL",
            "vi_gl_job_id": "CI_JOB_ID",
            "vi_gl_job_name": "CI_JOB_NAME",
            "vi_gl_job_url": "CI_JOB_URL",
            "vi_gl_pipeline_source": "CI_PIPELINE_SOURCE",
        },
        "CI_JOB_ID",
    ),
    "jenkins": _System(
        "JENKINS_URL",
        None,
        {
            "product_name": _Source("GIT_URL", _jenkins_product),
            "version": "BUILD_NUMBER",
            "scm_repository": _Source("GIT_URL", _jenkins_repository),
            "scm_sha": "GIT_COMMIT",
            "scm_branch": "GIT_BRANCH",
            "build_number": "BUILD_NUMBER",
            "invoke_id": "BUILD_ID",
            "link": "BUILD_URL",
            "by": "BUILD_USER",
            "by_email": "BUILD_USER_EMAIL",
        },
        {
            "vi_jenkins_job_name": "JOB_NAME",
            "vi_jenkins_build_url": "BUILD_URL",
            "vi_jenkins_node_name": "NODE_NAME",
            "vi_jenkins_executor_number": "EXECUTOR_NUMBER",
        },
        "BUILD_URL JOB_NAME",
    ),
    "circleci": _System(
        "CIRCLECI",
        "true",
        {
            "product_name": "CIRCLE_PROJECT_REPONAME",
            "version": _Source("CIRCLE_SHA1", _short),
            "scm_repository": "{CIRCLE_PROJECT_USERNAME}/{CIRCLE_PROJECT_REPONAME}",
            "scm_sha": "CIRCLE_SHA1",
            "scm_branch": "CIRCLE_BRANCH CIRCLE_TAG",
            "build_number": "CIRCLE_BUILD_NUM",
            "invoke_id": "CIRCLE_WORKFLOW_ID",
            "link": "CIRCLE_BUILD_URL",
            "by": "CIRCLE_USERNAME",
        },
        {
            "vi_circle_workflow_id": "CIRCLE_WORKFLOW_ID",
            "vi_circle_workflow_job_id": "CIRCLE_WORKFLOW_JOB_ID",
            "vi_circle_job_name": "CIRCLE_JOB",
            "vi_circle_node_index": "CIRCLE_NODE_INDEX",
        },
        ("CIRCLE_WORKFLOW_JOB_ID", "CIRCLE_NODE_INDEX"),
    ),
    "bitbucket": _System(
        "BITBUCKET_BUILD_NUMBER",
        None,
        {
            "product_name": "BITBUCKET_REPO_SLUG",
            "version": _Source("BITBUCKET_COMMIT", _short),
            "scm_repository": "BITBUCKET_REPO_FULL_NAME",
            "scm_sha": "BITBUCKET_COMMIT",
            "scm_branch": "BITBUCKET_BRANCH BITBUCKET_TAG",
            "build_number": "BITBUCKET_BUILD_NUMBER",
            "invoke_id": "BITBUCKET_PIPELINE_UUID",
            "link": "https://bitbucket.org/{BITBUCKET_REPO_FULL_NAME}/pipelines/results/{BITBUCKET_BUILD_NUMBER}",
        },
        {
            "vi_bb_pipeline_uuid": "BITBUCKET_PIPELINE_UUID",
            "vi_bb_step_uuid": "BITBUCKET_STEP_UUID",
            "vi_bb_workspace": "BITBUCKET_WORKSPACE",
            "vi_bb_repo_slug": "BITBUCKET_REPO_SLUG",
        },
        ("BITBUCKET_STEP_UUID", "BITBUCKET_STEP_RUN_NUMBER"),
    ),
    "azure-devops": _System(
        "TF_BUILD",
        "True",
        {
            "product_name": _Source("BUILD_REPOSITORY_NAME", _last_part),
            "version": "BUILD_BUILDNUMBER",
            "scm_repository": "BUILD_REPOSITORY_NAME",
            "scm_sha": "BUILD_SOURCEVERSION",
            "scm_branch": "BUILD_SOURCEBRANCHNAME",
            "build_number": "BUILD_BUILDNUMBER",
            "invoke_id": "BUILD_BUILDID",
            "link": "BUILD_BUILDURI",
            "by": "BUILD_REQUESTEDFOR",
            "by_email": "BUILD_REQUESTEDFOREMAIL",
        },
        {
            "vi_azure_build_id": "BUILD_BUILDID",
            "vi_azure_definition_name": "BUILD_DEFINITIONNAME",
            "vi_azure_agent_name": "AGENT_NAME",
            "vi_azure_team_project": "SYSTEM_TEAMPROJECT",
        },
        ("SYSTEM_STAGEATTEMPT", "SYSTEM_JOBATTEMPT", "SYSTEM_JOBID"),
    ),
    "travis": _System(
        "TRAVIS",
        "true",
        {
            "product_name": _Source("TRAVIS_REPO_SLUG", _second_of_two),
            "version": _Source("TRAVIS_COMMIT", _short),
            "scm_repository": "TRAVIS_REPO_SLUG",
            "scm_sha": "TRAVIS_COMMIT",
            "scm_branch": "TRAVIS_BRANCH TRAVIS_TAG",
            "build_number": "TRAVIS_BUILD_NUMBER",
            "invoke_id": "TRAVIS_BUILD_ID",
            "link": "TRAVIS_BUILD_WEB_URL",
        },
        {
            "vi_travis_build_id": "TRAVIS_BUILD_ID",
            "vi_travis_job_id": "TRAVIS_JOB_ID",
            "vi_travis_job_number": "TRAVIS_JOB_NUMBER",
            "vi_travis_event_type": "TRAVIS_EVENT_TYPE",
        },
        "TRAVIS_JOB_ID",
    ),
    "rundeck": _System(
        "RD_JOB_ID",
        None,
        {
            "product_name": "RD_JOB_NAME",
            "version": "RD_JOB_EXECID",
            "build_number": "RD_JOB_EXECID",
            "invoke_id": "RD_JOB_EXECID",
            "link": "{RD_JOB_SERVERURL}/project/{RD_JOB_PROJECT}/execution/show/{RD_JOB_EXECID}",
            "by": "RD_JOB_USERNAME RD_JOB_USER_NAME",
        },
        {
            "vi_rd_job_id": "RD_JOB_ID",
            "vi_rd_job_execid": "RD_JOB_EXECID",
            "vi_rd_job_serverurl": "RD_JOB_SERVERURL",
            "vi_rd_job_project": "RD_JOB_PROJECT",
            "vi_rd_job_name": "RD_JOB_NAME",
            "vi_rd_job_group": "RD_JOB_GROUP",
            "vi_rd_job_url": "RD_JOB_URL",
        },
        ("RD_JOB_SERVERURL", "RD_JOB_RETRYATTEMPT"),
    ),
}


def detect(env: Mapping[str, str]) -> Detected:
    """Return what the first CI system found in *env* tells; `NOTHING` outside CI."""
    for name, system in _SYSTEMS.items():
        sign = env.get(system.sign, "")
        if sign and system.word in (None, sign):
            return _told(name, system, env)
    return NOTHING


def _told(name: str, system: _System, env: Mapping[str, str]) -> Detected:
    values = {"source_system": (name, system.sign)}
    for field, source in system.values.items():
        text, made = (source, str) if isinstance(source, str) else source
        value, variables = _look_up(text, env)
        value = made(value)
        if value:
            values[field] = (value, variables)
    metadata = {key: value for key, variable in system.metadata.items() if (value := _variable(env, variable))}
    if isinstance(system.run_attempt, str):
        attempt = _look_up(system.run_attempt, env)[0]
    else:
        parts = [_variable(env, variable) for variable in system.run_attempt]
        attempt = ":".join(parts) if any(parts) else ""
    return Detected(name, values, metadata, attempt or None)


def _look_up(text: str, env: Mapping[str, str]) -> tuple[str, str]:
    """Return (value, variables): of the first name in *text* that is set, or of the template it is; else empty."""
    if "{" not in text:
        return next(((value, name) for name in text.split() if (value := _variable(env, name))), ("", ""))
    names = re.findall(r"\{(\w+)\}", text)
    found = {name: _variable(env, name) for name in names}
    return (text.format_map(found), ", ".join(names)) if all(found.values()) else ("", "")


def _variable(env: Mapping[str, str], name: str) -> str:
    value = env.get(name, "")
    return value if value.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", value)


#: The user's own word, before any system's.
_STATUS_VARIABLE = "VERSIONER_JOB_STATUS"
#: System -> the variable with the job's status, and whether that is the exit code of its commands.
_STATUS_OF = {
    "gitlab": ("CI_JOB_STATUS", False),
    "azure-devops": ("AGENT_JOBSTATUS", False),
    "bitbucket": ("BITBUCKET_EXIT_CODE", True),
    "travis": ("TRAVIS_TEST_RESULT", True),
}
#: What to do where no variable tells the status. Rundeck's steps are told none; its error handlers run after failures.
_STATUS_ADVICE = {
    "github": f"needs {_STATUS_VARIABLE}: ${{{{ job.status }}}} in the env of a step with if: always()",
    "gitlab": "needs CI_JOB_STATUS, which GitLab sets in after_script",
    "jenkins": f"needs {_STATUS_VARIABLE}=${{currentBuild.currentResult}} in post {{ always {{ … }} }}",
    "circleci": "needs two steps on CircleCI instead: --status success with when: on_success, "
    "--status failed with when: on_fail",
    "bitbucket": "needs BITBUCKET_EXIT_CODE, which Bitbucket sets in after-script",
    "azure-devops": f"needs {_STATUS_VARIABLE}: $(Agent.JobStatus) in the env of a step with condition: always()",
    "travis": "needs TRAVIS_TEST_RESULT, which Travis CI sets in after_script",
    "rundeck": "needs two steps on Rundeck instead: --status success in the last step, "
    "--status failed in the error handlers",
}


def job_status(env: Mapping[str, str], detected: Detected) -> str:
    """Return the word for how the job ended, as its variable has it; `completed` or `failed` for an exit code.

    Raises:
        ValidationError: Nothing tells the status, or what it tells is no end of a job.
    """
    # Of one system within another, only its own word is its job's.
    systems = [detected.system] if detected.system else list(_STATUS_OF)
    known = [_STATUS_OF[system] for system in systems if system in _STATUS_OF]
    for variable, is_exit_code in [(_STATUS_VARIABLE, False), *known]:
        said = _variable(env, variable).strip()
        if said:
            return _from_exit_code(variable, said) if is_exit_code else _ended(variable, said)
    advice = _STATUS_ADVICE.get(detected.system, f"needs {_STATUS_VARIABLE} with success, failed or aborted")
    raise ValidationError([f"status: auto {advice}"])


def _from_exit_code(variable: str, said: str) -> str:
    if not re.fullmatch(r"[+-]?\d+", said, re.ASCII):
        raise ValidationError([f"status: {variable} is {shown(said)}, not an exit code"])
    return "failed" if said.strip("+-0") else "completed"


def _ended(variable: str, said: str) -> str:
    known = {canonical_status(kind, said) for kind in KINDS} - {None}
    if known & set(ENDED):
        return said
    if known or said.lower() == "running":
        where = "; it is final in after_script" if variable == "CI_JOB_STATUS" else ""
        raise ValidationError([f"status: {variable} is {shown(said)}: the job has not ended{where}"])
    close = nearest(said.lower(), ("success", "failed", "aborted", *ENDED))
    advice = f"did you mean {close!r}?" if close else "one of success, failed, aborted"
    raise ValidationError([f"status: {variable} is {shown(said)}, which is no status; {advice}"])
