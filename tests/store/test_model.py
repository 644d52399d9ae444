"""The real outbox against a plain-Python model of it: whatever happens in whatever order, both agree.

The model knows the rules of order, duplicates and a record's life, and nothing of files, batches or SQL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
from dataclasses import dataclass

import pytest

pytest.importorskip("hypothesis", reason="a developer tool: pip install '.[dev]'")

import freezegun
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from versioner_agent import Outbox, events, review
from versioner_agent import outbox as outbox_module
from versioner_agent.ledger import Health, Ledger
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import Outcome, no_answer
from versioner_agent.policy import Counters, Limits, decide
from versioner_agent.settling import Settlement
from versioner_agent.storage import Store

HERE = Destination("https://api.example", "acme")
PRODUCTS = ("a", "b", "c")
LIVE = ("pending", "delivered", "exported")
DAY = 86_400
OUTCOMES = {
    "delivered": Outcome("delivered", "", http_status=200, server_id="evt"),
    "conflict": Outcome("conflict", "other SHA", http_status=409),
    "blocked": Outcome("blocked", "no window", http_status=423, code="NO_DEPLOY_WINDOW"),
    "invalid": Outcome("invalid", "bad", http_status=422),
    "server error": Outcome("unavailable", "oops", http_status=500, counts=True),
    "unavailable": Outcome("unavailable", "later", http_status=503, wait_s=5.0),
    "silence": no_answer("nothing"),
    "portal": Outcome("not_authentic", "HTML", http_status=200),
}

event = st.fixed_dictionaries(
    {
        "product_name": st.sampled_from(PRODUCTS),
        "version": st.sampled_from(("1", "2")),
        "status": st.sampled_from(("started", "completed")),
    },
    optional={"invoke_id": st.sampled_from(("7", "8")), "environment_name": st.sampled_from(("prod", "test"))},
)


@dataclass
class Known:
    """A record as the model knows it."""

    id: int
    event_id: str
    kind: str
    fields: dict[str, str]
    state: str = "pending"
    retries: int = 0
    settled_at: float | None = None

    @property
    def run(self):
        return tuple(self.fields.get(name) for name in ("invoke_id", "product_name", "environment_name"))


class Model(RuleBasedStateMachine):
    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="versioner-agent-model-")
        self.path = os.path.join(self.directory, "outbox.db")
        self.clock = freezegun.freeze_time("2026-12-01", tick=False)
        self.frozen = self.clock.start()
        self.chunk = outbox_module.CHUNK
        outbox_module.CHUNK = 3  # so that arrays of four are staged
        self.known: dict[int, Known] = {}
        self.last_id = 0
        self.deliveries = 0
        self.open()

    def open(self):
        self.outbox = Outbox(self.path)
        self.store = Store(self.path)
        self.ledger = Ledger(self.store)
        self.ledger.open(create=True)

    def close(self):
        self.outbox.close()
        self.store.close()

    def teardown(self):
        self.close()
        outbox_module.CHUNK = self.chunk
        self.clock.stop()
        shutil.rmtree(self.directory)

    # --- the model's rules

    def find_duplicate(self, kind, fields):
        if "invoke_id" not in fields:
            return None
        same = [k for k in self.known.values() if (k.kind, k.fields) == (kind, fields)]
        alive = [k for k in same if k.state in LIVE]
        if kind == "deployment":
            run = tuple(fields.get(name) for name in ("invoke_id", "product_name", "environment_name"))
            newest = max(
                (k for k in self.known.values() if k.kind == kind and k.run == run), key=lambda k: k.id, default=None
            )
            alive = [k for k in alive if k is newest]
        return min(alive, key=lambda k: k.id) if alive else None

    def pending_of(self, product):
        ids = [k.id for k in self.known.values() if k.state == "pending" and k.fields["product_name"] == product]
        return sorted(ids)

    def take_receipt(self, kind, fields, receipt, *, new):
        duplicate = None if new else self.find_duplicate(kind, fields)
        if duplicate is not None:
            assert (receipt.outcome, receipt.id, receipt.event_id) == ("duplicate", duplicate.id, duplicate.event_id)
            return duplicate.id
        assert (receipt.outcome, receipt.id) == ("queued", self.last_id + 1)
        self.last_id = receipt.id
        self.known[receipt.id] = Known(receipt.id, receipt.event_id, kind, fields)
        return receipt.id

    # --- what people and processes do

    @rule(target=ids, fields=event, new=st.sampled_from((False, False, False, True)))
    def enqueue(self, fields, new):
        kind = "deployment" if "environment_name" in fields else "build"
        receipt = self.outbox.enqueue(kind, fields, new=new)
        return self.take_receipt(kind, fields, receipt, new=new)

    @rule(target=ids, many=st.lists(event, min_size=1, max_size=8))
    def enqueue_array(self, many):
        kinds = ["deployment" if "environment_name" in fields else "build" for fields in many]
        valid = [events.validate(kind, fields) for kind, fields in zip(kinds, many, strict=True)]
        receipts = self.outbox.enqueue_all(valid)
        taken = [
            self.take_receipt(kind, fields, receipt, new=False)
            for kind, fields, receipt in zip(kinds, many, receipts, strict=True)
        ]
        return multiple(*taken)

    @rule(product=st.sampled_from(PRODUCTS), name=st.sampled_from(sorted(OUTCOMES)))
    def deliver(self, product, name):
        head = self.ledger.head(product)
        waiting = self.pending_of(product)
        if not waiting:
            assert head is None
            return
        record, payload = head
        known = self.known[waiting[0]]
        assert (record.id, record.event_id, record.retries) == (known.id, known.event_id, known.retries)
        assert f'"product_name":"{product}"'.encode() in payload
        now = time.time()
        counters = Counters(record.counted, record.counted_since, record.counted_mark)
        decision = decide(
            OUTCOMES[name], counters, Limits(3, 0.0),
            queued_at=record.queued_at, deliveries=self.deliveries, had_unanswered=record.unanswered > 0, now=now,
        )  # fmt: skip
        left = self.ledger.settle([Settlement(record, OUTCOMES[name], decision, now, 0.1)], Health("up"), HERE)
        assert left == []
        self.deliveries += decision.state == "delivered"
        known.state = decision.state
        known.settled_at = None if decision.state == "pending" else now
        assert decision.state in {
            "delivered": ("delivered",), "conflict": ("failed",), "blocked": ("failed",), "invalid": ("failed",),
            "server error": ("pending", "failed"),
        }.get(name, ("pending",))  # fmt: skip

    @rule(record_id=ids)
    def retry(self, record_id):
        known = self.known.get(record_id)
        (verdict,) = review.retry(self.store, [record_id])
        if known is None:
            assert verdict.outcome == "not_found"
            return
        if known.state not in ("failed", "exported"):
            assert verdict.outcome == "refused"
            return
        later = [k for k in self.known.values() if k.id > record_id]
        has_run = "invoke_id" in known.fields
        if has_run and any((k.kind, k.fields) == (known.kind, known.fields) and k.state in LIVE for k in later):
            assert verdict.outcome == "superseded"
        elif has_run and any((k.kind, k.run) == (known.kind, known.run) and k.state == "delivered" for k in later):
            assert verdict.outcome == "out_of_order"
        else:
            assert verdict.outcome == "retried"
            known.state, known.settled_at = "pending", None
            known.retries += 1

    @rule(record_id=ids, pending_too=st.booleans())
    def discard(self, record_id, pending_too):
        known = self.known.get(record_id)
        (verdict,) = review.discard(self.store, [record_id], pending_too=pending_too)
        allowed = ("failed", "exported", "pending") if pending_too else ("failed", "exported")
        if known is not None and known.state in allowed:
            assert verdict.outcome == "discarded"
            known.state = "discarded"
            known.settled_at = time.time()
        else:
            assert verdict.outcome == ("not_found" if known is None else "refused")

    @rule(days=st.sampled_from((0, 1, 400)))
    def prune(self, days):
        before = time.time() - days * DAY
        removed = sum(iter(lambda: self.ledger.prune(before), 0))
        old = [k for k in self.known.values() if k.state in ("delivered", "discarded") and k.settled_at < before]
        assert removed == len(old)
        for known in old:
            del self.known[known.id]

    @rule(jump=st.sampled_from((1, 3600, -3600, 365 * DAY, -365 * DAY)))
    def jump(self, jump):
        self.frozen.tick(jump)

    @rule()
    def reopen(self):
        self.close()
        self.open()

    @rule()
    def crash(self):
        """Somebody dies in the middle of a transaction, and what they staged is nobody's."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("UPDATE record SET state = 'discarded'")
            other.execute("DELETE FROM batch")
        self.close()
        self.open()

    # --- what holds at any time

    @invariant()
    def both_agree(self):
        with self.store.read() as connection:
            found = connection.execute("SELECT id, event_id, state, retries FROM record ORDER BY id").fetchall()
        assert found == [
            (k.id, k.event_id, k.state, k.retries) for k in sorted(self.known.values(), key=lambda k: k.id)
        ]

    @invariant()
    def what_is_told_is_what_is_there(self):
        counts = {state: count for state, count in review.stats(self.store).counts.items() if count}
        states = [k.state for k in self.known.values()]
        assert counts == {state: states.count(state) for state in set(states)}
        assert self.ledger.pending() == states.count("pending")

    @invariant()
    def every_product_that_waits_is_found_once(self):
        found = self.ledger.keys("", 10, ())
        assert found.keys == [product for product in PRODUCTS if self.pending_of(product)]


def at_length(examples):
    """Settings for so many lives of an outbox, of forty steps each."""
    return settings(max_examples=examples, stateful_step_count=40, suppress_health_check=list(HealthCheck))


class TestOutboxAgainstModel(Model.TestCase):
    settings = at_length(int(os.environ.get("EXAMPLES", "60")))


@pytest.mark.long
class TestOutboxAgainstModelAtLength(Model.TestCase):
    settings = at_length(600)
