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

    def __init__(self, per_record_s, per_commit_s=0.0):
        self.now, self.per_record_s, self.per_commit_s = 0.0, per_record_s, per_commit_s

    def clock(self):
        return self.now

    def work(self, size, waiting=MOST_STEP):
        """Do one transaction of *size*, as far as there is something *waiting*; returns how much that was."""
        done = min(size.value, waiting)
        size.start()
        self.now += done * self.per_record_s + self.per_commit_s
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


@pytest.mark.parametrize("per_commit_s", [0.03, 0.045, 0.06, 0.2], ids=str)
def test_a_disk_whose_syncs_take_long_is_not_given_more_of_them(per_commit_s):
    """Steps of one record would take as long each: a million of them took a day."""
    disk = Disk(0.0001, per_commit_s)
    size = StepSize(disk.clock)
    for _ in range(60):
        disk.work(size)

    assert all(90 <= disk.work(size) <= 400 for _ in range(20))


def test_syncs_that_take_long_for_a_while_are_forgotten():
    disk = Disk(0.004, 0.09)
    size = StepSize(disk.clock)
    for _ in range(60):
        disk.work(size)
    disk.per_commit_s = 0.0
    steps = [disk.work(size) for _ in range(30)]

    assert max(steps) * disk.per_record_s < 0.1
