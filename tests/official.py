"""What the official client posts for a call in an environment: once more, and not as a table.

Written from the facts that were collected about that client, so that the agent's table has a witness that shares
nothing with it. Each function takes `get`, which gives a variable's value or "", and returns the fields as a build
names them, with the link as `link`.
"""

from __future__ import annotations

import re


def github(get):
    owner, slash, name = get("GITHUB_REPOSITORY").partition("/")
    link = ""
    if get("GITHUB_SERVER_URL") != "" and get("GITHUB_REPOSITORY") != "" and get("GITHUB_RUN_ID") != "":
        link = get("GITHUB_SERVER_URL") + "/" + get("GITHUB_REPOSITORY") + "/actions/runs/" + get("GITHUB_RUN_ID")
    del owner
    return {
        "product_name": name if slash and name.count("/") == 0 else "",
        "version": "".join(list(get("GITHUB_SHA"))[0:8]),
        "scm_repository": get("GITHUB_REPOSITORY"),
        "scm_sha": get("GITHUB_SHA"),
        "scm_branch": get("GITHUB_REF_NAME"),
        "build_number": get("GITHUB_RUN_NUMBER"),
        "invoke_id": get("GITHUB_RUN_ID"),
        "link": link,
        "built_by": get("GITHUB_ACTOR"),
    }


def gitlab(get):
    return {
        "product_name": get("CI_PROJECT_PATH").split("/").pop(),
        "version": "".join(list(get("CI_COMMIT_SHA"))[0:8]),
        "scm_repository": get("CI_PROJECT_PATH"),
        "scm_sha": get("CI_COMMIT_SHA"),
        "scm_branch": get("CI_COMMIT_REF_NAME"),
        "build_number": get("CI_PIPELINE_IID"),
        "invoke_id": get("CI_PIPELINE_ID"),
        "link": get("CI_PIPELINE_URL"),
        "built_by": get("GITLAB_USER_LOGIN"),
        "built_by_email": get("GITLAB_USER_EMAIL"),
        "built_by_name": get("GITLAB_USER_NAME"),
    }


def jenkins(get):
    repository = get("GIT_URL")
    for edge in (r"\Ahttps://", r"\Ahttp://", r"\Agit@", r"\.git\Z"):
        repository = re.sub(edge, "", repository)
    colon = repository.find(":")
    if colon >= 0:
        repository = repository[:colon] + "/" + repository[colon + 1 :]
    return {
        "product_name": re.sub(r"\.git\Z", "", repository.split("/").pop()),
        "version": get("BUILD_NUMBER"),
        "scm_repository": repository,
        "scm_sha": get("GIT_COMMIT"),
        "scm_branch": get("GIT_BRANCH"),
        "build_number": get("BUILD_NUMBER"),
        "invoke_id": get("BUILD_ID"),
        "link": get("BUILD_URL"),
        "built_by": get("BUILD_USER"),
        "built_by_email": get("BUILD_USER_EMAIL"),
    }


def circleci(get):
    owner, name = get("CIRCLE_PROJECT_USERNAME"), get("CIRCLE_PROJECT_REPONAME")
    branch = get("CIRCLE_BRANCH")
    if branch == "":
        branch = get("CIRCLE_TAG")
    return {
        "product_name": name,
        "version": "".join(list(get("CIRCLE_SHA1"))[0:8]),
        "scm_repository": owner + "/" + name if owner != "" and name != "" else "",
        "scm_sha": get("CIRCLE_SHA1"),
        "scm_branch": branch,
        "build_number": get("CIRCLE_BUILD_NUM"),
        "invoke_id": get("CIRCLE_WORKFLOW_ID"),
        "link": get("CIRCLE_BUILD_URL"),
        "built_by": get("CIRCLE_USERNAME"),
    }


def bitbucket(get):
    repository, number = get("BITBUCKET_REPO_FULL_NAME"), get("BITBUCKET_BUILD_NUMBER")
    branch = get("BITBUCKET_BRANCH")
    if branch == "":
        branch = get("BITBUCKET_TAG")
    link = ""
    if repository != "" and number != "":
        link = "https://bitbucket.org/" + repository + "/pipelines/results/" + number
    return {
        "product_name": get("BITBUCKET_REPO_SLUG"),
        "version": "".join(list(get("BITBUCKET_COMMIT"))[0:8]),
        "scm_repository": repository,
        "scm_sha": get("BITBUCKET_COMMIT"),
        "scm_branch": branch,
        "build_number": number,
        "invoke_id": get("BITBUCKET_PIPELINE_UUID"),
        "link": link,
    }


def azure_devops(get):
    return {
        "product_name": get("BUILD_REPOSITORY_NAME").split("/").pop(),
        "version": get("BUILD_BUILDNUMBER"),
        "scm_repository": get("BUILD_REPOSITORY_NAME"),
        "scm_sha": get("BUILD_SOURCEVERSION"),
        "scm_branch": get("BUILD_SOURCEBRANCHNAME"),
        "build_number": get("BUILD_BUILDNUMBER"),
        "invoke_id": get("BUILD_BUILDID"),
        "link": get("BUILD_BUILDURI"),
        "built_by": get("BUILD_REQUESTEDFOR"),
        "built_by_email": get("BUILD_REQUESTEDFOREMAIL"),
    }


def travis(get):
    owner, slash, name = get("TRAVIS_REPO_SLUG").partition("/")
    del owner
    branch = get("TRAVIS_BRANCH")
    if branch == "":
        branch = get("TRAVIS_TAG")
    return {
        "product_name": name if slash and name.count("/") == 0 else "",
        "version": "".join(list(get("TRAVIS_COMMIT"))[0:8]),
        "scm_repository": get("TRAVIS_REPO_SLUG"),
        "scm_sha": get("TRAVIS_COMMIT"),
        "scm_branch": branch,
        "build_number": get("TRAVIS_BUILD_NUMBER"),
        "invoke_id": get("TRAVIS_BUILD_ID"),
        "link": get("TRAVIS_BUILD_WEB_URL"),
    }


def rundeck(get):
    server, project, execution = get("RD_JOB_SERVERURL"), get("RD_JOB_PROJECT"), get("RD_JOB_EXECID")
    link = ""
    if server != "" and project != "" and execution != "":
        link = server + "/project/" + project + "/execution/show/" + execution
    user = get("RD_JOB_USERNAME")
    if user == "":
        user = get("RD_JOB_USER_NAME")
    return {
        "product_name": get("RD_JOB_NAME"),
        "version": execution,
        "build_number": execution,
        "invoke_id": execution,
        "link": link,
        "built_by": user,
    }


def attempt(system, get):
    """What keeps a re-run apart, "" for nothing."""
    if system == "github":
        return get("GITHUB_RUN_ATTEMPT")
    if system == "gitlab":
        return get("CI_JOB_ID")
    if system == "jenkins":
        return get("BUILD_URL") if get("BUILD_URL") != "" else get("JOB_NAME")
    if system == "travis":
        return get("TRAVIS_JOB_ID")
    if system == "azure-devops":
        stage, job, number = get("SYSTEM_STAGEATTEMPT"), get("SYSTEM_JOBATTEMPT"), get("SYSTEM_JOBID")
        return "" if stage + job + number == "" else stage + ":" + job + ":" + number
    first, second = {
        "circleci": ("CIRCLE_WORKFLOW_JOB_ID", "CIRCLE_NODE_INDEX"),
        "bitbucket": ("BITBUCKET_STEP_UUID", "BITBUCKET_STEP_RUN_NUMBER"),
        "rundeck": ("RD_JOB_SERVERURL", "RD_JOB_RETRYATTEMPT"),
    }[system]
    return "" if get(first) + get(second) == "" else get(first) + ":" + get(second)


#: Automatic keys as the documentation lists them, "key variable" by line.
METADATA = {
    "github": """
        vi_gh_workflow GITHUB_WORKFLOW
        vi_gh_job GITHUB_JOB
        vi_gh_run_attempt GITHUB_RUN_ATTEMPT
        vi_gh_event_name GITHUB_EVENT_NAME
        vi_gh_ref GITHUB_REF
        vi_gh_head_ref GITHUB_HEAD_REF
        vi_gh_base_ref GITHUB_BASE_REF
    """,
    "gitlab": """
        vi_gl_pipeline_id CI_PIPELINE_ID
        vi_gl_pipeline_url CI_PIPELINE_URL
        vi_gl_job_id CI_JOB_ID
        vi_gl_job_name CI_JOB_NAME
        vi_gl_job_url CI_JOB_URL
        vi_gl_pipeline_source CI_PIPELINE_SOURCE
    """,
    "jenkins": """
        vi_jenkins_job_name JOB_NAME
        vi_jenkins_build_url BUILD_URL
        vi_jenkins_node_name NODE_NAME
        vi_jenkins_executor_number EXECUTOR_NUMBER
    """,
    "circleci": """
        vi_circle_workflow_id CIRCLE_WORKFLOW_ID
        vi_circle_workflow_job_id CIRCLE_WORKFLOW_JOB_ID
        vi_circle_job_name CIRCLE_JOB
        vi_circle_node_index CIRCLE_NODE_INDEX
    """,
    "bitbucket": """
        vi_bb_pipeline_uuid BITBUCKET_PIPELINE_UUID
        vi_bb_step_uuid BITBUCKET_STEP_UUID
        vi_bb_workspace BITBUCKET_WORKSPACE
        vi_bb_repo_slug BITBUCKET_REPO_SLUG
    """,
    "azure-devops": """
        vi_azure_build_id BUILD_BUILDID
        vi_azure_definition_name BUILD_DEFINITIONNAME
        vi_azure_agent_name AGENT_NAME
        vi_azure_team_project SYSTEM_TEAMPROJECT
    """,
    "travis": """
        vi_travis_build_id TRAVIS_BUILD_ID
        vi_travis_job_id TRAVIS_JOB_ID
        vi_travis_job_number TRAVIS_JOB_NUMBER
        vi_travis_event_type TRAVIS_EVENT_TYPE
    """,
    "rundeck": """
        vi_rd_job_id RD_JOB_ID
        vi_rd_job_execid RD_JOB_EXECID
        vi_rd_job_serverurl RD_JOB_SERVERURL
        vi_rd_job_project RD_JOB_PROJECT
        vi_rd_job_name RD_JOB_NAME
        vi_rd_job_group RD_JOB_GROUP
        vi_rd_job_url RD_JOB_URL
    """,
}
SYSTEMS = {
    "github": github, "gitlab": gitlab, "jenkins": jenkins, "circleci": circleci, "bitbucket": bitbucket,
    "azure-devops": azure_devops, "travis": travis, "rundeck": rundeck,
}  # fmt: skip


def system_of(get):
    """The system's name, "" outside CI."""
    if get("GITHUB_ACTIONS") == "true":
        return "github"
    if get("GITLAB_CI") == "true":
        return "gitlab"
    if get("JENKINS_URL") != "":
        return "jenkins"
    if get("CIRCLECI") == "true":
        return "circleci"
    if get("BITBUCKET_BUILD_NUMBER") != "":
        return "bitbucket"
    if get("TF_BUILD") == "True":
        return "azure-devops"
    if get("TRAVIS") == "true":
        return "travis"
    if get("RD_JOB_ID") != "":
        return "rundeck"
    return ""


def expected(kind, env):
    """Return (system, fields, metadata, run attempt or None) of an event of *kind*."""

    def get(name):
        value = env.get(name, "")
        return "".join("\ufffd" if 0xDC80 <= ord(character) <= 0xDCFF else character for character in value)

    system = system_of(get)
    if system == "":
        return "", {}, {}, None
    told = {**SYSTEMS[system](get), "source_system": system}
    told["build_url"] = told.pop("link")
    if kind == "deployment":
        told["deploy_url"] = told["build_url"]
        told.pop("scm_branch", None)
        for name in ("built_by", "built_by_email", "built_by_name"):
            if name in told:
                told[name.replace("built", "deployed")] = told.pop(name)
    listed = (line.split() for line in METADATA[system].strip().splitlines())
    metadata = {key: get(variable) for key, variable in listed if get(variable) != ""}
    return system, {name: value for name, value in told.items() if value != ""}, metadata, attempt(system, get) or None


def variables():
    """Name every variable that the functions above ask for."""
    asked = {line.split()[1] for lines in METADATA.values() for line in lines.strip().splitlines()}

    def get(name):
        asked.add(name)
        return ""

    system_of(get)
    for system, told in SYSTEMS.items():
        told(get)
        attempt(system, get)
    return sorted(asked)


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
#: What makes each system be found.
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


def posted(kind, flags, env):
    """The body that the official client posts, None where product, version or environment is missing."""
    system, told, automatic, _ = expected(kind, env)

    def first(option, fallback=""):
        return flags.get(option) or env.get(f"VERSIONER_{option.upper()}") or fallback

    names = {"product_name": first("product", told.get("product_name", ""))}
    names["version"] = first("version", told.get("version", ""))
    if kind == "deployment":
        names["environment_name"] = first("environment")
    if not all(names.values()):
        return None
    options = {option: first(option, told.get(option, "")) for option in STRING_OPTIONS[kind]}
    options["source_system"] = options["source_system"] or system or "unknown"
    body = {**names, "status": flags.get("status", "completed")}
    body |= {option: value for option, value in options.items() if value}
    metadata = {**automatic, **flags.get("extra_metadata", {})}
    return {**body, "extra_metadata": metadata} if metadata else body
