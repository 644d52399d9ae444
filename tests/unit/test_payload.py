"""The bytes that are sent, and what makes two events the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from versioner_agent import bodies, events

NOW = events.RELEASED_AT + 1_000_000.25
STAMP = events.Stamp("0b0e7a1c-0000-4000-8000-000000000000", NOW, "ci-7", "0.1.0")
BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
DEPLOYMENT = {**BUILD, "environment_name": "production"}
OURS = {
    "vi_agent_event_id": STAMP.event_id,
    "vi_agent_queued_at": events.rfc3339(NOW),
    "vi_agent_host": "ci-7",
    "vi_agent_version": "0.1.0",
}


def make(kind="build", **more):
    return events.validate(kind, {**(BUILD if kind == "build" else DEPLOYMENT), **more})


def sent(event, stamp=STAMP):
    return json.loads(events.payload(event, stamp))


def same(one, other):
    return events.content_digest(one) == events.content_digest(other)


def test_payload_is_exactly_these_bytes():
    event = events.validate("build", {"version": " 1 ", "status": "OK", "product_name": "zürich"})

    assert (
        events.payload(event, STAMP)
        == (
            '{"completed_at":"2026-11-12T13:46:40.250Z","extra_metadata":{'
            '"vi_agent_event_id":"0b0e7a1c-0000-4000-8000-000000000000","vi_agent_host":"ci-7",'
            '"vi_agent_queued_at":"2026-11-12T13:46:40.250Z","vi_agent_version":"0.1.0"},'
            '"product_name":"zürich","status":"completed","version":"1"}'
        ).encode()
    )


def test_order_of_fields_does_not_matter():
    turned = events.validate("build", dict(reversed(BUILD.items())))

    assert events.payload(turned, STAMP) == events.payload(make(), STAMP)
    assert same(turned, make())


@pytest.mark.parametrize(
    ("kind", "status", "names"),
    [
        ("build", "pending", set()),
        ("build", "started", {"started_at"}),
        ("build", "completed", {"completed_at"}),
        ("build", "failed", {"completed_at"}),
        ("build", "aborted", {"completed_at"}),
        ("deployment", "pending", set()),
        ("deployment", "started", set()),
        ("deployment", "completed", {"completed_at"}),
        ("deployment", "failed", {"completed_at"}),
        ("deployment", "aborted", {"completed_at"}),
    ],
)
def test_times_default_to_the_time_of_queuing(kind, status, names):
    body = sent(make(kind, status=status))

    assert {name for name in ("started_at", "completed_at") if name in body} == names
    assert all(body[name] == events.rfc3339(NOW) for name in names)


def test_given_time_is_kept():
    assert sent(make(completed_at="2020-01-01T00:00:00+01:00"))["completed_at"] == "2020-01-01T00:00:00+01:00"


@pytest.mark.parametrize("now", [0.0, -5.0, events.RELEASED_AT - 0.001], ids=str)
def test_implausible_clock_gives_no_times(now):
    assert not events.clock_is_plausible(now)
    assert "completed_at" not in sent(make(), STAMP._replace(queued_at=now))


def test_clock_of_the_release_is_plausible():
    assert events.clock_is_plausible(events.RELEASED_AT)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1970-01-01T00:00:00.000Z"), (-1e99, "1970-01-01T00:00:00.000Z"), (1e99, "9999-12-31T23:59:59.000Z")],
)
def test_any_clock_can_be_written(seconds, text):
    assert events.rfc3339(seconds) == text


def test_metadata_gains_ours():
    assert sent(make())["extra_metadata"] == OURS
    assert sent(make(extra_metadata={"a": 1}))["extra_metadata"] == {**OURS, "a": 1}


def test_keys_of_the_user_win():
    mine = {"vi_agent_host": "mine", "vi_agent_event_id": None}

    assert sent(make(extra_metadata=mine))["extra_metadata"] == {**OURS, **mine}


def test_ours_are_left_out_where_they_alone_exceed_the_limit_of_metadata():
    theirs = {"k": "x" * (events.MAX_METADATA_BYTES - 20)}

    assert sent(make(extra_metadata=theirs))["extra_metadata"] == theirs


def test_ours_are_left_out_where_they_alone_exceed_the_limit_of_the_body():
    room = events.MAX_BODY_BYTES - len(events._encode({**BUILD, "build_url": ""}))
    body = events.payload(make(build_url="u" * (room - 200)), STAMP)

    assert len(body) <= events.MAX_BODY_BYTES
    assert b"vi_agent_" not in body


def test_body_never_exceeds_the_limit():
    """What validation accepts at exactly the limit is not made longer by what is added at queuing."""
    room = events.MAX_BODY_BYTES - len(events._encode({**BUILD, "build_url": ""}))

    assert len(events.payload(make(build_url="u" * room), STAMP)) <= events.MAX_BODY_BYTES


def test_digest_ignores_what_is_automatic():
    plain = make(extra_metadata={"a": 1})

    assert same(plain, make(extra_metadata={"a": 1, "vi_agent_host": "elsewhere"}))
    assert same(make(version="1.2.3"), make(version=" 1.2.3 ", status="Success", scm_sha=""))


def test_digest_ignores_metadata_that_is_automatic_only():
    assert same(make(), make(extra_metadata={"vi_agent_host": "elsewhere"}))
    assert same(make(), make(extra_metadata={}))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1.2.4"}, {"product_name": "Payments"}, {"status": "failed"}, {"scm_sha": "abc"},
        {"completed_at": "2026-11-06T15:30:00Z"}, {"extra_metadata": {"a": 1}}, {"extra_metadata": {"vi_agen": 1}},
    ],
    ids=repr,
)  # fmt: skip
def test_digest_tells_contents_apart(change):
    assert not same(make(), make(**change))


def test_identity_is_kind_run_attempt_and_content():
    def identity(kind="build", run="7", attempt=None, content=b"c"):
        return events.identity(kind, run, attempt, content)

    others = [
        identity(kind="deployment"), identity(run="8"), identity(attempt="1"), identity(content=b"d"),
    ]  # fmt: skip
    assert identity() == identity(attempt="")
    assert len({identity(), *others}) == 5


def test_event_without_a_run_has_no_identity():
    assert events.identity("build", None, "1", b"c") is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), _json))
def test_metadata_arrives_as_it_was_given(metadata):
    event = make(extra_metadata=metadata)

    assert sent(event)["extra_metadata"] == OURS | metadata
    assert events.payload(event, STAMP) == events.payload(make(extra_metadata=metadata), STAMP)


@given(st.binary(max_size=200) | st.text('[]{}":,0123456789.eE-truefalsn\\ud8\n ', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(data):
    """No input makes reading or validating raise anything but ValidationError."""
    try:
        for event in bodies.validate_all(bodies.parse_json(data)):
            events.payload(event, STAMP)
    except events.ValidationError as exc:
        str(exc).encode()
