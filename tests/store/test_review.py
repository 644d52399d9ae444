"""Looking at records, and acting on them."""

from __future__ import annotations

import contextlib

import pytest

from versioner_agent import batches, exports, gauges, review
from versioner_agent.errors import OutboxError
from versioner_agent.events import validate
from versioner_agent.ledger import Ledger
from versioner_agent.records import record_json
from versioner_agent.review import discard, retry, show, stats
from versioner_agent.stepping import StepSize
from versioner_agent.storage import Store

DEPLOYMENT = {"product_name": "a", "version": "1", "environment_name": "prod", "invoke_id": "7"}


def queue(outbox, *products):
    return [outbox.enqueue("build", {"product_name": p, "version": str(n), "status": "ok"}).id
            for n, p in enumerate(products)]  # fmt: skip


def set_state(outbox, state, *ids, at=1_794_000_000.0):
    with outbox.store.write() as connection:
        for record_id in ids:
            connection.execute("UPDATE record SET state = ?, settled_at = ? WHERE id = ?", (state, at, record_id))


def outcome_of(call, outbox, record_id, **options):
    (verdict,) = call(outbox.store, [record_id], **options)
    assert verdict.id == record_id
    assert verdict.outcome in ("retried", "discarded") or verdict.detail
    return verdict.outcome


@pytest.mark.parametrize(
    ("state", "outcome"),
    [("pending", "refused"), ("delivered", "refused"), ("failed", "retried"), ("exported", "retried"),
     ("discarded", "refused")],
)  # fmt: skip
def test_retry(outbox, state, outcome):
    queue(outbox, "a")
    set_state(outbox, state, 1)

    assert outcome_of(retry, outbox, 1) == outcome
    assert show(outbox.store, 1)[0].state == ("pending" if outcome == "retried" else state)


@pytest.mark.parametrize(
    ("state", "outcome", "with_yes"),
    [("pending", "refused", "discarded"), ("delivered", "refused", "refused"), ("failed", "discarded", "discarded"),
     ("exported", "discarded", "discarded"), ("discarded", "refused", "refused")],
)  # fmt: skip
def test_discard(outbox, state, outcome, with_yes):
    queue(outbox, "a", "a")
    set_state(outbox, state, 1, 2)

    assert outcome_of(discard, outbox, 1) == outcome
    assert outcome_of(discard, outbox, 2, pending_too=True) == with_yes
    assert show(outbox.store, 1)[0].state == ("discarded" if outcome == "discarded" else state)


def test_unknown_ids_are_told_and_stop_nothing(outbox):
    queue(outbox, "a")
    set_state(outbox, "failed", 1)

    assert [verdict.outcome for verdict in retry(outbox.store, [9, 1, -1])] == ["not_found", "retried", "not_found"]
    assert [verdict.outcome for verdict in discard(outbox.store, [9, 1])] == ["not_found", "refused"]
    assert show(outbox.store, 9) is None


def test_retry_is_a_new_request_without_the_old_answer(outbox):
    queue(outbox, "a")
    event_id = show(outbox.store, 1)[0].event_id
    for again in (1, 2):
        with outbox.store.write() as connection:
            connection.execute(
                "UPDATE record SET state = 'failed', reason = 'blocked', detail = 'd', code = 'C', rule = 'r', late = 1,"
                " retry_after = 'x', counted = 20, counted_since = 1, counted_mark = 1, unanswered = 1, attempts = 5,"
                " http_status = 409, settled_at = 1"
            )
        retry(outbox.store, [1])
        record = show(outbox.store, 1)[0]

        assert record.idempotency_key == f"{event_id}.{again}"
        assert (record.state, record.counted, record.unanswered, record.late) == ("pending", 0, 0, 0)
        assert not any((record.reason, record.detail, record.code, record.rule, record.retry_after))
        assert not any((record.http_status, record.settled_at, record.counted_since, record.counted_mark))
        assert record.attempts == 5


def test_retried_record_keeps_its_place(outbox):
    queue(outbox, "a", "a")
    set_state(outbox, "failed", 1)
    retry(outbox.store, [1])

    assert Ledger(outbox.store).head("a")[0].id == 1


@pytest.mark.parametrize("state", ["pending", "delivered", "exported"])
def test_event_queued_again_since_is_superseded(outbox, state):
    fields = {"product_name": "a", "version": "1", "status": "ok", "invoke_id": "7"}
    outbox.enqueue("build", fields)
    set_state(outbox, "failed", 1)
    outbox.enqueue("build", fields)
    set_state(outbox, state, 2)

    assert outcome_of(retry, outbox, 1) == "superseded"
    assert outcome_of(retry, outbox, 1, out_of_order=True) == "superseded"
    set_state(outbox, "failed", 2)
    assert outcome_of(retry, outbox, 1) == "retried"


def test_what_a_delivered_successor_overtook_is_out_of_order(outbox):
    outbox.enqueue("deployment", {**DEPLOYMENT, "status": "started"})
    outbox.enqueue("deployment", {**DEPLOYMENT, "status": "completed"})
    set_state(outbox, "failed", 1)
    set_state(outbox, "delivered", 2)

    assert outcome_of(retry, outbox, 1) == "out_of_order"
    assert show(outbox.store, 1)[0].state == "failed"
    assert outcome_of(retry, outbox, 1, out_of_order=True) == "retried"


@pytest.mark.parametrize(
    "change",
    [{"environment_name": "staging"}, {"product_name": "b"}, {"invoke_id": "8"}, {"invoke_id": None}],
    ids=repr,
)
def test_others_overtake_nothing(outbox, change):
    outbox.enqueue("deployment", {**DEPLOYMENT, "status": "started"})
    outbox.enqueue("deployment", {**DEPLOYMENT, "status": "completed", **change})
    set_state(outbox, "failed", 1)
    set_state(outbox, "delivered", 2)

    assert outcome_of(retry, outbox, 1) == "retried"


def test_predecessors_and_undelivered_successors_overtake_nothing(outbox):
    for status in ("pending", "started", "completed"):
        outbox.enqueue("deployment", {**DEPLOYMENT, "status": status})
    set_state(outbox, "delivered", 1)
    set_state(outbox, "failed", 2)

    assert outcome_of(retry, outbox, 2) == "retried"


def test_build_is_overtaken_too(outbox):
    fields = {"product_name": "a", "version": "1", "invoke_id": "7"}
    outbox.enqueue("build", {**fields, "status": "started"})
    outbox.enqueue("build", {**fields, "status": "completed"})
    set_state(outbox, "failed", 1)
    set_state(outbox, "delivered", 2)

    assert outcome_of(retry, outbox, 1) == "out_of_order"


def test_stats_of_an_outbox(outbox):
    queue(outbox, *"abcde")
    set_state(outbox, "failed", 2, at=40.0)
    set_state(outbox, "failed", 1, at=30.0)  # later, whatever the clock said
    set_state(outbox, "delivered", 3)
    found = stats(outbox.store)

    assert found.counts == {"pending": 2, "delivered": 1, "failed": 2, "exported": 0, "discarded": 0}
    assert found.last_failure.id == 1
    assert found.oldest_pending_at == show(outbox.store, 4)[0].queued_at
    assert found.bytes > 0
    assert found.held == []
    assert review.EMPTY.counts == dict.fromkeys(found.counts, 0)


def test_failures_since_a_moment(outbox):
    queue(outbox, *"abc")
    set_state(outbox, "failed", 1, at=50.0)
    set_state(outbox, "failed", 2, at=40.0)
    set_state(outbox, "delivered", 3, at=60.0)

    assert [record.id for record in review.failed_since(outbox.store, 40.0)] == [2, 1]
    assert [record.id for record in review.failed_since(outbox.store, 40.5)] == [1]


def test_record_has_the_documented_keys(outbox):
    queue(outbox, "a")
    found = record_json(show(outbox.store, 1)[0])

    assert " ".join(found) == (
        "id event_id state kind product_name version environment_name status invoke_id queued_at queued_by attempts "
        "last_attempt_at settled_at http_status server_id reason code rule retry_after late detail"
    )
    assert found["late"] is False
    assert found["queued_at"].endswith("Z")
    assert found["settled_at"] is None


def hand_over(store):
    batches.hand_over_batch(store, 100)


def turn(store):
    exports.turn(store, StepSize())


@pytest.mark.parametrize("step", [hand_over, turn])
@pytest.mark.parametrize(
    "count",
    [
        lambda store: review.stats(store).counts["pending"],
        lambda store: gauges.look(store).counts["pending"],
        lambda store: Ledger(store).pending(),
        lambda store: Ledger(store).standing().pending,
    ],
    ids=["status", "metrics", "flush", "agent"],
)
def test_what_is_counted_is_of_one_moment(outbox, monkeypatch, count, step):
    """Whoever hands a batch over between two queries, or turns what is exported, changes no number."""
    pending = batches.CHUNK + 1
    many = [validate("build", {"product_name": "a", "version": str(n), "status": "ok"}) for n in range(pending)]
    with monkeypatch.context() as patch:
        if step == hand_over:
            patch.setattr(batches, "hand_over_batch", lambda _: False)
        outbox.enqueue_all(many)
    if step == turn:
        pending = 0
        export = exports.begin(outbox.store, None, 1.0)
        found = exports.Claimed([], [], 0, is_end=False)
        while not found.is_end:
            found = exports.claim(outbox.store, export, found.last_id, StepSize(), 99, 1.0)
        exports.mark(outbox.store, export, exports.Written(len(many), 1, len(many), "d"), len(many), None)

    with contextlib.closing(Store(outbox.store.path, 0.05)) as other:

        def on_query(_):
            with contextlib.suppress(OutboxError):
                step(other)

        with outbox.store.read() as connection:
            connection.set_trace_callback(on_query)
        assert count(outbox.store) == pending
