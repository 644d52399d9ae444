"""Failures in groups: counted as a plain count would, with the first one's author and link."""

from __future__ import annotations

import collections
import json
import random

import pytest

from versioner_agent import events, groups
from versioner_agent.filters import Filter
from versioner_agent.groups import Group, link_of


def queue(outbox, *versions, **fields):
    fields = {"product_name": "a", "status": "ok", **fields}
    kind = "deployment" if "environment_name" in fields else "build"
    valid = [events.validate(kind, {**fields, "version": version}) for version in versions]
    return [each.id for each in outbox.enqueue_all(valid)]


def fail(outbox, *ids, reason="conflict", late=0):
    with outbox.store.write() as connection:
        for record_id in ids:
            connection.execute(
                "UPDATE record SET state = 'failed', reason = ?, late = ? WHERE id = ?", (reason, late, record_id)
            )


def grouped(outbox, wanted=None):
    return list(groups.groups(outbox.store, wanted or Filter()))


def test_a_group_tells_how_many_whose_and_where(outbox):
    outbox.queued_by = "ann (uid 7)"
    fail(outbox, *queue(outbox, "1", built_by="bob", build_url="https://ci/1"), *queue(outbox, "1", "1"))
    fail(outbox, *queue(outbox, "2", built_by="bob", built_by_name="Bob B."))
    fail(
        outbox,
        *queue(outbox, "2", environment_name="prod", deployed_by="eve", deploy_url="https://d/1"),
        reason="invalid",
    )
    fail(outbox, *queue(outbox, "3"), reason="gave_up")

    assert grouped(outbox) == [
        Group("a", "1", "conflict", False, 3, 1, "bob", "https://ci/1"),
        Group("a", "2", "conflict", False, 1, 4, "Bob B.", None),
        Group("a", "2", "invalid", False, 1, 5, "eve", "https://d/1"),
        Group("a", "3", "gave_up", False, 1, 6, "ann (uid 7)", None),
    ]


def test_late_refusals_by_a_rule_are_counted_apart(outbox):
    ids = queue(outbox, *["1"] * 5)
    fail(outbox, *ids[:2], reason="blocked")
    fail(outbox, *ids[2:], reason="blocked", late=1)

    assert [(each.late, each.total, each.first_id) for each in grouped(outbox)] == [(False, 2, 1), (True, 3, 3)]
    assert [each.total for each in grouped(outbox, Filter(reason="late"))] == [3]
    assert [each.total for each in grouped(outbox, Filter(reason="blocked"))] == [2, 3]


@pytest.mark.parametrize("page", [1, 7, 500])
def test_counts_are_those_of_a_plain_count(outbox, monkeypatch, page):
    monkeypatch.setattr(groups, "PAGE", page)
    dice = random.Random(3)
    expected = collections.Counter()
    for product in "abc":
        for record_id in queue(outbox, *(dice.choice("12") for _ in range(40)), product_name=product):
            reason, late = dice.choice([("conflict", 0), ("blocked", 0), ("blocked", 1)])
            if dice.random() < 0.8:
                fail(outbox, record_id, reason=reason, late=late)
                with outbox.store.read() as connection:
                    version = connection.execute("SELECT version FROM record WHERE id = ?", (record_id,)).fetchone()[0]
                expected[product, version, reason, bool(late)] += 1

    assert {group[:4]: group.total for group in grouped(outbox)} == expected
    one = grouped(outbox, Filter("failed", "b", "2"))
    assert {group[:4]: group.total for group in one} == {k: n for k, n in expected.items() if k[:2] == ("b", "2")}
    without_product = grouped(outbox, Filter(version="2"))
    assert {group[:4]: group.total for group in without_product} == {k: n for k, n in expected.items() if k[1] == "2"}
    summary = groups.summary(outbox.store, 3)
    assert [group.total for group in summary.groups] == sorted(expected.values(), reverse=True)[:3]
    assert (summary.left, summary.is_cut) == (len(expected) - 3, False)


def test_a_summary_looks_at_a_bounded_number(outbox, monkeypatch):
    monkeypatch.setattr(groups, "PAGE", 10)
    fail(outbox, *queue(outbox, *["1"] * 50))
    monkeypatch.setattr(groups, "MOST_ROWS", 20)
    summary = groups.summary(outbox.store, 5)

    assert (summary.groups[0].total, summary.is_cut) == (20, True)


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[1]", b"[" * 100_000, "null", b'{"build_url": 7}', None])
def test_a_payload_that_says_nothing_has_no_link(payload):
    assert link_of(payload) is None


def test_an_author_who_is_no_text_is_nobody(outbox):
    fail(outbox, *queue(outbox, "1"))
    with outbox.store.write() as connection:
        connection.execute("UPDATE record SET payload = ?", (json.dumps({"built_by": ["x"]}).encode(),))

    assert grouped(outbox)[0].first_by.startswith("uid ")


@pytest.mark.parametrize(
    ("query", "plan"),
    [
        (groups.WALK_VERSION, "(product_name=? AND version=? AND rowid>?)"),
        (groups.WALK, "((product_name,version)>(?,?))"),
    ],
)
def test_the_next_page_of_a_million_failures_is_sought(outbox, query, plan):
    queue(outbox, "1")
    with outbox.store.read() as connection:
        found = connection.execute(f"EXPLAIN QUERY PLAN {query}", {"p": "a", "v": "1", "i": 0, "page": 1}).fetchall()

    assert [row[3] for row in found] == [f"SEARCH record USING INDEX record_refused {plan}"]


@pytest.mark.parametrize("page", [1, 2, 3, 500])
def test_pages_end_anywhere(outbox, monkeypatch, page):
    monkeypatch.setattr(groups, "PAGE", page)
    ids = queue(outbox, *"1213123")
    fail(outbox, *ids[:4])
    fail(outbox, *ids[4:], reason=None)

    assert [(each.version, each.reason, each.total) for each in grouped(outbox)] == [
        ("1", "", 1), ("1", "conflict", 2), ("2", "", 1), ("2", "conflict", 1), ("3", "", 1), ("3", "conflict", 1),
    ]  # fmt: skip
