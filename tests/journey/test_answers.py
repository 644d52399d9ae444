"""Every row of the table of answers, played by a server: a record ends where it says, and what waits arrives later."""

from __future__ import annotations

import collections

import pytest
from host import KEY, eventually
from scripted import accepted, answer, closed, hanging, raw, refused, reset

RULE = {
    "error": "deployment_blocked",
    "message": "production is frozen",
    "code": "NO_DEPLOY_WINDOW",
    "retry_after": "2030-01-01T00:00:00Z",
    "details": {"rule_name": "Freeze"},
}
PORTAL = b"<html>Please log in</html>"

#: what is answered -> the record's reason; every one of them settles the event.
SETTLING = {
    "409": (refused(409, "exists with a different SHA"), "conflict"),
    "409 with a rule": (answer(409, {"detail": RULE}), "blocked"),
    "409 with a flat rule": (answer(409, RULE), "blocked"),
    "423": (answer(423, RULE), "blocked"),
    "428": (answer(428, {"detail": RULE}), "blocked"),
    **{str(status): (refused(status), "invalid") for status in (400, 411, 413, 414, 415, 422, 431)},
    "422 with fields": (answer(422, {"detail": [{"loc": ["body", "version"], "msg": "too long"}]}), "invalid"),
    "400 with a message": (answer(400, {"message": "no"}), "invalid"),
}

#: what is answered -> the attempt's outcome; none of them settles anything.
WAITING = {
    **{str(status): (refused(status), "unavailable") for status in (408, 425, 500, 501, 502, 503, 504, 599)},
    "503 of a proxy": (answer(503, PORTAL), "unavailable"),
    "429": (refused(429, "slow down", retry_after="0"), "rate_limited"),
    "407": (answer(407, PORTAL), "proxy"),
    "302": (answer(302, b"", location="http://login.invalid/"), "misrouted"),
    "308 with an id": (answer(308, {"detail": "moved"}, location="/elsewhere"), "misrouted"),
    "200 with HTML": (answer(200, PORTAL), "not_authentic"),
    "200 without a body": (answer(200, b""), "not_authentic"),
    "200 without an id": (answer(200, {"status": "ok"}), "not_authentic"),
    "200 with an empty id": (answer(200, {"id": " "}), "not_authentic"),
    "200 with a refusal": (answer(200, {"detail": "no"}), "not_authentic"),
    "201 with a list": (answer(201, [{"id": "evt-1"}]), "not_authentic"),
    "204": (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "not_authentic"),
    "511": (refused(511, "log in first"), "not_authentic"),
    **{f"{status} with HTML": (answer(status, PORTAL), "not_authentic") for status in (400, 401, 403, 404, 409, 422)},
    "409 without words": (answer(409, {}), "not_authentic"),
    **{str(status): (refused(status), "unauthorized") for status in (401, 402, 403)},
    **{str(status): (refused(status), "misrouted") for status in (404, 405, 410, 421, 426)},
    **{str(status): (refused(status), "misrouted") for status in (406, 418, 451, 499)},
    "closed": (closed(), "no_answer"),
    "reset": (reset(), "no_answer"),
    "garbage": (raw(b"\x00\x01\x02"), "no_answer"),
    "half an answer": (raw(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"id": "evt-1"'), "no_answer"),
    "oversized": (answer(200, b"x" * 100_000), "no_answer"),
    "nothing at all": (hanging(), "no_answer"),
}


@pytest.mark.parametrize(("reaction", "reason"), SETTLING.values(), ids=SETTLING)
def test_a_refusal_is_final_and_kept_in_the_words_of_the_api(host_for, serve, reaction, reason):
    server = serve(lambda _: reaction)
    host = host_for(server.url)
    (record_id,) = host.queue("payments", environment_name="production")

    done = host.run("flush", "--timeout", "30")

    record, _, attempts = host.record(record_id)
    assert (record.state, record.reason) == ("failed", reason)
    assert len(attempts) == len(server.requests) == 1
    assert record.detail
    assert done.returncode == (4 if reason == "invalid" else 5), done.stderr
    if reason == "blocked":
        assert (record.code, record.rule, record.retry_after) == ("NO_DEPLOY_WINDOW", "Freeze", "2030-01-01T00:00:00Z")


@pytest.mark.parametrize("reason", sorted({reason for _, reason in WAITING.values()}))
def test_answers_that_are_no_verdict_delay_events_until_the_api_answers(host_for, serve, reason):
    """All answers of a kind, each to a product of its own, twice to each."""
    check_delayed(host_for, serve, reason, {name: each for name, (each, why) in WAITING.items() if why == reason})


@pytest.mark.long
@pytest.mark.parametrize("name", WAITING)
def test_each_of_them_alone_delays_an_event(host_for, serve, name):
    reaction, reason = WAITING[name]
    check_delayed(host_for, serve, reason, {name: reaction})


def check_delayed(host_for, serve, reason, reactions):
    asked = collections.Counter()

    def script(seen):
        asked[seen.product] += 1
        return reactions[seen.product] if asked[seen.product] <= 2 else accepted("evt-9")

    server = serve(script)
    host = host_for(server.url)
    ids = [host.queue(product)[0] for product in reactions]

    done = host.run("flush", "--timeout", "30", "--request-timeout", "0.5")

    assert done.returncode == 0, done.stderr
    for record_id in ids:
        record, _, attempts = host.record(record_id)
        assert (record.state, record.server_id) == ("delivered", "evt-9"), record.product_name
        assert [each.outcome for each in attempts] == [reason, reason, "delivered"], record.product_name
    assert len({(seen.key, seen.body) for seen in server.requests}) == len(ids)


def test_what_waits_stays_pending_with_the_reason_shown(host_for, serve):
    server = serve(lambda _: answer(200, PORTAL))
    host = host_for(server.url)
    (record_id,) = host.queue("payments")

    done = host.run("flush", "--timeout", "0.5")

    (status,) = host.json("status")
    assert done.returncode == 75
    assert status["destination"]["state"] == "not_authentic"
    assert status["held"] == [
        {"product_name": "payments", "id": record_id, "since": status["held"][0]["since"], "reason": "not_authentic"}
    ]
    assert host.record(record_id)[0].state == "pending"


def test_many_products_get_many_answers_and_each_record_ends_where_it_should(host_for, serve):
    cases = {f"{name}-product": case for name, case in {**SETTLING, **WAITING}.items() if name != "nothing at all"}
    seen_once = set()

    def script(seen):
        reaction, reason = cases[seen.product]
        is_first = seen.key not in seen_once
        seen_once.add(seen.key)
        settles = reason in ("conflict", "blocked", "invalid")
        # Answers to one product must not close the connection under another one's request: each gets its own.
        return reaction if settles or is_first else accepted(f"evt {seen.key}")

    host = host_for(serve(script).url)
    ids = {product: host.queue(product)[0] for product in cases}
    host.agent()
    eventually(lambda: host.counts().get("pending") is None)

    found = {product: host.record(record_id)[0] for product, record_id in ids.items()}
    for product, (_, reason) in cases.items():
        expected = "failed" if reason in ("conflict", "blocked", "invalid") else "delivered"
        assert found[product].state == expected, product


def test_a_key_that_was_wrong_is_read_again_before_each_try(host_for, serve):
    good = "sk_acme_k2_good"

    def script(seen):
        return accepted() if seen.headers["authorization"] == f"Bearer {good}" else refused(401, "no such key")

    host = host_for(serve(script).url)
    file = host.directory / "api_key"
    file.write_text(KEY)
    host.agent(VERSIONER_API_KEY="", VERSIONER_AGENT_API_KEY_FILE=str(file))
    host.queue("payments", 3)
    eventually(lambda: host.health().state == "unauthorized")

    file.write_text(good)
    eventually(lambda: host.counts() == {"delivered": 3})
