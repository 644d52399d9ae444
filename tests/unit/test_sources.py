"""Which source gives a field its value, field by field."""

from __future__ import annotations

import math
import random

import pytest

from versioner_agent import events
from versioner_agent.ci import detect
from versioner_agent.sources import NOTHING, Filled, Filler

#: Field -> variable, as the official client has them; written down here once more.
VARIABLES = {
    "product_name": "VERSIONER_PRODUCT", "version": "VERSIONER_VERSION", "environment_name": "VERSIONER_ENVIRONMENT",
    "scm_branch": "VERSIONER_SCM_BRANCH", "scm_sha": "VERSIONER_SCM_SHA", "scm_repository": "VERSIONER_SCM_REPOSITORY",
    "build_url": "VERSIONER_BUILD_URL", "build_number": "VERSIONER_BUILD_NUMBER",
    "source_system": "VERSIONER_SOURCE_SYSTEM", "invoke_id": "VERSIONER_INVOKE_ID", "built_by": "VERSIONER_BUILT_BY",
    "built_by_email": "VERSIONER_BUILT_BY_EMAIL", "built_by_name": "VERSIONER_BUILT_BY_NAME",
    "deployed_by": "VERSIONER_DEPLOYED_BY",
    "deployed_by_email": "VERSIONER_DEPLOYED_BY_EMAIL", "deployed_by_name": "VERSIONER_DEPLOYED_BY_NAME",
    "deploy_url": "VERSIONER_DEPLOY_URL",
}  # fmt: skip
FLAGS_ALONE = {"status", "started_at", "completed_at", "skip_preflight_checks", "extra_metadata"}
NOT_READ = {("deployment", "scm_branch"), ("deployment", "build_url")}
BUILD_ONLY = {"built_by", "built_by_email", "built_by_name"}
DEPLOYMENT_ONLY = {"environment_name", "deployed_by", "deployed_by_email", "deployed_by_name", "deploy_url"}
READ_OF = {
    "build": {name for name in VARIABLES if name not in DEPLOYMENT_ONLY},
    "deployment": {name for name in VARIABLES if name not in BUILD_ONLY and ("deployment", name) not in NOT_READ},
}
GITHUB = {
    "GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "acme/payments", "GITHUB_SHA": "0123456789", "GITHUB_REF_NAME": "main",
    "GITHUB_RUN_NUMBER": "7", "GITHUB_RUN_ID": "99", "GITHUB_SERVER_URL": "https://github.com", "GITHUB_ACTOR": "octocat",
    "GITHUB_JOB": "build",
}  # fmt: skip
CHECKOUT = {"scm_sha": "a" * 40, "scm_branch": "trunk", "scm_repository": "git.example/acme/payments"}


def filled(kind="build", given=(), env=(), checkout=(), *, ci=()):
    return Filler(kind, dict(env), detect(dict(ci))).fill(dict(given), dict(checkout))


def test_every_option_but_those_that_the_official_client_takes_from_flags_alone_has_its_variable():
    assert {*VARIABLES, *FLAGS_ALONE} == set(events.ALL_NAMES)


@pytest.mark.parametrize("kind", events.KINDS)
def test_what_the_official_client_takes_from_flags_alone_is_read_from_no_variable(kind):
    env = {f"VERSIONER_{name.upper()}": "true" for name in FLAGS_ALONE}

    assert filled(kind, env=env) == Filled({}, {})


@pytest.mark.parametrize("kind", events.KINDS)
def test_a_variable_fills_each_field_that_the_kind_has(kind):
    env = {variable: f"of {name}" for name, variable in VARIABLES.items()}

    found = filled(kind, env={**env, "VERSIONER_STATUS": "failed"})

    assert found.fields == {name: f"of {name}" for name in READ_OF[kind]}
    assert found.sources == {name: VARIABLES[name] for name in READ_OF[kind]}


@pytest.mark.parametrize("kind", events.KINDS)
def test_what_is_given_comes_first_then_the_environment_then_ci(kind):
    """Drawn many times: each field on its own, whatever the others have."""
    dice = random.Random(kind)
    detected = filled(kind, ci=GITHUB).fields
    for _ in range(300):
        given = {name: f"given {name}" for name in events.FIELDS_OF[kind] if dice.random() < 0.4}
        given.pop("extra_metadata", None)
        env = {VARIABLES[name]: f"env {name}" for name in READ_OF[kind] if dice.random() < 0.4}
        blank = {name: dice.choice((None, "", " \t\n")) for name in VARIABLES if dice.random() < 0.2}
        blank = {name: value for name, value in blank.items() if name in events.FIELDS_OF[kind] and name not in given}

        found = filled(kind, {**blank, **given}, env, CHECKOUT, ci=GITHUB)

        for name in events.FIELDS_OF[kind]:
            variable = VARIABLES.get(name, "-")
            expected = given.get(name) or env.get(variable) or detected.get(name, blank.get(name))
            assert found.fields.get(name) == expected
            assert (name in found.sources) == (
                name not in given and expected == (env.get(variable) or detected.get(name)) is not None
            )


def test_sources_name_the_variables():
    found = filled("build", {"version": "1"}, {"VERSIONER_BUILT_BY": "jane"}, ci=GITHUB)

    assert found.sources == {
        "product_name": "GITHUB_REPOSITORY", "scm_repository": "GITHUB_REPOSITORY", "scm_sha": "GITHUB_SHA",
        "scm_branch": "GITHUB_REF_NAME", "build_number": "GITHUB_RUN_NUMBER", "invoke_id": "GITHUB_RUN_ID",
        "build_url": "GITHUB_SERVER_URL, GITHUB_REPOSITORY, GITHUB_RUN_ID", "built_by": "VERSIONER_BUILT_BY",
        "source_system": "GITHUB_ACTIONS", "extra_metadata": "github",
    }  # fmt: skip


def test_status_is_only_taken_as_it_was_given():
    env = {"VERSIONER_STATUS": "failed"}

    assert filled("build", {"status": " "}, env).fields == {"status": " "}
    assert filled("build", {"status": None}, env).fields == {"status": None}
    assert filled("build", {}, env).fields == {}


def test_a_blank_that_nothing_fills_stays_for_validation_to_name():
    found = filled("build", {"product_name": " ", "version": ""}, {"VERSIONER_PRODUCT": "  "})

    assert found == Filled({"product_name": " ", "version": ""}, {})


@pytest.mark.parametrize("blank", ["", "  "], ids=["empty", "blank"])
def test_a_blank_variable_is_not_set(blank):
    """Of the user's as of the CI system's."""
    assert filled("build", env={"VERSIONER_VERSION": blank}, ci=GITHUB).fields["version"] == "01234567"
    assert "version" not in filled("build", ci={**GITHUB, "GITHUB_SHA": blank}).fields


def test_unknown_names_and_wrong_types_are_kept_for_validation():
    given = {"produkt": "x", "version": 7, "environment_name": "", "scm_sha": ["x"]}

    found = filled("build", given, {"VERSIONER_VERSION": "1", "VERSIONER_ENVIRONMENT": "e", "VERSIONER_SCM_SHA": "s"})

    assert found == Filled(given, {})


def test_what_was_given_is_not_changed():
    given = {"version": "", "extra_metadata": {"a": 1}}
    Filler("build", {"VERSIONER_VERSION": "1"}, detect(GITHUB)).fill(given, CHECKOUT)

    assert given == {"version": "", "extra_metadata": {"a": 1}}


def test_automatic_metadata_lies_under_the_users_own():
    own = {"vi_gh_job": "mine", "team": "core"}

    assert filled("build", ci=GITHUB).fields["extra_metadata"] == {"vi_gh_job": "build"}
    assert filled("build", {"extra_metadata": own}, ci=GITHUB).fields["extra_metadata"] == own
    found = filled("build", {"extra_metadata": {"a": 1}}, ci=GITHUB)
    assert found.fields["extra_metadata"] == {"vi_gh_job": "build", "a": 1}
    assert found.sources["extra_metadata"] == "github, beside your own"


@pytest.mark.parametrize("own", ["", " ", "{}", 3, [], False], ids=repr)
def test_given_metadata_that_is_no_object_is_left_for_validation(own):
    found = filled("build", {"extra_metadata": own}, ci=GITHUB)

    assert found.fields["extra_metadata"] is own
    assert "extra_metadata" not in found.sources


def test_automatic_metadata_is_left_out_where_it_alone_makes_it_too_large():
    automatic = len('"vi_gh_job":"build",')
    room = events.MAX_METADATA_BYTES - len('{"k":""}')
    fits, full = {"k": "x" * (room - automatic)}, {"k": "x" * (room - automatic + 1)}

    assert filled("build", {"extra_metadata": fits}, ci=GITHUB).fields["extra_metadata"] == {
        **fits,
        "vi_gh_job": "build",
    }
    found = filled("build", {"extra_metadata": full}, ci=GITHUB)
    assert found.fields["extra_metadata"] == full
    events.validate("build", {**found.fields, "status": "completed"})


def test_automatic_metadata_that_is_too_large_alone_is_left_out():
    found = filled("build", ci={**GITHUB, "GITHUB_JOB": "x" * events.MAX_METADATA_BYTES})

    assert "extra_metadata" not in found.fields | found.sources


def nested():
    root = {}
    for _ in range(100_000):
        root = {"a": root}
    return root


@pytest.mark.parametrize(
    "own", [{"a": math.nan}, {1: 2}, {"a": {1, 2}}, {"a": "\ud800"}, nested()], ids=["nan", "key", "set", "surrogate", "deep"]
)  # fmt: skip
def test_metadata_that_cannot_be_sent_is_left_for_validation(own):
    assert filled("build", {"extra_metadata": own}, ci=GITHUB).fields["extra_metadata"] is own


# What git tells.


def test_a_build_outside_ci_is_told_by_its_checkout():
    assert filled("build", {"scm_sha": None, "scm_branch": " "}, checkout=CHECKOUT) == Filled(
        CHECKOUT, dict.fromkeys(CHECKOUT, "git")
    )
    assert filled("build", checkout={"scm_sha": "a" * 40}).fields == {"scm_sha": "a" * 40}


def test_a_deployment_is_not_told_by_a_checkout():
    """It is of the version that is deployed, whatever lies in the directory."""
    assert filled("deployment", checkout=CHECKOUT) == Filled({}, {})


def test_within_ci_the_checkout_is_not_asked():
    assert filled("build", checkout=CHECKOUT, ci={"JENKINS_URL": "x"}).fields == {"source_system": "jenkins"}


@pytest.mark.parametrize("name", sorted(CHECKOUT))
def test_a_checkout_is_used_whole_or_not_at_all(name):
    """A commit of the user's with the branch of some directory would be a lie."""
    assert filled("build", {name: "x"}, checkout=CHECKOUT).fields == {name: "x"}
    assert filled("build", env={VARIABLES[name]: "x"}, checkout=CHECKOUT).fields == {name: "x"}


def test_only_what_a_checkout_can_tell_is_taken_from_it():
    assert filled("build", checkout={**CHECKOUT, "version": "1"}).fields == CHECKOUT


def test_nothing_gives_nothing():
    assert Filler("build", {}, NOTHING).fill({}, {}) == Filled({}, {})
