"""What is forgotten and what never is, in how many transactions, and the space that is given back."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sqlite3

import pytest

from versioner_agent import pruning, review, schema
from versioner_agent.errors import OutboxDamaged, OutboxFull
from versioner_agent.events import validate
from versioner_agent.flusher import Options
from versioner_agent.ledger import Ledger
from versioner_agent.pruning import Pruner
from versioner_agent.stepping import FIRST_STEP, MOST_STEP
from versioner_agent.storage import Store
from versioner_agent.upkeep import SHORTEST_REST_S, Upkeep

NOW = 1_800_000_000.0
DAY = 86_400.0
STATES = ("pending", "delivered", "failed", "exported", "discarded")


def queue(outbox, count, **fields):
    event = {"product_name": "a", "status": "ok", **fields}
    valid = [validate("build", {**event, "version": str(number)}) for number in range(count)]
    return [receipt.id for receipt in outbox.enqueue_all(valid)]


def change(outbox, statement, *values):
    with contextlib.closing(sqlite3.connect(outbox.store.path)) as connection:
        connection.execute(statement, values)
        connection.commit()


def ask(outbox, query, *values):
    with contextlib.closing(sqlite3.connect(outbox.store.path)) as connection:
        return connection.execute(query, values).fetchall()


def ids(outbox):
    return {row[0] for row in ask(outbox, "SELECT id FROM record")}


def make_old(outbox, state="delivered", at=NOW - DAY):
    change(outbox, "UPDATE record SET state = ?, settled_at = ?", state, at)


class Ticking:
    """A clock that goes on by so much whenever it is looked at."""

    def __init__(self, by):
        self.now, self.by = 0.0, by

    def __call__(self):
        self.now += self.by
        return self.now


# --- what goes, and what never does


@pytest.mark.parametrize("seed", range(5))
def test_nothing_goes_but_what_is_over_and_was_told(outbox, seed):
    """Records of any state, origin, time of settling and time of telling, against the rule in two lines."""
    dice = random.Random(seed)
    kept, rows, told, before = set(), [], [], NOW - 30 * DAY
    everything = queue(outbox, 400)
    for record_id in everything:
        state, is_imported = dice.choice(STATES), dice.random() < 0.5
        settled_at = None if state == "pending" else NOW + dice.choice((-400, -31, -29, 1)) * DAY
        told_at = NOW + dice.choice((-400, -31, -29)) * DAY if is_imported and dice.random() < 0.6 else None
        rows.append((state, "o" if is_imported else None, settled_at, -7 if state == "exported" else None, record_id))
        told += [] if told_at is None else [(record_id, told_at)]

        over_at = told_at if is_imported else settled_at
        is_over = state in ("delivered", "discarded") and over_at is not None and over_at < before
        kept |= set() if is_over else {record_id}
    with contextlib.closing(sqlite3.connect(outbox.store.path)) as connection:
        connection.executemany("UPDATE record SET state = ?, origin = ?, settled_at = ?, batch = ? WHERE id = ?", rows)
        connection.executemany("INSERT INTO told (record_id, at) VALUES (?, ?)", told)
        connection.commit()
    ledger = Ledger(outbox.store)

    while ledger.prune(before):
        pass

    assert ids(outbox) == kept
    assert 0 < len(kept) < len(everything)


def test_what_belongs_to_a_record_goes_with_it(outbox):
    gone, stays = queue(outbox, 2)
    make_old(outbox)
    change(outbox, "UPDATE record SET state = 'failed' WHERE id = ?", stays)
    change(outbox, "UPDATE record SET origin = 'o' WHERE id = ?", gone)
    change(outbox, "INSERT INTO told VALUES (?, ?)", gone, NOW - DAY)
    for record_id in (gone, stays):
        change(outbox, "INSERT INTO attempt (record_id, at, outcome, duration_s) VALUES (?, 1, 'x', 0)", record_id)

    assert Pruner(outbox.store).prune(NOW) == 1
    assert Pruner(outbox.store).prune(NOW) == 0
    assert ask(outbox, "SELECT count(*) FROM told") == [(0,)]
    for table in ("attempt", "failure"):
        assert ask(outbox, f"SELECT record_id FROM {table}") == [(stays,)]
    assert review.stats(outbox.store).counts["delivered"] == 0


def test_a_record_that_was_told_and_waits_again_is_to_be_told_again(outbox):
    """Whatever led to it: a verdict that is not the one that was told must not be taken for it."""
    (record_id,) = queue(outbox, 1)
    change(outbox, "UPDATE record SET origin = 'o'")
    change(outbox, "INSERT INTO told VALUES (?, ?)", record_id, NOW - DAY)
    pruner = Pruner(outbox.store)

    assert [pruner.prune(NOW) for _ in range(2)] == [1, 0]
    assert ids(outbox) == {record_id}
    assert ask(outbox, "SELECT * FROM told") == []


def test_what_arrives_again_just_before_it_is_removed_stays(outbox, monkeypatch):
    (record_id,) = queue(outbox, 1)
    change(outbox, "UPDATE record SET origin = 'o', state = 'delivered', settled_at = 1")
    monkeypatch.setattr(Pruner, "_old", lambda *_: [(record_id, 1)])

    assert Pruner(outbox.store).prune(NOW) == 0
    assert ids(outbox) == {record_id}


def test_an_index_that_is_wrong_about_what_is_old_removes_nothing(outbox, monkeypatch):
    """It would name the same record for ever."""
    (record_id,) = queue(outbox, 1)
    monkeypatch.setattr(pruning, "FIND_OLD", "SELECT id, 1 FROM record WHERE ? OR ?")

    with pytest.raises(OutboxDamaged, match=f"wrong about record {record_id}"):
        Pruner(outbox.store).prune(NOW)
    assert ids(outbox) == {record_id}


def test_an_outbox_that_is_not_upgraded_yet_is_left_alone(tmp_path):
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in schema.statements(schema.EXPORTS_SINCE - 1):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {schema.EXPORTS_SINCE - 1}")
        connection.commit()
    with contextlib.closing(Store(path)) as store:
        assert Pruner(store).prune(NOW) == 0


def test_imported_batches_stay_known(outbox):
    """A file that turns up after years must add nothing."""
    queue(outbox, 1)
    change(outbox, "INSERT INTO arrival VALUES (1, 'u', 'o', 'h', 1, 1.0, 1.0, 5)")
    Pruner(outbox.store).prune(NOW)

    assert ask(outbox, "SELECT count(*) FROM arrival") == [(1,)]


# --- in steps


@pytest.mark.parametrize(("per_record_s", "least", "most"), [(0.0, 100, MOST_STEP), (0.003, 8, 12), (0.5, 1, 1)])
def test_transactions_are_as_long_as_the_disk_allows(outbox, per_record_s, least, most):
    """After the first one, which ends when its time is over."""
    queue(outbox, 1200)
    make_old(outbox)
    pruner = Pruner(outbox.store, Ticking(per_record_s))
    removed = [pruner.prune(NOW) for _ in range(6)]

    assert removed[0] <= FIRST_STEP
    assert least <= removed[-1] <= most
    assert max(removed) <= MOST_STEP


def test_large_records_make_small_steps(outbox):
    queue(outbox, 8, extra_metadata={"notes": "n" * 90_000, "more": {"n": 1}})
    change(outbox, "UPDATE record SET payload = zeroblob(400000)")
    make_old(outbox)
    pruner = Pruner(outbox.store, Ticking(0.0))

    assert [pruner.prune(NOW) for _ in range(5)] == [2, 2, 2, 2, 0]


class Slow:
    """Stands in for a ledger that has always more to do, in steps that take *takes_s* by its own clock."""

    def __init__(self, takes_s):
        self.now, self.takes_s, self.steps = 0.0, takes_s, 0

    def clock(self):
        return self.now

    def prune(self, _before):
        return 0

    def give_space_back(self):
        self.now += self.takes_s
        self.steps += 1
        return True


@pytest.mark.parametrize("takes_s", [0.0, 0.04, 2.0])
def test_between_two_steps_others_have_the_outbox_for_as_long_as_one_took(takes_s):
    """Else somebody who queues could wait for one step after the other."""
    ledger = Slow(takes_s)
    upkeep = Upkeep(ledger, ledger.clock)
    ledger.now = 0.5  # something else was done in the same turn, from 0 on
    upkeep.step(0.0, 0.0, None, Options())
    free_from, due_at = ledger.now, upkeep.step_at

    assert due_at - free_from == pytest.approx(max(takes_s, SHORTEST_REST_S))
    upkeep.step(due_at - 0.001, due_at - 0.001, None, Options())
    assert ledger.steps == 1
    upkeep.step(due_at, due_at, None, Options())
    assert ledger.steps == 2


# --- space


def test_the_file_shrinks_to_what_is_in_it_and_little_more(outbox):
    queue(outbox, 2500, scm_branch="b" * 3000)
    make_old(outbox)
    (kept,) = queue(outbox, 1, product_name="kept")
    path, ledger = outbox.store.path, Ledger(outbox.store)
    before = os.path.getsize(path)
    while ledger.prune(NOW):
        pass
    assert os.path.getsize(path) == before
    sizes = [before]
    while ledger.give_space_back():
        sizes.append(os.path.getsize(path))

    assert sizes == sorted(sizes, reverse=True)
    assert max(a - b for a, b in itertools.pairwise(sizes)) <= MOST_STEP * 4096
    assert os.path.getsize(path) < pruning.KEPT_FREE_BYTES + 1024 * 1024 < before // 2
    assert ask(outbox, "PRAGMA integrity_check") == [("ok",)]
    assert ids(outbox) == {kept}


def test_no_room_to_give_space_back_is_no_error(outbox, monkeypatch):
    queue(outbox, 1200, scm_branch="b" * 3000)
    make_old(outbox)
    pruner = Pruner(outbox.store)
    while pruner.prune(NOW):
        pass

    @contextlib.contextmanager
    def full():
        raise OutboxFull("no space left")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(outbox.store, "write", full)
        assert not pruner.give_space_back()
    assert pruner.give_space_back()
