"""What monitoring is told: thresholds, the worst first, and a line that nothing can break."""

from __future__ import annotations

import re

import pytest
from measured import HEALTHY, NOW

from versioner_agent.checking import CRITICAL, OK, THRESHOLDS, UNKNOWN, WARNING, defaults, judge, line, report

DAY = 86_400
#: What is changed of a healthy outbox -> level, words.
CONDITIONS = {
    "healthy": ({}, OK, r"3 pending, 0 failed, the API is up"),
    "no outbox": ({"is_there": False, "has_agent": False, "is_delivering": False}, OK, r"no outbox yet: .*"),
    "pending at the limit": ({"counts": {"pending": 1000}}, OK, r"1000 pending.*"),
    "pending": ({"counts": {"pending": 1001}}, WARNING, r"1001 events pending \(more than 1000\)"),
    "many pending": ({"counts": {"pending": 10_001}}, CRITICAL, r"10001 events pending \(more than 10000\)"),
    "age": ({"oldest_pending_at": NOW - 3601}, WARNING, r"the oldest pending event waits for 1 h"),
    "great age": ({"oldest_pending_at": NOW - DAY - 1}, CRITICAL, r"the oldest pending event waits for 1 d"),
    "queued ahead": ({"oldest_pending_at": NOW + DAY}, OK, r".*"),
    "failed": ({"counts": {"failed": 1}}, WARNING, r"1 event failed \(`versioner-agent list --state failed`\)"),
    "many failed": ({"counts": {"failed": 50_000}}, WARNING, r"50000 events failed .*"),
    "little space": ({"free_bytes": 500 * 2**20 - 1}, WARNING, r"500 MiB free beside the outbox"),
    "read-only": ({"is_read_only": True}, CRITICAL, r"the outbox lies on a read-only file system: .*"),
    "hardly any space": ({"free_bytes": 64 * 2**20 - 1}, CRITICAL, r"64 MiB free beside the outbox"),
    "space unknown": ({"free_bytes": None}, OK, r".*"),
    "no agent": ({"has_agent": False, "is_delivering": False}, CRITICAL, r"events are pending and no agent is running"),
    "no agent, nothing to do": (
        {"has_agent": False, "is_delivering": False, "counts": {"pending": 0}}, WARNING, r"no agent is running",
    ),
    "an agent that hangs": ({"last_sign_at": NOW - 610}, CRITICAL, r"the agent has tried nothing for 10 min: .*"),
    "an agent with nothing to do": ({"last_sign_at": None}, OK, r".*"),
    "a flush": ({"has_agent": False}, OK, r".*"),
    "agent waits for a flush": ({"is_delivering": False}, OK, r".*"),
    "unauthorized": (
        {"state": "unauthorized", "reason": "HTTP 401: no such key", "since": NOW - 7200}, CRITICAL,
        r"the API is unauthorized since 2 h: HTTP 401: no such key",
    ),
    "misrouted": ({"state": "misrouted", "since": None}, CRITICAL, r"the API is misrouted since 0 s"),
    "damage": ({"damage": "page 3"}, WARNING, r"the outbox was damaged \(`versioner-agent doctor --ackn.*\): page 3"),
    "no receipt": ({"oldest_batch_at": NOW - 31 * DAY}, WARNING, r"2 exported batches have no receipt, .* 31 d"),
    "one without receipt": ({"oldest_batch_at": NOW - 31 * DAY, "batches": 1}, WARNING, r"1 exported batch has no .*"),
    "schema of before": ({"batches": None, "oldest_batch_at": None, "failed": None, "failures": None}, OK, r".*"),
    **{
        f"{state} for long": ({"state": state, "since": NOW - 901}, WARNING, rf"the API is {state} since 15 min")
        for state in ("down", "rate_limited", "proxy", "not_authentic")
    },
    "down for a moment": ({"state": "down", "since": NOW - 900}, OK, r"3 pending, 0 failed, the API is down"),
    "down since tomorrow": ({"state": "down", "since": NOW + DAY}, OK, r".*"),
    "down, nothing waits": ({"state": "down", "since": NOW - DAY, "counts": {"pending": 0}}, OK, r".*"),
    "unknown": ({"state": "unknown", "since": None}, OK, r".* the API is unknown"),
}  # fmt: skip


def changed(**changes):
    counts = {**HEALTHY.counts, **changes.pop("counts", {})}
    return HEALTHY._replace(counts=counts, **changes)


def words_of(told):
    return told.partition(" - ")[2].partition(" | ")[0]


@pytest.mark.parametrize(("changes", "level", "words"), CONDITIONS.values(), ids=CONDITIONS)
def test_each_condition_has_its_level_and_words(changes, level, words):
    code, told = report(changed(**changes), defaults(), NOW)

    assert code == level
    assert told.startswith(f"VERSIONER {('OK', 'WARNING', 'CRITICAL')[level]} - ")
    assert re.fullmatch(words, words_of(told)), told


def test_the_worst_leads():
    view = changed(counts={"failed": 2, "pending": 20_000}, damage="page 3", has_agent=False, is_delivering=False)

    problems = judge(view, defaults(), NOW)
    _, told = report(view, defaults(), NOW)

    assert [problem.level for problem in problems] == [CRITICAL, CRITICAL, WARNING, WARNING]
    assert words_of(told).startswith("events are pending and no agent is running; 20000 events pending (more than ")


def test_where_no_agent_is_expected_none_is_missed():
    view = changed(has_agent=False, is_delivering=False)

    assert report(view, defaults(), NOW, wants_agent=False)[0] == OK


@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda each: each.key)
def test_every_limit_can_be_moved_and_switched_off(threshold):
    """All conditions at once, each a little beyond its own limit: only the one that is left can speak."""
    view = changed(
        counts={"pending": 11, "failed": 11}, oldest_pending_at=NOW - 11, free_bytes=9, state="down", since=NOW - 11,
        oldest_batch_at=NOW - 11,
    )  # fmt: skip
    off = dict.fromkeys((each.key for each in THRESHOLDS), None)

    assert judge(view, off, NOW) == []
    (found,) = judge(view, off | {threshold.key: 10}, NOW)
    assert found.level == (CRITICAL if threshold.key.endswith("critical") else WARNING)


def test_performance_data_has_thresholds_in_their_place():
    _, told = report(HEALTHY, defaults() | {"pending_warning": None}, NOW)

    assert told.partition(" | ")[2] == (
        "pending=3;;10000;0 oldest_age=59s;3600;86400;0 failed=0;0;;0 delivered=1000001c;;;0 exported=2;;;0 "
        "free=1099511627776B;524288000:;67108864:;0"
    )
    assert "free=" not in report(changed(free_bytes=None), defaults(), NOW)[1]


@pytest.mark.parametrize("words", ["a|b", "a\nb", "a\rb", "a\u2028b", "it's 'quoted'", "sk_acme_k1_secret", "x" * 5000])
def test_no_words_break_the_line(words):
    view = changed(state="unauthorized", reason=words, damage=words)

    _, told = report(view, defaults(), NOW)

    assert len(told.splitlines()) == 1
    assert told.count("|") == 1
    assert len(told.encode()) < 1500
    assert "secret" not in told
    assert told.isprintable()


def test_a_line_without_data_has_no_separator():
    assert line(UNKNOWN, "a | b") == "VERSIONER UNKNOWN - a / b"


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("pending_warning", "0", 0), ("pending_warning", "none", None), ("failed_critical", " None ", None),
        ("age_warning", "90", 90), ("age_warning", "90s", 90), ("age_warning", "90m", 5400), ("age_warning", "24h", DAY),
        ("receipt_warning", "7d", 7 * DAY), ("free_warning", "1000", 1000), ("free_warning", "64K", 65536),
        ("free_warning", "500M", 524_288_000), ("free_warning", "500MiB", 524_288_000), ("free_warning", "2g", 2**31),
    ],
)  # fmt: skip
def test_limits_are_read(key, given, expected):
    (threshold,) = (each for each in THRESHOLDS if each.key == key)

    assert threshold.parse(given) == expected


@pytest.mark.parametrize(
    "given", ["", "-1", "1.5", "1e9", "nan", "inf", "x", "1w", "9" * 400, "٣", "1 000", "none none"]
)
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda each: each.key)
def test_other_limits_are_refused(threshold, given):
    with pytest.raises(ValueError, match=r"^must be .*, or none$"):
        threshold.parse(given)
