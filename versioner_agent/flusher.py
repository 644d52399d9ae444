"""The flusher: which event goes next, and what its answer does to the outbox. A step, and a loop around it.

Worker threads send; the thread that owns the ledger chooses, decides and commits. A key's next event is sent, and a
slot freed, only after the commit of the decision before it, so a crash repeats at most `concurrency` requests. Settling
takes whatever answers have arrived in one transaction and never waits for more. Memory holds a window of keys, never
the backlog.
"""

from __future__ import annotations

import logging
import queue
import random
import time
from collections.abc import Callable
from typing import NamedTuple

from versioner_agent.chooser import Chooser
from versioner_agent.errors import OutboxDamaged, OutboxError
from versioner_agent.files import Times, times_of
from versioner_agent.ledger import Health, Ledger
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import STATE_OF
from versioner_agent.policy import Counters, Limits, Pace, decide
from versioner_agent.records import Record, is_intact
from versioner_agent.reports import log_destination, log_failure, log_settlement
from versioner_agent.settling import Settlement
from versioner_agent.upkeep import MAX_CLOCK_SKEW_S, Upkeep
from versioner_agent.workers import Answer, Sender, Workers

logger = logging.getLogger(__name__)

POLL_S = 0.1  # how often the file is looked at for new events
LOOK_S = 2.0  # how often the outbox is asked, whatever the file's times say
REWRITE_S = 1.0  # pause before a commit that failed is tried again
CONDEMNED_A_STEP = 10
MEND_S = 60.0  # from one replacement of a damaged outbox to the next


class Options(NamedTuple):
    """The settings that bear on delivering; seconds and days."""

    concurrency: int = 4
    max_backoff: float = 120.0
    max_event_attempts: int = 20
    give_up_after: float = 3600.0
    retention_days: float = 30.0
    exported_retention_days: float = 0.0  # 0 is never


class Flusher:
    """Delivers what is pending. Belongs to the thread that made it; `wake` may be called from anywhere."""

    def __init__(
        self,
        ledger: Ledger,
        sender: Sender,
        options: Options,
        here: Destination,
        *,
        roll: Callable[[], float] = random.random,
        on_failed: Callable[[Record], None] = lambda _: None,
        on_account: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Deliver from *ledger* through *sender*; *roll* gives the jitter, in [0, 1).

        *on_failed* is told of each record that failed for good, *on_account* of the account that the API knew us as,
        both after the commit.
        """
        self._ledger = ledger
        self._roll = roll
        self._on_failed = on_failed
        self._on_account = on_account
        self._has_batches = True
        self._is_resting = False
        self._inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._workers = Workers(self._inbox)
        self._arrived: list[Answer] = []
        self._unwritten: list[Settlement] = []
        self._rewrite_at = 0.0  # when those are tried again
        self._paused_until = 0.0  # where the outbox could not be used
        self.trouble = ""  # why not
        self._busy: set[str] = set()
        self._seen_file: Times | None = None
        self._seen_version: int | None = None
        self._look_at = 0.0
        self._mend_at = 0.0
        self._upkeep = Upkeep(ledger)
        self._stepped_at = 0.0  # when the step began
        self._left_over: int | None = None
        self._server_ahead_s: float | None = None  # the API's clock less the monotonic one
        self._has_verdict = False
        _, self._health, self._deliveries = ledger.destination()
        self._told_state = self._health.state
        self._pace = Pace(options.concurrency, options.max_backoff)
        self._chooser = Chooser(ledger, self._pace)
        self.configure(sender, options, here)
        if self._health.retry_at is not None:
            # Believed only so far ahead, in case this host's clock was wrong when it was written.
            left = self._health.retry_at - time.time()
            if 0 < left <= 3600:
                self._pace.paused_until = time.monotonic() + left

    def configure(self, sender: Sender, options: Options, here: Destination, slept_s: float = 0.0) -> None:
        """Use other settings from now on, and ask at once; requests under way end as they began.

        *slept_s* is for how long the host was suspended meanwhile, which the monotonic clock does not count.
        """
        self._sender = sender
        self._options = options
        self._here = here
        self._limits = Limits(options.max_event_attempts, options.give_up_after)
        self._pace = Pace(options.concurrency, options.max_backoff, self._pace.paused_until - slept_s)
        self._chooser = Chooser(self._ledger, self._pace)

    def wake(self) -> None:
        """Make the loop look up at once; safe in signal handlers and other threads."""
        self._inbox.put(None)

    def run(self, is_done: Callable[[], bool]) -> None:
        """Deliver until *is_done*, which is asked at least every POLL_S seconds."""
        while not is_done():
            due = self.step(time.monotonic())
            self._take(max(0.0, due - time.monotonic()))

    def step(self, now: float) -> float:
        """Settle what arrived, send what may be sent; returns when to come again at the latest (monotonic seconds)."""
        self._stepped_at = time.monotonic()
        try:
            if self._arrived or (self._unwritten and now >= self._rewrite_at):
                self._settle(now)
            if now >= self._paused_until:
                self._notice(now)
                if self._has_batches:
                    self._hand_over()
                if not self._has_batches and not self._is_resting:
                    self._dispatch(now)
                    self._maintain(now)
                self._paused_until = 0.0
                self.trouble = self.trouble if self._unwritten else ""
        except OutboxDamaged as exc:
            self._mend(exc, now)
        except OutboxError as exc:
            if not self._paused_until:  # once, however long it lasts
                logger.error("%s; trying again", exc.message, extra={"action": "outbox_error"})  # noqa: TRY400
            self.trouble = exc.message
            self._rewrite_at = self._paused_until = now + REWRITE_S
            self._chooser.look_again()  # a key may have been taken up and not sent
        if self._has_batches and not self._paused_until:
            return now
        due = (now + POLL_S, self._pace.next_due(now), self._upkeep.step_at)
        return min(at for at in due if at is not None and at > now)

    def rest(self, *, is_resting: bool) -> None:
        """Send nothing new while *is_resting*; what is under way is settled as ever."""
        self._is_resting = is_resting
        self._chooser.look_again()

    def is_busy(self) -> bool:
        """Tell whether a request is under way, or its outcome is not written yet."""
        return bool(self._busy)

    def is_idle(self, now: float) -> bool:
        """Tell whether at *now* (monotonic seconds) there is nothing to send, as far as has been seen."""
        return not self._busy and self._chooser.is_exhausted() and self._pace.next_due(now) is None

    def finish(self, grace_s: float) -> int:
        """Wait up to *grace_s* for requests under way and settle them; returns how many remain unanswered."""
        end = time.monotonic() + grace_s
        self._ledger.store.busy_timeout = min(self._ledger.store.busy_timeout, grace_s)
        self._ledger.store.patience = 1
        is_told = False
        while self._busy and time.monotonic() < end:
            self._take(min(POLL_S, max(0.0, end - time.monotonic())))
            if self._arrived or self._unwritten:
                try:
                    self._settle(time.monotonic())
                except OutboxError as exc:
                    if not is_told:
                        logger.error("%s", exc.message, extra={"action": "outbox_error"})  # noqa: TRY400
                        is_told = True
        self._workers.stop()
        return len(self._busy)

    def is_drained(self) -> bool:
        """Tell whether nothing is pending and nothing is under way."""
        try:
            return not self._busy and not self._unwritten and self._ledger.pending() == 0
        except OutboxError:
            return False  # the loop meets the same error and says so

    def is_tidying(self) -> bool:
        """Tell whether there is more that is old, or more space to give back, than there has been time for."""
        return self._upkeep.is_more

    def _mend(self, found: OutboxDamaged, now: float) -> None:
        """Go on with what can be saved; a disk that damages file after file must not be filled with them."""
        self._rewrite_at = self._paused_until = now + REWRITE_S
        self._chooser.look_again()
        if now < self._mend_at:
            return
        self._mend_at = now + MEND_S
        try:
            mended = self._ledger.mend(found)
        except OutboxError as exc:
            logger.error("%s", exc.message, extra={"action": "damage"})  # noqa: TRY400
            return
        self._rewrite_at = self._paused_until = 0.0
        if mended is not None:
            logger.error("the outbox was damaged: %s", str(mended), extra={"action": "damage"})

    # --- waiting and noticing

    def _take(self, timeout: float) -> None:
        try:
            answer = self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
            while True:
                if answer is not None:
                    self._arrived.append(answer)
                answer = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _notice(self, now: float) -> None:
        """Look again for keys when another process has committed."""
        file = times_of(self._ledger.store.path)
        if file == self._seen_file and now < self._look_at:
            return
        is_replaced = file is None or self._seen_file is None or file[2] != self._seen_file[2]
        self._seen_file = file
        self._look_at = now + LOOK_S
        version = self._ledger.data_version()
        if version != self._seen_version or is_replaced:
            self._seen_version = version
            self._has_batches = True
            self._chooser.look_again()

    def _hand_over(self) -> None:
        """Do one step for who published a batch and died; nothing is chosen meanwhile, for its events come first."""
        self._has_batches = self._ledger.hand_over()
        if not self._has_batches:
            self._chooser.look_again()

    # --- sending

    def _dispatch(self, now: float) -> None:
        condemned = 0
        while len(self._busy) < self._pace.limit(now) and condemned < CONDEMNED_A_STEP:
            found = self._chooser.next(now, self._busy)
            if found is None:
                return
            record, payload = found
            if not is_intact(record, payload):
                self._condemn(record, payload)
                condemned += 1
                continue
            self._busy.add(record.product_name)
            self._workers.send(self._sender, record, payload, min(len(self._busy), self._options.concurrency))
        if condemned:
            self.wake()  # there may be many, and a sign of life may be due between them

    def _condemn(self, record: Record, payload: bytes) -> None:
        detail = "the record's digest does not fit: its content was altered on the disk; it was not sent"
        self._ledger.condemn(record, detail, time.time())
        self._chooser.make_ready(record.product_name)
        failed = record._replace(state="failed", reason="damaged", detail=detail)
        log_failure(failed, payload)
        self._on_failed(failed)

    # --- settling

    def _settle(self, now: float) -> None:
        """Decide on the answers that arrived and commit; after that, and only then, their keys go on."""
        answers, self._arrived = self._arrived, []
        self._unwritten += [self._judge(answer, now) for answer in answers]
        written = self._unwritten
        told = {settlement.record.id for settlement in written[: len(written) - len(answers)]}
        health = self._health_after(written, now) if answers else self._health
        self._health = health
        verdict = next((s.outcome for s in written if s.outcome.is_verdict and s.outcome.account), None)
        here = self._here if verdict is None else self._here._replace(account=verdict.account)
        left = {settlement.record.id for settlement in self._ledger.settle(written, health, here)}
        if verdict is not None and verdict.account is not None:
            self._on_account(verdict.account)
        self._unwritten = [settlement for settlement in written if settlement.record.id in left]
        written = [settlement for settlement in written if settlement.record.id not in left]
        for settlement in written:
            key = settlement.record.product_name
            self._busy.discard(key)
            if not self._pace.is_retrying(key):
                self._chooser.make_ready(key)
        for settlement in written:
            log_settlement(settlement)
            if settlement.decision.state == "failed":
                self._on_failed(settlement.settled)
        if left:
            self._rewrite_at = now + REWRITE_S
        for record_id in sorted(left - told):
            extra = {"action": "outbox_error", "record": record_id}
            logger.error("no room to record what became of %d; trying again", record_id, extra=extra)
        if health.state != self._told_state:
            self._told_state = health.state
            log_destination(health, self._here)

    def _judge(self, answer: Answer, now: float) -> Settlement:
        record, outcome, at, duration_s, payload = answer
        if outcome.is_verdict and outcome.server_time is not None:
            self._server_ahead_s = outcome.server_time - now
            if abs(at - outcome.server_time) > MAX_CLOCK_SKEW_S:
                at = outcome.server_time  # or it would be pruned at once, or never, when the clock is right again
        decision = decide(
            outcome,
            Counters(record.counted, record.counted_since, record.counted_mark),
            self._limits,
            queued_at=record.queued_at,
            deliveries=self._deliveries,
            had_unanswered=record.unanswered > 0,
            now=at,
            last_attempt_at=record.last_attempt_at,
        )
        if decision.state == "delivered":
            self._deliveries += 1
        if outcome.is_verdict:
            self._has_verdict = True
            if self._pace.is_open:
                self._chooser.look_again()  # the keys that waited are forgotten there and found again
            self._pace.verdict(record.product_name, now)
        elif decision.state == "failed":
            self._pace.forget(record.product_name)
        elif self._pace.failed(record.product_name, outcome, now, self._roll(), duration_s):
            self._chooser.look_again()
        return Settlement(record, outcome, decision, at, duration_s, payload)

    def _health_after(self, settlements: list[Settlement], now: float) -> Health:
        """Return the destination's state; one failing event among healthy ones does not make it bad."""
        health, told = self._health, [(each.outcome, each.at) for each in settlements if not each.outcome.is_cut]
        if not told:
            return health  # nothing was learnt, so what is known becomes no newer
        for outcome, at in told:
            is_paused = now < self._pace.paused_until
            if outcome.is_verdict:
                if is_paused:
                    continue  # nothing goes until the API lets us, whatever was under way
                state, reason = "up", None
            elif self._has_verdict and self._pace.failures_in_a_row < 2 and not is_paused:
                continue
            else:
                state, reason = STATE_OF[outcome.reason], outcome.detail
            since = health.since if state == health.state else at
            health = Health(state, reason, since, retry_at=health.retry_at)
            if outcome.wait_s and outcome.reason == "rate_limited":
                health = health._replace(retry_at=at + outcome.wait_s)
        due = self._pace.next_due(now)
        if health.state == "up":
            return health._replace(next_attempt_at=None, retry_at=None)
        return health._replace(next_attempt_at=time.time() + max(0.0, due - now) if due is not None else None)

    def _look_for_leftovers(self, now: float) -> None:
        """Find out that a record waits though nothing does: the index of pending ones does not lead to it."""
        oldest = None
        if self._chooser.is_exhausted() and self._pace.next_due(now) is None:
            oldest = self._ledger.oldest_pending()
        # Twice, for it may have been queued since the keys were looked through.
        is_left_over, self._left_over = oldest is not None and oldest == self._left_over, oldest
        if is_left_over:
            raise self._ledger.store.suspected(f"the pending record {oldest} can't be found by its product")

    def _maintain(self, now: float) -> None:
        """Look after the file, in small steps and only while nothing is to be sent."""
        if self._busy or self._chooser.has_ready():
            return
        if self._upkeep.look(now):
            self._look_for_leftovers(now)
        self._upkeep.step(now, self._stepped_at, self._server_ahead_s, self._options)
