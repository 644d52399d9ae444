"""Retrying and discarding what a filter means: the plan says what happens, and nothing else happens."""

from __future__ import annotations

import functools

import pytest

from versioner_agent import events, repair, review, selecting, stepping
from versioner_agent.filters import Filter

DEPLOYMENT = {"product_name": "a", "version": "1", "environment_name": "prod", "invoke_id": "7"}
RETRY = {"out_of_order": False}
FAILED = Filter("failed")


def queue(outbox, count=1, **fields):
    valid = events.validate("build", {"product_name": "a", "version": "1", "status": "ok", **fields})
    return [each.id for each in outbox.enqueue_all([valid] * count, new=True)]


def set_state(outbox, state, *ids, reason="conflict"):
    with outbox.store.write() as connection:
        connection.executemany(
            "UPDATE record SET state = ?, reason = ? WHERE id = ?", [(state, reason, record_id) for record_id in ids]
        )


def planned(outbox, wanted=FAILED):
    return repair.plan(outbox.store, wanted, functools.partial(review.retry_objection, **RETRY))


def retried(outbox, wanted=FAILED, last_id=10**9):
    steps = repair.act(outbox.store, wanted, last_id, functools.partial(review.retry_one, **RETRY))
    return [verdict for step in steps for verdict in step]


def states(outbox):
    return {record.id: record.state for page in selecting.select(outbox.store) for record in page}


def test_a_plan_tells_numbers_by_group_and_what_stands_against_some(outbox):
    queue(outbox, 3)
    queue(outbox, 2, version="2")
    outbox.enqueue("deployment", {**DEPLOYMENT, "status": "started"})
    outbox.enqueue("deployment", {**DEPLOYMENT, "status": "completed"})
    fields = {"product_name": "b", "version": "1", "status": "ok", "invoke_id": "9"}
    outbox.enqueue("build", fields)
    set_state(outbox, "failed", 1, 2, 3, 6, 8)
    set_state(outbox, "failed", 4, reason="damaged")
    with outbox.store.write() as connection:
        connection.execute("UPDATE record SET payload = x'7b7d' WHERE id = 4")
    set_state(outbox, "delivered", 7)
    outbox.enqueue("build", fields)
    plan = planned(outbox)

    assert [tuple(part) for part in plan.parts] == [
        ("failed", "a", "1", "conflict", 3, 1, 6, {"out_of_order": 1}),
        ("failed", "a", "2", "damaged", 0, 4, 4, {"refused": 1}),
        ("failed", "b", "1", "conflict", 0, 8, 8, {"superseded": 1}),
    ]
    assert plan[1:] == (3, 3, 1, 8, False)
    assert sorted(states(outbox).values()) == sorted(["failed"] * 6 + ["pending"] * 2 + ["delivered"])


def test_what_was_planned_is_done_in_order(outbox, monkeypatch):
    monkeypatch.setattr(repair, "STEP", 2)
    set_state(outbox, "failed", *queue(outbox, 5))
    set_state(outbox, "failed", *queue(outbox, 2, version="2"))

    assert [tuple(each) for each in retried(outbox, Filter("failed", version="1"))] == [
        (number, "retried", "") for number in range(1, 6)
    ]
    assert states(outbox) == {**dict.fromkeys(range(1, 6), "pending"), 6: "failed", 7: "failed"}


def test_what_takes_long_to_judge_keeps_no_lock_for_a_page(outbox, monkeypatch):
    """Thousands of events with one invoke_id: each is held against all of them."""
    ids = queue(outbox, 5)
    set_state(outbox, "failed", *ids)
    monkeypatch.setattr(stepping, "WORK_S", -1.0)  # each takes longer than a transaction may
    steps = list(repair.act(outbox.store, FAILED, ids[-1], functools.partial(review.retry_one, **RETRY)))

    assert [[verdict.id for verdict in step] for step in steps] == [[each] for each in ids]
    assert set(states(outbox).values()) == {"pending"}


def test_what_came_after_the_plan_is_left_alone(outbox):
    set_state(outbox, "failed", *queue(outbox, 2))
    plan = planned(outbox)
    set_state(outbox, "failed", *queue(outbox, 2))

    assert [each.id for each in retried(outbox, last_id=plan.last_id)] == [1, 2]


def test_what_has_changed_meanwhile_is_judged_as_it_is(outbox, monkeypatch):
    """Another person's `retry` between reading and writing is not done twice."""
    set_state(outbox, "failed", *queue(outbox, 3))
    real = review.find
    monkeypatch.setattr(
        review, "find", lambda connection, ids: [each._replace(state="pending") if each.id == 2 else each for each in real(connection, ids)]
    )  # fmt: skip

    assert [each.id for each in retried(outbox)] == [1, 3]


def test_discarding_by_filter_keeps_the_records(outbox):
    ids = queue(outbox, 4)
    set_state(outbox, "failed", *ids[:2])
    do = functools.partial(review.discard_one, pending_too=True)
    for wanted in (FAILED, Filter("pending", "a")):
        list(repair.act(outbox.store, wanted, 10**9, do))

    assert states(outbox) == dict.fromkeys(ids, "discarded")
    assert review.show(outbox.store, 1)[0].reason == "conflict"


def test_more_groups_than_a_plan_tells_apart_are_counted_all_the_same(outbox, monkeypatch):
    monkeypatch.setattr(repair, "MOST_GROUPS", 2)
    for version in "123":
        set_state(outbox, "failed", *queue(outbox, 2, version=version))
    plan = planned(outbox)

    assert (len(plan.parts), plan.total, plan.is_cut) == (2, 6, True)


@pytest.mark.parametrize("count", [1000])
def test_a_thousand_are_retried(outbox, count):
    set_state(outbox, "failed", *queue(outbox, count))

    assert planned(outbox).total == count
    assert len(retried(outbox)) == count
    assert review.stats(outbox.store).counts["pending"] == count
