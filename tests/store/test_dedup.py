"""What counts as the same event queued again."""

from __future__ import annotations

import pytest

from versioner_agent import events, review

BUILD = {"product_name": "payments", "version": "1.2.3", "status": "completed", "invoke_id": "7"}
DEPLOYMENT = {**BUILD, "environment_name": "production"}
LIVE = ("pending", "delivered", "exported")


def set_state(outbox, record_id, state):
    with outbox.store.write() as connection:
        connection.execute("UPDATE record SET state = ? WHERE id = ?", (state, record_id))


def ids(outbox, kind, *changes, **options):
    """Queue one event after the other; the ids that their receipts name."""
    base = BUILD if kind == "build" else DEPLOYMENT
    return [outbox.enqueue(kind, {**base, **change}, **options).id for change in changes]


@pytest.mark.parametrize("kind", events.KINDS)
def test_repeat_of_a_run_names_the_first_record(outbox, kind):
    fields = BUILD if kind == "build" else DEPLOYMENT
    first = outbox.enqueue(kind, fields)
    again = outbox.enqueue(kind, fields)

    assert (first.outcome, again.outcome) == ("queued", "duplicate")
    assert again._replace(outcome="queued") == first
    assert review.stats(outbox.store).counts["pending"] == 1


@pytest.mark.parametrize("kind", events.KINDS)
@pytest.mark.parametrize("state", LIVE)
def test_live_record_blocks(outbox, kind, state):
    ids(outbox, kind, {})
    set_state(outbox, 1, state)

    assert ids(outbox, kind, {}) == [1]


@pytest.mark.parametrize("kind", events.KINDS)
@pytest.mark.parametrize("state", ["failed", "discarded"])
def test_dead_record_does_not_block(outbox, kind, state):
    ids(outbox, kind, {})
    set_state(outbox, 1, state)

    assert ids(outbox, kind, {}, {}) == [2, 2]


def test_without_a_run_nothing_is_a_repeat(outbox):
    assert ids(outbox, "build", {"invoke_id": None}, {"invoke_id": ""}, {"invoke_id": None}) == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"status": "failed"}, {"product_name": "billing"}, {"version": "1.2.4"}, {"scm_sha": "abc"},
        {"invoke_id": "8"}, {"extra_metadata": {"a": 1}}, {"build_url": "https://ci/branch/2"},
        {"completed_at": "2026-11-06T15:30:00Z"},
    ],
    ids=repr,
)  # fmt: skip
def test_other_content_is_another_event(outbox, change):
    assert ids(outbox, "build", {}, change, change, {}) == [1, 2, 2, 1]


def test_spelling_is_no_content(outbox):
    assert ids(outbox, "build", {}, {"status": " SUCCESS "}, {"version": " 1.2.3"}, {"scm_sha": ""}) == [1] * 4


def test_agents_own_metadata_is_no_content(outbox):
    mine = {"extra_metadata": {"a": 1}}
    theirs = {"extra_metadata": {"a": 1, "vi_agent_host": "other"}}

    assert ids(outbox, "build", mine, theirs) == [1, 1]


def test_kinds_are_apart(outbox):
    fields = {"product_name": "p", "version": "1", "status": "ok", "invoke_id": "7"}

    assert outbox.enqueue("build", fields).id == 1
    assert outbox.enqueue("deployment", {**fields, "environment_name": "e"}).id == 2


@pytest.mark.parametrize("kind", events.KINDS)
def test_run_attempt_keeps_a_re_run_apart(outbox, kind):
    assert ids(outbox, kind, {}, run_attempt="1") == [1]
    assert ids(outbox, kind, {}, {}, run_attempt="2") == [2, 2]
    assert ids(outbox, kind, {}) == [3]


@pytest.mark.parametrize("kind", events.KINDS)
def test_new_queues_regardless(outbox, kind):
    assert ids(outbox, kind, {}, {}, {}, new=True) == [1, 2, 3]
    assert ids(outbox, kind, {})[0] in (1, 3)
    assert review.stats(outbox.store).counts["pending"] == 3


def test_builds_of_one_run_are_compared_with_all_before(outbox):
    assert ids(outbox, "build", {"status": "started"}, {}, {"status": "started"}) == [1, 2, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{"version": "1"}, {"version": "2"}, {"version": "1"}], [1, 2, 3]),
        ([{"status": "started"}, {"status": "failed"}, {"status": "started"}], [1, 2, 3]),
        ([{"version": "1"}, {"version": "2"}, {"version": "2"}, {"version": "1"}, {"version": "1"}], [1, 2, 2, 3, 3]),
        ([{}, {"environment_name": "staging"}, {}], [1, 2, 1]),
        ([{}, {"product_name": "billing"}, {}], [1, 2, 1]),
        ([{}, {"invoke_id": "8"}, {}], [1, 2, 1]),
    ],
    ids=["there and back", "again after a failure", "each step once", "environments", "products", "runs"],
)
def test_deployment_is_compared_with_the_newest_of_its_run_product_and_environment(outbox, changes, expected):
    assert ids(outbox, "deployment", *changes) == expected


def test_dead_newest_deployment_does_not_hide_that_it_is_a_transition(outbox):
    """1 → 2 → 1 where 2 was refused: the second 1 is compared with 2, the newest, and is queued."""
    ids(outbox, "deployment", {"version": "1"}, {"version": "2"})
    set_state(outbox, 2, "failed")

    assert ids(outbox, "deployment", {"version": "1"}) == [3]


def test_build_between_deployments_changes_nothing(outbox):
    ids(outbox, "deployment", {})
    ids(outbox, "build", {})

    assert ids(outbox, "deployment", {}) == [1]


def test_pruned_record_is_forgotten(outbox):
    ids(outbox, "build", {})
    with outbox.store.write() as connection:
        connection.execute("DELETE FROM record")

    assert ids(outbox, "build", {}) == [2]
