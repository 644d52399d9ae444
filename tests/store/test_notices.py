"""What authors are told while queuing: each condition, and that looking costs little and breaks nothing."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading

import pytest
from freezegun import freeze_time
from specimen import make_tables

from versioner_agent import Outbox, events, notices
from versioner_agent.locks import FlusherLock
from versioner_agent.notices import LOST_WITH_CONTAINER, Notices, Subject, binding, unattended_s
from versioner_agent.storage import Store

NOW = 1_800_000_000.0
BUILD = {"product_name": "my-service", "version": "1.2.3", "status": "completed"}
IMMUTABLE = "the API will refuse this with 409: versions are immutable"
#: Before the fixture of all tests puts another in its place.
IS_IN_CONTAINER = notices._is_in_container


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "outbox.db")


@pytest.fixture(autouse=True)
def clock():
    with freeze_time("2027-01-15T08:00:00Z") as frozen:
        yield frozen


def queue(path, **fields):
    """Queue one event as a process of its own does; returns its receipt."""
    with Outbox(path) as outbox:
        return outbox.enqueue("build", {**BUILD, **fields})


def queue_all(path, *fields):
    with Outbox(path) as outbox:
        return outbox.enqueue_all([events.validate("build", {**BUILD, **each}) for each in fields])


def change(path, statement, values=()):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(statement, values)
        connection.commit()


def settled(path, state, record_id=1):
    change(path, "UPDATE record SET state = ?, settled_at = 1 WHERE id = ?", (state, record_id))


# --- nobody empties it


@pytest.mark.parametrize(
    ("oldest", "signs", "idle_s"),
    [
        (None, (None, None, None), 0.0),
        (NOW - 1500, (None, None, None), 1500),
        (NOW - 1500, (NOW - 700, NOW - 900, None), 700),
        (NOW - 1500, (None, None, NOW - 5), 5),
        (NOW - 5, (NOW - 1500, None, NOW - 2000), 5),
        (NOW + 60, (None, None, None), -60),
    ],
)
def test_an_outbox_is_unattended_since_the_last_sign_of_a_flusher(oldest, signs, idle_s):
    assert unattended_s(oldest, signs, NOW) == idle_s


def waited(path, seconds=1500):
    queue(path)
    change(path, "UPDATE record SET queued_at = ?", (NOW - seconds,))


UNATTENDED = (
    "nothing has emptied this outbox for 25 min: start the agent (`versioner-agent service install --now`) "
    "or run `versioner-agent flush`"
)


def test_that_nobody_empties_the_outbox_is_said_after_ten_minutes(path):
    waited(path, 590)
    assert queue(path).warnings == ()
    change(path, "UPDATE record SET queued_at = ?", (NOW - 1500,))

    assert queue(path).warnings == (UNATTENDED,)


@pytest.mark.parametrize("sign", ["flusher", "tried", "delivered"])
def test_a_sign_of_a_flusher_within_ten_minutes_is_enough(path, sign):
    waited(path)

    def sign_at(then):
        if sign == "flusher":
            with open(f"{path}.flusher", "ab"):
                os.utime(f"{path}.flusher", (then, then))
        elif sign == "tried":
            change(path, "UPDATE record SET last_attempt_at = ? WHERE id = 1", (then,))
        else:
            change(path, "UPDATE destination SET last_delivered_at = ?", (then,))

    sign_at(NOW - 1500)
    assert queue(path).warnings == (UNATTENDED,)
    sign_at(NOW - 590)
    assert queue(path).warnings == ()


@pytest.mark.parametrize("claim", [FlusherLock.claim_agent, FlusherLock.claim_delivery])
def test_who_holds_the_lock_empties_the_outbox_however_long_ago_it_began(path, claim):
    waited(path)
    with contextlib.closing(FlusherLock(path)) as lock:
        assert claim(lock)
        os.utime(f"{path}.flusher", (1, 1))
        assert queue(path).warnings == ()

    assert queue(path).warnings == (UNATTENDED,)


def test_a_duplicate_is_told_of_the_outbox_and_of_nothing_else(path):
    queue(path, version="1.0", product_name="other")
    queue(path, invoke_id="7", scm_sha="abc")
    queue(path)
    settled(path, "failed", 3)
    change(path, "UPDATE record SET queued_at = ?", (NOW - 1500,))

    again = queue(path, invoke_id="7", scm_sha="abc")

    assert (again.outcome, again.warnings) == ("duplicate", (UNATTENDED,))


# --- lost with the container


@pytest.mark.parametrize(
    ("has_marker", "root", "outbox", "is_lost"),
    [
        (True, os.makedev(0, 52), os.makedev(0, 52), True),
        (True, os.makedev(0, 52), os.makedev(0, 53), False),
        (True, os.makedev(0, 52), os.makedev(254, 0), False),
        (True, os.makedev(254, 0), os.makedev(254, 0), False),
        (False, os.makedev(0, 52), os.makedev(0, 52), False),
    ],
    ids=["layer", "another layer", "volume", "machine made of an image", "no container"],
)
def test_an_outbox_on_a_layer_is_lost_with_its_container(has_marker, root, outbox, is_lost):
    assert notices.is_lost_with_container(root, outbox, has_marker=has_marker) == is_lost


@pytest.mark.parametrize("marker", ["KUBERNETES_SERVICE_HOST", "container", "file", None])
def test_a_container_is_known_by_its_marks(monkeypatch, tmp_path, marker):
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(notices, "_MARKER_FILES", (str(tmp_path / "mark"),))
    if marker == "file":
        (tmp_path / "mark").touch()
    elif marker:
        monkeypatch.setenv(marker, "podman")

    assert IS_IN_CONTAINER("/") == (marker is not None and os.major(os.stat("/").st_dev) == 0)
    monkeypatch.setattr(os, "major", lambda _: 0)
    assert IS_IN_CONTAINER("/") == (marker is not None)
    assert not IS_IN_CONTAINER("/proc")


def test_what_is_lost_with_the_container_is_said_unless_an_agent_empties_it(path, monkeypatch):
    monkeypatch.setattr(notices, "_is_in_container", lambda directory: directory == os.path.dirname(path))

    assert queue(path).warnings == (LOST_WITH_CONTAINER,)
    with contextlib.closing(FlusherLock(path)) as lock:
        assert lock.claim_agent()
        assert queue(path).warnings == ()


# --- the destination


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("unauthorized", "events wait: the API refuses the key (unauthorized for 3 h; HTTP 401: Invalid API key)"),
        ("misrouted", "events wait: api_url does not lead to the API (misrouted for 3 h; HTTP 401: Invalid API key)"),
        *((state, None) for state in ("unknown", "up", "down", "rate_limited", "proxy", "not_authentic")),
    ],
)
def test_a_destination_that_needs_a_person_is_named(path, state, words):
    queue(path)
    destination = (state, "HTTP 401:\nInvalid API key", NOW - 3 * 3600)
    change(path, "UPDATE destination SET state = ?, reason = ?, since = ?", destination)

    assert queue(path).warnings == ((f"{words}: `versioner-agent status` says what to do",) if words else ())


def test_what_is_not_known_of_the_destination_is_left_out(path):
    queue(path)
    change(path, "UPDATE destination SET state = 'unauthorized', reason = NULL, since = NULL")
    (without,) = queue(path).warnings
    change(path, "UPDATE destination SET reason = ?", ("w" * 2000,))
    (long,) = queue(path).warnings

    assert "(unauthorized): " in without
    assert len(long) < 250


# --- earlier refusals


def test_earlier_refusals_of_the_same_product_are_counted(path):
    queue_all(path, *[{"version": str(number)} for number in range(4)])
    assert queue(path).warnings == ()

    settled(path, "failed", 1)
    assert queue(path).warnings == ("1 event of my-service was refused, see versioner-agent list --state failed",)
    settled(path, "failed", 2)
    assert queue(path).warnings == ("2 events of my-service were refused, see versioner-agent list --state failed",)
    assert queue(path, product_name="other").warnings == ()
    settled(path, "discarded", 1)
    settled(path, "delivered", 2)
    assert queue(path).warnings == ()


@pytest.mark.parametrize(("refused", "count"), [(999, "999 events"), (1000, "1000 or more events"), (1200, "1000 or")])
def test_no_more_than_a_thousand_refusals_are_counted(path, refused, count):
    queue_all(path, *[{"version": str(number)} for number in range(1200)])
    change(path, "UPDATE record SET state = 'failed' WHERE id <= ?", (refused,))

    (warning,) = queue(path).warnings

    assert warning.startswith(count)


# --- another commit


def test_another_commit_of_a_version_that_was_queued_is_announced_as_a_conflict(path):
    queue_all(path, *[{"version": f"0.{number}"} for number in range(16)], {"scm_sha": "abc123"})

    assert queue(path, scm_sha="def456").warnings == (
        "my-service 1.2.3 was queued before with scm_sha abc123 (record 17), now with def456: " + IMMUTABLE,
    )
    assert queue(path, scm_sha="abc123").warnings == ()


@pytest.mark.parametrize(
    "other",
    [{}, {"scm_sha": "def", "version": "1.2.4"}, {"scm_sha": "def", "product_name": "other"}],
    ids=["no commit", "another version", "another product"],
)
def test_what_the_api_takes_is_no_conflict(path, other):
    queue(path, scm_sha="abc")

    assert queue(path, **other).warnings == ()


@pytest.mark.parametrize("sha", ["abc1", "ab", "ABC"])
def test_a_commit_is_the_same_only_when_its_text_is(path, sha):
    """The API compares texts: an abbreviation is another commit to it."""
    queue(path, scm_sha="abc")

    assert len(queue(path, scm_sha=sha).warnings) == 1


@pytest.mark.parametrize(
    ("state", "warnings"), [("pending", 1), ("delivered", 1), ("exported", 1), ("failed", 0), ("discarded", 0)]
)
def test_only_what_is_or_will_be_at_the_api_binds_a_version(path, state, warnings):
    queue(path, scm_sha="abc")
    settled(path, state)

    told = [each for each in queue(path, scm_sha="def").warnings if "immutable" in each]

    assert len(told) == warnings


def test_a_version_is_bound_by_what_was_delivered_else_by_the_first():
    """So a wrong one that waits to be refused does not make the right one look wrong."""
    wrong, right = b'{"scm_sha": "bad"}', b'{"scm_sha": "good"}'

    assert binding([(1, "pending", wrong), (2, "delivered", right)]) == (2, "good")
    assert binding([(2, "pending", wrong), (1, "pending", right)]) == (1, "good")
    assert binding([(1, "delivered", b"{}"), (2, "pending", right)]) == (2, "good")
    assert binding([]) is None


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"\xff\xfe", b"[" * 60_000, b"[]", b'{"scm_sha": 7}', b'{"extra_metadata": {"scm_sha": "x"}}'],
)
def test_a_body_that_says_nothing_of_a_commit_binds_nothing(path, payload):
    queue(path, scm_sha="abc")
    change(path, "UPDATE record SET payload = ?", (payload,))

    assert queue(path, scm_sha="def").warnings == ()


def test_large_bodies_are_passed_over(path):
    queue(path, scm_sha="abc", extra_metadata={"notes": "n" * 70_000})
    assert queue(path, scm_sha="def").warnings == ()

    assert "(record 2)" in queue(path, scm_sha="ghi").warnings[0]


def test_the_first_of_a_version_and_the_last_are_looked_at(path):
    queue_all(path, {"scm_sha": "abc"}, *[{}] * 25)
    assert "(record 1)" in queue(path, scm_sha="def").warnings[0]
    settled(path, "discarded", 1)

    assert "(record 27)" in queue(path, scm_sha="ghi").warnings[0]


def test_no_more_than_twenty_from_either_end_are_looked_at(path):
    """A version may have been refused a million times."""
    queue_all(path, *[{}] * 22, {"scm_sha": "abc"}, *[{}] * 22)
    change(path, "UPDATE record SET state = 'discarded' WHERE id <> 23")

    assert queue(path, scm_sha="def").warnings == ()
    change(path, "DELETE FROM record WHERE id > 42")
    assert "(record 23)" in queue(path, scm_sha="def").warnings[0]


def test_events_of_one_call_are_compared_with_those_before_them(path):
    fields = ({"scm_sha": "abc"}, {"scm_sha": "def"}, {"scm_sha": "abc"}, {"scm_sha": "def"}, {})

    told = [len(receipt.warnings) for receipt in queue_all(path, *fields)]

    assert told == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("count", [20, 700], ids=["at once", "staged"])
def test_each_event_of_a_batch_is_told_its_own(path, count):
    queue_all(path, {"product_name": "p1"}, {"product_name": "p2", "scm_sha": "abc"})
    settled(path, "failed", 1)
    batch = [{"product_name": f"p{number % 4}", "scm_sha": "def", "version": "1.2.3"} for number in range(count)]

    receipts = queue_all(path, *batch)

    assert {(receipt.product_name, receipt.warnings) for receipt in receipts} == {
        ("p0", ()),
        ("p1", ("1 event of p1 was refused, see versioner-agent list --state failed",)),
        ("p2", (f"p2 1.2.3 was queued before with scm_sha abc (record 2), now with def: {IMMUTABLE}",)),
        ("p3", ()),
    }


def test_of_a_batch_fifty_products_and_versions_are_looked_at(path):
    named = [{"product_name": f"p{number}", "scm_sha": "abc"} for number in range(60)]
    queue_all(path, *named)
    queue_all(path, *[{"product_name": f"p{number}"} for number in range(60)])
    change(path, "UPDATE record SET state = 'failed' WHERE id > 60")

    told = [len(receipt.warnings) for receipt in queue_all(path, *[{**each, "scm_sha": "def"} for each in named])]

    assert told == [2] * 50 + [0] * 10


def test_long_names_are_shortened(path):
    long = {"product_name": "p" * 50_000, "version": "v" * 5000}
    queue(path, **long, scm_sha="a" * 5000)
    queue(path, **long)
    settled(path, "failed", 2)

    assert all(len(warning) < 600 for warning in queue(path, **long, scm_sha="b" * 5000).warnings)


# --- what it costs, and what can go wrong


def test_every_look_up_seeks_an_index_and_sorts_nothing(outbox):
    """So that it costs the same at a million records as at ten."""
    outbox.enqueue("build", BUILD)
    key = ("my-service", "1.2.3", 9)
    plans = {
        notices.OLDEST_PENDING: ((), "USING INDEX record_state (state=?)"),
        notices.DESTINATION: ((), "SEARCH destination USING INTEGER PRIMARY KEY"),
        notices.COUNT_REFUSED: (("my-service", 1000), "INDEX record_refused (product_name=?)"),
        notices.FIRST_OF_VERSION: (key, "COVERING INDEX record_version (product_name=? AND version=? AND rowid<?)"),
        notices.LAST_OF_VERSION: (key, "COVERING INDEX record_version (product_name=? AND version=? AND rowid<?)"),
    }
    with outbox.store.read() as connection:
        for query, (values, wanted) in plans.items():
            steps = [row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + query, values).fetchall()]

            assert any(wanted in step for step in steps), steps
            assert all("USING" in step for step in steps if "record" in step), steps
            assert not any("TEMP B-TREE" in step for step in steps), steps


def test_the_outbox_as_a_whole_is_looked_at_once_a_second(path, clock, monkeypatch):
    waited(path)
    looks = []
    monkeypatch.setattr(notices, "_is_in_container", looks.append)
    with Outbox(path) as outbox:
        told = []
        for _ in range(4):
            told.append(outbox.enqueue("build", BUILD).warnings)
            clock.tick(0.4)

    assert len(looks) == 2
    assert told == [(UNATTENDED,)] * 4


def test_a_locked_outbox_is_not_waited_for_and_nothing_is_said(path):
    waited(path)
    opened, locked, answers = threading.Event(), threading.Event(), []

    def look():
        with contextlib.closing(Store(path, busy_timeout=3600)) as store:
            with store.read():
                opened.set()
            locked.wait()
            answers.append(Notices(store).on([Subject(1, "my-service", "1.2.3", None), None]))

    looking = threading.Thread(target=look)
    looking.start()
    opened.wait()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        locked.set()
        looking.join(30)
        is_waiting = looking.is_alive()
    looking.join()

    assert not is_waiting
    assert answers == [[(), ()]]


@pytest.mark.parametrize(("busy_timeout", "milliseconds"), [(60, 60_000), (float("inf"), 2**31 - 1)])
def test_a_look_leaves_the_connection_as_it_was(path, busy_timeout, milliseconds):
    waited(path)
    with Outbox(path, busy_timeout=60) as outbox:
        outbox.store.busy_timeout = busy_timeout
        assert outbox.enqueue("build", BUILD).warnings == (UNATTENDED,)
        with outbox.store.read() as connection:
            assert connection.execute("PRAGMA busy_timeout").fetchone() == (milliseconds,)
            assert not connection.in_transaction


@pytest.mark.parametrize("content", [None, b"", b"notes\n", b"SQLite format 3\0" + bytes(5000)])
def test_where_there_is_no_outbox_to_look_at_nothing_is_said(path, content):
    if content is not None:
        with open(path, "wb") as file:
            file.write(content)
    with contextlib.closing(Store(path)) as store:
        assert Notices(store).on([Subject(1, "p", "1", "abc"), None]) == [(), ()]


@pytest.mark.parametrize("value", [b"\xff\0", "x", -1e300, 9e999, -9e999, 2**62, None])
def test_columns_that_have_become_something_else_break_nothing(path, value):
    queue(path, scm_sha="abc")
    change(
        path, "UPDATE destination SET state = 'misrouted', reason = ?, since = ?, last_delivered_at = ?", [value] * 3
    )
    change(path, "UPDATE record SET last_attempt_at = ?, payload = ?", (value, b"" if value is None else value))
    if value is not None:
        change(path, "UPDATE record SET queued_at = ?", (value,))

    receipt = queue(path, scm_sha="def")

    assert receipt.outcome == "queued"
    assert any(warning.startswith("events wait: api_url") for warning in receipt.warnings)


def test_a_row_that_is_gone_breaks_nothing(path):
    waited(path)
    change(path, "DELETE FROM destination")

    assert queue(path).warnings == ()


def test_of_an_outbox_without_the_indexes_only_the_whole_is_looked_at(path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        make_tables(connection, 1)
    queue_all(path, {"scm_sha": "abc"}, {"version": "2"})
    settled(path, "failed", 2)
    change(path, "UPDATE record SET queued_at = ?", (NOW - 1500,))
    change(path, "UPDATE destination SET state = 'unauthorized'")

    assert queue(path, scm_sha="def").warnings == (
        UNATTENDED,
        "events wait: the API refuses the key (unauthorized): `versioner-agent status` says what to do",
    )


def test_the_automatic_times_of_a_wrong_clock_are_told_first(path):
    queue(path, scm_sha="abc")
    with freeze_time("2001-01-01T00:00:00Z"):
        first, second = queue(path, scm_sha="def").warnings

    assert "before the agent's release" in first
    assert IMMUTABLE in second


def test_what_is_queued_is_what_the_notice_names(path):
    queue(path, scm_sha="abc")
    receipt = queue(path, scm_sha="def")

    with contextlib.closing(sqlite3.connect(path)) as connection:
        (payload,) = connection.execute("SELECT payload FROM record WHERE id = ?", (receipt.id,)).fetchone()
    assert json.loads(payload)["scm_sha"] == "def"
