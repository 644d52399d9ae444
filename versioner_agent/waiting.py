"""Waiting for the API's verdict on events that were just queued: `--wait`, and the gate before a deployment.

Whoever delivers is watched. Where nobody does and nobody else can write the outbox, we deliver ourselves: these events
and what goes before them, nothing else. Whatever is in the way is a note and no error, for the events are queued.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from typing import NamedTuple

from versioner_agent import exports, review
from versioner_agent.config import Settings
from versioner_agent.errors import AgentError, OutboxBusy, OutboxDamaged, OutboxError
from versioner_agent.flush import HELD, Turn, deliver, others_can_write, take_turn
from versioner_agent.flusher import Flusher
from versioner_agent.ledger import Health, Ledger, Seek
from versioner_agent.locks import FlusherLock
from versioner_agent.opening import GRACE_S, LOCK_POLL_S, open_outbox
from versioner_agent.outcomes import MAX_RETRY_AFTER_S
from versioner_agent.records import Record
from versioner_agent.reports import TROUBLE, in_trouble
from versioner_agent.storage import Store

STILL_QUEUED = 75  # EX_TEMPFAIL of sysexits(3)
#: With less time left than this no request is begun: it would be cut off before an answer could come (seconds).
SHORTEST_S = 0.05
#: So long a gate asks an API that was in trouble not long ago (seconds).
PROBE_S = 1.0
#: So long it waits for an agent to come back, which systemd starts again after five seconds.
AWAY_S = 6.0
#: Of so many products it is found out whether exported records hold them.
LOOKED_AT = 50
#: So long, at least, it is remembered that the API could not be asked (seconds).
REMEMBERED_S = 60.0


class Waited(NamedTuple):
    """What the waiting came to."""

    records: list[Record]  # as they are in the end, in the order of the ids given
    note: str = ""  # why something has no verdict, for people
    gone: tuple[int, ...] = ()  # ids that the outbox does not know any more
    signal: int = 0  # that ended it early, 0 if none did


def await_verdicts(
    settings: Settings, env: Mapping[str, str], ids: Sequence[int], timeout: float, *, is_gate: bool = False
) -> Waited:
    """Wait up to *timeout* seconds for the verdicts on the records *ids*.

    A gate does not wait for a destination that is known to be in trouble. SIGINT and SIGTERM end it after what we have
    under way is settled; while somebody else delivers they do what they did before. Raises no AgentError.
    """
    store = Store(settings.db, min(settings.busy_timeout, GRACE_S, max(LOCK_POLL_S, timeout / 4)))
    store.patience = 1
    with closing(_Wait(settings, env, store, ids, timeout)) as wait:
        try:
            with store.translated():
                note = wait.run(is_gate=is_gate)
        except AgentError as exc:
            note = " ".join(f"{exc.message}; {exc.hint}".split()) if exc.hint else " ".join(exc.message.split())
        with suppress(AgentError):
            wait.wanted.read_all()
        return wait.wanted.result(note, wait.signal)


def exit_code(records: Sequence[Record]) -> int:
    """Return what a command exits with for *records*: 0 where all of them were delivered.

    1 for a damaged one, 4 for a refusal, 5 where rules (or a deployment's 409) account for all of them, 75 for what has
    no verdict, 1 for what a person discarded.
    """
    failed = [record for record in records if record.state == "failed"]
    if any(record.reason == "damaged" for record in failed):
        return 1
    if failed:
        return 5 if all(map(is_by_rule, failed)) else 4
    states = {record.state for record in records}
    if states & {"pending", "exported"}:
        return STILL_QUEUED
    return 1 if "discarded" in states else 0


def is_by_rule(record: Record) -> bool:
    """Tell whether a rule refused it, as the official client sees it: a deployment's 409 is one."""
    return record.reason == "blocked" or (record.reason == "conflict" and record.kind == "deployment")


class _Wanted:
    """The records that are waited for.

    Of many that wait only the first page is looked at again and again, for a reader keeps others from committing.
    """

    def __init__(self, store: Store, ids: Sequence[int]) -> None:
        self._store = store
        self._ids = list(dict.fromkeys(ids))
        self._open = self._ids
        self._event_ids: dict[int, str] = {}
        self._found: dict[int, Record] = {}

    def is_waiting(self) -> bool:
        """Look whether one of them has no verdict yet; raises OutboxError."""
        while self._open:
            waiting = self._read(self._open[: review.PAGE])
            self._open = waiting + self._open[review.PAGE :]
            if waiting:
                return True
        return False

    def read_all(self) -> None:
        """Look at all of them that had no verdict; raises OutboxError."""
        pages = [self._open[start : start + review.PAGE] for start in range(0, len(self._open), review.PAGE)]
        self._open = [each for page in pages for each in self._read(page)]

    def waiting(self) -> list[Record]:
        """Return those that had no verdict when they were looked at."""
        return [self._found[each] for each in self._open if each in self._found]

    def result(self, note: str, signal: int) -> Waited:
        """Return how they are, and why some are not delivered; *note* says why some wait."""
        records = [self._found[each] for each in self._ids if each in self._found]
        gone = tuple(each for each in self._ids if each not in self._found and each not in self._open)
        notes = [note] if self._open else []
        notes += [f"{each.id} is exported, waiting for a receipt" for each in records if each.state == "exported"]
        notes += [f"a person discarded {each.id}" for each in records if each.state == "discarded"]
        notes += [f"the outbox has no record {each} any more" for each in gone]
        return Waited(records, "; ".join(notes), gone, signal)

    def _read(self, page: list[int]) -> list[int]:
        """Take how the records of *page* are and return those that wait."""
        found = review.by_id(self._store, page)
        for each in page:
            record = found.get(each)
            # What is saved of a damaged file may leave an id free for another event.
            if record is None or self._event_ids.setdefault(each, record.event_id) != record.event_id:
                self._found.pop(each, None)
            else:
                self._found[each] = record
        return [each for each in page if each in self._found and self._found[each].state == "pending"]


class _Excerpt(Ledger):
    """A ledger that shows each wanted key up to the last wanted record of it: what lies behind stays for others."""

    def __init__(self, store: Store, wanted: Sequence[Record]) -> None:
        super().__init__(store)
        self._last: dict[str, int] = {}
        for record in wanted:
            self._last[record.product_name] = max(record.id, self._last.get(record.product_name, 0))
        self._keys = sorted(self._last)

    def keys(self, after: str, wanted: int, skip: Container[str]) -> Seek:
        rest = self._keys[bisect_right(self._keys, after) :]
        keys = list(islice((key for key in rest if key not in skip), wanted))
        return Seek(keys, "", is_end=True) if len(keys) < wanted else Seek(keys, keys[-1], is_end=False)

    def head(self, key: str) -> tuple[Record, bytes] | None:
        found = super().head(key)
        return found if found and found[0].id <= self._last.get(key, 0) else None


class _Wait:
    """One waiting, from the first look at the records to the last."""

    def __init__(
        self, settings: Settings, env: Mapping[str, str], store: Store, ids: Sequence[int], timeout: float
    ) -> None:
        self.wanted = _Wanted(store, ids)
        self.signal = 0
        self._settings = settings
        self._env = env
        self._store = store
        self._lock = FlusherLock(store.path)
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._turn: Turn | None = None

    def run(self, *, is_gate: bool) -> str:
        """Wait until nothing is without a verdict; returns why something is all the same."""
        if not self._is_waiting():
            return ""
        sharing = others_can_write(self._store.path)
        if is_gate and (trouble := self._known_trouble()):
            if sharing or self._lock.presence().has_agent:
                return trouble
            # Nobody else would notice that the API is back.
            self._end = min(self._end, time.monotonic() + PROBE_S)
        away_since: float | None = None
        while self._is_waiting():
            now = time.monotonic()
            away_since = None if not sharing or self._lock.presence().is_delivering else away_since or now
            if self.signal:
                return "interrupted"
            if self._is_all_held():
                return HELD
            if now >= self._end or (away_since and now - away_since >= AWAY_S):
                return self._why(sharing)
            if not sharing and self._may_ask() and take_turn(self._lock):
                with self._retrying():
                    self._deliver()
            else:
                time.sleep(min(LOCK_POLL_S, max(0.0, self._end - time.monotonic())))
        return ""

    def close(self) -> None:
        """Give everything back."""
        self._lock.close()
        self._store.close()

    def _is_waiting(self) -> bool:
        try:
            return self.wanted.is_waiting()
        except OutboxBusy:
            if time.monotonic() >= self._end:
                raise
            return True  # a gate must not open for it
        except OutboxDamaged:
            # Whoever delivers gets over it.
            if time.monotonic() >= self._end or not self._lock.presence().is_delivering:
                raise
            return True

    @contextmanager
    def _retrying(self) -> Iterator[None]:
        """Come again as long as there is time, where others keep the outbox."""
        try:
            yield
        except OutboxBusy:
            self._lock.close()
            if time.monotonic() >= self._end:
                raise

    def _deliver(self) -> None:
        """Take our turn for what is wanted.

        The flusher looks after the file as ever, in small steps and only when nothing is to be sent: on a host where
        every event is waited for, nobody else would prune it.
        """
        open_outbox(Ledger(self._store), create=False)
        self.wanted.read_all()
        excerpt = _Excerpt(self._store, self.wanted.waiting())
        self._turn = deliver(
            excerpt, self._lock, self._settings, self._env, self._end, self._is_settled, is_strict=True
        )
        self.signal = self._turn.signal

    def _is_all_held(self) -> bool:
        """Tell whether no verdict can come before a receipt does."""
        products = {record.product_name for record in self.wanted.waiting()}
        return len(products) <= LOOKED_AT and exports.are_held(self._store, products)

    def _may_ask(self) -> bool:
        return time.monotonic() < self._end - SHORTEST_S

    def _is_settled(self, _: Flusher) -> bool:
        try:
            return not (self._may_ask() and self.wanted.is_waiting())
        except OutboxError:
            return False  # the flusher meets the same error and says so

    def _known_trouble(self) -> str:
        """Say in what trouble the destination is known to be: asked not long ago, and nobody has got through since."""
        health = self._health()
        has_agent = self._lock.presence().has_agent
        longest_s: float = max(self._settings.max_backoff, REMEMBERED_S)
        if has_agent:
            longest_s += self._settings.timeout  # its next request may be under way
        return in_trouble(health) if is_known(health, time.time(), longest_s, has_agent=has_agent) else ""

    def _health(self) -> Health:
        while True:
            with self._retrying():
                return Ledger(self._store).destination()[1]

    def _why(self, sharing: str) -> str:
        """Say why something still waits."""
        presence = self._lock.presence()
        if sharing and not presence.is_delivering:
            return f"{sharing}: only its agent delivers from it, and none is running"
        why = in_trouble(self._health()) or (self._turn.why if self._turn else "") or self._held()
        if why:
            return why
        is_others = presence.is_delivering and not presence.has_agent
        turn = f" (pid {presence.pid or 'unknown'} has its turn at delivering)" if is_others else ""
        return f"no verdict within {self._timeout:g} s{turn}"

    def _held(self) -> str:
        """Say what holds the first one that waits: its own last answer, or a record before it."""
        mine = self.wanted.waiting()[0]
        first = review.first_pending(self._store, mine.product_name)
        if first is None:
            return ""
        words = f"{first.reason}: {first.detail}" if first.detail else ""
        return words if first.id == mine.id else f"{first.id} goes first{f' ({words})' if words else ''}"


def is_known(health: Health, now: float, longest_s: float, *, has_agent: bool) -> bool:
    """Tell whether *health* tells how the destination is at *now* (seconds since 1970), and that it is in trouble.

    Whoever delivers comes again *longest_s* after its due time at the latest, so what is older was left by somebody who
    is gone, or by an agent that has had nothing to send since. A time too far ahead was written by a wrong clock.
    """
    if health.state not in TROUBLE:
        return False
    if health.next_attempt_at is None:
        return has_agent
    return -max(longest_s, MAX_RETRY_AFTER_S) <= now - health.next_attempt_at < longest_s
