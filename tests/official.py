"""What the official client posts for a call in an environment, written down from what it was seen to do.

Kept apart from the package on purpose: eight plain descriptions, no table.
"""

from __future__ import annotations

STRING_OPTIONS = {
    "build": (
        "source_system", "build_number", "scm_sha", "scm_branch", "scm_repository", "build_url", "invoke_id", "built_by",
        "built_by_email", "built_by_name",
    ),
    "deployment": (
        "source_system", "build_number", "scm_sha", "scm_repository", "deploy_url", "invoke_id", "deployed_by",
        "deployed_by_email", "deployed_by_name",
    ),
}  # fmt: skip
METADATA = {
    "github": "vi_gh_ workflow GITHUB_WORKFLOW job GITHUB_JOB run_attempt GITHUB_RUN_ATTEMPT event_name GITHUB_EVENT_NAME "
    "ref GITHUB_REF head_ref GITHUB_HEAD_REF base_ref GITHUB_BASE_REF",
    "gitlab": "vi_gl_ pipeline_id CI_PIPELINE_ID pipeline_url CI_PIPELINE_URL job_id CI_JOB_ID job_name CI_JOB_NAME "
    "job_url CI_JOB_URL pipeline_source CI_PIPELINE_SOURCE",
    "jenkins": "vi_jenkins_ job_name JOB_NAME build_url BUILD_URL node_name NODE_NAME executor_number EXECUTOR_NUMBER",
    "circleci": "vi_circle_ workflow_id CIRCLE_WORKFLOW_ID workflow_job_id CIRCLE_WORKFLOW_JOB_ID job_name CIRCLE_JOB "
    "node_index CIRCLE_NODE_INDEX",
    "bitbucket": "vi_bb_ pipeline_uuid BITBUCKET_PIPELINE_UUID step_uuid BITBUCKET_STEP_UUID "
    "workspace BITBUCKET_WORKSPACE repo_slug BITBUCKET_REPO_SLUG",
    "azure-devops": "vi_azure_ build_id BUILD_BUILDID definition_name BUILD_DEFINITIONNAME agent_name AGENT_NAME "
    "team_project SYSTEM_TEAMPROJECT",
    "travis": "vi_travis_ build_id TRAVIS_BUILD_ID job_id TRAVIS_JOB_ID job_number TRAVIS_JOB_NUMBER "
    "event_type TRAVIS_EVENT_TYPE",
    "rundeck": "vi_rd_ job_id RD_JOB_ID job_execid RD_JOB_EXECID job_serverurl RD_JOB_SERVERURL "
    "job_project RD_JOB_PROJECT job_name RD_JOB_NAME job_group RD_JOB_GROUP job_url RD_JOB_URL",
}
#: Every variable that says something to it, with what makes a system be found.
MARKS = {
    "github": ("GITHUB_ACTIONS", "true"),
    "gitlab": ("GITLAB_CI", "true"),
    "jenkins": ("JENKINS_URL", "https://ci.example.com/"),
    "circleci": ("CIRCLECI", "true"),
    "bitbucket": ("BITBUCKET_BUILD_NUMBER", "71"),
    "azure-devops": ("TF_BUILD", "True"),
    "travis": ("TRAVIS", "true"),
    "rundeck": ("RD_JOB_ID", "3f1c"),
}
VARIABLES = {
    "github": "REPOSITORY SHA REF_NAME RUN_NUMBER RUN_ID SERVER_URL ACTOR",
    "gitlab": "CI_PROJECT_PATH CI_COMMIT_SHA CI_COMMIT_REF_NAME CI_PIPELINE_IID GITLAB_USER_LOGIN GITLAB_USER_EMAIL "
    "GITLAB_USER_NAME",
    "jenkins": "GIT_URL GIT_COMMIT GIT_BRANCH BUILD_NUMBER BUILD_ID BUILD_USER BUILD_USER_EMAIL",
    "circleci": "CIRCLE_PROJECT_USERNAME CIRCLE_PROJECT_REPONAME CIRCLE_SHA1 CIRCLE_BRANCH CIRCLE_TAG CIRCLE_BUILD_NUM "
    "CIRCLE_BUILD_URL CIRCLE_USERNAME",
    "bitbucket": "BITBUCKET_REPO_FULL_NAME BITBUCKET_COMMIT BITBUCKET_BRANCH BITBUCKET_TAG",
    "azure-devops": "BUILD_REPOSITORY_NAME BUILD_SOURCEVERSION BUILD_SOURCEBRANCHNAME BUILD_BUILDNUMBER BUILD_BUILDURI "
    "BUILD_REQUESTEDFOR BUILD_REQUESTEDFOREMAIL",
    "travis": "TRAVIS_REPO_SLUG TRAVIS_COMMIT TRAVIS_BRANCH TRAVIS_TAG TRAVIS_BUILD_NUMBER TRAVIS_BUILD_WEB_URL",
    "rundeck": "RD_JOB_USERNAME RD_JOB_USER_NAME",
}


def variables_of(system):
    """All variables that it reads in a system, without the one that makes it be found."""
    prefix = "GITHUB_" if system == "github" else ""
    names = [prefix + name for name in VARIABLES[system].split()]
    return list(dict.fromkeys([*names, *METADATA[system].split()[2::2]]))


def posted(kind, flags, env):
    """The body it posts, None where it refuses the call for lack of product, version or environment."""
    seen = detected(env)

    def first(option, fallback=""):
        return flags.get(option) or env.get(f"VERSIONER_{option.upper()}") or fallback

    product, version = first("product", seen.get("product")), first("version", seen.get("version"))
    environment = first("environment")
    if not product or not version or (kind == "deployment" and not environment):
        return None
    body = {"product_name": product, "version": version, "status": flags.get("status", "completed")}
    if kind == "deployment":
        body["environment_name"] = environment
    for option in STRING_OPTIONS[kind]:
        generic = {"deploy_url": "link", "build_url": "link"}.get(option, option.replace("deployed_by", "built_by"))
        if value := first(option, seen.get(generic)):
            body[option] = value
    metadata = {**metadata_of(seen.get("source_system"), env), **flags.get("extra_metadata", {})}
    if metadata:
        body["extra_metadata"] = metadata
    return body


def metadata_of(system, env):
    if not system:
        return {}
    prefix, *words = METADATA[system].split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {prefix + name: env[variable] for name, variable in pairs if env.get(variable)}


def detected(env):
    for system, (variable, value) in MARKS.items():
        is_set = (
            bool(env.get(variable)) if system in ("jenkins", "bitbucket", "rundeck") else env.get(variable) == value
        )
        if is_set:
            return {"source_system": system, **_DESCRIPTIONS[system](lambda name: env.get(name, ""))}
    return {}


def github(e):
    repository, run = e("GITHUB_REPOSITORY"), e("GITHUB_RUN_ID")
    parts = repository.split("/")
    has_link = e("GITHUB_SERVER_URL") and repository and run
    return {
        "scm_repository": repository, "scm_sha": e("GITHUB_SHA"), "scm_branch": e("GITHUB_REF_NAME"), "invoke_id": run,
        "build_number": e("GITHUB_RUN_NUMBER"), "built_by": e("GITHUB_ACTOR"), "version": e("GITHUB_SHA")[:8],
        "product": parts[1] if len(parts) == 2 else "",
        "link": f"{e('GITHUB_SERVER_URL')}/{repository}/actions/runs/{run}" if has_link else "",
    }  # fmt: skip


def gitlab(e):
    return {
        "scm_repository": e("CI_PROJECT_PATH"), "scm_sha": e("CI_COMMIT_SHA"), "scm_branch": e("CI_COMMIT_REF_NAME"),
        "invoke_id": e("CI_PIPELINE_ID"), "build_number": e("CI_PIPELINE_IID"), "link": e("CI_PIPELINE_URL"),
        "built_by": e("GITLAB_USER_LOGIN"), "built_by_email": e("GITLAB_USER_EMAIL"),
        "built_by_name": e("GITLAB_USER_NAME"), "product": e("CI_PROJECT_PATH").split("/")[-1],
        "version": e("CI_COMMIT_SHA")[:8],
    }  # fmt: skip


def jenkins(e):
    url = e("GIT_URL")
    for beginning in ("https://", "http://", "git@"):
        url = url.removeprefix(beginning)
    url = url.removesuffix(".git").replace(":", "/", 1)
    return {
        "scm_repository": url, "scm_sha": e("GIT_COMMIT"), "scm_branch": e("GIT_BRANCH"), "link": e("BUILD_URL"),
        "build_number": e("BUILD_NUMBER"), "invoke_id": e("BUILD_ID"), "built_by": e("BUILD_USER"),
        "built_by_email": e("BUILD_USER_EMAIL"), "product": url.split("/")[-1].removesuffix(".git"),
        "version": e("BUILD_NUMBER"),
    }  # fmt: skip


def circleci(e):
    owner, name = e("CIRCLE_PROJECT_USERNAME"), e("CIRCLE_PROJECT_REPONAME")
    return {
        "scm_repository": f"{owner}/{name}" if owner and name else "", "scm_sha": e("CIRCLE_SHA1"),
        "scm_branch": e("CIRCLE_BRANCH") or e("CIRCLE_TAG"), "build_number": e("CIRCLE_BUILD_NUM"),
        "invoke_id": e("CIRCLE_WORKFLOW_ID"), "link": e("CIRCLE_BUILD_URL"), "built_by": e("CIRCLE_USERNAME"),
        "product": name, "version": e("CIRCLE_SHA1")[:8],
    }  # fmt: skip


def bitbucket(e):
    repository, number = e("BITBUCKET_REPO_FULL_NAME"), e("BITBUCKET_BUILD_NUMBER")
    return {
        "scm_repository": repository, "scm_sha": e("BITBUCKET_COMMIT"),
        "scm_branch": e("BITBUCKET_BRANCH") or e("BITBUCKET_TAG"), "build_number": number,
        "invoke_id": e("BITBUCKET_PIPELINE_UUID"), "product": e("BITBUCKET_REPO_SLUG"),
        "version": e("BITBUCKET_COMMIT")[:8],
        "link": f"https://bitbucket.org/{repository}/pipelines/results/{number}" if repository and number else "",
    }  # fmt: skip


def azure(e):
    return {
        "scm_repository": e("BUILD_REPOSITORY_NAME"), "scm_sha": e("BUILD_SOURCEVERSION"),
        "scm_branch": e("BUILD_SOURCEBRANCHNAME"), "build_number": e("BUILD_BUILDNUMBER"),
        "invoke_id": e("BUILD_BUILDID"), "link": e("BUILD_BUILDURI"), "built_by": e("BUILD_REQUESTEDFOR"),
        "built_by_email": e("BUILD_REQUESTEDFOREMAIL"), "product": e("BUILD_REPOSITORY_NAME").split("/")[-1],
        "version": e("BUILD_BUILDNUMBER"),
    }  # fmt: skip


def travis(e):
    parts = e("TRAVIS_REPO_SLUG").split("/")
    return {
        "scm_repository": e("TRAVIS_REPO_SLUG"), "scm_sha": e("TRAVIS_COMMIT"),
        "scm_branch": e("TRAVIS_BRANCH") or e("TRAVIS_TAG"), "build_number": e("TRAVIS_BUILD_NUMBER"),
        "invoke_id": e("TRAVIS_BUILD_ID"), "link": e("TRAVIS_BUILD_WEB_URL"),
        "product": parts[1] if len(parts) == 2 else "", "version": e("TRAVIS_COMMIT")[:8],
    }  # fmt: skip


def rundeck(e):
    server, project, execution = e("RD_JOB_SERVERURL"), e("RD_JOB_PROJECT"), e("RD_JOB_EXECID")
    has_link = server and project and execution
    return {
        "build_number": execution, "invoke_id": execution, "version": execution, "product": e("RD_JOB_NAME"),
        "built_by": e("RD_JOB_USERNAME") or e("RD_JOB_USER_NAME"),
        "link": f"{server}/project/{project}/execution/show/{execution}" if has_link else "",
    }  # fmt: skip


_DESCRIPTIONS = {
    "github": github, "gitlab": gitlab, "jenkins": jenkins, "circleci": circleci, "bitbucket": bitbucket,
    "azure-devops": azure, "travis": travis, "rundeck": rundeck,
}  # fmt: skip
