"""When to try again, and when an event has had enough tries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from versioner_agent import policy
from versioner_agent.outcomes import Outcome, no_answer
from versioner_agent.policy import Counters, Limits, Pace

NOW = 1_794_000_000.0
DOWN = Outcome("unavailable", "HTTP 503", http_status=503)
SILENT = no_answer("timed out")
COUNTING = Outcome("unavailable", "boom", http_status=500, counts=True)
LIMITED = Outcome("rate_limited", "slow down", http_status=429, wait_s=30.0)


def decide(outcome, counters=None, limits=None, **more):
    known = {"queued_at": NOW - 5, "deliveries": 0, "had_unanswered": False, "now": NOW} | more
    return policy.decide(outcome, counters or Counters(), limits or Limits(), **known)


def verdict(reason, status=409):
    return Outcome(reason, "words", http_status=status)


def opened(*keys, now=0.0, roll=0.5, concurrency=4):
    pace = Pace(concurrency, 120.0)
    for key in keys or ("a", "b", "c"):
        pace.failed(key, DOWN, now, roll)
    assert pace.is_open
    return pace


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0.1, 3600))
def test_backoff_is_monotone_and_capped(failures, roll, cap):
    delay = policy.backoff_s(failures, roll, cap)

    assert 0 <= delay <= cap
    assert delay <= policy.backoff_s(failures + 1, roll, cap)
    assert delay == pytest.approx(roll * min(cap, 2.0 ** min(failures - 1, 40)))


@pytest.mark.parametrize(("failures", "most"), [(1, 1), (2, 2), (3, 4), (7, 64), (8, 120), (5000, 120)])
def test_backoff_doubles_from_one_second(failures, most):
    assert policy.backoff_s(failures, 1.0, 120.0) == most
    assert policy.backoff_s(failures, 0.0, 120.0) == 0


@pytest.mark.parametrize("reason", ["conflict", "invalid", "blocked"])
def test_refusal_fails_the_event(reason):
    decision = decide(verdict(reason))

    assert decision == policy.Decision("failed", reason, "words", Counters(), is_late=False)


def test_delivery_delivers_the_event():
    assert decide(verdict("delivered", 200)) == policy.Decision("delivered", "delivered", "", Counters())


@pytest.mark.parametrize(
    "reason", ["unavailable", "no_answer", "rate_limited", "proxy", "unauthorized", "misrouted", "not_authentic"]
)
def test_what_speaks_of_the_destination_leaves_the_event_pending(reason):
    decision = decide(Outcome(reason, "words"), Counters(10_000, 0.0, 0), queued_at=0.0, deliveries=10_000)

    assert decision == policy.Decision("pending", reason, "words", Counters(10_000, 0.0, 0))


@pytest.mark.parametrize(("age", "is_late"), [(0, False), (600, False), (601, True), (-50, False)])
def test_blocked_is_late_when_queued_over_ten_minutes_before(age, is_late):
    assert decide(verdict("blocked", 423), queued_at=NOW - age).is_late is is_late
    assert not decide(verdict("conflict"), queued_at=NOW - age).is_late


def test_rules_409_after_an_unanswered_attempt_may_be_our_echo():
    assert "echo of our own request" in decide(verdict("blocked"), had_unanswered=True).detail
    assert decide(verdict("blocked"), had_unanswered=False).detail == "words"
    assert decide(verdict("blocked", 423), had_unanswered=True).detail == "words"
    assert decide(verdict("conflict"), had_unanswered=True).detail == "words"


def test_first_answer_about_an_event_counts():
    assert decide(COUNTING, deliveries=7).counters == Counters(1, NOW, 7)


def test_next_answer_counts_only_after_another_delivery():
    first = Counters(1, NOW - 100, 7)

    assert decide(COUNTING, first, deliveries=7).counters == first
    assert decide(COUNTING, first, deliveries=8).counters == Counters(2, NOW - 100, 8)
    assert decide(DOWN, first, deliveries=8).counters == first


@pytest.mark.parametrize(
    ("counted", "span", "state"),
    [(19, 3600, "failed"), (18, 3600, "pending"), (19, 3599, "pending"), (500, 0, "pending"), (500, 4000, "failed")],
)
def test_gives_up_after_enough_answers_over_enough_time(counted, span, state):
    decision = decide(COUNTING, Counters(counted, NOW - span, 5), deliveries=6)

    assert decision.state == state
    assert decision.reason == ("gave_up" if state == "failed" else "unavailable")
    assert decision.counters.counted == counted + 1


def test_giving_up_says_what_the_api_said():
    decision = decide(COUNTING, Counters(19, NOW - 4000, 5), deliveries=6)

    assert decision.detail == "gave up after 20 answers while other events were delivered: boom"


def test_an_outage_never_gives_up():
    """Without deliveries of other events in between nothing proves that the event is to blame."""
    counters = Counters()
    for hour in range(1000):
        decision = decide(COUNTING, counters, now=NOW + hour * 3600)
        counters = decision.counters
        assert decision.state == "pending"

    assert counters.counted == 1


YEAR = 365 * 86_400


@pytest.mark.parametrize("step", [3600, -3600, YEAR, -YEAR, -NOW], ids=str)
def test_a_step_of_the_clock_neither_gives_up_early_nor_keeps_from_giving_up(step):
    """Tries a minute apart, the clock stepped after the tenth: the span is that of the tries."""
    counters, now, last = Counters(), NOW, None
    number = 0
    while (decision := decide(COUNTING, counters, deliveries=number, now=now, last_attempt_at=last)).state == "pending":
        number += 1
        counters, last = decision.counters, now
        now += 60 + (step if number == 10 else 0)

    assert decision.reason == "gave_up"
    assert 50 <= number <= 61


def test_a_pause_of_days_does_not_count_towards_giving_up():
    counters = Counters(19, NOW - 1000, 5)

    decision = decide(COUNTING, counters, deliveries=6, now=NOW + YEAR, last_attempt_at=NOW)

    assert decision.state == "pending"
    assert decision.counters.counted == 20


def test_limits_are_settings():
    assert decide(COUNTING, None, Limits(1, 0.0)).state == "failed"


def test_starts_at_full_speed_and_keeps_it():
    pace = Pace(4, 120.0)
    for key in "abcde":
        pace.verdict(key, 0.0)

        assert pace.limit(0.0) == 4


def test_failure_delays_its_own_key():
    pace = Pace(4, 120.0)
    pace.failed("a", DOWN, 100.0, 0.5)

    assert pace.is_retrying("a")
    assert not pace.is_retrying("b")
    assert pace.limit(100.0) == 4
    assert pace.next_due(100.0) == 100.5
    assert pace.first_due(100.4, ()) is None
    assert pace.first_due(100.5, ()) == "a"
    assert pace.first_due(100.5, {"a"}) is None


def test_retry_after_is_the_least_delay():
    pace = Pace(4, 120.0)
    pace.failed("a", DOWN._replace(wait_s=40.0), 100.0, 0.5)

    assert pace.next_due(100.0) == 140.0
    assert pace.limit(100.0) == 4


def test_key_due_the_longest_is_first():
    pace = Pace(4, 120.0)
    pace.failed("a", DOWN, 100.0, 0.9)
    pace.failed("b", DOWN, 100.0, 0.1)

    assert pace.first_due(200.0, ()) == "b"
    assert pace.first_due(200.0, {"b"}) == "a"
    pace.forget("b")
    assert pace.first_due(200.0, ()) == "a"


@pytest.mark.parametrize(
    ("failures", "is_open"),
    [
        ([("a", DOWN), ("a", DOWN), ("a", DOWN)], False),
        ([("a", DOWN)] * 50, False),
        ([("a", DOWN), ("b", DOWN)], False),
        ([("a", DOWN), ("b", DOWN), ("a", DOWN)], True),
        ([("a", SILENT)] * 2, False),
        ([("a", SILENT)] * 3, True),
        ([("a", SILENT), ("a", DOWN), ("a", SILENT)], False),
        ([("a", DOWN), ("a", DOWN), ("a", DOWN), ("b", DOWN)], True),
        ([("a", SILENT), ("a", SILENT), ("a", DOWN), ("a", SILENT), ("a", SILENT), ("a", SILENT)], True),
    ],
)
def test_breaker_opens_on_three_in_a_row_from_two_keys_or_without_any_answer(failures, is_open):
    pace = Pace(4, 120.0)
    for key, outcome in failures:
        pace.failed(key, outcome, 0.0, 0.5)

    assert pace.is_open is is_open


def test_verdict_ends_the_row():
    pace = Pace(4, 120.0)
    for key in ("a", "b"):
        pace.failed(key, DOWN, 0.0, 0.5)
    pace.verdict("c", 0.0)
    pace.failed("d", DOWN, 0.0, 0.5)
    pace.failed("e", DOWN, 0.0, 0.5)

    assert not pace.is_open
    assert pace.failures_in_a_row == 2


def test_open_breaker_sends_one_probe_when_it_is_due():
    pace = opened(now=100.0, roll=0.5)

    assert pace.limit(101.9) == 0
    assert pace.next_due(100.0) == 102.0
    assert pace.limit(102.0) == 1


def test_probes_back_off_up_to_the_cap():
    pace = opened(roll=1.0)
    intervals = []
    for probe in range(12):
        now = 1000.0 * probe
        pace.failed(f"key {probe}", SILENT, now, 1.0)
        intervals.append(pace.next_due(now) - now)

    assert intervals == [8, 16, 32, 64, *[120] * 8]


def test_probe_rotates_through_keys_not_tried_first():
    pace = opened("a", "b", "a")
    assert [key for key in "abc" if pace.was_tried(key)] == ["a", "b"]

    pace.failed("c", DOWN, 10.0, 0.5)
    pace.failed("b", DOWN, 20.0, 0.5)
    assert all(map(pace.was_tried, "abc"))


def test_tried_keys_are_forgotten_when_it_closes():
    pace = opened()
    pace.verdict("a", 0.0)

    assert not pace.was_tried("a")


def test_verdict_closes_it_clears_delays_and_starts_slowly():
    pace = opened("a", "b", "c", concurrency=6)
    pace.verdict("a", 0.0)

    assert not pace.is_open
    assert not any(pace.is_retrying(key) for key in "abc")
    limits = []
    for _ in range(5):
        limits.append(pace.limit(0.0))
        pace.verdict("a", 0.0)
    assert limits == [1, 2, 4, 6, 6]


def test_verdict_of_a_closed_breaker_clears_only_its_own_delay():
    pace = Pace(4, 120.0)
    pace.failed("a", DOWN, 0.0, 0.5)
    pace.failed("b", DOWN, 0.0, 0.5)
    pace.verdict("a", 0.0)

    assert not pace.is_retrying("a")
    assert pace.is_retrying("b")


def test_429_pauses_everything():
    pace = Pace(4, 120.0)
    pace.failed("a", LIMITED, 100.0, 0.0)

    assert pace.limit(129.9) == 0
    assert pace.next_due(100.0) == 130.0
    assert pace.limit(130.0) == 4


def test_later_429_never_shortens_the_pause():
    pace = Pace(4, 120.0)
    pace.failed("a", LIMITED, 100.0, 0.0)
    pace.failed("a", LIMITED._replace(wait_s=1.0), 101.0, 0.0)

    assert pace.paused_until == 130.0


def test_stored_pause_still_runs():
    pace = Pace(4, 120.0, paused_until=50.0)

    assert pace.limit(49.0) == 0
    assert pace.next_due(0.0) == 50.0
    assert pace.limit(50.0) == 4


def test_nothing_is_due_while_no_timer_runs():
    assert Pace(4, 120.0).next_due(0.0) is None


@pytest.mark.parametrize(("concurrency", "slots"), [(1, 1), (2, 1), (3, 1), (4, 2), (64, 32)])
def test_failing_keys_leave_slots_for_the_healthy(concurrency, slots):
    assert Pace(concurrency, 120.0).max_retrying() == slots


def test_memory_of_keys_is_bounded():
    pace = Pace(4, 120.0)
    forgotten = [pace.failed(f"key {n}", DOWN, float(n), 0.5) for n in range(policy.MAX_TRACKED_KEYS + 50)]

    assert forgotten == [False] * policy.MAX_TRACKED_KEYS + [True] * 50
    assert len(pace._delays) == policy.MAX_TRACKED_KEYS
    assert len(pace._tried) <= policy.MAX_TRACKED_KEYS
    assert pace.is_retrying(f"key {policy.MAX_TRACKED_KEYS + 49}")


def test_parts_of_an_api_that_were_not_tried_yet_are_found_before_the_pauses_grow():
    """A 5xx may come from one shard; the first pass over the keys must not take hours."""
    pace = opened("a", "b", "a", roll=1.0)
    intervals = []
    for number, key in enumerate(("c", "d", "e", "c", "d")):
        pace.failed(key, DOWN, 1000.0 * number, 1.0)
        intervals.append(pace.next_due(1000.0 * number) - 1000.0 * number)

    assert intervals == [4, 4, 4, 8, 16]


def fail_three_times(pace, key, now):
    for _ in range(3):
        pace.failed(key, SILENT, now, 1.0)
    assert pace.is_open


def test_a_delay_is_cleared_only_once_until_the_key_has_a_verdict():
    """Or a part of an API that stays away would be tried anew each time another one answers."""
    pace = opened("a", "b", "a", roll=1.0)
    pace.verdict("well", 10.0)
    assert not pace.is_retrying("a")
    fail_three_times(pace, "a", 20.0)
    pace.verdict("well", 30.0)
    assert pace.is_retrying("a")
    pace.verdict("a", 40.0)
    fail_three_times(pace, "a", 50.0)
    pace.verdict("well", 60.0)
    assert not pace.is_retrying("a")


def test_failures_of_a_key_whose_delay_was_cleared_go_on_being_counted():
    pace = opened("a", "b", "a", roll=1.0)
    pace.verdict("well", 10.0)
    pace.failed("a", DOWN, 1000.0, 1.0)

    assert pace.next_due(1000.0) == 1004.0


def test_a_retry_after_of_one_key_holds_that_key_only():
    pace = Pace(4, 120.0)
    for key in "aba":
        pace.failed(key, DOWN._replace(wait_s=3600.0), 0.0, 1.0)
    assert pace.is_open
    assert pace.next_due(0.0) == 4.0
    assert pace.is_asked_to_wait("a", 3599.0)
    assert not pace.is_asked_to_wait("a", 3600.0)
    pace.verdict("well", 130.0)

    assert pace.is_retrying("a")
    assert pace.first_due(3599.0, ()) is None
    assert pace.first_due(3600.0, ()) == "a"


def test_keys_that_were_well_are_named_the_latest_first_until_they_are_tried():
    pace = Pace(4, 120.0)
    for key in ("x", "y", "z", "x"):
        pace.verdict(key, 0.0)
    for key in ("a", "b", "z"):
        pace.failed(key, DOWN, 0.0, 1.0)

    assert pace.well() == ["x", "y"]


def test_a_key_has_failed_until_a_verdict_of_its_own():
    pace = opened("a", "b", "a")
    pace.verdict("c", 0.0)  # clears the delays of a and b
    assert [key for key in "abcd" if pace.has_failed(key)] == ["a", "b"]
    pace.verdict("a", 0.0)

    assert [key for key in "abcd" if pace.has_failed(key)] == ["b"]


def test_a_slow_start_begins_with_keys_that_are_well():
    pace = opened("a", "b", "a", concurrency=4)
    slots = []
    for _ in range(4):
        pace.verdict("c", 0.0)
        slots.append(pace.max_retrying())

    assert slots == [0, 1, 2, 2]


def test_with_nothing_to_probe_the_next_look_is_when_something_may_be():
    pace = Pace(4, 120.0)
    for key in "aba":
        pace.failed(key, DOWN._replace(wait_s=50.0), 0.0, 1.0)
    pace.postpone_probe(10.0)
    assert pace.next_due(10.0) == 50.0
    pace.postpone_probe(60.0)
    assert pace.next_due(60.0) == 180.0


def test_what_an_attempt_lasted_is_part_of_the_interval_between_probes():
    pace = opened("a", "b", "a", roll=1.0)
    pace.failed("a", SILENT, 1000.0, 1.0, took=5.0)
    assert pace.next_due(1000.0) == 1003.0
    pace.failed("a", SILENT, 2000.0, 1.0, took=500.0)
    assert pace.next_due(2000.0) == 2000.0
