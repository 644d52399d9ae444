"""A flusher stepped by hand: a real ledger on a real file, a sender whose answers are given one by one."""

from __future__ import annotations

import collections
import json
import queue
import threading
import time

from versioner_agent import review
from versioner_agent.flusher import Flusher, Options
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import Destination, Outbox
from versioner_agent.outcomes import Outcome, no_answer
from versioner_agent.storage import Store

PATIENCE_S = 20.0
HERE = Destination("https://api.example", "acme")
DELIVERED = Outcome("delivered", "", http_status=200, server_id="evt-1")
CONFLICT = Outcome("conflict", "exists with a different SHA", http_status=409)
UNAVAILABLE = Outcome("unavailable", "come back later", http_status=503)
LIMITED = Outcome("rate_limited", "slow down", http_status=429)
POISON = Outcome("unavailable", "internal error", http_status=500, counts=True)
SILENCE = no_answer("no route to host")


class Wire:
    """A list-backed Sender: every request waits for its answer."""

    def __init__(self):
        self.sent = []  # (product, version, idempotency key), in order
        self.changed = threading.Condition()
        self._answers = collections.defaultdict(queue.SimpleQueue)
        self._waiting = []

    def send(self, kind, payload, idempotency_key):
        event = json.loads(payload)
        product = event["product_name"]
        with self.changed:
            self.sent.append((product, event["version"], idempotency_key))
            self._waiting.append(product)
            self.changed.notify_all()
        answer = self._answers[product].get(timeout=PATIENCE_S)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def under_way(self, count):
        """Wait until *count* requests wait for their answers, and return their products."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self._waiting) == count, PATIENCE_S), self._waiting
            return list(self._waiting)

    def reply(self, product, outcome):
        with self.changed:
            self._waiting.remove(product)
        self._answers[product].put(outcome)

    def versions(self, product):
        return [version for name, version, _ in self.sent if name == product]


class Bench:
    """A flusher on a file of its own, with a clock that moves only when told."""

    def __init__(self, path, **options):
        self.path = str(path)
        self.outbox = Outbox(self.path)
        self.store = Store(self.path)
        self.ledger = Ledger(self.store)
        self.ledger.open(create=True)
        self.wire = Wire()
        self.failed = []
        self.now = 1000.0
        self.flusher = Flusher(
            self.ledger, self.wire, Options(**options), HERE, roll=lambda: 1.0, on_failed=self.failed.append
        )

    def queue(self, product, count=1, first=1):
        """Queue versions of *product*; returns their ids."""
        versions = [str(number) for number in range(first, first + count)]
        fields = {"product_name": product, "status": "completed"}
        return [self.outbox.enqueue("build", {**fields, "version": version}).id for version in versions]

    def step(self, after=0.0):
        """Step the flusher *after* seconds and return the products under way then."""
        self.now += after
        self.flusher.step(self.now)
        return self.wire.under_way(len(self.flusher._busy) - len(self.flusher._arrived) - self._unwritten())

    def answer(self, *replies, after=0.0, took=0.0):
        """Give answers, (product, outcome) each, settle them in that order as if they *took* so long, and step."""
        for product, outcome in replies:
            arrived = len(self.flusher._arrived)
            self.wire.reply(product, outcome)
            while len(self.flusher._arrived) == arrived:
                self.flusher._take(PATIENCE_S)
            # freezegun leaves threads their own clock; here all go by the one that stands still.
            self.flusher._arrived[-1] = self.flusher._arrived[-1]._replace(at=time.time(), duration_s=took)
        return self.step(after)

    def answer_all(self, outcome, after=0.0):
        return self.answer(*((product, outcome) for product in sorted(self.wire._waiting)), after=after)

    def drain(self, outcome=DELIVERED, steps=2000):
        """Answer everything alike until nothing is under way."""
        under_way = self.step()
        while under_way:
            steps -= 1
            assert steps, "this takes too long"
            under_way = self.answer_all(outcome)

    def record(self, record_id):
        return review.show(self.store, record_id)[0]

    def states(self):
        return {state: count for state, count in review.stats(self.store).counts.items() if count}

    def close(self):
        for product in list(self.wire._waiting):
            self.wire.reply(product, SILENCE)
        self.flusher.finish(2.0)
        self.outbox.close()
        self.store.close()

    def _unwritten(self):
        return len(self.flusher._unwritten)
