"""Which records a filter means, and the moments that people name."""

from __future__ import annotations

import time

import pytest

from versioner_agent.filters import FAILED_FOR, REASONS, moment
from versioner_agent.outcomes import STATE_OF

NOW = 1_794_000_000.0


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("90m", NOW - 5400),
        ("24h", NOW - 86_400),
        ("7d", NOW - 7 * 86_400),
        ("2w", NOW - 14 * 86_400),
        ("0s", NOW),
        ("1970-01-01T00:01:00Z", 60.0),
        ("1970-01-01t01:01:00.5+01:00", 60.5),
        ("1970-01-01 00:01Z", 60.0),
    ],
)
def test_a_moment_is_a_time_or_an_age(words, seconds):
    assert moment(words, NOW) == seconds


@pytest.mark.parametrize(
    ("zone", "date", "begins"),
    [
        ("Asia/Tokyo", "2026-11-06", "2026-11-06T00:00:00+09:00"),
        ("America/Sao_Paulo", "2018-11-04", "2018-11-04T01:00:00-02:00"),  # clocks went from 0:00 to 1:00
        ("America/Havana", "2026-11-01", "2026-11-01T00:00:00-04:00"),  # and from 1:00 to 0:00
    ],
)
def test_a_date_is_when_it_begins_here(monkeypatch, zone, date, begins):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert moment(date, NOW) == moment(begins, NOW)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "words",
    ["", "yesterday", "7", "-7d", "7 d", "1e3h", "2026-11-06T15:30:00", "2026-13-01", "2026-11-06T25:00:00Z", "\u0667d",
     "2026-W01-1", "9" * 30 + "d", "2026-11-06\n"],
)  # fmt: skip
def test_anything_else_is_no_moment(words):
    with pytest.raises(ValueError, match="24h"):
        moment(words, NOW)


def test_every_reason_that_records_have_can_be_asked_for():
    assert {*FAILED_FOR, *STATE_OF} == set(REASONS)
