"""How much one transaction does: what the last ones took says so."""

from __future__ import annotations

import pytest

from versioner_agent.stepping import AIM_S, FIRST_STEP, MOST_STEP, StepSize, next_step


def test_a_step_takes_what_fits_into_its_time():
    assert next_step(100, AIM_S) == 100
    assert next_step(100, AIM_S / 10) == 200
    assert next_step(100, AIM_S * 10) == 10
    assert next_step(1, 60.0) == 1
    assert next_step(MOST_STEP, 0.0) == MOST_STEP


class Disk:
    """A clock that goes on by what work takes here."""

    def __init__(self, per_record_s):
        self.now, self.per_record_s = 0.0, per_record_s

    def clock(self):
        return self.now

    def work(self, size, waiting=MOST_STEP):
        """Do one transaction of *size*, as far as there is something *waiting*; returns how much that was."""
        done = min(size.value, waiting)
        size.start()
        self.now += done * self.per_record_s
        size.end(done)
        return done


@pytest.mark.parametrize(
    ("per_record_s", "expected"), [(0.0, MOST_STEP), (0.0001, 400), (0.004, 10), (0.5, 1)], ids=str
)
def test_steps_are_soon_as_long_as_the_disk_allows(per_record_s, expected):
    disk = Disk(per_record_s)
    size = StepSize(disk.clock)
    steps = [disk.work(size) for _ in range(10)]

    assert steps[0] == FIRST_STEP
    assert steps[-1] == pytest.approx(expected, abs=1)


def test_a_disk_that_becomes_slow_is_believed_at_once():
    disk = Disk(0.0001)
    size = StepSize(disk.clock)
    for _ in range(10):
        disk.work(size)
    disk.per_record_s = 0.01
    disk.work(size)

    assert disk.work(size) * disk.per_record_s <= AIM_S


def test_a_step_that_had_little_to_do_says_nothing():
    disk = Disk(0.0)
    size = StepSize(disk.clock)
    disk.work(size, waiting=1)
    disk.work(size, waiting=0)

    assert size.value == FIRST_STEP


def test_waiting_for_our_turn_is_not_taken_for_a_slow_disk():
    disk = Disk(0.0)
    size = StepSize(disk.clock)
    for _ in range(3):
        disk.now += 60.0
        disk.work(size)

    assert size.value == 8 * FIRST_STEP
