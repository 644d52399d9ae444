"""Clocks that step, hosts that boot in 1970, and an outage of 45 days: nothing lost, nothing failed, no burst."""

from __future__ import annotations

import contextlib
import itertools
import json
import time

import freezegun
import pytest
from bench import DELIVERED, HERE, LIMITED, PATIENCE_S, SILENCE, UNAVAILABLE
from host import eventually
from scripted import accepted

from versioner_agent import Outbox, review
from versioner_agent.flusher import Flusher, Options
from versioner_agent.ledger import Ledger
from versioner_agent.storage import Store
from versioner_agent.upkeep import MAINTENANCE_S

HOUR, DAY, YEAR = 3600, 86_400, 365 * 86_400
START = "2026-12-01"
STEPS = pytest.mark.parametrize(
    "step", [HOUR, -HOUR, YEAR, -YEAR, "1970-01-01"], ids=["+1h", "-1h", "+1y", "-1y", "boot-in-1970"]
)


@pytest.fixture
def wall():
    """The wall clock; it moves only when told."""
    with freezegun.freeze_time(START) as frozen:
        yield frozen


def step_clock(wall, step):
    wall.move_to(step) if isinstance(step, str) else wall.tick(step)


def tries_while_away(b, wall, seconds, outcome):
    """Let *seconds* pass, each try answered with *outcome*; returns the moments of the tries."""
    moments = []
    for _ in range(seconds):
        wall.tick(1)
        if b.step(after=1.0):
            moments.append(b.now)
            b.answer_all(outcome)
    return moments


@STEPS
@pytest.mark.parametrize("outcome", [SILENCE, UNAVAILABLE], ids=["silence", "503"])
def test_a_step_of_the_clock_during_backoff_neither_stalls_nor_floods(bench, wall, step, outcome):
    b = bench(max_backoff=120.0)
    for product in "abc":
        b.queue(product, 4)
    b.step()
    b.answer_all(outcome)
    tries_while_away(b, wall, 1000, outcome)  # the backoff has grown to its cap

    step_clock(wall, step)
    stepped_at = b.now
    tries = [stepped_at, *tries_while_away(b, wall, 1000, outcome)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    while b.states() != {"delivered": 12}:
        b.step(after=1.0)
        b.drain(DELIVERED)

    assert max(gaps) <= 121
    assert min(gaps[1:]) >= 119
    assert all(b.wire.versions(product)[-4:] == ["1", "2", "3", "4"] for product in "abc")


@STEPS
def test_a_restart_believes_a_stored_pause_only_an_hour_ahead(bench, wall, tmp_path, step):
    """Whatever the clock was when it was written: at most an hour goes by before the next try."""
    b = bench()
    b.queue("a", 2)
    b.step()
    b.answer(("a", LIMITED._replace(wait_s=1800.0)))
    before = b.ledger.destination()[1].retry_at - time.time()
    step_clock(wall, step)
    now = time.monotonic()
    flusher = Flusher(b.ledger, b.wire, Options(), HERE)

    assert before == pytest.approx(1800, abs=5)
    assert flusher._pace.paused_until - now <= HOUR


@STEPS
def test_events_around_a_step_of_the_clock_keep_their_order(bench, wall, step):
    b = bench()
    b.queue("a", 3)
    step_clock(wall, step)
    b.queue("a", 3, first=4)

    b.drain()

    assert b.wire.versions("a") == ["1", "2", "3", "4", "5", "6"]


def test_a_host_that_boots_in_1970_queues_and_what_it_delivers_is_kept(bench, wall):
    """Without automatic times; settled by the API's clock, or the next clock would remove it at once."""
    wall.move_to("1970-01-02")
    b = bench()
    receipt = b.outbox.enqueue("build", {"product_name": "a", "version": "1", "status": "completed"})
    b.step()
    api_time = 1_796_083_200.0
    b.answer(("a", DELIVERED._replace(server_time=api_time)))
    wall.move_to(START)
    b.queue("a", 1, first=2)
    b.step()
    b.answer(("a", DELIVERED._replace(server_time=time.time())))
    b.step(after=MAINTENANCE_S + 1)
    b.step(after=MAINTENANCE_S + 1)

    assert "before the agent's release" in receipt.warnings[0]
    _, payload, _ = review.show(b.store, receipt.id)
    assert "completed_at" not in json.loads(payload)
    assert b.record(receipt.id).settled_at == api_time
    assert b.states() == {"delivered": 2}


@pytest.mark.parametrize("step", [YEAR, -YEAR], ids=["+1y", "-1y"])
def test_a_clock_that_steps_while_nothing_is_sent_does_not_cost_the_dedup_window(bench, wall, step):
    """The last answer said that the clock was right; that was before the step."""
    b = bench(retention_days=30.0)
    b.queue("a", 3)
    for _ in range(3):
        b.step()
        b.answer(("a", DELIVERED._replace(server_time=time.time())))
    wall.tick(step)
    for _ in range(5):
        b.step(after=MAINTENANCE_S + 1)

    assert b.states() == {"delivered": 3}


def test_only_the_apis_own_date_says_that_the_clock_is_right(bench, wall):
    """A portal on a host that is a year ahead too agrees with us, and must not have a say."""
    b = bench()
    b.queue("a", 2)
    b.step()
    b.answer(("a", DELIVERED._replace(server_time=time.time())))
    wall.tick(YEAR)
    for _ in range(3):
        b.step(after=MAINTENANCE_S)
        for product in list(b.wire._waiting):
            b.answer((product, UNAVAILABLE._replace(server_time=time.time())))

    assert b.states() == {"delivered": 1, "pending": 1}


# --- 45 days


class Away:
    """Nothing answers until *is_back*; counts the tries."""

    def __init__(self):
        self.is_back = False
        self.tries = 0
        self.arrived = []

    def send(self, kind, payload, idempotency_key):
        self.tries += 1
        if not self.is_back:
            return SILENCE
        self.arrived.append(json.loads(payload))
        return DELIVERED


def live(path, away, wall, seconds, max_backoff):
    """Run an agent for *seconds* of simulated time, going from one timer to the next."""
    with contextlib.closing(Store(path)) as store:
        ledger = Ledger(store)
        ledger.open(create=True)
        flusher = Flusher(ledger, away, Options(max_backoff=max_backoff), HERE, roll=lambda: 1.0)
        now = time.monotonic()
        end = now + seconds
        while now < end:
            flusher.step(now)
            while flusher._busy:
                if not flusher._arrived:
                    flusher._take(PATIENCE_S)
                flusher.step(now)
            due = flusher._pace.next_due(now) or now + 60
            wall.tick(due - now)
            now = due
        flusher.finish(0)


def outage(tmp_path, wall, max_backoff):
    """45 days without network, an event an hour, a restart a day; then the network is back."""
    path, away = str(tmp_path / "outbox.db"), Away()
    with Outbox(path) as outbox:
        for day in range(45):
            for hour in range(24):
                fields = {"product_name": f"p{hour % 3}", "version": str(day * 24 + hour), "status": "completed"}
                outbox.enqueue("build", fields)
            live(path, away, wall, DAY, max_backoff)
        tries, away.is_back = away.tries, True
        live(path, away, wall, 10 * max_backoff, max_backoff)
        counts = review.stats(outbox.store).counts

    # A day's tries: one an interval, and those in which the backoff grows to it.
    assert 45 * DAY / max_backoff * 0.9 < tries <= 45 * (DAY / max_backoff + 20)
    assert counts == {"pending": 0, "delivered": 45 * 24, "failed": 0, "exported": 0, "discarded": 0}
    for product in ("p0", "p1", "p2"):
        arrived = [int(event["version"]) for event in away.arrived if event["product_name"] == product]
        assert arrived == sorted(arrived)
        assert len(arrived) == 45 * 8


def test_an_outage_of_45_days_with_daily_restarts_loses_and_fails_nothing(tmp_path, wall):
    outage(tmp_path, wall, 3600)


@pytest.mark.long
def test_an_outage_of_45_days_at_the_default_backoff(tmp_path, wall):
    outage(tmp_path, wall, 120)


# --- a real agent


def test_an_agent_on_a_host_whose_clock_is_wrong_delivers_all_the_same(host_for, serve):
    """The clock of what is queued and of what delivers is a year off either way; the API's is right."""
    server = serve(lambda seen: accepted(f"evt-{seen.key}"))
    host = host_for(server.url)
    for number, moment in enumerate(("1970-01-01", "2025-01-01", "2028-01-01", START)):
        with freezegun.freeze_time(moment):
            host.queue("a", first=number)
    host.agent()

    eventually(lambda: host.counts() == {"delivered": 4})
    assert [seen.event["version"] for seen in server.requests] == ["0", "1", "2", "3"]
