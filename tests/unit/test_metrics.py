"""Prometheus' text: valid for a parser that is not ours, whatever stands in it."""

from __future__ import annotations

import math

import pytest
from exposition import has, read, value
from measured import HEALTHY, NOW

from versioner_agent import metrics, outcomes
from versioner_agent.metrics import Family, families, render
from versioner_agent.schema import FAILED_REASONS, STATES

BUILD = {"version": "1.2.3", "python": "3.11.7", "sqlite": "3.40.1"}
FULL = HEALTHY._replace(
    counts=dict(zip(STATES, (3, 1_000_000, 7, 2, 0), strict=True)),
    failed=dict(zip(FAILED_REASONS, range(7), strict=True)),
)
HOSTILE = ['a"b', "back\\slash", "line\nbreak", "\\n", '"} 1\nevil 2', "naïve ☃", "", "tab\there", "a,b=c{d}", "\\"]


def test_everything_that_is_known_is_told():
    found = read(render(families(FULL, BUILD, 1_794_000_200.5)))

    assert value(found, "build_info", **BUILD) == 1
    assert value(found, "last_loop_timestamp_seconds") == 1_794_000_200.5
    assert value(found, "outbox_readable") == 1
    assert [value(found, "records", state=state) for state in STATES] == [3, 1_000_000, 7, 2, 0]
    assert [value(found, "failed_records", reason=reason) for reason in FAILED_REASONS] == list(range(7))
    assert value(found, "oldest_pending_timestamp_seconds") == NOW - 59.75
    assert value(found, "last_delivery_timestamp_seconds") == NOW - 5
    assert value(found, "deliveries_total") == 1_000_001
    assert value(found, "failures_total") == 9
    assert value(found, "held_products") == 1
    assert value(found, "exported_batches") == 2
    assert value(found, "oldest_export_timestamp_seconds") == NOW - 3600
    assert value(found, "outbox_bytes") == 565248
    assert value(found, "free_bytes") == 2**40
    assert value(found, "damaged") == 0
    assert value(found, "agent_running") == 1
    assert value(found, "destination_up") == 1


def test_what_is_not_known_is_left_out():
    nothing = FULL._replace(
        free_bytes=None, oldest_pending_at=None, last_delivered_at=None, failures=None, failed=None, held=None,
        batches=None, oldest_batch_at=None,
    )  # fmt: skip

    found = read(render(families(nothing, BUILD)))

    for name in (
        "last_loop_timestamp_seconds", "oldest_pending_timestamp_seconds", "last_delivery_timestamp_seconds",
        "failures_total", "failed_records", "held_products", "exported_batches", "oldest_export_timestamp_seconds",
        "free_bytes",
    ):  # fmt: skip
        assert has(read(render(families(FULL, BUILD, 1.0))), name)
        assert not has(found, name)


def test_of_an_outbox_that_cannot_be_read_only_that_is_told():
    found = read(render(families(None, BUILD, 5.0)))

    assert {name for name, _ in found} == {
        "versioner_agent_build_info", "versioner_agent_last_loop_timestamp_seconds", "versioner_agent_outbox_readable",
    }  # fmt: skip
    assert value(found, "outbox_readable") == 0


@pytest.mark.parametrize("state", [*metrics.STATES, "nonsense"])
def test_the_destination_is_in_one_state(state):
    found = read(render(families(FULL._replace(state=state), BUILD)))

    states = {each: value(found, "destination_state", state=each) for each in metrics.STATES}
    assert sum(states.values()) == 1
    assert states[state if state in metrics.STATES else "unknown"] == 1
    assert value(found, "destination_up") == (state == "up")


def test_every_state_of_a_destination_has_a_series():
    assert set(metrics.STATES) == {"unknown", "up", *outcomes.STATE_OF.values()}


@pytest.mark.parametrize("word", HOSTILE, ids=ascii)
def test_hostile_words_stay_words(word):
    """No word of others is a label today; the escaping is the format's all the same."""
    family = Family("x_things", "gauge", f"Things {word}", [({"name": word, "other": "o"}, 1), ({"name": "é"}, 2)])

    found = read(render(iter([family])))

    assert found == {
        ("x_things", frozenset({("name", word), ("other", "o")})): 1.0,
        ("x_things", frozenset({("name", "é")})): 2.0,
    }


@pytest.mark.parametrize("number", [0, True, 2**63 - 1, -1.5, 1e300, math.inf, -math.inf, math.nan], ids=repr)
def test_every_number_can_be_read_again(number):
    (found,) = read(render(iter([Family("x", "gauge", "X.", [({}, number)])]))).values()

    assert found == number or (math.isnan(found) and math.isnan(number))
