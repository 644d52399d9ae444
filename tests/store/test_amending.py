"""Corrected copies: what they keep, what they change, and that copy and discarding are one."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
from crash import killed_at, needs_strace

from versioner_agent import amending, events, review, selecting
from versioner_agent.amending import Correction, amend, correction, planned
from versioner_agent.errors import OutboxError, OutboxFull, ValidationError
from versioner_agent.filters import Filter
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import Outbox
from versioner_agent.records import digest_of, is_intact

BUILD = {"product_name": "a", "version": "1", "status": "ok"}
DEPLOYMENT = {"product_name": "a", "version": "1", "environment_name": "prod", "status": "ok"}


def set_state(outbox, state, *ids, **columns):
    named = {"state": state, "settled_at": 1.8e9, **columns}
    words = ", ".join(f"{name} = :{name}" for name in named)
    with outbox.store.write() as connection:
        for record_id in ids:
            connection.execute(f"UPDATE record SET {words} WHERE id = :id", {**named, "id": record_id})


def failed(outbox, kind="build", /, **fields):
    record_id = outbox.enqueue(kind, {**(BUILD if kind == "build" else DEPLOYMENT), **fields}).id
    set_state(outbox, "failed", record_id, reason="conflict", detail="exists with another SHA")
    return record_id


def only(found):
    (amendment,) = found
    return amendment


def amended(outbox, record_id, *assignments, unset=(), **how):
    return only(amend(outbox, [record_id], correction(assignments, unset), **how))


def payload(outbox, record_id):
    return json.loads(review.show(outbox.store, record_id)[1])


def test_a_copy_is_a_new_event_with_the_times_and_metadata_of_the_old_one(outbox):
    old_id = failed(outbox, invoke_id="7", scm_sha="abc", extra_metadata={"team": "core"}, status="started")
    old, before, _ = review.show(outbox.store, old_id)
    with Outbox(outbox.store.path, queued_by="ann") as others:
        found = amended(others, old_id, "version=2", "extra_metadata.why=typo")
    new, after, attempts = review.show(outbox.store, found.amended_by)
    before, after = json.loads(before), json.loads(after)

    assert (found.outcome, found.amended_by) == ("amended", 2)
    assert found.changes == {"version": ("1", "2"), "extra_metadata.why": (None, "typo")}
    assert new.state == "pending"
    assert (new.amends, new.queued_at, new.queued_by, new.invoke_id) == (old_id, old.queued_at, "ann", "7")
    assert new.event_id != old.event_id
    assert is_intact(new, review.show(outbox.store, 2)[1])
    assert (new.attempts, attempts, new.reason) == (0, [], None)
    assert after["started_at"] == before["started_at"]
    metadata = before["extra_metadata"] | {"vi_agent_event_id": new.event_id, "why": "typo"}
    assert after == {**before, "version": "2", "extra_metadata": metadata}
    discarded = review.show(outbox.store, old_id)[0]
    assert (discarded.state, discarded.reason, discarded.detail) == ("discarded", "conflict", "exists with another SHA")
    assert review.amended_by(outbox.store, old_id) == 2
    assert review.amended_by(outbox.store, 2) is None


def test_a_copy_goes_behind_what_its_product_has_waiting(outbox):
    old = failed(outbox)
    outbox.enqueue("build", {**BUILD, "version": "5"})
    amended(outbox, old, "version=2")

    assert Ledger(outbox.store).head("a")[0].version == "5"


@pytest.mark.parametrize(
    ("assignment", "changes"),
    [
        ("status=failed", {"status": ("completed", "failed")}),
        ("product_name=b", {"product_name": ("a", "b")}),
        ("scm_sha= def ", {"scm_sha": (None, "def")}),
        ("environment_name=x=y", {"environment_name": ("prod", "x=y")}),
        ("skip_preflight_checks=TRUE", {"skip_preflight_checks": (None, True)}),
        ('extra_metadata={"n": 1}', {"extra_metadata.k": ("v", None), "extra_metadata.n": (None, 1)}),
        ("extra_metadata.k.l=1", {"extra_metadata.k.l": (None, "1")}),
        ("deploy_url=", {"deploy_url": ("https://d", None)}),
    ],
)
def test_every_kind_of_field_can_be_changed(outbox, assignment, changes):
    found = amended(outbox, failed(outbox, "deployment", deploy_url="https://d", extra_metadata={"k": "v"}), assignment)
    record, body, _ = review.show(outbox.store, found.amended_by)
    fields = json.loads(body)

    assert found.changes == changes
    assert record.content == events.contents_of(record.kind, body, record.queued_at)[0]
    assert [getattr(record, name) for name in ("product_name", "version", "environment_name", "status")] == [
        fields[name] for name in ("product_name", "version", "environment_name", "status")
    ]
    assert fields["extra_metadata"]["vi_agent_host"] == os.uname().nodename


def test_automatic_times_follow_the_status(outbox):
    """What ended has an end, what has started has not: the time is still that of queuing."""
    old = failed(outbox)
    moment = events.rfc3339(review.show(outbox.store, old)[0].queued_at)

    assert amended(outbox, old, "status=started").changes == {
        "completed_at": (moment, None), "status": ("completed", "started"), "started_at": (None, moment),
    }  # fmt: skip


def test_fields_are_left_out_too(outbox):
    old = failed(outbox, scm_sha="abc", extra_metadata={"k": "v", "n": 1})
    found = amended(outbox, old, unset=["scm_sha", "extra_metadata.k", "build_url"])

    assert found.changes == {"scm_sha": ("abc", None), "extra_metadata.k": ("v", None)}


@pytest.mark.parametrize(
    ("assignments", "unset", "words"),
    [
        (["version"], [], "must be FIELD=VALUE"),
        (["versoin=1"], [], "did you mean 'version'"),
        (["kind=deployment"], [], "unknown field"),
        (["extra_metadata.=1"], [], "unknown field"),
        (["skip_preflight_checks=perhaps"], [], "must be true or false"),
        (["extra_metadata=[1]"], [], "one JSON object"),
        (["version=1"], ["version"], "both set and unset"),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused(assignments, unset, words):
    with pytest.raises(ValidationError) as caught:
        correction(assignments, unset)

    assert words in " ".join(caught.value.problems)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("status=zonk", "record 1: status: unknown status"),
        ("version= ", "record 1: version: must not be empty"),
        ("deploy_url=x", "record 1: deploy_url: is not a field of a build"),
        ("completed_at=yesterday", "record 1: completed_at:"),
    ],
)
def test_nothing_is_done_while_one_of_them_would_be_invalid(outbox, assignment, words):
    failed(outbox)
    failed(outbox, "deployment", version="2")
    wanted = correction([assignment], [])
    for call in (planned, amend):
        with pytest.raises(ValidationError) as caught:
            list(call(outbox, Filter("failed"), wanted))
        assert any(problem.startswith(words) for problem in caught.value.problems)

    assert review.stats(outbox.store).counts == {
        "pending": 0,
        "delivered": 0,
        "failed": 2,
        "exported": 0,
        "discarded": 0,
    }


@pytest.mark.parametrize(
    ("state", "columns", "words"),
    [
        ("delivered", {}, "it is delivered"),
        ("discarded", {}, "it is discarded"),
        ("exported", {}, "the far side has it"),
        ("failed", {"version": "altered"}, "damaged"),
    ],
)
def test_what_can_not_be_amended_is_refused(outbox, state, columns, words):
    set_state(outbox, state, failed(outbox), **columns)
    found = amended(outbox, 1, "version=2")

    assert found.outcome == "refused"
    assert words in found.detail
    assert review.show(outbox.store, 2) is None


def test_a_record_is_amended_once(outbox):
    old = failed(outbox)
    amended(outbox, old, "version=2")
    again = amended(outbox, old, "version=3")

    assert (again.outcome, again.amended_by, again.detail) == ("refused", 2, "it was amended as 2")
    assert amended(outbox, 9, "version=2").outcome == "not_found"


def test_a_copy_can_be_amended_again_and_frees_what_waits(outbox):
    amended(outbox, failed(outbox), "version=2")

    assert amended(outbox, 2, "version=3").amended_by == 3
    assert [review.show(outbox.store, each)[0].state for each in (1, 2, 3)] == ["discarded", "discarded", "pending"]


def test_without_a_change_nothing_is_done(outbox):
    old = failed(outbox, scm_sha="abc")

    assert amended(outbox, old, "scm_sha=abc", "status=success").outcome == "unchanged"
    assert review.show(outbox.store, old)[0].state == "failed"


@pytest.mark.parametrize("kind", ["build", "deployment"])
def test_a_copy_does_not_repeat_the_event_that_it_amends(outbox, kind):
    """What makes no difference for duplicates can be corrected while the event waits."""
    old = failed(outbox, kind, invoke_id="7")
    set_state(outbox, "pending", old)

    assert amended(outbox, old, "extra_metadata.vi_agent_note=x").outcome == "amended"


@pytest.mark.parametrize("kind", ["build", "deployment"])
def test_a_copy_that_repeats_a_live_event_is_superseded(outbox, kind):
    first = outbox.enqueue(kind, {**DEPLOYMENT, "invoke_id": "7", "version": "2"} if kind == "deployment" else
                           {**BUILD, "invoke_id": "7", "version": "2"}).id  # fmt: skip
    set_state(outbox, "delivered", first)
    old = failed(outbox, kind, invoke_id="7")
    found = amended(outbox, old, "version=2", out_of_order=True)

    assert (found.outcome, found.detail) == ("superseded", f"the corrected event was queued before as {first}")
    assert review.show(outbox.store, old)[0].state == "failed"


def test_a_deployment_that_differs_from_the_newest_of_its_run_is_a_transition(outbox):
    for version in "23":
        outbox.enqueue("deployment", {**DEPLOYMENT, "invoke_id": "7", "version": version})
    old = failed(outbox, "deployment", invoke_id="7")

    assert amended(outbox, old, "version=2").outcome == "amended"


def test_what_a_later_event_of_its_run_has_overtaken_is_refused(outbox):
    """A corrected `started` after its `completed` would leave the run in progress for ever."""
    old = failed(outbox, "deployment", invoke_id="7", status="started")
    later = outbox.enqueue("deployment", {**DEPLOYMENT, "invoke_id": "7"}).id
    set_state(outbox, "delivered", later)

    assert "--out-of-order" in amended(outbox, old, "scm_sha=a").detail
    assert amended(outbox, old, "scm_sha=a", out_of_order=True).outcome == "amended"


@pytest.mark.parametrize("state", ["delivered", "pending"])
@pytest.mark.parametrize("times", [1, 3])
def test_the_corrected_start_of_a_run_is_no_later_event_of_it(outbox, state, times):
    """An agent delivers the copy of a `started` while the `completed` behind it is still to be corrected."""
    started, completed = [failed(outbox, invoke_id="7", status=status) for status in ("started", "completed")]
    for number in range(times):
        started = amended(outbox, started, f"version=2.{number}").amended_by
        set_state(outbox, "failed", started)
    set_state(outbox, state, started)
    record = review.show(outbox.store, completed)[0]
    with outbox.store.read() as connection:
        assert review.retry_objection(connection, record, out_of_order=False) is None

    found = amended(outbox, completed, "version=2")
    assert (found.outcome, found.amended_by, found.detail) == ("amended", started + 1, "")
    assert amended(outbox, completed, "version=2").detail == f"it was amended as {started + 1}"


def test_the_corrected_end_of_a_run_is_a_later_event_of_it(outbox):
    started, completed = [failed(outbox, invoke_id="7", status=status) for status in ("started", "completed")]
    copy = amended(outbox, completed, "version=2").amended_by
    set_state(outbox, "delivered", copy)

    found = amended(outbox, started, "version=2")
    assert (found.outcome, found.detail.split()[0]) == ("refused", str(copy))


def test_fields_that_were_let_through_unknown_stay(outbox):
    outbox.enqueue("build", {**BUILD, "novel": [1]}, allow_unknown=True)
    set_state(outbox, "failed", 1)
    amended(outbox, 1, "version=2")

    assert payload(outbox, 2)["novel"] == [1]


def test_a_field_that_nobody_knows_can_be_left_out_where_the_event_has_it(outbox):
    """It may be what the API refuses; a name that is mistyped is noticed all the same."""
    outbox.enqueue("build", {**BUILD, "novel": [1]}, allow_unknown=True)
    set_state(outbox, "failed", 1)
    with pytest.raises(ValidationError, match="did you mean 'version'"):
        amended(outbox, 1, unset=["vresion"])

    assert amended(outbox, 1, unset=["novel"]).changes == {"novel": ([1], None)}
    assert "novel" not in payload(outbox, 2)


def test_copies_are_queued_in_the_order_of_their_events_however_they_are_named(outbox):
    """`list` shows the newest first, and ids are copied from there."""
    ids = [failed(outbox, invoke_id="7", status=status) for status in ("started", "completed")]
    found = list(amend(outbox, [2, 1, 2], correction(["version=2"], [])))

    assert [each.id for each in found] == ids
    assert [payload(outbox, each.amended_by)["status"] for each in found] == ["started", "completed"]


def test_what_waits_of_the_same_run_is_told_for_it_goes_first(outbox):
    old = failed(outbox, invoke_id="7", status="started")
    later = outbox.enqueue("build", {**BUILD, "invoke_id": "7"}).id

    assert amended(outbox, old, "scm_sha=a").detail == f"{later} of the same run waits, and goes first"


@pytest.mark.parametrize("body", [b"[1]", b"null", b"{}", b"no JSON", b"[" * 5000, b'{"n": ' + b"9" * 5000 + b"}"])
def test_a_payload_that_is_no_event_is_refused_and_keeps_no_other_from_being_amended(outbox, body):
    """Whoever shares an outbox can write to it, and give a record a digest that fits."""
    ids = [failed(outbox, version=version) for version in "12"]
    record = review.show(outbox.store, ids[0])[0]
    set_state(outbox, "failed", ids[0], payload=body, digest=digest_of(record, body))
    found = list(amend(outbox, Filter("failed"), correction(["scm_sha=a"], [])))

    assert [each.outcome for each in found] == ["refused", "amended"]
    assert "no event" in found[0].detail


def test_what_would_be_invalid_and_came_after_the_plan_is_left_as_it_is(outbox, monkeypatch):
    ids = [failed(outbox, "deployment", version=version) for version in "12"]
    looked_at = list(planned(outbox, Filter("failed"), correction(["deploy_url=x"], [])))
    failed(outbox)
    monkeypatch.setattr(amending, "planned", lambda *_, **__: looked_at)
    found = list(amend(outbox, Filter("failed"), correction(["deploy_url=x"], [])))

    assert [(each.id, each.outcome) for each in found] == [(ids[0], "amended"), (ids[1], "amended"), (3, "refused")]
    assert "not a field of a build" in found[2].detail


def test_an_imported_deployment_of_the_same_run_makes_no_transition(outbox):
    """Nothing that is queued here counts as its repeat, and it is none of ours (see `outbox`)."""
    deployment = {**DEPLOYMENT, "invoke_id": "7", "version": "2"}
    first = outbox.enqueue("deployment", deployment).id
    imported = outbox.enqueue("deployment", {**deployment, "version": "3"}).id
    set_state(outbox, "pending", imported, origin="a" * 32, identity=None)

    assert outbox.enqueue("deployment", deployment).outcome == "duplicate"
    found = amended(outbox, failed(outbox, "deployment", invoke_id="7"), "version=2")
    assert (found.outcome, found.detail) == ("superseded", f"the corrected event was queued before as {first}")


def test_an_event_of_a_batch_that_is_still_handed_over_is_queued_already(outbox):
    old = failed(outbox, invoke_id="7")
    set_state(outbox, "staged", outbox.enqueue("build", {**BUILD, "invoke_id": "7", "version": "2"}).id, batch=1)
    with outbox.store.write() as connection:
        connection.execute("INSERT INTO batch (id, kind, created_at, published) VALUES (1, 'enqueue', 1, 1)")

    assert amended(outbox, old, "version=2").outcome == "superseded"


def test_a_plan_writes_nothing(outbox):
    old = failed(outbox)
    found = only(planned(outbox, [old], Correction({"version": "2"}, ())))

    assert (found.outcome, found.changes) == ("planned", {"version": ("1", "2")})
    assert review.show(outbox.store, old)[0].state == "failed"
    assert review.show(outbox.store, 2) is None


def test_a_thousand_are_amended_each_once_though_the_copies_fit_the_filter_too(outbox, monkeypatch):
    monkeypatch.setattr(selecting, "WINDOW", 300)
    outbox.enqueue_all([events.validate("build", BUILD)] * 1000)
    found = list(amend(outbox, Filter("pending"), correction(["extra_metadata.n=1"], [])))

    assert [(each.id, each.outcome, each.amended_by) for each in found] == [
        (number, "amended", 1000 + number) for number in range(1, 1001)
    ]
    assert review.stats(outbox.store).counts["pending"] == 1000


def test_on_a_full_disk_nothing_is_half_done(outbox, monkeypatch):
    old = failed(outbox)
    monkeypatch.setattr(outbox.store, "free_space", lambda: 0)
    monkeypatch.setattr("versioner_agent.reserve.has_room_inside", lambda *_: False)
    with pytest.raises(OutboxFull):
        amended(outbox, old, "version=2")

    assert review.show(outbox.store, old)[0].state == "failed"


def test_an_outbox_of_an_older_schema_is_left_as_it_is(outbox):
    failed(outbox)
    outbox.store.close()
    with sqlite3.connect(outbox.store.path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()

    with pytest.raises(OutboxError, match="earlier version"):
        amended(outbox, 1, "version=2")


@needs_strace
def test_killed_at_any_write_there_is_a_copy_or_there_is_none(outbox, tmp_path):
    """Both the copy and the discarding, or neither; another run does the rest."""
    old = failed(outbox)
    outbox.close()
    env = {**os.environ, "VERSIONER_AGENT_DB": outbox.store.path, "VERSIONER_AGENT_CONFIG": str(tmp_path / "c.toml")}
    (tmp_path / "c.toml").write_text("")
    command = (sys.executable, "-m", "versioner_agent", "amend", str(old), "--set", "version=2", "--yes")
    outcomes = set()
    for call in ("pwrite64", "fdatasync"):
        for number in range(1, 60):
            was_killed, done = killed_at(call, number, command, env=env)
            copy = review.amended_by(outbox.store, old)
            state = review.show(outbox.store, old)[0].state
            assert (state, copy is None) in (("failed", True), ("discarded", False)), (call, number)
            outcomes.add(state if was_killed else "done")
            if copy is not None:
                with outbox.store.write() as connection:
                    connection.execute("DELETE FROM record WHERE id = ?", (copy,))
                set_state(outbox, "failed", old, reason="conflict")
            outbox.close()
            if not was_killed:
                assert done.returncode == 0, done.stderr
                break
        else:
            pytest.fail("it never came to its end")
    assert outcomes >= {"failed", "discarded", "done"}


def test_an_interrupted_run_of_many_leaves_pairs(outbox):
    outbox.enqueue_all([events.validate("build", BUILD)] * 200)
    code = """
import sys
from versioner_agent.amending import amend, correction
from versioner_agent.filters import Filter
from versioner_agent.outbox import Outbox
for each in amend(Outbox(sys.argv[1]), Filter("pending"), correction(["version=2"], [])):
    print(each.id, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, outbox.store.path], stdout=subprocess.PIPE)
    with process:
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    counts = review.stats(outbox.store).counts

    assert counts["discarded"] >= 20
    assert counts["pending"] == 200
    for record_id in range(1, 201):
        is_discarded = review.show(outbox.store, record_id)[0].state == "discarded"
        assert is_discarded == (review.amended_by(outbox.store, record_id) is not None)
