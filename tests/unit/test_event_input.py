"""Reading events from JSON, and finding out their kind."""

from __future__ import annotations

import json

import pytest

from versioner_agent import bodies, events
from versioner_agent.errors import ValidationError

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
DEPLOYMENT = {**BUILD, "environment_name": "production"}


def refusal(call, *args, **kwargs):
    with pytest.raises(ValidationError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def kind_of(fields, kind=None):
    (event,) = bodies.validate_all([("", fields)], kind)
    return event.kind


def test_one_object_has_no_number():
    assert bodies.parse_json(b' {"a": 1}\n') == [("", {"a": 1})]


def test_array_is_numbered_from_one():
    assert bodies.parse_json(b'[{"a": 1}, 2]') == [("event 1", {"a": 1}), ("event 2", 2)]


@pytest.mark.parametrize("between", [b"\n", b"\r\n", b"\n\n \t", b" ", b""], ids=repr)
def test_json_lines_are_numbered_from_one(between):
    assert bodies.parse_json(b'{"a": 1}' + between + b'{"a": 2}') == [("event 1", {"a": 1}), ("event 2", {"a": 2})]


def test_byte_order_mark_is_skipped():
    assert bodies.parse_json(b'\xef\xbb\xbf{"a": 1}') == [("", {"a": 1})]


@pytest.mark.parametrize("data", [b"", b" \r\n\t", b"\xef\xbb\xbf"], ids=repr)
def test_empty_input_is_refused(data):
    (problem,) = refusal(bodies.parse_json, data, "events.json")

    assert problem.startswith("events.json: empty")


def test_empty_array_is_refused():
    assert "empty array" in refusal(bodies.parse_json, b"[]")[0]


@pytest.mark.parametrize("data", [b'{"a": "\xff"}', b"\xe9", b"\xff\xfe{\x00}\x00", b'"\xed\xa0\x80"'], ids=repr)
def test_other_encodings_than_utf_8_are_refused(data):
    assert "is not UTF-8" in refusal(bodies.parse_json, data)[0]


@pytest.mark.parametrize(
    "data",
    [
        b"{", b"}", b'{"a": }', b'{"a": 1,}', b"{'a': 1}", b"[1,", b"null x", b'{"a": 01}', b'{"a": "\n"}', b'"\\u12"',
        b'{"a": 1} trailing', b"\x00", b'{"a": "\x00"}', b"{1: 2}", b"// x\n{}",
    ],
    ids=repr,
)  # fmt: skip
def test_broken_json_is_refused_with_its_place(data):
    (problem,) = refusal(bodies.parse_json, data)

    assert "line" in problem
    assert "not valid JSON" in problem


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_no_json_are_refused(word):
    assert f"{word} is not a JSON number" in refusal(bodies.parse_json, f'{{"a": {word}}}'.encode())[0]


def test_number_too_large_for_a_float_is_refused():
    items = bodies.parse_json(json.dumps({**BUILD, "extra_metadata": {"n": "@"}}).replace('"@"', "1e999").encode())

    assert "finite" in refusal(bodies.validate_all, items)[0]


@pytest.mark.parametrize("digits", [400, 5_000, 200_000])
def test_huge_integer_is_refused(digits):
    data = json.dumps({**BUILD, "extra_metadata": {"n": "@"}}).replace('"@"', "9" * digits).encode()

    problems = refusal(lambda: bodies.validate_all(bodies.parse_json(data)))
    assert len(problems) == 1
    assert len(problems[0]) < 400


@pytest.mark.parametrize("data", [b'{"a": 1, "a": 2}', b'{"x": [{"a": 1, "b": 0, "a": 1}]}', b'{"a":1,"\\u0061":1}'])
def test_duplicate_key_is_refused_at_any_depth(data):
    assert "the key 'a' is given twice" in refusal(bodies.parse_json, data)[0]


def test_duplicate_key_names_the_line_of_its_object():
    assert "line 3" in refusal(bodies.parse_json, b'{"a": 1}\n\n{"b": 1, "b": 2}')[0]


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'], ids=repr)
def test_100_000_brackets_are_refused(opening):
    assert refusal(bodies.parse_json, opening * 100_000) == ["input: nested too deeply"]


def test_escaped_surrogate_is_refused():
    items = bodies.parse_json(b'{"product_name": "\\ud800", "version": "1", "status": "ok"}')

    assert "surrogate" in refusal(bodies.validate_all, items)[0]


def test_escaped_surrogate_pair_is_a_character():
    assert bodies.parse_json(b'"\\ud83d\\ude00"') == [("", "\U0001f600")]


@pytest.mark.parametrize("value", [1, "text", None, True, [1], []], ids=repr)
def test_event_that_is_no_object_is_refused(value):
    assert "must be a JSON object" in refusal(bodies.validate_all, [("event 2", value)])[0]


def test_all_events_are_checked_and_numbered():
    problems = refusal(bodies.validate_all, [("event 1", {}), ("event 2", BUILD), ("event 3", {**BUILD, "x": 1})])

    assert [problem.split(":")[0] for problem in problems] == ["event 1"] * 3 + ["event 3"]


@pytest.mark.parametrize("text", ["[]", "[{}]", "{} {}", "1", "", "{", "\udcff"], ids=ascii)
def test_metadata_option_is_one_object(text):
    (problem,) = refusal(bodies.parse_object, text, "extra_metadata")

    assert problem.startswith("extra_metadata: ")


def test_metadata_option_is_read():
    assert bodies.parse_object(' {"a": [1]} ', "extra_metadata") == {"a": [1]}


def test_kind_is_deployment_where_there_is_an_environment():
    assert kind_of(DEPLOYMENT) == "deployment"
    assert kind_of(BUILD) == "build"


def test_environment_that_is_null_makes_neither_kind():
    """A deployment whose environment variable was unset must not be recorded as a build."""
    assert "environment_name" in refusal(bodies.validate_all, [("", {**BUILD, "environment_name": None})])[0]


@pytest.mark.parametrize("kind", events.KINDS)
def test_kind_field_wins_over_guessing_and_is_not_sent(kind):
    (event,) = bodies.validate_all([("", {**(DEPLOYMENT if kind == "deployment" else BUILD), "kind": kind})])

    assert event.kind == kind
    assert "kind" not in event.fields


def test_kind_of_the_command_wins_over_guessing():
    assert kind_of(BUILD, "build") == "build"
    assert refusal(bodies.validate_all, [("", BUILD)], "deployment") == ["environment_name: is required"]
    assert "is a field of a deployment" in refusal(bodies.validate_all, [("", DEPLOYMENT)], "build")[0]


def test_kind_of_event_and_command_must_agree():
    assert "the event says build" in refusal(bodies.validate_all, [("", {**BUILD, "kind": "build"})], "deployment")[0]


@pytest.mark.parametrize("kind", ["Build", "", 1, [], {}, True], ids=repr)
def test_kind_field_is_build_or_deployment(kind):
    assert refusal(bodies.validate_all, [("", {**BUILD, "kind": kind})])[0].startswith("kind: must be")


@pytest.mark.parametrize(
    "half",
    [
        {"deployed_by": "ana"}, {"deployed_by_email": "a@b"}, {"deployed_by_name": "Ana"}, {"deploy_url": "https://x"},
        {"skip_preflight_checks": True}, {"status": "deployed"}, {"status": " Deploying "},
    ],
    ids=repr,
)  # fmt: skip
def test_half_a_deployment_is_not_taken_for_a_build(half):
    (problem,) = refusal(bodies.validate_all, [("", {**BUILD, **half})])

    assert "add environment_name" in problem
