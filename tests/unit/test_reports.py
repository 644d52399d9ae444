"""How things are, in the line that `systemctl status` shows."""

from __future__ import annotations

import time

import pytest

from versioner_agent.ledger import Health, Standing
from versioner_agent.outcomes import STATE_OF
from versioner_agent.reports import TROUBLE, headline

NOW = time.mktime((2026, 11, 6, 14, 32, 0, 0, 0, -1))
SINCE = NOW - 1800
LONG_AGO = NOW - 3 * 86_400


def down(**health):
    return Health("down", "no route to host", **{"since": SINCE, "next_attempt_at": NOW + 40, **health})


@pytest.mark.parametrize(
    ("standing", "line"),
    [
        (Standing(0, 3, Health("up")), "up: 0 pending, 3 failed"),
        (Standing(0, 0, Health()), "up: 0 pending, 0 failed (API not asked yet)"),
        (Standing(120, 0, down()), "API unreachable since 14:02, 120 pending, next try in 40 s"),
        (Standing(120, 3, down()), "API unreachable since 14:02, 120 pending, 3 failed, next try in 40 s"),
        (Standing(120, 0, down(next_attempt_at=NOW)), "API unreachable since 14:02, 120 pending, trying now"),
        (Standing(120, 0, down(next_attempt_at=None)), "API unreachable since 14:02, 120 pending"),
        (Standing(0, 0, down()), "API unreachable since 14:02, 0 pending"),
        (Standing(1, 0, down(since=None)), "API unreachable, 1 pending, next try in 40 s"),
        (Standing(1, 0, down(since=LONG_AGO)), "API unreachable since 2026-11-03 14:32, 1 pending, next try in 40 s"),
        (Standing(1, 0, down(since=-1e300)), "API unreachable since 1970-01-01"),
        (Standing(1, 0, down(since=1e300)), "API unreachable since "),
    ],
)
def test_one_line_says_how_things_are(standing, line):
    said = headline(standing, NOW)

    assert said == line or (standing.health.since or 0) in (-1e300, 1e300)
    assert said.startswith(line)


def test_a_missing_key_comes_before_all_else():
    assert headline(Standing(5, 1, down()), NOW, has_key=False).startswith("no API key, events wait for one: 5 pending")


def test_every_bad_state_has_words():
    assert set(TROUBLE) == set(STATE_OF.values()) - {"up", "unknown"}
