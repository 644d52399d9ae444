"""The table of answers, and the words that are taken from them."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from versioner_agent import outcomes

NOW = 1_794_000_000.0
REFUSAL = b'{"detail": "no"}'
RULE = b'{"error": "deployment_blocked", "message": "busy", "code": "CONCURRENT_DEPLOYMENT"}'
SUCCESS = b'{"id": "evt_1", "status": "ok"}'
BODIES = {
    "refusal": REFUSAL,
    "rule": RULE,
    "success": SUCCESS,
    "html": b"<html><body>Sign in</body></html>",
    "empty": b"",
    "array": b'[{"id": "evt_1"}]',
    "without id": b'{"status": "ok"}',
    "empty id": b'{"id": ""}',
}
PROVEN = ("refusal", "rule")  # bodies that prove a refusal


def expected(status, body):
    """Section by section what an answer means, written down apart from the code."""
    if 200 <= status <= 299 and body == "success":
        return "delivered"
    if status == 429:
        return "rate_limited"
    if status in (408, 425) or (status >= 500 and status != 511):
        return "unavailable"
    if status == 407:
        return "proxy"
    if 300 <= status <= 399:
        return "misrouted"
    if status < 300 or status == 511 or body not in PROVEN:
        return "not_authentic"
    if status == 409:
        return "blocked" if body == "rule" else "conflict"
    named = {
        "unauthorized": (401, 402, 403),
        "misrouted": (404, 405, 410, 421, 426),
        "blocked": (423, 428),
        "invalid": (400, 411, 413, 414, 415, 422, 431),
    }
    return next((reason for reason, codes in named.items() if status in codes), "misrouted")


def classify(status, body=REFUSAL, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return outcomes.classify(status, named, body, NOW)


def says(value, status=422):
    return classify(status, json.dumps(value).encode()).detail


@pytest.mark.parametrize("body", BODIES)
def test_every_status_lands_as_the_table_says(body):
    for status in range(100, 600):
        outcome = classify(status, BODIES[body], retry_after="7")

        assert outcome.reason == expected(status, body), status
        assert outcome.reason in outcomes.EVENT_REASONS | outcomes.STATE_OF.keys()
        assert outcome.is_verdict == (outcome.reason in ("delivered", "conflict", "blocked", "invalid"))
        assert outcome.http_status == status
        assert outcome.is_answered
        assert outcome.was_sent
        assert outcome.server_id == ("evt_1" if outcome.reason == "delivered" else None)
        assert bool(outcome.detail) == (outcome.reason != "delivered")
        asks_for_time = status in (408, 425, 429) or (500 <= status <= 599 and status != 511)
        assert outcome.wait_s == (7.0 if asks_for_time else None)
        is_proven = body in PROVEN
        assert outcome.counts == ((status in (500, 501) and is_proven) or (status in (403, 413) and not is_proven))


def test_every_destination_state_has_advice():
    assert set(outcomes.ADVICE) == set(outcomes.STATE_OF.values())


@given(st.integers(100, 599), st.binary(max_size=60), st.text(max_size=20))
def test_no_answer_breaks_classify(status, body, header):
    headers = {"retry-after": header, "date": header, "location": header, "content-type": header}
    outcome = outcomes.classify(status, headers, body, NOW)

    assert outcome.wait_s is None or 0 <= outcome.wait_s <= 3600
    outcome.detail.encode()


@pytest.mark.parametrize(
    "body",
    [
        '{{"detail": {}}}', '{{"detail": {{"x": {}}}}}', '{{"detail": [{{"loc": [{}], "msg": "m"}}]}}',
        '{{"id": {}}}', '{{"detail": "no", "code": {}}}',
    ],
)  # fmt: skip
def test_nested_answer_breaks_nothing(body):
    """However deep it is: each step has its own limit, and a depth between two of them once fell through."""
    for depth in (*range(900, 1010), 30_000):
        classify(422, body.format("[" * depth + "]" * depth).encode())
        classify(200, body.format("[" * depth + "]" * depth).encode())


@pytest.mark.parametrize("value", ["evt_1", " evt_1 ", 17, 0], ids=repr)
def test_success_carries_an_id(value):
    outcome = classify(201, json.dumps({"id": value}).encode())

    assert outcome.reason == "delivered"
    assert outcome.server_id == str(value).strip()


@pytest.mark.parametrize("value", ["", "  ", None, True, [], ["x"], {"a": 1}, 1.5], ids=repr)
def test_success_without_a_usable_id_is_not_believed(value):
    assert classify(200, json.dumps({"id": value}).encode()).reason == "not_authentic"


def test_long_id_is_cut():
    assert len(classify(200, json.dumps({"id": "x" * 5000}).encode()).server_id) == 200


@pytest.mark.parametrize("value", [{}, {"detail": ""}, {"detail": " "}, {"detail": []}, {"detail": {}}, {"error": ""},
                                   {"detail": None}, {"detail": 5}, {"message": 1}, {"errors": "x"}], ids=repr)  # fmt: skip
def test_object_without_words_proves_nothing(value):
    assert classify(422, json.dumps(value).encode()).reason == "not_authentic"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"detail": " Field 'x' is required "}, "Field 'x' is required"),
        ({"detail": [{"loc": ["body", "version"], "msg": "field required", "type": "t"}]}, "version: field required"),
        (
            {"detail": [{"loc": ["body", "a", 0], "msg": "one"}, {"loc": ["query"], "msg": "two"}]},
            "a.0: one; query: two",
        ),
        ({"detail": [{"loc": ["body"], "msg": "m"}]}, "body: m"),
        ({"detail": [{"msg": "m"}]}, "m"),
        ({"detail": ["plain", 3]}, '"plain"; 3'),
        ({"detail": [{"loc": ["body", "a"], "type": "t"}]}, 'a: {"loc": ["body", "a"], "type": "t"}'),
        ({"detail": {"error": "e", "message": "m"}}, "m"),
        ({"detail": {"error": "e"}}, "e"),
        ({"detail": {"why": "x"}}, '{"why": "x"}'),
        ({"error": "e", "message": "m"}, "m"),
        ({"error": "e"}, "e"),
        ({"message": "m", "details": {"reason": "release freeze"}}, "m (release freeze)"),
        ({"message": "m: freeze", "details": {"reason": "freeze"}}, "m: freeze"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_every_documented_shape_of_refusal_is_readable(value, text):
    assert says(value) == text


@pytest.mark.parametrize("is_nested", [False, True], ids=["flat", "inside detail"])
@pytest.mark.parametrize("status", [409, 423, 428])
def test_rule_is_read_in_both_forms(status, is_nested):
    form = {
        "error": "deployment_blocked",
        "message": "A freeze is on",
        "code": "NO_DEPLOY_WINDOW",
        "retry_after": "2026-12-27T00:00:00Z",
        "details": {"rule_name": "xmas", "window": "w"},
    }
    outcome = classify(status, json.dumps({"detail": form} if is_nested else form).encode())

    assert (outcome.reason, outcome.code, outcome.rule) == ("blocked", "NO_DEPLOY_WINDOW", "xmas")
    assert outcome.retry_after == "2026-12-27T00:00:00Z"
    assert outcome.detail == "A freeze is on"
    assert outcome.wait_s is None


@pytest.mark.parametrize("code", [None, "", " ", False, [], {}], ids=repr)
def test_409_without_a_code_is_a_conflict(code):
    outcome = classify(409, json.dumps({"detail": {"message": "other SHA", "code": code}}).encode())

    assert (outcome.reason, outcome.code) == ("conflict", None)


def test_rule_keeps_numbers_as_text():
    outcome = classify(423, b'{"message": "m", "retry_after": 600, "code": 12}')

    assert (outcome.code, outcome.retry_after) == ("12", "600")


def test_code_of_another_refusal_is_not_a_rule():
    assert classify(422, RULE).code is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0), ("5", 5.0), (" 30 ", 30.0), ("0005", 5.0), ("3600", 3600.0), ("3601", 3600.0), ("9" * 5000, 3600.0),
        ("-5", None), ("+5", None), ("1.5", None), ("", None), ("soon", None), ("٣", None), ("\ud800", None),
        ("1e9", None), ("Fri, 99 Nov 2026 10:00:00 GMT", None), ("x" * 10_000, None),
    ],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_retry_after_in_seconds(value, seconds):
    assert outcomes.retry_after_s(value, None, NOW) == seconds


@pytest.mark.parametrize(
    ("date", "seconds"),
    [
        ("Fri, 06 Nov 2026 15:30:10 GMT", 10.0), ("Fri, 06 Nov 2026 15:29:00 GMT", 0.0),
        ("Sat, 07 Nov 2026 15:30:00 GMT", 3600.0), ("Friday, 06-Nov-26 15:30:10 GMT", 10.0),
    ],
)  # fmt: skip
def test_retry_after_date_is_judged_by_the_answers_own_date(date, seconds):
    outcome = classify(503, date="Fri, 06 Nov 2026 15:30:00 GMT", retry_after=date)

    assert outcome.wait_s == seconds


def test_retry_after_date_without_a_date_is_judged_by_our_clock():
    date = "Fri, 06 Nov 2026 15:30:00 GMT"
    server = classify(503, date=date).server_time

    assert outcomes.retry_after_s(date, None, server - 30) == 30.0


def test_missing_retry_after_means_nothing():
    assert classify(503).wait_s is None
    assert outcomes.retry_after_s(None, None, NOW) is None


@pytest.mark.parametrize("date", ["", "now", "x" * 200, "Fri, 06 Nov 99999999 15:30:00 GMT"], ids=lambda v: v[:9])
def test_unreadable_date_is_no_date(date):
    assert classify(503, date=date).server_time is None


@pytest.mark.parametrize(
    "value",
    [
        {"detail": "Invalid key sk_acme_k1_s3cret-x"},
        {"detail": {"message": "m sk_acme_k1_s3cret-x"}},
        {"detail": {"odd": "first line\nsk_acme_k1_s3cret-x"}},
        {"detail": [{"loc": ["header", "sk_acme_k1_s3cret-x"], "msg": "m"}]},
        {"detail": "k=sk_acme_k1_s3cret-x" + "y" * 5000},
        {"detail": "y" * (outcomes.MAX_DETAIL_CHARS - 18) + " sk_acme_k1_s3cret-x"},
        {"message": "m", "code": "sk_acme_k1_s3cret-x", "details": {"rule_name": "sk_acme_k1_s3cret-x"}},
        {"message": "m", "retry_after": "sk_acme_k1_s3cret-x"},
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_no_key_is_kept_from_a_refusal(value):
    assert "k1_s3" not in repr(classify(423, json.dumps(value).encode()))


def test_no_key_is_kept_from_a_success():
    assert "k1_s3cret" not in repr(classify(200, b'{"id": "sk_acme_k1_s3cret"}'))


def test_no_key_is_kept_from_headers():
    outcome = classify(302, b"", location="https://x/?key=sk_acme_k1_s3cret", content_type="sk_acme_k1_s3cret")

    assert "k1_s3cret" not in repr(outcome)
    assert "redirected to https://x/" in outcome.detail
    assert "k1_s3cret" not in repr(classify(400, b"", content_type="sk_acme_k1_s3cret; charset=x"))


@pytest.mark.parametrize("make", [outcomes.no_answer, outcomes.proxy_refused, outcomes.no_key])
def test_no_key_is_kept_from_a_problem(make):
    assert make("bad sk_acme_k1_s3cret").detail == "bad sk_acme_***"


def test_surrogates_and_nul_in_answers_can_be_stored():
    outcome = classify(423, b'{"message": "a\\ud800b\\u0000", "code": "\\udfff", "details": {"rule_name": "\\ud800"}}')

    for text in (outcome.detail, outcome.code, outcome.rule, classify(200, b'{"id": "x\\ud800"}').server_id):
        assert "\0" not in text
        text.encode()


def test_detail_is_bounded():
    assert len(says({"detail": "x" * 60_000})) == outcomes.MAX_DETAIL_CHARS
    assert len(says({"detail": {"x": "y" * 60_000}})) <= outcomes.MAX_DETAIL_CHARS
    assert len(says({"detail": [{"msg": "z" * 3000}] * 100})) == outcomes.MAX_DETAIL_CHARS


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8-sig"])
def test_refusal_in_another_encoding_breaks_nothing(encoding):
    classify(422, '{"detail": "é"}'.encode(encoding))


def test_what_happened_without_an_answer():
    assert outcomes.no_answer("timed out") == outcomes.Outcome("no_answer", "timed out")
    assert not outcomes.no_answer("x").is_answered
    assert not outcomes.no_answer("x").is_verdict
    assert outcomes.proxy_refused("no", 407).http_status == 407
    assert not outcomes.no_key("none").was_sent


def test_a_status_written_into_a_conflict_names_no_rule():
    assert classify(409, b'{"detail": "exists", "code": 409}').reason == "conflict"
    assert classify(409, b'{"detail": "exists", "code": "CONCURRENT_DEPLOYMENT"}').reason == "blocked"


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata"])
def test_a_date_without_a_zone_is_gmt(monkeypatch, zone):
    """The oldest of the forms that RFC 9110 allows."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        outcome = classify(503, b"", date="Sun Nov  6 08:49:37 1994", retry_after="Sun, 06 Nov 1994 08:50:37 GMT")
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()

    assert outcome.wait_s == 60.0
