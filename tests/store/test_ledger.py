"""Choosing what is next, and writing what was decided."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from versioner_agent import ledger as ledger_module
from versioner_agent import review
from versioner_agent.ledger import Health, Ledger, Settlement
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import Outcome, no_answer, no_key
from versioner_agent.policy import Counters, Decision
from versioner_agent.records import is_intact

NOW = 1_794_000_000.0
HERE = Destination("https://api.versioner.io", "acme")
UP = Health("up", None, NOW)
DELIVERED = Outcome("delivered", "", 200, server_id="evt_9")
CONFLICT = Outcome("conflict", "other SHA", 409)
DOWN = Outcome("unavailable", "HTTP 503", 503)


@pytest.fixture
def ledger(outbox):
    made = Ledger(outbox.store)
    made.open(create=True)
    return made


def queue(outbox, *products):
    return [
        outbox.enqueue("build", {"product_name": product, "version": str(number), "status": "ok"}).id
        for number, product in enumerate(products)
    ]


def settle(ledger, record_id, outcome, at=NOW, here=HERE, **decided):
    record = review.show(ledger.store, record_id)[0]
    states = {"delivered": "delivered", "conflict": "failed", "blocked": "failed", "invalid": "failed"}
    known = {"state": states.get(outcome.reason, "pending"), "reason": outcome.reason, "detail": outcome.detail}
    decision = Decision(**(known | {"counters": Counters()} | decided))
    ledger.settle([Settlement(record, outcome, decision, at, 0.25)], UP, here)


def shown(ledger, record_id):
    return review.show(ledger.store, record_id)[0]


def run(store, statement, *values):
    with store.write() as connection:
        connection.execute(statement, values)


def test_keys_are_found_in_order_and_once(outbox, ledger):
    queue(outbox, "c", "a", "b", "a", "a")

    assert ledger.keys("", 10, ()) == (["a", "b", "c"], "", True)
    assert ledger.keys("a", 10, ()).keys == ["b", "c"]
    assert ledger.keys("c", 10, ()) == ([], "", True)


def test_window_of_keys_is_bounded(outbox, ledger):
    queue(outbox, *"abcd")

    assert ledger.keys("", 2, ()) == (["a", "b"], "b", False)
    assert ledger.keys("b", 2, ()) == (["c", "d"], "d", False)


def test_skipped_keys_are_passed_over(outbox, ledger):
    queue(outbox, *"abcd")

    assert ledger.keys("", 2, {"a", "c"}) == (["b", "d"], "d", False)


def test_one_look_passes_over_a_bounded_number_of_keys(outbox, ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "SEEK_STEPS", 3)
    queue(outbox, *"abcde")

    assert ledger.keys("", 10, set("abcde")) == ([], "c", False)
    assert ledger.keys("c", 10, set("abcde")) == ([], "", True)


def test_keys_without_pending_records_are_not_found(outbox, ledger):
    first, second = queue(outbox, "a", "b")
    settle(ledger, first, CONFLICT)

    assert ledger.keys("", 10, ()).keys == ["b"]
    assert ledger.head("a") is None
    assert ledger.head("b")[0].id == second


def test_head_is_the_oldest_of_its_key(outbox, ledger):
    queue(outbox, "b", "a", "a")
    record, payload = ledger.head("a")

    assert record.id == 2
    assert is_intact(record, payload)
    settle(ledger, 2, DELIVERED)
    assert ledger.head("a")[0].id == 3


def test_waiting_record_stays_the_head(outbox, ledger):
    queue(outbox, "a", "a")
    settle(ledger, 1, DOWN)

    assert ledger.head("a")[0].id == 1


def test_choosing_uses_the_partial_index(outbox, ledger):
    """So that it costs the same at a million records as at ten."""
    with ledger.store.read() as connection:
        for statement, values in ((ledger_module.NEXT_KEY, ("",)), (ledger_module.HEAD_OF, ("a",))):
            (step,) = connection.execute("EXPLAIN QUERY PLAN " + statement, values).fetchall()
            assert "SEARCH record USING" in step[3]
            assert "record_pending" in step[3]


def test_delivery_is_written_with_its_attempt(outbox, ledger):
    queue(outbox, "a")
    settle(ledger, 1, DELIVERED, detail="")
    record, _, attempts = review.show(ledger.store, 1)

    assert (record.state, record.server_id, record.http_status, record.attempts) == ("delivered", "evt_9", 200, 1)
    assert record.settled_at == record.last_attempt_at == NOW
    assert (record.reason, record.detail, record.held_since) == (None, None, None)
    assert attempts == [(NOW, "delivered", 200, None, 0.25)]
    assert ledger.destination() == (HERE, UP, 1)
    assert review.stats(ledger.store).last_delivered_at == NOW


def test_refusal_is_written_with_all_the_api_said(outbox, ledger):
    queue(outbox, "a")
    outcome = Outcome("blocked", "freeze", 423, code="NO_DEPLOY_WINDOW", rule="xmas", retry_after="2026-12-27")
    settle(ledger, 1, outcome, is_late=True, counters=Counters(3, NOW - 9, 7))
    record = shown(ledger, 1)

    assert (record.state, record.reason, record.detail, record.late) == ("failed", "blocked", "freeze", 1)
    assert (record.code, record.rule, record.retry_after) == ("NO_DEPLOY_WINDOW", "xmas", "2026-12-27")
    assert (record.counted, record.counted_since, record.counted_mark) == (3, NOW - 9, 7)


def test_held_record_remembers_since_when(outbox, ledger):
    queue(outbox, "a")
    settle(ledger, 1, DOWN, at=NOW)
    settle(ledger, 1, no_answer("timed out"), at=NOW + 60)
    record = shown(ledger, 1)

    assert (record.state, record.reason, record.http_status) == ("pending", "no_answer", None)
    assert (record.held_since, record.last_attempt_at, record.settled_at) == (NOW, NOW + 60, None)
    assert (record.attempts, record.unanswered) == (2, 1)
    assert review.stats(ledger.store).held == [("a", 1, NOW, "no_answer")]
    settle(ledger, 1, DELIVERED, at=NOW + 90)
    assert review.stats(ledger.store).held == []


def test_what_was_not_sent_is_no_attempt(outbox, ledger):
    queue(outbox, "a")
    settle(ledger, 1, no_key("no API key"))

    assert shown(ledger, 1).attempts == 0
    assert review.show(ledger.store, 1)[2] == []


def test_last_twenty_attempts_are_kept_and_all_are_counted(outbox, ledger):
    queue(outbox, "a", "b")
    settle(ledger, 2, DOWN)
    for n in range(33):
        settle(ledger, 1, DOWN, at=NOW + n)
    record, _, attempts = review.show(ledger.store, 1)

    assert record.attempts == 33
    assert [attempt.at for attempt in attempts] == [NOW + n for n in range(13, 33)]
    assert len(review.show(ledger.store, 2)[2]) == 1


def test_many_answers_are_one_transaction(outbox, ledger):
    queue(outbox, "a", "b")
    good = Settlement(shown(ledger, 1), DELIVERED, Decision("delivered", "delivered", "", Counters()), NOW, 0.1)
    bad = good._replace(record=shown(ledger, 2), decision=good.decision._replace(state="no state"))
    with pytest.raises(Exception, match="CHECK"):
        ledger.settle([good, bad], UP, HERE)

    assert review.stats(ledger.store).counts["pending"] == 2
    assert ledger.destination() == (Destination(None, None), Health(), 0)


@pytest.mark.parametrize("outcome", [DELIVERED, CONFLICT, DOWN], ids=lambda outcome: outcome.reason)
def test_discarded_in_flight_stays_discarded_but_keeps_the_attempt(outbox, ledger, outcome):
    queue(outbox, "a")
    record = shown(ledger, 1)
    review.discard(ledger.store, [1], pending_too=True)
    decision = Decision("delivered" if outcome is DELIVERED else "failed", outcome.reason, "", Counters())
    ledger.settle([Settlement(record, outcome, decision, NOW, 0.1)], UP, HERE)

    assert shown(ledger, 1).state == "discarded"
    assert [attempt.outcome for attempt in review.show(ledger.store, 1)[2]] == [outcome.reason]


def test_first_verdict_binds_the_outbox(outbox, ledger):
    queue(outbox, "a", "b", "c")
    settle(ledger, 1, DOWN, here=Destination("https://portal", None))
    assert ledger.destination()[0] == Destination(None, None)

    settle(ledger, 1, CONFLICT)
    settle(ledger, 2, DELIVERED, here=Destination("https://other", "umbrella"))
    assert ledger.destination()[0] == HERE

    ledger.unbind()
    assert ledger.destination() == (Destination(None, None), Health(), 1)
    settle(ledger, 3, DELIVERED, here=Destination("https://other", "umbrella"))
    assert ledger.destination()[0] == Destination("https://other", "umbrella")


def test_ids_are_never_used_again(outbox, ledger):
    queue(outbox, "a")
    settle(ledger, 1, DELIVERED)
    ledger.prune(NOW + 1)
    ledger.give_space_back()

    assert queue(outbox, "a") == [2]


@pytest.mark.parametrize("position", [0, 60, -1])
def test_one_flipped_byte_of_a_payload_is_noticed(outbox, ledger, position):
    queue(outbox, "a")
    body = bytearray(ledger.head("a")[1])
    body[position] ^= 1
    with closing(sqlite3.connect(ledger.store.path)) as connection:
        connection.execute("UPDATE record SET payload = ?", (bytes(body),))
        connection.commit()

    assert not is_intact(*ledger.head("a"))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("event_id", "x"), ("kind", "deployment"), ("version", "9"), ("status", "failed"), ("environment_name", "e"),
        ("invoke_id", "7"), ("run_attempt", "2"), ("occurrence", 1), ("queued_at", 1.5), ("origin", "o"), ("id", 77),
        ("version", b"\xff"), ("digest", b""), ("queued_at", "text"),
    ],
    ids=str,
)  # fmt: skip
def test_changed_column_is_noticed(outbox, ledger, column, value):
    queue(outbox, "a")
    run(ledger.store, f"UPDATE record SET {column} = ?", value)

    assert not is_intact(*ledger.head("a"))


def test_damaged_record_fails_and_is_never_sent_again(outbox, ledger):
    queue(outbox, "a", "a")
    run(ledger.store, "UPDATE record SET payload = x'7b7d' WHERE id = 1")
    ledger.condemn(shown(ledger, 1), "the payload changed", NOW)
    record = shown(ledger, 1)

    assert (record.state, record.reason, record.detail) == ("failed", "damaged", "the payload changed")
    assert ledger.head("a")[0].id == 2
    assert review.retry(ledger.store, [1])[0].outcome == "refused"


@pytest.mark.parametrize("seed", range(5))
def test_random_work_agrees_with_a_model(outbox, ledger, seed):
    """Never lost, never settled twice, order kept, tallies equal to a count."""
    dice = random.Random(seed)
    model: dict[int, list[str]] = {}
    for step in range(120):
        do = dice.choice(["queue", "queue", "settle", "settle", "discard", "retry", "prune"])
        some = dice.choice(list(model)) if model else 0
        if do == "queue":
            product = dice.choice("abc")
            (record_id,) = queue(outbox, product)
            model[record_id] = [product, "pending"]
        elif do == "settle" and (found := ledger.head(product := dice.choice("abc"))):
            assert found[0].id == min(i for i, (key, state) in model.items() if (key, state) == (product, "pending"))
            outcome = dice.choice([DELIVERED, CONFLICT, DOWN])
            settle(ledger, found[0].id, outcome, at=NOW + step)
            model[found[0].id][1] = {DELIVERED: "delivered", CONFLICT: "failed", DOWN: "pending"}[outcome]
        elif do == "discard" and some:
            (verdict,) = review.discard(ledger.store, [some], pending_too=True)
            assert (verdict.outcome == "discarded") == (model[some][1] in ("pending", "failed"))
            model[some][1] = "discarded" if verdict.outcome == "discarded" else model[some][1]
        elif do == "retry" and some:
            (verdict,) = review.retry(ledger.store, [some])
            assert (verdict.outcome == "retried") == (model[some][1] == "failed")
            model[some][1] = "pending" if verdict.outcome == "retried" else model[some][1]
        elif do == "prune" and step % 30 == 0:
            assert ledger.prune(9e12) == sum(state in ("delivered", "discarded") for _, state in model.values())
            model = {i: pair for i, pair in model.items() if pair[1] not in ("delivered", "discarded")}

        with ledger.store.read() as connection:
            rows = connection.execute("SELECT id, product_name, state FROM record").fetchall()
            tally = dict(connection.execute("SELECT state, n FROM tally WHERE n <> 0").fetchall())
        assert {row[0]: list(row[1:]) for row in rows} == model
        assert tally == Counter(row[2] for row in rows)
    assert ledger.pending() == sum(state == "pending" for _, state in model.values())
