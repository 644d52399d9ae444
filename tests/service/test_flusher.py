"""The flusher, stepped by hand: a real ledger on a real file, a sender whose answers are given one by one."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import time

import pytest
from bench import CONFLICT, DELIVERED, HERE, LIMITED, PATIENCE_S, POISON, SILENCE, UNAVAILABLE, Wire

from versioner_agent import chooser, policy, review
from versioner_agent.errors import OutboxBusy, OutboxError
from versioner_agent.flusher import LOOK_S, REWRITE_S, Flusher, Options
from versioner_agent.ledger import Seek
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import Outcome, no_key
from versioner_agent.storage import Store
from versioner_agent.upkeep import MAINTENANCE_S

# --- order


def test_events_of_a_key_are_sent_one_after_another_in_the_order_they_were_queued(bench):
    b = bench(concurrency=4)
    b.queue("a", 5)

    under_way = [b.step()]
    under_way += [b.answer(("a", DELIVERED)) for _ in range(5)]

    assert under_way == [["a"]] * 5 + [[]]
    assert b.wire.versions("a") == ["1", "2", "3", "4", "5"]
    assert b.states() == {"delivered": 5}


def test_keys_are_sent_side_by_side_up_to_the_concurrency(bench):
    b = bench(concurrency=3)
    for product in "abcde":
        b.queue(product, 2)

    assert sorted(b.step()) == ["a", "b", "c"]
    b.drain()
    assert all(b.wire.versions(product) == ["1", "2"] for product in "abcde")


def test_the_next_event_of_a_key_is_sent_only_after_the_commit_of_the_one_before(bench, monkeypatch):
    b = bench()
    first, second = b.queue("a", 2)
    b.step()
    states = []
    settle = b.ledger.settle
    monkeypatch.setattr(b.ledger, "settle", lambda *args: (states.append(len(b.wire.sent)), settle(*args))[1])

    b.answer(("a", DELIVERED))

    assert states == [1]
    assert b.record(first).state == "delivered"
    assert b.record(second).state == "pending"
    assert b.wire.versions("a") == ["1", "2"]


def test_a_refused_event_does_not_hold_its_key(bench):
    b = bench()
    first, second = b.queue("a", 2)
    b.step()

    b.answer(("a", CONFLICT))
    b.answer(("a", DELIVERED))

    assert [b.record(each).state for each in (first, second)] == ["failed", "delivered"]


def test_a_waiting_event_holds_its_own_key_only(bench):
    b = bench()
    b.queue("a", 2)
    b.queue("b", 2)
    b.step()

    assert b.answer(("a", UNAVAILABLE), ("b", DELIVERED)) == ["b"]
    assert b.answer(("b", DELIVERED)) == []
    assert b.step(after=1.0) == ["a"]
    assert b.wire.versions("a") == ["1", "1"]


def test_it_is_idle_only_while_nothing_is_to_be_sent(bench):
    b = bench()
    b.queue("a", 2)
    seen = [b.step(), b.flusher.is_idle(b.now)]
    seen += [b.answer(("a", UNAVAILABLE)), b.flusher.is_idle(b.now)]
    seen += [b.step(after=200.0), b.answer(("a", DELIVERED)), b.flusher.is_idle(b.now)]
    seen += [b.answer(("a", DELIVERED)), b.step(), b.flusher.is_idle(b.now)]

    assert seen == [["a"], False, [], False, ["a"], ["a"], False, [], [], True]


def test_every_attempt_carries_the_same_idempotency_key(bench):
    b = bench()
    b.queue("a")
    b.step()
    for _ in range(3):
        b.answer(("a", UNAVAILABLE), after=1.0)
        b.step(after=200.0)

    assert len(b.wire.sent) == 4
    assert len(set(b.wire.sent)) == 1


# --- a commit that fails


def fail_once(monkeypatch, ledger, error):
    settle, errors = ledger.settle, [error]

    def broken(*args):
        if errors:
            raise errors.pop()
        return settle(*args)

    monkeypatch.setattr(ledger, "settle", broken)


@pytest.mark.parametrize("outcome", [DELIVERED, CONFLICT, UNAVAILABLE], ids=lambda outcome: outcome.reason)
def test_a_decision_that_cannot_be_written_stops_its_key_and_is_written_later(bench, monkeypatch, outcome):
    b = bench()
    first, _ = b.queue("a", 2)
    b.step()
    fail_once(monkeypatch, b.ledger, OutboxError("disk error"))

    assert b.answer(("a", outcome)) == []
    assert b.step(after=REWRITE_S / 2) == []
    assert b.record(first).state == "pending"
    assert b.record(first).attempts == 0
    assert b.failed == []
    b.step(after=REWRITE_S)

    assert b.record(first).attempts == 1
    assert b.record(first).state == {"unavailable": "pending", "conflict": "failed"}.get(outcome.reason, "delivered")
    assert [failed.id for failed in b.failed] == ([first] if outcome is CONFLICT else [])
    assert b.wire.versions("a") == ["1", "1" if outcome is UNAVAILABLE else "2"]


def test_nothing_else_is_sent_while_decisions_cannot_be_written(bench, monkeypatch):
    """Else a crash would repeat more requests than there are slots."""
    b = bench(concurrency=2)
    for product in "abcdef":
        b.queue(product)
    b.step()
    fail_once(monkeypatch, b.ledger, OutboxBusy("locked"))

    assert b.answer(("a", DELIVERED)) == ["b"]
    assert b.step(after=REWRITE_S / 2) == ["b"]
    b.step(after=REWRITE_S)
    b.drain()

    assert [name for name, *_ in b.wire.sent] == list("abcdef")
    assert b.states() == {"delivered": 6}


def test_an_answer_that_comes_while_another_cannot_be_written_is_kept_too(bench, monkeypatch):
    b = bench(concurrency=2)
    for product in "ab":
        b.queue(product, 2)
    b.step()
    fail_once(monkeypatch, b.ledger, OutboxBusy("locked"))
    b.answer(("a", DELIVERED))

    b.answer(("b", DELIVERED))
    b.step(after=REWRITE_S)
    b.drain()

    assert b.states() == {"delivered": 4}
    assert b.wire.versions("a") == b.wire.versions("b") == ["1", "2"]


def test_trouble_while_reporting_one_failure_does_not_hold_the_keys_of_the_others(bench):
    """What happens after the commit must not undo that the slots are free."""
    b = bench(concurrency=2)
    b.queue("a", 2)
    b.queue("b", 2)
    b.step()
    calls = []

    def trouble(record):
        calls.append(record)
        if len(calls) == 1:
            raise OutboxBusy("locked")

    b.flusher._on_failed = trouble
    b.wire.reply("a", CONFLICT)
    b.wire.reply("b", CONFLICT)
    while len(b.flusher._arrived) < 2:
        b.flusher._take(PATIENCE_S)
    for _ in range(4):
        b.now += REWRITE_S
        b.flusher.step(b.now)

    with b.wire.changed:
        assert b.wire.changed.wait_for(lambda: len(b.wire.sent) == 4, 3.0), b.wire.sent


def test_answers_are_settled_together_in_one_commit(bench, monkeypatch):
    b = bench(concurrency=3)
    for product in "abc":
        b.queue(product)
    b.step()
    sizes = []
    settle = b.ledger.settle
    monkeypatch.setattr(b.ledger, "settle", lambda found, *rest: (sizes.append(len(found)), settle(found, *rest))[1])

    b.answer(*((product, DELIVERED) for product in "abc"))

    assert sizes == [3]


# --- the breaker


def open_breaker(b, products):
    """Queue one event for each of *products* and let the network die."""
    for product in products:
        b.queue(product)
    b.step()
    b.answer_all(SILENCE)
    assert b.flusher._pace.is_open


def test_a_dead_network_costs_one_request_per_interval(bench):
    b = bench(concurrency=4, max_backoff=60.0)
    open_breaker(b, [f"p{number}" for number in range(10)])
    opened, times = len(b.wire.sent), []

    for _ in range(2400):
        if b.step(after=0.5):
            times.append(b.now)
            b.answer_all(SILENCE)

    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert opened == 4
    assert gaps[2:] == [60.0] * len(gaps[2:])
    assert len(times) <= 22
    assert b.states() == {"pending": 10}


def test_probes_go_to_keys_not_tried_since_it_opened_before_any_is_tried_again(bench):
    b = bench(concurrency=4)
    keys = [f"p{number}" for number in range(10)]
    open_breaker(b, keys)

    for _ in range(10):
        b.step(after=200.0)
        b.answer_all(SILENCE)
    sent = [name for name, *_ in b.wire.sent]

    assert sorted(sent[:10]) == keys
    assert len(sent) == 14
    assert len(set(sent[10:])) == 4


def test_that_holds_for_keys_that_failed_before_it_opened_too(bench):
    """Whatever made it open, the one that is well again is found among those not tried since."""
    b = bench(concurrency=4)
    keys = [f"p{number}" for number in range(10)]
    for key in keys:
        b.flusher._pace._forgiven[key] = 1
    open_breaker(b, keys)
    opened_with = {name for name, *_ in b.wire.sent}
    for _ in range(10 - len(opened_with)):
        b.step(after=200.0)
        b.answer_all(SILENCE)

    sent = [name for name, *_ in b.wire.sent]
    assert sorted(sent) == keys


def test_an_event_that_always_fails_does_not_keep_the_breaker_open(bench):
    """The probe rotates, so that another key's delivery shows that the API is there again."""
    b = bench(concurrency=4)
    open_breaker(b, "abcd")
    for _ in range(8):
        b.step(after=200.0)
        b.answer_all(SILENCE)

    for _ in range(8):
        for product in b.step(after=200.0):
            b.answer((product, POISON if product == "a" else DELIVERED))

    assert b.states() == {"pending": 1, "delivered": 3}


def test_a_verdict_closes_the_breaker_and_starts_slowly(bench):
    b = bench(concurrency=4)
    keys = [f"p{number:02}" for number in range(20)]
    open_breaker(b, keys)
    b.step(after=200.0)

    counts = [len(b.answer_all(DELIVERED)) for _ in range(4)]

    assert counts == [1, 2, 4, 4]
    b.drain()
    assert b.states() == {"delivered": 20}


def test_a_refusal_closes_the_breaker_too(bench):
    b = bench()
    open_breaker(b, "abcdef")
    b.step(after=200.0)
    b.answer_all(CONFLICT)

    assert not b.flusher._pace.is_open
    b.drain()
    assert b.states() == {"delivered": 5, "failed": 1}


def test_keys_that_waited_go_on_at_once_when_the_breaker_closes(bench):
    b = bench(concurrency=4)
    open_breaker(b, "abcd")
    b.step(after=200.0)
    b.drain()

    assert b.now == 1200.0
    assert b.states() == {"delivered": 4}


def test_one_event_that_is_answered_badly_does_not_open_the_breaker(bench):
    b = bench()
    b.queue("a")
    b.step()
    for _ in range(10):
        b.answer_all(UNAVAILABLE)
        b.step(after=200.0)

    assert not b.flusher._pace.is_open


def test_429_pauses_every_key(bench):
    b = bench(concurrency=2)
    for product in "abcd":
        b.queue(product, 2)
    b.step()
    limited = LIMITED._replace(wait_s=60.0)

    assert b.answer(("a", limited)) == ["b"]
    assert b.answer(("b", DELIVERED)) == []
    assert b.step(after=59.0) == []
    assert b.step(after=1.5) != []
    b.drain()
    assert b.states() == {"delivered": 8}


def test_a_pause_outlives_the_process(bench, tmp_path):
    b = bench()
    b.queue("a")
    b.step()
    b.answer(("a", LIMITED._replace(wait_s=60.0)))

    fresh = Flusher(b.ledger, b.wire, Options(), HERE)

    assert 0 < fresh._pace.paused_until - time.monotonic() <= 60


@pytest.mark.parametrize("ahead", [-10.0, 4000.0, 1e9])
def test_a_stored_pause_is_believed_only_within_an_hour(bench, ahead):
    b = bench()
    with b.store.write() as connection:
        connection.execute("UPDATE destination SET retry_at = ?", (time.time() + ahead,))

    assert Flusher(b.ledger, b.wire, Options(), HERE)._pace.paused_until == 0.0


def test_failing_keys_take_at_most_half_of_the_slots(bench):
    b = bench(concurrency=4)
    keys = ["a-good", "b-bad", "c-good", "d-bad", "e-good", "f-bad", "g-good", "h-bad"]
    for product in keys:
        b.queue(product, 1 if product.endswith("bad") else 50)

    def reply(product):
        return (product, UNAVAILABLE if product.endswith("bad") else DELIVERED)

    under_way = b.step()
    for _ in range(2):  # every failure is followed by a delivery, so that the breaker stays closed
        assert len(under_way) == 4
        under_way = b.answer(*map(reply, sorted(under_way)))
    assert b.states()["pending"] == len(b.flusher._pace._delays) + 200 - b.states()["delivered"]
    assert not b.flusher._pace.is_open

    b.answer(*map(reply, under_way), after=500.0)  # all of the failing ones are due
    for _ in range(8):
        under_way = b.step()
        assert len(under_way) == 4
        assert len([product for product in under_way if product.endswith("bad")]) == 2
        b.answer(*((product, DELIVERED) for product in under_way if not product.endswith("bad")))


# --- one event must not stop the rest


def test_a_poisonous_event_is_not_given_up_while_nothing_else_is_delivered(bench):
    b = bench(max_event_attempts=3, give_up_after=0.0)
    (poison,) = b.queue("a")
    b.step()
    for _ in range(30):
        b.answer_all(POISON)
        b.step(after=200.0)

    assert b.record(poison).state == "pending"
    assert b.record(poison).attempts == 30


def test_a_poisonous_event_is_given_up_when_others_were_delivered_between(bench):
    b = bench(max_event_attempts=3, give_up_after=0.0, concurrency=2)
    (poison,) = b.queue("a")
    for number in range(3):
        assert b.record(poison).state == "pending"
        b.queue("good", first=number)
        assert sorted(b.step(after=200.0)) == ["a", "good"]
        b.answer(("a", POISON), ("good", DELIVERED))

    record = b.record(poison)
    assert (record.state, record.reason, record.attempts) == ("failed", "gave_up", 3)
    assert "internal error" in record.detail


def test_a_poisonous_event_is_not_given_up_before_its_time(bench):
    b = bench(max_event_attempts=1, give_up_after=3600.0, concurrency=2)
    (poison,) = b.queue("a")
    for number in range(5):
        b.queue("good", first=number)
        b.step(after=200.0)
        b.answer(("a", POISON), ("good", DELIVERED))

    assert b.record(poison).state == "pending"


def test_silence_is_never_counted_against_an_event(bench):
    b = bench(max_event_attempts=1, give_up_after=0.0, concurrency=1)
    (slow,) = b.queue("a")
    for number in range(5):
        b.queue("good", first=number)
        b.step(after=200.0)
        while b.wire._waiting:
            product = b.wire._waiting[0]
            b.answer((product, SILENCE if product == "a" else DELIVERED))

    assert b.record(slow).state == "pending"
    assert b.record(slow).attempts >= 3


# --- records that must not be sent, or are gone


def tamper(path, sql, *args):
    connection = sqlite3.connect(path)
    try:
        connection.execute(sql, args)
        connection.commit()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("payload", b'{"product_name":"a","version":"9"}'),
        ("version", "9"),
        ("event_id", "00000000-0000-4000-8000-000000000000"),
        ("queued_at", 1.0),
        ("digest", b""),
    ],
)
def test_a_damaged_record_is_never_sent_and_the_next_one_is(bench, column, value, caplog):
    b = bench()
    damaged, sound = b.queue("a", 2)
    tamper(b.path, f"UPDATE record SET {column} = ? WHERE id = ?", value, damaged)

    with caplog.at_level(logging.ERROR, "versioner_agent"):
        assert b.step() == ["a"]
    b.answer(("a", DELIVERED))

    assert b.wire.versions("a") == ["2"]
    assert (b.record(damaged).state, b.record(damaged).reason) == ("failed", "damaged")
    assert b.record(sound).state == "delivered"


def test_a_record_discarded_while_its_request_is_under_way_stays_discarded(bench):
    b = bench()
    first, second = b.queue("a", 2)
    b.step()
    with contextlib.closing(Store(b.path)) as elsewhere:
        review.discard(elsewhere, [first], pending_too=True)

    assert b.answer(("a", DELIVERED)) == ["a"]
    b.answer(("a", DELIVERED))

    assert b.record(first).state == "discarded"
    assert b.record(second).state == "delivered"
    assert len(review.show(b.store, first)[2]) == 1


def test_a_held_record_that_is_discarded_frees_its_key(bench):
    b = bench()
    first, _ = b.queue("a", 2)
    b.step()
    b.answer(("a", UNAVAILABLE))
    with contextlib.closing(Store(b.path)) as elsewhere:
        review.discard(elsewhere, [first], pending_too=True)

    assert b.step(after=200.0) == ["a"]
    assert b.wire.versions("a") == ["1", "2"]


def test_a_retried_record_is_sent_again_under_a_new_key(bench):
    b = bench()
    (first,) = b.queue("a")
    b.step()
    b.answer(("a", CONFLICT))
    with contextlib.closing(Store(b.path)) as elsewhere:
        review.retry(elsewhere, [first])

    assert b.step(after=LOOK_S) == ["a"]
    event_id = b.record(first).event_id
    assert [key for *_, key in b.wire.sent] == [event_id, f"{event_id}.1"]


# --- finding keys


def test_keys_beyond_the_window_get_their_turn(bench, monkeypatch):
    monkeypatch.setattr(chooser, "WINDOW", 4)
    monkeypatch.setattr(chooser, "REFILL", 2)
    b = bench(concurrency=3)
    keys = [f"p{number:02}" for number in range(30)]
    for product in keys:
        b.queue(product, 3)

    b.drain()

    assert b.states() == {"delivered": 90}
    assert all(b.wire.versions(product) == ["1", "2", "3"] for product in keys)
    assert len(b.flusher._chooser._ready) <= 4


def test_more_failing_keys_than_are_remembered_are_all_delivered_in_the_end(bench, monkeypatch):
    monkeypatch.setattr(policy, "MAX_TRACKED_KEYS", 4)
    monkeypatch.setattr(chooser, "WINDOW", 4)
    monkeypatch.setattr(chooser, "REFILL", 2)
    b = bench(concurrency=4)
    keys = [f"p{number:02}" for number in range(20)]
    for product in keys:
        b.queue(product, 2)
    b.step()
    for _ in range(40):
        b.answer_all(SILENCE)
        b.step(after=200.0)
    assert len(b.flusher._pace._delays) <= 4

    b.drain()

    assert b.states() == {"delivered": 40}
    assert all(list(dict.fromkeys(b.wire.versions(product))) == ["1", "2"] for product in keys)


def test_events_queued_later_are_noticed(bench):
    b = bench()
    assert b.step() == []
    b.queue("a")

    assert b.step(after=LOOK_S) == ["a"]
    b.answer(("a", DELIVERED))
    b.queue("a", first=2)
    assert b.step(after=LOOK_S) == ["a"]


def test_events_queued_behind_the_cursor_are_noticed(bench):
    b = bench(concurrency=1)
    b.queue("m", 3)
    b.step()
    b.queue("a")
    b.queue("z")
    b.step(after=LOOK_S)
    b.drain()

    assert b.states() == {"delivered": 5}


# --- maintenance


@pytest.mark.parametrize(
    ("skew", "left"),
    [(0.0, {}), (2 * 86_400.0, {"delivered": 1}), (-2 * 86_400.0, {"delivered": 1}), (None, {"delivered": 1})],
    ids=["clocks agree", "ours is ahead", "ours is behind", "no Date"],
)
def test_old_records_are_removed_only_while_the_clock_agrees_with_the_server(bench, skew, left):
    b = bench(retention_days=0.0)
    b.queue("a")
    b.step()
    date = None if skew is None else time.time() - skew
    b.answer(("a", DELIVERED._replace(server_time=date)))

    for _ in range(3):
        b.step(after=MAINTENANCE_S)

    assert b.states() == left


def test_failed_and_pending_records_are_never_removed_by_age(bench):
    b = bench(retention_days=0.0)
    b.queue("a", 2)
    b.queue("b")
    b.step()
    b.answer(("a", CONFLICT._replace(server_time=time.time())), ("b", UNAVAILABLE))
    b.answer(("a", DELIVERED._replace(server_time=time.time())))
    for _ in range(3):
        b.answer_all(UNAVAILABLE)
        b.step(after=MAINTENANCE_S)

    assert b.states()["failed"] == 1
    assert b.states()["pending"] == 1


# --- workers and the destination


def test_whatever_a_sender_raises_comes_back_as_no_answer(bench):
    b = bench()
    (first,) = b.queue("a")
    b.step()
    b.answer(("a", RuntimeError("a bug")))

    assert (b.record(first).state, b.record(first).reason) == ("pending", "no_answer")
    assert "a bug" not in b.record(first).detail
    assert b.step(after=1.0) == ["a"]


def test_an_attempt_that_was_not_made_leaves_no_trace_on_the_record(bench):
    b = bench()
    (first,) = b.queue("a")
    b.step()
    b.answer(("a", no_key("there is no API key")))

    assert b.record(first).attempts == 0
    stats = review.stats(b.store)
    assert (stats.health.state, stats.health.reason) == ("unauthorized", "there is no API key")


def test_the_first_verdict_binds_the_outbox_and_nothing_before_it(bench):
    b = bench()
    b.queue("a")
    b.step()
    b.answer(("a", UNAVAILABLE))
    assert b.ledger.destination()[0] == Destination(None, None)
    b.step(after=1.0)
    b.answer(("a", CONFLICT))

    assert b.ledger.destination()[0] == HERE


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (SILENCE, "down"),
        (UNAVAILABLE, "down"),
        (Outcome("rate_limited", "slow", http_status=429), "rate_limited"),
        (Outcome("proxy", "407", http_status=407), "proxy"),
        (Outcome("unauthorized", "bad key", http_status=401), "unauthorized"),
        (Outcome("misrouted", "Not Found", http_status=404), "misrouted"),
        (Outcome("not_authentic", "HTTP 200 with text/html", http_status=200), "not_authentic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_destination_says_how_it_is_and_is_up_again_after_a_verdict(bench, outcome, state):
    b = bench()
    b.queue("a")
    b.step()
    b.answer(("a", outcome))
    health = review.stats(b.store).health
    assert (health.state, health.reason) == (state, outcome.detail)
    assert health.next_attempt_at is not None

    b.step(after=200.0)
    b.answer(("a", DELIVERED))
    health = review.stats(b.store).health
    assert (health.state, health.reason, health.next_attempt_at) == ("up", None, None)


def test_what_holds_a_key_is_shown_until_it_is_delivered(bench):
    b = bench()
    (first,) = b.queue("a")
    b.step()
    b.answer(("a", UNAVAILABLE))
    held = review.stats(b.store).held
    assert [(each.product_name, each.id, each.reason) for each in held] == [("a", first, "unavailable")]

    b.step(after=200.0)
    b.answer(("a", DELIVERED))
    assert review.stats(b.store).held == []


def test_finish_settles_what_is_answered_in_time_and_counts_what_is_not(bench):
    b = bench(concurrency=2)
    first, second = [b.queue(product)[0] for product in "ab"]
    b.step()
    b.wire.reply("a", DELIVERED)

    assert b.flusher.finish(0.5) == 1
    assert (b.record(first).state, b.record(second).state) == ("delivered", "pending")


def test_a_flusher_is_drained_only_when_nothing_is_under_way(bench):
    b = bench()
    b.queue("a")
    assert not b.flusher.is_drained()
    b.step()
    assert not b.flusher.is_drained()
    b.answer(("a", DELIVERED))
    assert b.flusher.is_drained()


def test_other_settings_take_effect_for_the_next_request(bench):
    b = bench(concurrency=1)
    for product in "abcd":
        b.queue(product, 2)
    assert len(b.step()) == 1
    other = Wire()

    b.flusher.configure(other, Options(concurrency=4), HERE)
    b.flusher.step(b.now)
    other.under_way(3)
    for product in list(other._waiting):
        other.reply(product, DELIVERED)

    assert len(b.wire.sent) == 1
    while len(b.flusher._arrived) < 3:
        b.flusher._take(PATIENCE_S)
    b.flusher.configure(b.wire, Options(concurrency=1), HERE)


def test_a_rate_limit_is_told_while_it_runs_whatever_was_under_way(bench):
    """Answers that were on their way do not end it; a restart respects it."""
    b = bench(concurrency=4)
    for product in "abcdef":
        b.queue(product)
    b.step()
    limited = LIMITED._replace(wait_s=600.0)
    b.answer(("a", limited), ("b", DELIVERED), ("c", DELIVERED), ("d", DELIVERED))
    _, health, _ = b.ledger.destination()
    again = Flusher(b.ledger, b.wire, Options(), HERE)

    assert (health.state, health.reason) == ("rate_limited", "slow down")
    assert health.next_attempt_at is not None
    assert 590 < again._pace.paused_until - time.monotonic() <= 600
    assert b.step(after=599.0) == []
    assert sorted(b.step(after=2.0)) == ["a", "e", "f"]
    b.answer_all(DELIVERED)
    assert b.ledger.destination()[1].state == "up"


def test_a_record_that_its_product_does_not_lead_to_is_noticed(bench, monkeypatch, caplog):
    """A damaged index in a file too large to be looked through at the start."""
    b = bench()
    b.queue("a")
    monkeypatch.setattr(b.ledger, "keys", lambda *_: Seek([], "", is_end=True))
    for _ in range(3):
        b.step(after=MAINTENANCE_S + 1)

    assert "the pending record 1 can't be found by its product" in caplog.text
    monkeypatch.undo()
    b.step(after=60.0)
    b.step(after=5.0)
    b.drain()
    assert b.states() == {"delivered": 1}


def test_an_event_that_was_just_queued_is_no_leftover(bench, caplog):
    b = bench()
    for number in range(5):
        b.step(after=MAINTENANCE_S + 1)
        b.queue("a", first=number)
        b.flusher._seen_file, b.flusher._look_at = b.flusher._seen_file, 1e12  # not seen yet
        b.flusher._maintain(b.now + MAINTENANCE_S)
        b.flusher._look_at = 0.0
        b.drain()

    assert "can't be found" not in caplog.text


def test_many_altered_records_are_failed_in_steps(bench):
    """The watchdog wants a sign of life between them, and a signal may have come."""
    made = bench()
    made.queue("a", 25)
    with made.store.write() as connection:
        connection.execute("UPDATE record SET payload = CAST(payload || ' ' AS BLOB)")

    for failed in (10, 20, 25):
        made.step()
        assert made.states().get("failed") == failed
    assert made.wire.sent == []


def test_a_damaged_record_that_can_not_be_marked_is_mended(bench, caplog):
    """One bit makes its digest another type, which no statement finds again: it would be tried for ever."""
    made = bench()
    made.queue("a", 2)
    tamper(made.path, "UPDATE record SET digest = CAST(digest AS TEXT) WHERE id = ?", 1)

    with caplog.at_level(logging.ERROR, "versioner_agent"):
        made.step()
        made.drain()

    assert made.states().get("delivered", 0) >= 1
    assert "pending" not in made.states()
    assert caplog.text.count("was not sent") <= 1
