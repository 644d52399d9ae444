"""What an author is told while queuing, because later is too late: what an outbox waits for, what the API will refuse.

Looked at when the events are on the disk: whatever goes wrong here means that nothing is said. Each query seeks an
index and reads a few rows, so that it costs the same at a million records as at ten. Knows neither configuration nor
network.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from versioner_agent.errors import OutboxError
from versioner_agent.files import changed_at
from versioner_agent.locks import FLUSHER_SUFFIX, FlusherLock
from versioner_agent.storage import Store
from versioner_agent.text import bounded, duration

#: So long an outbox may be left to itself before that is worth a word (seconds).
UNATTENDED_S = 600.0
#: What concerns the outbox as a whole is looked at no more often than this (seconds).
LOOK_AGAIN_S = 1.0
#: So long the look waits for a writer: the events are safe, and the build goes on.
PATIENCE_MS = 100
MOST_MS = 2**31 - 1  # that SQLite takes
#: Events of one batch that are looked at, and products, and versions of them.
MOST_EVENTS = 1000
MOST_LOOKED_AT = 50
MOST_REFUSALS = 1000
#: The schema from which on there are the indexes for what concerns single events.
INDEXED_SINCE = 2
NAME_CHARS = 100
REASON_CHARS = 120

#: Files and variables by which a container can be told (Docker, Podman; Kubernetes, systemd's container interface).
_MARKER_FILES = ("/.dockerenv", "/run/.containerenv")
_MARKER_VARIABLES = ("KUBERNETES_SERVICE_HOST", "container")
#: States of a destination that no waiting ends -> what has happened.
_NEEDS_A_PERSON = {"unauthorized": "the API refuses the key", "misrouted": "api_url does not lead to the API"}

LOST_WITH_CONTAINER = (
    "the outbox is in the container's own file system and no agent empties it: its events are lost with the container; "
    "put it on a volume (VERSIONER_AGENT_DB), or end the job with `versioner-agent flush`"
)


class Subject(NamedTuple):
    """What of an event that was just queued matters here."""

    id: int
    product_name: str
    version: str
    scm_sha: str | None


class Condition(NamedTuple):
    """The outbox as a whole; times are seconds since 1970."""

    state: str  # of the destination
    reason: str
    since: float | None
    last_delivered_at: float | None
    oldest_queued_at: float | None  # of what is pending
    oldest_tried_at: float | None


class Notices:
    """Looks at an outbox for one `Outbox`, and remembers for a moment what concerns all events."""

    def __init__(self, store: Store) -> None:
        """Look through *store*."""
        self._store = store
        self._on_outbox: tuple[str, ...] = ()
        self._looked_at = -LOOK_AGAIN_S

    def on(self, queued: Sequence[Subject | None]) -> list[tuple[str, ...]]:
        """Return what to tell about each event; about a duplicate, given as None, only what concerns the outbox.

        Empty for all of them where the outbox can't be looked at now. Raises nothing.
        """
        try:
            return self._on(queued)
        except (OutboxError, sqlite3.Error, OSError):
            return [()] * len(queued)

    def _on(self, queued: Sequence[Subject | None]) -> list[tuple[str, ...]]:
        moment = time.monotonic()
        is_due = moment - self._looked_at >= LOOK_AGAIN_S
        with _glance(self._store) as connection:
            condition = _condition(self._store, connection) if is_due else None
            said = _on_events(connection, queued) if self._store.version >= INDEXED_SINCE else {}
        if condition is not None:
            self._on_outbox = _on_outbox(self._store, condition, time.time())
            self._looked_at = moment
        if not said:
            return [self._on_outbox] * len(queued)
        return [(*self._on_outbox, *(said.get(subject, ()) if subject else ())) for subject in queued]


@contextmanager
def _glance(store: Store) -> Iterator[sqlite3.Connection]:
    """Lend the connection for a snapshot that hardly waits for writers."""
    with store.read() as connection:
        connection.execute(f"PRAGMA busy_timeout = {PATIENCE_MS}")
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute(f"PRAGMA busy_timeout = {int(min(store.busy_timeout * 1000, MOST_MS))}")


# --- the outbox as a whole


def _condition(store: Store, connection: sqlite3.Connection) -> Condition:
    oldest = connection.execute(OLDEST_PENDING).fetchone() or (None, None)
    return Condition(*store.only(connection.execute(DESTINATION)), *oldest)


def _on_outbox(store: Store, condition: Condition, now: float) -> tuple[str, ...]:
    flusher_at = changed_at(store.path + FLUSHER_SUFFIX)
    signs = (condition.oldest_tried_at, condition.last_delivered_at, flusher_at and flusher_at / 1e9)
    idle_s = unattended_s(condition.oldest_queued_at, signs, now)
    found = []
    if idle_s > UNATTENDED_S:
        found.append(
            f"nothing has emptied this outbox for {duration(idle_s)}: start the agent "
            "(`versioner-agent service install --now`) or run `versioner-agent flush`"
        )
    if _is_in_container(os.path.dirname(store.path)):
        found.append(LOST_WITH_CONTAINER)
    if found and _is_attended(store.path):
        found = []
    return (*found, *_on_destination(condition, now))


def unattended_s(oldest_queued_at: float | None, signs: Iterable[float | None], now: float) -> float:
    """Return for how long (seconds) something waits without a sign of a flusher; 0 where nothing waits.

    All are seconds since 1970. A flusher shows in its lock's file, which it writes when it starts, in its last try of
    the oldest event, and in its last delivery.
    """
    if oldest_queued_at is None:
        return 0.0
    return now - max(oldest_queued_at, *(sign or 0.0 for sign in signs))


def is_lost_with_container(root_device: int, outbox_device: int, *, has_marker: bool) -> bool:
    """Tell whether the outbox ends with the container: it lies on its root, which is a layer of an image.

    Devices as in `st_dev`. Layers have no disk of their own, hence major 0; the root of a virtual machine that was made
    of an image has one, whatever marks are left in it.
    """
    return has_marker and os.major(root_device) == 0 and root_device == outbox_device


def _is_in_container(directory: str) -> bool:
    has_marker = any(map(os.environ.get, _MARKER_VARIABLES)) or any(map(os.path.exists, _MARKER_FILES))
    if not has_marker:
        return False
    return is_lost_with_container(os.stat("/").st_dev, os.stat(directory).st_dev, has_marker=True)


def _is_attended(path: str) -> bool:
    presence = FlusherLock(path).presence()
    return presence.is_delivering or presence.has_agent


def _on_destination(condition: Condition, now: float) -> tuple[str, ...]:
    what = _NEEDS_A_PERSON.get(condition.state)
    if what is None:
        return ()
    since = "" if condition.since is None else f" for {duration(now - condition.since)}"
    reason = bounded(" ".join(condition.reason.split()), REASON_CHARS)
    words = f"{condition.state}{since}{'; ' if reason else ''}{reason}"
    return (f"events wait: {what} ({words}): `versioner-agent status` says what to do",)


# --- single events


def _on_events(connection: sqlite3.Connection, queued: Sequence[Subject | None]) -> dict[Subject, tuple[str, ...]]:
    """Return what there is to tell, by event."""
    subjects = [subject for subject in queued if subject is not None]
    if not subjects:
        return {}
    if len(subjects) == 1 and not any(connection.execute(MAY_TELL, subjects[0][:3]).fetchone() or (1,)):
        return {}  # as nearly always: no refusals at all, and a new version
    products = list(dict.fromkeys(subject.product_name for subject in subjects))[:MOST_LOOKED_AT]
    refusals = {name: _on_refusals(connection, name) for name in products}
    commits = list({subject[1:]: subject for subject in subjects if subject.scm_sha is not None}.values())
    conflicts = {subject[1:]: _on_conflict(connection, subject) for subject in commits[:MOST_LOOKED_AT]}
    found = {}
    for subject in subjects:
        words = (refusals.get(subject.product_name, ""), conflicts.get(subject[1:], ""))
        if any(words):
            found[subject] = tuple(filter(None, words))
    return found


def _on_refusals(connection: sqlite3.Connection, product_name: str) -> str:
    count = connection.execute(COUNT_REFUSED, (product_name, MOST_REFUSALS)).fetchone()[0]
    if not count:
        return ""
    events = "1 event" if count == 1 else f"{count}{' or more' if count == MOST_REFUSALS else ''} events"
    were = "was" if count == 1 else "were"
    return f"{events} of {_named(product_name)} {were} refused, see versioner-agent list --state failed"


def _on_conflict(connection: sqlite3.Connection, subject: Subject) -> str:
    """Say that the API binds the version to another commit (Event Tracking API documentation: 409)."""
    named = (subject.product_name, subject.version, subject.id)
    bound = binding(connection.execute(FIRST_OF_VERSION, named).fetchall())
    if bound is None:
        bound = binding(connection.execute(LAST_OF_VERSION, named).fetchall())
    if bound is None or bound[1] == subject.scm_sha:
        return ""
    what, before, now = map(_named, (f"{subject.product_name} {subject.version}", bound[1], str(subject.scm_sha)))
    return (
        f"{what} was queued before with scm_sha {before} (record {bound[0]}), now with {now}: "
        "the API will refuse this with 409: versions are immutable"
    )


def binding(rows: Iterable[tuple[int, str, bytes]]) -> tuple[int, str] | None:
    """Return id and scm_sha of the record to whose commit the API binds a version; None where none names one.

    *rows* are id, state and payload. What was delivered has bound it; else the first that will be.
    """
    for record_id, _, payload in sorted(rows, key=lambda row: (row[1] != "delivered", row[0])):
        try:
            fields = json.loads(payload)
        except (ValueError, RecursionError):  # damaged, or given up on a full disk
            continue
        if isinstance(fields, dict) and isinstance(fields.get("scm_sha"), str):
            return record_id, fields["scm_sha"]
    return None


def _named(name: str) -> str:
    return bounded(name, NAME_CHARS)


# A damaged file may hold anything anywhere: casts make it what is expected.
OLDEST_PENDING = """
    SELECT max(CAST(queued_at AS REAL), 0.0), CAST(last_attempt_at AS REAL) FROM record INDEXED BY record_state
    WHERE state = 'pending' ORDER BY id LIMIT 1
"""
DESTINATION = """
    SELECT CAST(state AS TEXT), COALESCE(CAST(reason AS TEXT), ''), max(CAST(since AS REAL), 0.0),
        CAST(last_delivered_at AS REAL)
    FROM destination WHERE id = 1
"""
MAY_TELL = """
    SELECT n, EXISTS (
        SELECT 1 FROM record INDEXED BY record_version WHERE id < ? AND product_name = ? AND version = ?
    ) FROM tally WHERE state = 'failed'
"""
COUNT_REFUSED = """
    SELECT count(*) FROM (
        SELECT 1 FROM record INDEXED BY record_refused WHERE state = 'failed' AND product_name = ? LIMIT ?
    )
"""
# A version may have been refused, or sent in large bodies, a million times: no more than twenty records are touched.
_OF_VERSION = """
    SELECT id, state, CAST(payload AS BLOB) FROM record NOT INDEXED WHERE id IN (
        SELECT id FROM record INDEXED BY record_version
        WHERE product_name = ? AND version = ? AND id < ? ORDER BY id {order} LIMIT 20
    ) AND state IN ('pending', 'delivered', 'exported') AND length(payload) <= 65536 ORDER BY id {order} LIMIT 3
"""
FIRST_OF_VERSION = _OF_VERSION.format(order="ASC")
LAST_OF_VERSION = _OF_VERSION.format(order="DESC")
