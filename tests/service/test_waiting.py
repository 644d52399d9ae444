"""Waiting for verdicts: what is sent for it, what is not, and what is said when there is none."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time

import pytest
from host import KEY, eventually, free_port
from scripted import accepted, answer, dripped, hanging, refused

from versioner_agent import batches, config, review, selecting, upkeep, waiting
from versioner_agent import flush as flushing
from versioner_agent import outbox as outboxes
from versioner_agent.events import validate
from versioner_agent.ledger import Health, Seek
from versioner_agent.locks import FlusherLock
from versioner_agent.outbox import Outbox
from versioner_agent.records import Record
from versioner_agent.storage import Store
from versioner_agent.waiting import STILL_QUEUED, Waited, await_verdicts, exit_code, is_known

PATIENCE_S = 30.0
RULE = {
    "error": "deployment_blocked",
    "message": "production is frozen",
    "code": "NO_DEPLOY_WINDOW",
    "retry_after": "2030-01-01T00:00:00Z",
    "details": {"rule_name": "Freeze"},
}
PORTAL = b"<html>Please log in</html>"


class Place:
    """A private outbox, and waiting for what is in it."""

    def __init__(self, directory):
        directory.mkdir(mode=0o700)
        self.outbox = Outbox(directory / "outbox.db")
        self.path = self.outbox.store.path

    def queue(self, product, count=1, first=1, **fields):
        kind = "deployment" if "environment_name" in fields else "build"
        event = {"product_name": product, "status": "completed", **fields}
        return [
            self.outbox.enqueue(kind, {**event, "version": str(number)}).id for number in range(first, first + count)
        ]

    def wait(self, url, ids, within=PATIENCE_S, *, is_gate=False, key=KEY, **values):
        flags = {"db": self.path, "api_url": url, "max_backoff": 0.1, **values}
        env = {"VERSIONER_API_KEY": key} if key else {}
        return await_verdicts(config.resolve(flags, {}, []), env, ids, within, is_gate=is_gate)

    def states(self):
        with contextlib.closing(Store(self.path)) as store:
            return {record.id: record.state for page in selecting.select(store) for record in page}

    def change(self, sql, *values):
        with contextlib.closing(Store(self.path)) as store, store.write() as connection:
            connection.execute(sql, values)

    def health(self):
        with contextlib.closing(Store(self.path)) as store:
            return review.stats(store).health

    def is_in(self, state, reason="no route to host", next_attempt_at=None):
        self.change(
            "UPDATE destination SET state = ?, reason = ?, since = 1, next_attempt_at = ?",
            state,
            reason,
            next_attempt_at,
        )


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path / "state")
    yield made
    made.outbox.close()


@pytest.fixture
def somebody(place):
    """Somebody else's hold on the outbox: `claim_delivery`, `claim_agent`."""
    lock = FlusherLock(place.path)
    yield lock
    lock.close()


def products(server):
    return [(seen.product, seen.event["version"]) for seen in server.requests]


# --- verdicts


@pytest.mark.parametrize(
    ("kind", "reaction", "state", "reason", "code"),
    [
        ("build", accepted("evt-7"), "delivered", None, 0),
        ("build", refused(400), "failed", "invalid", 4),
        ("build", refused(409), "failed", "conflict", 4),
        ("deployment", refused(409), "failed", "conflict", 5),
        ("build", answer(409, RULE), "failed", "blocked", 5),
        ("deployment", answer(409, {"detail": RULE}), "failed", "blocked", 5),
        ("deployment", answer(423, RULE), "failed", "blocked", 5),
        ("deployment", answer(428, {"detail": RULE}), "failed", "blocked", 5),
    ],
)
def test_a_verdict_ends_the_waiting(place, serve, kind, reaction, state, reason, code):
    server = serve(lambda _: reaction)
    ids = place.queue("payments", **({"environment_name": "production"} if kind == "deployment" else {}))

    waited = place.wait(server.url, ids)

    assert [(record.state, record.reason) for record in waited.records] == [(state, reason)]
    assert waited.note == ""
    assert exit_code(waited.records) == code
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reaction", "words"),
    [
        (refused(401, "Invalid API key"), "the API is unauthorized: Invalid API key"),
        (answer(403, PORTAL), "the API is not_authentic"),
        (refused(404), "the API is misrouted"),
        (answer(302, b"", location="http://login.invalid/"), "the API is misrouted: redirected to"),
        (refused(503, "maintenance"), "the API is down: maintenance"),
        (refused(429, "slow down", retry_after="60"), "the API is rate_limited: slow down"),
    ],
)
def test_what_is_no_verdict_leaves_the_event_queued_and_says_why(place, serve, reaction, words):
    ids = place.queue("payments")
    url = serve(lambda _: reaction).url

    def told():
        waited = place.wait(url, ids, 0.3)  # which a busy machine may take for less than a try
        return waited if words in waited.note else None

    waited = eventually(told)

    assert [record.state for record in waited.records] == ["pending"]
    assert exit_code(waited.records) == STILL_QUEUED


def test_an_api_that_is_away_leaves_the_event_queued(place):
    waited = place.wait(f"http://127.0.0.1:{free_port()}", place.queue("payments"), 0.3)

    assert "the API is down: can't connect" in waited.note


def test_transient_failures_are_tried_again_within_the_timeout(place, serve):
    server = serve(lambda seen: refused(503) if seen.number < 3 else accepted())

    waited = place.wait(server.url, place.queue("payments"))

    assert waited.records[0].state == "delivered"
    assert len({seen.key for seen in server.requests}) == 1


def test_no_pause_is_longer_than_what_is_left(place, serve, monkeypatch):
    made = []
    real = flushing.Flusher
    monkeypatch.setattr(flushing, "Flusher", lambda *args, **more: made.append(args[2]) or real(*args, **more))

    place.wait(serve().url, place.queue("payments"), 7.0, max_backoff=120)

    assert 0 < made[0].max_backoff <= 7.0


def test_a_request_that_hangs_is_cut_off_at_the_end(place, serve):
    """And settled as unanswered: no grace is needed for it."""
    server = serve(lambda _: hanging())

    waited = place.wait(server.url, place.queue("payments"), 0.3)

    assert "no complete answer" in waited.note
    assert (waited.records[0].state, waited.records[0].unanswered) == ("pending", 1)


def test_an_answer_that_drips_is_none(place, serve):
    server = serve(lambda _: dripped(b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 100))

    waited = place.wait(server.url, place.queue("payments"), 0.5, timeout=0.3)

    assert "no complete answer" in waited.note


def test_a_timeout_of_0_looks_once_and_sends_nothing(place, serve):
    server = serve()
    ids = place.queue("payments")

    waited = place.wait(server.url, ids, 0)

    assert [record.state for record in waited.records] == ["pending"]
    assert waited.note == "no verdict within 0 s"
    assert server.requests == []


def test_records_come_in_the_order_of_the_ids(place, serve):
    first, second = place.queue("a") + place.queue("b")

    waited = place.wait(serve().url, [second, first, second])

    assert [record.id for record in waited.records] == [second, first]


# --- this event and what goes before it, nothing else


def test_what_goes_before_it_is_sent_first_and_nothing_else(place, serve):
    server = serve()
    place.queue("other")
    before = place.queue("payments", 3)
    (mine,) = place.queue("payments", first=4)
    place.queue("payments", 2, first=5)
    place.queue("zebra")

    waited = place.wait(server.url, [mine])

    assert waited.records[0].state == "delivered"
    assert products(server) == [("payments", str(number)) for number in range(1, 5)]
    states = place.states()
    assert {each for each in states if states[each] == "delivered"} == {*before, mine}


def test_each_key_is_sent_up_to_its_own_last_event(place, serve):
    server = serve()
    (early,) = place.queue("a")
    place.queue("b", 2)
    (late,) = place.queue("b", first=3)
    place.queue("a", first=2)

    place.wait(server.url, [early, late])

    assert sorted(products(server)) == [("a", "1"), ("b", "1"), ("b", "2"), ("b", "3")]


def test_more_keys_than_the_chooser_looks_for_at_once_are_all_sent(place, serve):
    server = serve()
    ids = [place.queue(f"product-{number}")[0] for number in range(150)]

    waited = place.wait(server.url, ids)

    assert {record.state for record in waited.records} == {"delivered"}
    assert len(server.requests) == 150


def test_what_waits_is_looked_at_by_pages(place, serve, monkeypatch):
    monkeypatch.setattr(review, "PAGE", 3)
    ids = place.queue("a", 4) + place.queue("b", 4)

    waited = place.wait(serve().url, ids)

    assert [(record.id, record.state) for record in waited.records] == [(each, "delivered") for each in ids]


def test_a_refused_predecessor_holds_nothing(place, serve):
    server = serve(lambda seen: refused(400) if seen.event["version"] == "1" else accepted())
    first, second = place.queue("payments", 2)

    waited = place.wait(server.url, [second])

    assert waited.records[0].state == "delivered"
    assert place.states()[first] == "failed"


def test_a_predecessor_that_waits_holds_it(place, serve):
    server = serve(lambda seen: refused(500, "boom") if seen.product == "payments" else accepted())
    _, second = place.queue("payments", 2)
    (other,) = place.queue("other")

    waited = place.wait(server.url, [other, second], 1.0)

    assert [record.state for record in waited.records] == ["delivered", "pending"]
    assert {version for product, version in products(server) if product == "payments"} == {"1"}


def test_what_holds_it_is_named_where_the_api_is_up(place, serve, somebody):
    assert somebody.claim_delivery()
    first, second = place.queue("payments", 2)
    place.change("UPDATE record SET reason = 'unavailable', detail = 'boom' WHERE id = ?", first)
    url = serve().url

    assert place.wait(url, [second], 0.1).note == f"{first} goes first (unavailable: boom)"
    assert place.wait(url, [first], 0.1).note == "unavailable: boom"


def test_a_batch_that_was_never_handed_over_is_sent_too(place, serve, monkeypatch):
    """Its enqueue died, or met a busy outbox, after it had published the batch."""
    monkeypatch.setattr(outboxes, "CHUNK", 2)
    monkeypatch.setattr(batches, "hand_over_batch", lambda _: False)
    fields = {"product_name": "payments", "status": "completed"}
    valid = [validate("build", {**fields, "version": str(number)}) for number in range(5)]
    ids = [receipt.id for receipt in place.outbox.enqueue_all(valid)]
    assert set(place.states()) == set()

    waited = place.wait(serve().url, ids)

    assert [record.state for record in waited.records] == ["delivered"] * 5


def test_looking_after_the_file_does_not_take_what_is_not_shown_for_damage(place, serve, monkeypatch, caplog):
    monkeypatch.setattr(upkeep, "MAINTENANCE_S", 0.0)
    place.queue("other")
    ids = place.queue("payments")
    before = os.stat(place.path).st_ino

    waited = place.wait(serve(lambda _: refused(503)).url, ids, 1.0)

    assert "the API is down" in waited.note
    assert os.stat(place.path).st_ino == before
    assert not [line for line in caplog.records if getattr(line, "action", "") in ("damage", "outbox_error")]


def test_waiting_prunes_what_is_old(place, serve):
    """On a host where nothing else delivers, nobody else would."""
    old = place.queue("payments", 3)
    place.change("UPDATE record SET state = 'delivered', settled_at = 1000")
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())

    place.wait(serve(lambda _: answer(200, {"id": "evt-1"}, date=date)).url, place.queue("payments", first=4))

    assert not set(old) & set(place.states())


# --- when it is somebody else's turn


def test_beside_somebody_who_delivers_nothing_is_sent(place, serve, somebody):
    assert somebody.claim_delivery()
    server = serve()
    ids = place.queue("payments")

    waited = place.wait(server.url, ids, 0.3)

    assert server.requests == []
    assert waited.note == f"no verdict within 0.3 s (pid {os.getpid()} has its turn at delivering)"


def test_when_who_delivered_leaves_it_is_our_turn(place, serve, somebody):
    """A flush may leave with the event still queued."""
    assert somebody.claim_delivery()
    server = serve()
    ids = place.queue("payments")
    timer = threading.Timer(0.3, somebody.close)
    timer.start()

    waited = place.wait(server.url, ids)

    timer.join()
    assert waited.records[0].state == "delivered"
    assert len(server.requests) == 1


def test_an_agent_that_waits_for_its_turn_is_not_overtaken(place, serve, somebody):
    assert somebody.claim_agent()
    server = serve()
    ours = FlusherLock(place.path)

    place.wait(server.url, place.queue("payments"), 0.3)

    assert server.requests == []
    assert not flushing.take_turn(ours)
    assert somebody.claim_delivery()
    ours.close()


def test_what_somebody_else_settles_ends_the_waiting(place, serve, somebody):
    assert somebody.claim_delivery()
    ids = place.queue("payments")
    settle = "UPDATE record SET state = 'failed', reason = 'invalid', detail = 'no'"
    timer = threading.Timer(0.3, place.change, (settle,))
    timer.start()

    waited = place.wait(serve().url, ids)

    timer.join()
    assert waited.records[0].reason == "invalid"


@pytest.mark.parametrize("which", ["file", "directory"])
def test_an_outbox_that_others_can_write_is_left_to_its_agent(place, serve, which):
    server = serve()
    ids = place.queue("payments")
    os.chmod(*{"file": (place.path, 0o660), "directory": (os.path.dirname(place.path), 0o2770)}[which])

    waited = place.wait(server.url, ids, 0.3)

    assert server.requests == []
    assert "others can write" in waited.note
    assert "none is running" in waited.note
    assert exit_code(waited.records) == STILL_QUEUED


# --- what is in the way is a note


def test_without_a_key_the_event_is_queued_and_the_note_says_so(place, serve):
    server = serve()
    waited = place.wait(server.url, place.queue("payments"), key="")

    assert "no API key" in waited.note
    assert "VERSIONER_API_KEY" in waited.note
    assert waited.records[0].state == "pending"
    assert server.requests == []


def test_another_destination_gets_nothing(place, serve):
    server = serve()
    ids = place.queue("payments")
    place.change("UPDATE destination SET origin = 'https://api.example', account = 'acme'")

    waited = place.wait(server.url, ids)

    assert "https://api.example" in waited.note
    assert server.requests == []
    assert not FlusherLock(place.path).presence().is_delivering


def test_a_ca_file_that_cannot_be_read_is_a_note(place, tmp_path):
    waited = place.wait("https://127.0.0.1:1", place.queue("payments"), ca_bundle=str(tmp_path / "none.pem"))

    assert "none.pem" in waited.note
    assert waited.records[0].state == "pending"


def test_an_outbox_that_is_gone_is_a_note(place, serve):
    ids = place.queue("payments")
    place.outbox.close()
    os.remove(place.path)

    waited = place.wait(serve().url, ids)

    assert waited.records == []
    assert waited.gone == ()
    assert "missing" in waited.note


def test_an_outbox_that_is_no_outbox_is_a_note(place, serve):
    ids = place.queue("payments")
    place.outbox.close()
    with open(place.path, "r+b") as file:
        file.write(b"garbage" * 100)

    waited = place.wait(serve().url, ids)

    assert waited.records == []
    assert place.path in waited.note
    assert "\n" not in waited.note


def test_a_busy_outbox_does_not_end_the_waiting_while_somebody_delivers(place, serve, somebody, monkeypatch):
    """Or a gate would open for a slow disk."""
    assert somebody.claim_delivery()
    ids = place.queue("payments")
    real, looks = review.by_id, []

    def by_id(store, page):
        looks.append(page)
        if len(looks) in (2, 3):
            raise waiting.OutboxBusy("locked")
        if len(looks) == 4:
            place.change("UPDATE record SET state = 'delivered'")
        return real(store, page)

    monkeypatch.setattr(review, "by_id", by_id)

    assert place.wait(serve().url, ids).records[0].state == "delivered"


def test_exported_records_are_not_waited_for(place, serve, somebody):
    somebody.claim_delivery()
    ids = place.queue("payments")
    place.change("UPDATE record SET state = 'exported'")

    waited = place.wait(serve().url, ids)

    assert waited.note == f"{ids[0]} is exported, waiting for a receipt"
    assert exit_code(waited.records) == STILL_QUEUED


def test_what_a_person_discarded_is_not_waited_for(place, serve):
    server = serve()
    ids = place.queue("payments")
    place.change("UPDATE record SET state = 'discarded'")

    waited = place.wait(server.url, ids)

    assert waited.note == f"a person discarded {ids[0]}"
    assert exit_code(waited.records) == 1
    assert server.requests == []


def test_a_record_that_vanished_is_left_out(place, serve):
    first, second = place.queue("payments", 2)
    place.change("DELETE FROM record WHERE id = ?", first)

    waited = place.wait(serve().url, [first, second])

    assert [record.id for record in waited.records] == [second]
    assert waited.gone == (first,)
    assert str(first) in waited.note


def test_the_verdict_of_another_event_under_the_same_id_is_none(place, serve, somebody):
    """Where a file was damaged, the next one may give an id anew."""
    assert somebody.claim_delivery()
    ids = place.queue("payments")
    change = "UPDATE record SET event_id = 'another', state = 'delivered'"
    timer = threading.Timer(0.3, place.change, (change,))
    timer.start()

    waited = place.wait(serve().url, ids)

    timer.join()
    assert waited == Waited([], f"the outbox has no record {ids[0]} any more", (ids[0],))


def test_a_duplicates_receipt_waits_for_the_record_that_was_first(place, serve):
    server = serve()
    first = place.queue("payments", invoke_id="42")
    again = place.queue("payments", invoke_id="42")
    assert first == again

    waited = place.wait(server.url, again)

    assert waited.records[0].state == "delivered"
    assert len(server.requests) == 1


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_settles_what_is_under_way_and_leaves_the_rest(place, serve, number):
    def script(_):
        os.kill(os.getpid(), number)
        return accepted()

    server = serve(script)
    ids = place.queue("payments", 2)

    waited = place.wait(server.url, ids)

    assert [record.state for record in waited.records] == ["delivered", "pending"]
    assert (waited.note, waited.signal) == ("interrupted", number)
    assert len(server.requests) == 1


# --- the gate


@pytest.mark.parametrize("state", ["down", "rate_limited", "proxy", "unauthorized", "misrouted", "not_authentic"])
def test_a_gate_does_not_wait_for_what_is_known_to_be_in_trouble(place, serve, somebody, state):
    assert somebody.claim_agent()
    assert somebody.claim_delivery()
    server = serve()
    ids = place.queue("payments", environment_name="production", status="started")
    place.is_in(state, next_attempt_at=time.time() + 10)

    waited = place.wait(server.url, ids, is_gate=True)

    assert waited.note == f"the API is {state}: no route to host"
    assert server.requests == []


def test_who_waits_without_a_gate_asks_all_the_same(place, serve):
    place.queue("payments")
    place.is_in("down", next_attempt_at=time.time() + 10)

    assert place.wait(serve().url, [1]).records[0].state == "delivered"


def test_without_an_agent_a_gate_finds_out_that_the_api_is_back(place, serve):
    place.queue("payments")
    place.is_in("down", next_attempt_at=time.time() + 10)

    assert place.wait(serve().url, [1], is_gate=True).records[0].state == "delivered"


def test_without_an_agent_a_gate_does_not_wait_for_an_api_that_is_still_down(place, monkeypatch):
    """Waiting for its timeout, this test would never end."""
    monkeypatch.setattr(waiting, "PROBE_S", 0.3)
    place.queue("payments")
    place.is_in("down", next_attempt_at=time.time() + 10)

    waited = place.wait(f"http://127.0.0.1:{free_port()}", [1], 1e6, is_gate=True)

    assert waited.records[0].state == "pending"
    assert waited.note.startswith("the API is down: can't connect")


def test_a_wait_that_was_too_short_says_nothing_of_the_api(place, serve):
    """And so keeps no gate from asking."""
    may_answer = threading.Event()
    server = serve(lambda _: may_answer.wait(30) and accepted())
    place.queue("payments")

    waited = place.wait(server.url, [1], 0.3)
    may_answer.set()

    assert "no complete answer" in waited.note
    assert place.health().state == "unknown"
    assert place.wait(server.url, [1], is_gate=True).records[0].state == "delivered"


def test_a_probe_that_was_cut_short_makes_what_is_known_no_newer(place, serve, monkeypatch):
    """Or an API that answers slowly would never be asked about its rules again."""
    monkeypatch.setattr(waiting, "PROBE_S", 0.3)
    server = serve(lambda _: hanging())
    place.queue("payments")
    place.is_in("down", next_attempt_at=time.time() + 10)
    before = place.health()

    assert place.wait(server.url, [1], 1e6, is_gate=True).note == "the API is down: no route to host"
    assert len(server.requests) == 1
    assert place.health() == before


def test_a_gate_waits_for_an_outbox_that_others_keep(place, serve):
    """Longer than one look at it does."""
    place.queue("payments")
    others = sqlite3.connect(place.path, isolation_level=None, check_same_thread=False)
    others.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, others.rollback).start()

    waited = place.wait(serve().url, [1], 1.2, is_gate=True, busy_timeout=0.1)

    assert waited.records[0].state == "delivered"
    others.close()


def test_nobody_waits_for_ever_for_an_agent_that_is_gone(place, monkeypatch):
    monkeypatch.setattr(waiting, "AWAY_S", 0.2)
    monkeypatch.setattr(waiting, "others_can_write", lambda _: "others can write it")
    place.queue("payments")

    waited = place.wait("http://127.0.0.1:9", [1], 1e6, is_gate=True)

    assert waited.note.endswith("only its agent delivers from it, and none is running")


def test_a_gate_asks_where_the_trouble_was_seen_long_ago(place, serve):
    place.queue("payments")
    place.is_in("down", next_attempt_at=time.time() - 3600)

    assert place.wait(serve().url, [1], is_gate=True).records[0].state == "delivered"


def test_a_gate_beside_an_agent_in_trouble_does_not_wait(place, serve, somebody):
    assert somebody.claim_agent()
    assert somebody.claim_delivery()
    place.queue("payments")
    place.is_in("down", next_attempt_at=time.time() - 1)

    assert place.wait(serve().url, [1], is_gate=True).note == "the API is down: no route to host"


def test_a_gate_waits_for_trouble_that_begins_while_it_waits(place, serve, somebody):
    """A blip must not open the gate."""
    assert somebody.claim_agent()
    assert somebody.claim_delivery()
    place.queue("payments")

    def blip():
        place.is_in("down", next_attempt_at=time.time() + 10)
        second.start()

    second = threading.Timer(0.3, place.change, ("UPDATE record SET state = 'delivered'",))
    first = threading.Timer(0.2, blip)
    first.start()

    waited = place.wait(serve().url, [1], is_gate=True)

    first.join()
    second.join()
    assert waited.records[0].state == "delivered"


def test_a_gate_tries_again_what_fails_just_now(place, serve):
    server = serve(lambda seen: refused(503) if seen.number < 4 else accepted())

    assert place.wait(server.url, place.queue("payments"), is_gate=True).records[0].state == "delivered"


def test_a_gate_lets_through_what_was_delivered_before_the_trouble(place, serve):
    ids = place.queue("payments", invoke_id="42")
    place.change("UPDATE record SET state = 'delivered'")
    place.is_in("down", next_attempt_at=time.time() + 10)

    assert place.wait(serve().url, ids, is_gate=True).note == ""


@pytest.mark.parametrize(
    ("state", "due_in", "has_agent", "known"),
    [
        ("up", 5, True, False),
        ("unknown", None, True, False),
        ("down", 5, False, True),
        ("down", -29, False, True),
        ("down", -31, False, False),
        ("down", None, False, False),
        ("down", None, True, True),
        ("down", -29, True, True),
        ("down", -31, True, False),  # an agent with nothing to send since
        ("rate_limited", 3599, False, True),
        ("down", 3601, False, False),  # a clock was wrong
        ("down", 3601, True, False),
    ],
)
def test_trouble_is_known_while_somebody_asks_again_and_again(state, due_in, has_agent, known):
    now = 1_000_000.0
    health = Health(state, "reason", 1.0, None if due_in is None else now + due_in)

    assert is_known(health, now, 30.0, has_agent=has_agent) == known


# --- exit codes


def record(state, reason=None, kind="build"):
    fields = dict.fromkeys(Record._fields)
    return Record(**{**fields, "state": state, "reason": reason, "kind": kind})


DELIVERED = record("delivered")
PENDING = record("pending")
INVALID = record("failed", "invalid")
BLOCKED = record("failed", "blocked")
DEPLOYMENT_409 = record("failed", "conflict", "deployment")


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ([], 0),
        ([DELIVERED], 0),
        ([PENDING], 75),
        ([record("exported")], 75),
        ([record("discarded")], 1),
        ([record("discarded"), PENDING], 75),
        ([INVALID], 4),
        ([record("failed", "conflict")], 4),
        ([record("failed", "gave_up")], 4),
        ([BLOCKED], 5),
        ([DEPLOYMENT_409], 5),
        ([DEPLOYMENT_409, BLOCKED], 5),
        ([BLOCKED, INVALID], 4),
        ([BLOCKED, PENDING, DELIVERED], 5),
        ([INVALID, PENDING], 4),
        ([record("failed", "damaged"), BLOCKED], 1),
    ],
)
def test_the_exit_code_is_the_worst_of_the_verdicts(records, code):
    assert exit_code(records) == code


def test_a_look_by_id_is_a_seek_and_so_is_the_first_of_a_key(place):
    place.queue("payments")
    with contextlib.closing(Store(place.path)) as store, store.read() as connection:
        queries = [(review.BY_ID.format("?, ?"), (1, 2)), (review.FIRST_PENDING, ("payments",))]
        plans = [
            " ".join(row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", values))
            for query, values in queries
        ]
    assert all("SEARCH" in plan and "SCAN" not in plan and "TEMP B-TREE" not in plan for plan in plans), plans


def test_the_keys_of_others_are_not_even_looked_at(place):
    """There may be a hundred thousand of them."""
    for product in ("a", "b", "c", "d"):
        place.queue(product, 2)
    with contextlib.closing(Store(place.path)) as store:
        wanted = review.by_id(store, [1, 5])
        excerpt = waiting._Excerpt(store, list(wanted.values()))

        assert excerpt.keys("", 10, ()) == Seek(["a", "c"], "", is_end=True)
        assert excerpt.keys("", 1, ()) == Seek(["a"], "a", is_end=False)
        assert excerpt.keys("a", 1, ()) == Seek(["c"], "c", is_end=False)
        assert excerpt.keys("", 10, {"a"}) == Seek(["c"], "", is_end=True)
        assert excerpt.keys("c", 1, ()) == Seek([], "", is_end=True)
        assert (excerpt.head("a")[0].id, excerpt.head("b")) == (1, None)
