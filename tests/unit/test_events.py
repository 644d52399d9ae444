"""Which fields an event may have, and what happens to them."""

from __future__ import annotations

import math

import pytest

from versioner_agent import events, values
from versioner_agent.errors import ValidationError

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
DEPLOYMENT = {**BUILD, "environment_name": "production"}
BASE = {"build": BUILD, "deployment": DEPLOYMENT}
STRINGS = {
    "both": ("scm_branch", "scm_sha", "scm_repository", "build_url", "build_number", "source_system", "invoke_id"),
    "build": ("built_by", "built_by_email", "built_by_name"),
    "deployment": ("deployed_by", "deployed_by_email", "deployed_by_name", "deploy_url"),
}
#: The API's aliases and the CI systems' own words, written down here once more: canonical -> (both, deployment, build).
ALIASES = {
    "pending": ("queued scheduled", "", ""),
    "started": ("in_progress init", "deploying", "building"),
    "completed": (
        "success complete finished succeeded succeededwithissues passed ok",
        "deployed",
        "built",
    ),
    "failed": ("fail failure error timed_out unstable", "", ""),
    "aborted": ("abort cancelled cancel skipped canceled not_built", "", ""),
}


def words(kind):
    for canonical, (both, deployment, build) in ALIASES.items():
        own = build if kind == "build" else deployment
        for word in (canonical, *both.split(), *own.split()):
            yield word, canonical


def problems_of(kind, fields, **options):
    with pytest.raises(ValidationError) as caught:
        events.validate(kind, fields, **options)
    assert caught.value.exit_code == 2
    return caught.value.problems


@pytest.mark.parametrize("kind", events.KINDS)
def test_least_event_is_valid(kind):
    assert events.validate(kind, BASE[kind]) == events.Event(kind, BASE[kind])


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in events.KINDS for name in BASE[kind]], ids=lambda value: value
)
def test_required_field_must_be_there_and_hold_something(kind, name):
    rest = {key: value for key, value in BASE[kind].items() if key != name}

    assert problems_of(kind, rest) == [f"{name}: is required"]
    assert problems_of(kind, {**rest, name: None}) == [f"{name}: is required"]
    assert problems_of(kind, {**rest, name: " \t\n"}) == [f"{name}: must not be empty"]


@pytest.mark.parametrize("kind", events.KINDS)
def test_every_optional_string_is_taken_trimmed(kind):
    names = STRINGS["both"] + STRINGS[kind]
    event = events.validate(kind, {**BASE[kind], **{name: f"  {name} x\n" for name in names}})

    assert event.fields == {**BASE[kind], **{name: f"{name} x" for name in names}}


@pytest.mark.parametrize("kind", events.KINDS)
def test_names_are_trimmed_but_never_folded(kind):
    event = events.validate(kind, {**BASE[kind], "product_name": " PayMents ", "version": "\tV1 "})

    assert event.product_name == "PayMents"
    assert event.fields["version"] == "V1"


@pytest.mark.parametrize("empty", [None, "", "  "], ids=["null", "empty", "blank"])
def test_empty_optional_field_is_left_out(empty):
    assert events.validate("build", {**BUILD, "scm_sha": empty, "started_at": empty}).fields == BUILD


@pytest.mark.parametrize("value", [1, 1.5, True, [], {}, ["x"]], ids=repr)
def test_string_field_takes_strings_only(value):
    (problem,) = problems_of("build", {**BUILD, "version": value})

    assert problem.startswith("version: must be a string, not a")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("build", n) for n in (*STRINGS["deployment"], "environment_name", "skip_preflight_checks")]
    + [("deployment", n) for n in (*STRINGS["build"], "started_at")],
)
def test_field_of_the_other_kind_is_refused_as_such(kind, name):
    (problem,) = problems_of(kind, {**BASE[kind], name: "x"})

    assert problem.startswith(f"{name}: is a field of a ")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("produkt_name", "product_name"),
        ("scm-sha", "scm_sha"),
        ("buildnumber", "build_number"),
        ("metadata", "extra_metadata"),
        ("zzz", None),
    ],
)
def test_unknown_field_is_refused_with_the_nearest_name(typo, meant):
    (problem,) = problems_of("build", {**BUILD, typo: "x"})

    assert typo in problem
    assert (f"did you mean {meant!r}?" in problem) if meant else ("--allow-unknown-fields" in problem)


def test_allowed_unknown_fields_pass_as_they_are():
    extra = {"region": " eu ", "canary": {"share": [1, 2.5, None, True]}}

    assert events.validate("build", {**BUILD, **extra}, allow_unknown=True).fields == {**BUILD, **extra}


@pytest.mark.parametrize("name", ["\ud800", "a\0b"], ids=["surrogate", "NUL"])
def test_allowed_unknown_field_needs_a_sendable_name(name):
    assert len(problems_of("build", {**BUILD, name: 1}, allow_unknown=True)) == 1


@pytest.mark.parametrize(
    "value", [math.nan, ["\ud800"], {"a": "\0"}, object()], ids=["nan", "surrogate", "NUL", "type"]
)
def test_allowed_unknown_field_needs_a_sendable_value(value):
    (problem,) = problems_of("build", {**BUILD, "region": value}, allow_unknown=True)

    assert problem.startswith("region")


@pytest.mark.parametrize("name", [1, None, ("a",)], ids=repr)
def test_field_names_are_strings(name):
    assert problems_of("build", {**BUILD, name: "x"}) == [f"{name!r}: field names are strings"]


@pytest.mark.parametrize("kind", ["Build", "", "release", None, ["build"]], ids=repr)
def test_unknown_kind_is_refused(kind):
    (problem,) = problems_of(kind, BUILD)

    assert "build or deployment" in problem


@pytest.mark.parametrize("kind", events.KINDS)
def test_every_status_word_in_any_case_becomes_canonical(kind):
    for word, canonical in words(kind):
        for spelled in (word, word.upper(), word.title(), f" {word} "):
            assert events.validate(kind, {**BASE[kind], "status": spelled}).fields["status"] == canonical


def test_no_other_status_words_exist():
    for kind in events.KINDS:
        assert events._CANONICAL_OF[kind] == dict(words(kind))


@pytest.mark.parametrize(("kind", "word"), [("build", "deployed"), ("deployment", "built"), ("deployment", "building")])
def test_status_word_of_the_other_kind_is_refused(kind, word):
    (problem,) = problems_of(kind, {**BASE[kind], "status": word})

    assert problem.startswith(f"status: unknown status {word!r} for a {kind}")


@pytest.mark.parametrize(
    ("word", "advice"), [("complted", "'completed'"), ("Faild", "'failed'"), ("zzz", "one of pending, started")]
)
def test_unknown_status_is_refused_with_the_nearest_one(word, advice):
    (problem,) = problems_of("build", {**BUILD, "status": word})

    assert advice in problem


@pytest.mark.parametrize(
    "value",
    [
        "2026-11-06T15:30:00Z", "2026-11-06t15:30:00z", "2026-11-06T15:30:00+02:00", "2026-11-06T15:30:00-11:30",
        "2026-11-06T15:30:00.1Z", "2026-11-06T15:30:00.123456789Z", "2024-02-29T00:00:00Z", "2016-12-31T23:59:60Z",
        " 2026-11-06T15:30:00Z ",
    ],
)  # fmt: skip
def test_rfc_3339_time_is_taken(value):
    event = events.validate("build", {**BUILD, "started_at": value, "completed_at": value})

    assert event.fields["started_at"] == event.fields["completed_at"] == value.strip().upper()


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (".500Z", ".5Z"), (".000Z", "Z"), (".0Z", "Z"), (".050Z", ".05Z"), (".100200300Z", ".1002003Z"), (".25z", ".25Z"),
        ("+00:00", "Z"), ("-00:00", "Z"), (".500+00:00", ".5Z"), (".0-00:30", "-00:30"), ("+10:00", "+10:00"),
        (".10+00:01", ".1+00:01"),
    ],
)  # fmt: skip
def test_a_time_has_one_spelling(given, sent):
    """The official client's: no zeros at the end of the fraction, and Z for no offset."""
    event = events.validate("build", {**BUILD, "completed_at": f"2026-11-06T15:30:00{given}"})

    assert event.fields["completed_at"] == f"2026-11-06T15:30:00{sent}"


@pytest.mark.parametrize(
    "value",
    [
        "2026-11-06T15:30:00", "2026-11-06 15:30:00Z", "2026-11-06", "now", "1793491200", "2026-13-01T00:00:00Z",
        "2026-02-29T00:00:00Z", "2026-11-06T24:00:00Z", "2026-11-06T15:60:00Z", "2026-11-06T15:30:61Z",
        "2026-11-06T15:30Z", "2026-11-06T15:30:00+0200", "2026-11-06T15:30:00+25:00", "2026-11-06T15:30:00.Z",
        "2026-11-06T15:30:00.1234567890Z", "٢٠٢٦-11-06T15:30:00Z", "0000-01-01T00:00:00Z", "20261106T153000Z",
    ],
)  # fmt: skip
def test_other_time_is_refused(value):
    (problem,) = problems_of("deployment", {**DEPLOYMENT, "completed_at": value})

    assert problem.startswith("completed_at: ")
    assert "RFC 3339" in problem


@pytest.mark.parametrize("value", [True, False])
def test_boolean_is_taken(value):
    event = events.validate("deployment", {**DEPLOYMENT, "skip_preflight_checks": value})

    assert event.fields["skip_preflight_checks"] is value


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}], ids=repr)
def test_boolean_takes_booleans_only(value):
    (problem,) = problems_of("deployment", {**DEPLOYMENT, "skip_preflight_checks": value})

    assert problem.startswith("skip_preflight_checks: must be true or false")


@pytest.mark.parametrize("value", [[1], "{}", 3, True, 0, [], ""], ids=repr)
def test_metadata_takes_objects_only(value):
    (problem,) = problems_of("build", {**BUILD, "extra_metadata": value})

    assert problem.startswith("extra_metadata: must be a JSON object")


@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, -math.inf, "\ud800", "a\0b", b"bytes", {1, 2}, 10**400, {"k": [{"deep": math.nan}]},
        {"\udc80": 1}, {"a\0": 1}, {1: 2},
    ],
    ids=ascii,
)  # fmt: skip
def test_metadata_refuses_what_json_cannot_carry(value):
    (problem,) = problems_of("build", {**BUILD, "extra_metadata": {"key": value}})

    assert problem.startswith("extra_metadata.key")


def test_integers_as_large_as_anybody_reads_are_taken():
    event = events.validate("build", {**BUILD, "extra_metadata": {"n": 2**64, "m": -(2**1023)}})

    assert event.fields["extra_metadata"]["n"] == 2**64


@pytest.mark.parametrize("text", ["\ud800", "a\udcff", "a\0b", "ü\0"], ids=ascii)
@pytest.mark.parametrize("name", ["product_name", "version", "status", "scm_sha", "completed_at", "invoke_id"])
def test_no_string_holds_a_surrogate_or_nul(name, text):
    (problem,) = problems_of("build", {**BUILD, name: text})

    assert problem.startswith(f"{name}: ")
    problem.encode()


def test_nesting_has_a_limit():
    def nested(levels):
        root = {}
        for _ in range(levels - 1):
            root = {"a": root}
        return {**BUILD, "extra_metadata": root}

    events.validate("build", nested(values.MAX_DEPTH))
    assert "nested deeper" in problems_of("build", nested(values.MAX_DEPTH + 1))[0]
    assert "nested deeper" in problems_of("build", nested(100_000))[0]


def test_metadata_over_its_limit_is_refused():
    fits = {"k": "x" * (events.MAX_METADATA_BYTES - len('{"k":""}'))}

    events.validate("build", {**BUILD, "extra_metadata": fits})
    (problem,) = problems_of("build", {**BUILD, "extra_metadata": {"k": fits["k"] + "x"}})
    assert problem.startswith(f"extra_metadata: is {events.MAX_METADATA_BYTES + 1} bytes")


def test_300_kb_value_is_refused_by_name():
    (problem,) = problems_of("build", {**BUILD, "build_url": "u" * 300_000})

    assert f"over the limit of {events.MAX_BODY_BYTES}" in problem
    assert "build_url" in problem
    assert len(problem) < 300


def test_body_limit_is_in_bytes_of_utf_8():
    problems_of("build", {**BUILD, "build_url": "é" * (events.MAX_BODY_BYTES // 2)})


def test_all_problems_are_listed_at_once():
    found = problems_of(
        "deployment",
        {"version": 1, "status": "nope", "completed_at": "x", "scm_sah": "1", "extra_metadata": {"a": math.nan}},
    )

    assert sorted(problem.split(":")[0].strip("'") for problem in found) == [
        "completed_at", "environment_name", "extra_metadata.a", "product_name", "scm_sah", "status", "version",
    ]  # fmt: skip


def test_values_in_messages_are_short_and_printable():
    (problem,) = problems_of("build", {**BUILD, "status": "\x1b[31m" + "x" * 5000})

    assert problem.isprintable()
    assert len(problem) < 400


def test_message_counts_what_it_does_not_show():
    error = ValidationError([f"problem {n}" for n in range(60)])

    assert "… and 10 more" in error.message
    assert len(error.problems) == 60


def test_caller_keeps_its_fields():
    given = {**BUILD, "version": " 1 ", "extra_metadata": {"a": 1}}
    before = {**given}
    event = events.validate("build", given)
    events.payload(event, events.Stamp("id", 0.0, "host", "1"))

    assert given == before
    assert given["extra_metadata"] == {"a": 1}
