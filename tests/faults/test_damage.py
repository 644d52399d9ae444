"""Broken files: whatever happened to the bytes of an outbox, what can be proven goes on, and nothing else is sent.

The oracle knows from the sound file where each record lies. After a mutation it reads the record at that place, and
where the digest still fits, the record must have been saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading

import pytest
from specimen import HERE, MUTATIONS, PRODUCTS, Specimen, records_of

from versioner_agent import damage, review
from versioner_agent.flusher import Flusher, Options
from versioner_agent.ledger import Ledger
from versioner_agent.outcomes import Outcome
from versioner_agent.storage import Store

SEED = int(os.environ.get("SEED", "20261125"))
TURNS = int(os.environ.get("TURNS", "223"))  # of the long test: times nine kinds of damage


class Wire:
    """Answers every event with a delivery and remembers what was sent."""

    def __init__(self):
        self.sent = []
        self._guard = threading.Lock()

    def send(self, kind, payload, idempotency_key):
        with self._guard:
            self.sent.append((idempotency_key, payload))
        return Outcome("delivered", "", http_status=200, server_id="evt", account="acme")


def drained(ledger):
    """Deliver everything that is pending; returns what was sent."""
    wire = Wire()
    flusher = Flusher(ledger, wire, Options(), HERE)
    flusher.run(flusher.is_drained)
    flusher.finish(5)
    return wire.sent


def check_saved(specimen, ledger, provable):
    """Start on a broken outbox, and hold what came of it against what can be proven."""
    mended = ledger.open(create=True)

    found = records_of(ledger.store.path)
    assert set(found) <= set(specimen.kept), "a record that never was, or was pruned"
    assert provable <= set(found), f"{len(provable - set(found))} provable records were not saved"
    assert [found[id_] for id_ in provable] == [specimen.kept[id_] for id_ in provable]
    stats = review.stats(ledger.store)
    assert stats.damage == mended
    assert sum(stats.counts.values()) == len(found)
    assert stats.destination in (HERE, (None, None))
    if mended is not None and mended.kept is not None:
        assert os.path.exists(mended.kept)


def check_sent(specimen, sent, provable):
    """Nothing altered was sent, everything provable was, and in order."""
    by_event = {kept.event_id: kept for kept in specimen.kept.values()}
    assert all(by_event[key].payload == payload for key, payload in sent)
    pending = {specimen.kept[id_].event_id for id_ in provable if specimen.kept[id_].state == "pending"}
    assert pending <= {key for key, _ in sent}
    assert all(by_event[key].state == "pending" for key, _ in sent)
    for product in range(PRODUCTS):
        order = [by_event[key].id for key, body in sent if json.loads(body)["product_name"] == f"product-{product}"]
        assert order == sorted(set(order))


def survives(specimen, directory, mutate, seed):
    path = specimen.copy_to(directory)
    mutate(path, random.Random(seed))
    provable = specimen.provable(path)
    with contextlib.closing(Store(path)) as store:
        ledger = Ledger(store)
        check_saved(specimen, ledger, provable)
        check_sent(specimen, drained(ledger), provable)
        assert damage.find(store) is None


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return Specimen(tmp_path_factory.mktemp("large"), 10 * 1024 * 1024, SEED)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    return Specimen(tmp_path_factory.mktemp("middle"), 4 * 1024 * 1024, SEED)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Specimen(tmp_path_factory.mktemp("small"), 700_000, SEED)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_every_provable_record_survives_and_no_altered_one_is_sent(small, tmp_path, mutate, turn):
    survives(small, tmp_path, mutate, f"{SEED}-{mutate.__name__}-{turn}")


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_the_same_of_four_megabytes(middle, tmp_path, mutate):
    survives(middle, tmp_path, mutate, f"{SEED}-middle-{mutate.__name__}")


@pytest.mark.long
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_two_thousand_broken_outboxes_of_ten_megabytes(large, tmp_path, mutate):
    for turn in range(TURNS):
        directory = tmp_path / str(turn)
        directory.mkdir()
        survives(large, directory, mutate, f"{SEED}-long-{mutate.__name__}-{turn}")
        shutil.rmtree(directory)
