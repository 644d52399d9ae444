"""Jobs whose wrapper was killed: whoever delivers queues the end that nobody told.

Used only by whoever holds the flusher lock, in the thread that owns the ledger. The lock of a job's file is held until
its end is queued, and the ids of its events were decided when it began: so its end is queued once, whoever dies when.
"""

from __future__ import annotations

import logging
import os
import time

from versioner_agent import jobs
from versioner_agent.errors import OutboxError
from versioner_agent.jobs import End, Found, Garbage, Job
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import Outbox
from versioner_agent.text import age

logger = logging.getLogger(__name__)

LOOK_S = 2.0
AGAIN_S = 10.0  # from one try to the next, where the outbox can't be used
LIST_S = 60.0  # from one listing of an unchanged directory to the next: 10 000 names take 5 ms
SETTLED_NS = 2_000_000_000  # a directory that changed so shortly before may change again without showing it
ENDS_A_LOOK = 20  # requests under way wait to be settled meanwhile
UNKNOWN = "the wrapper was killed; how the command ended is not known"

#: By kind, state and reason of a start that a rule has refused: for the API the job did not begin.
REFUSED = {"build": {("failed", "blocked")}, "deployment": {("failed", "blocked"), ("failed", "conflict")}}

FIND_STATE = """
    SELECT state, reason FROM record INDEXED BY record_run
    WHERE invoke_id = ? AND product_name = ? AND environment_name IS ? AND event_id = ? AND state <> 'staged'
"""


class Orphans:
    """Looks for the files of jobs beside the outbox, and ends those that nobody holds."""

    def __init__(self, ledger: Ledger) -> None:
        """Look beside the outbox of *ledger*."""
        self._ledger = ledger
        self._path = ledger.store.path
        self._due = self._list_due = 0.0
        self._changed_ns: int | None = None  # of the directory when it was listed, if that can tell a change
        self._names: list[str] = []
        self._told: set[str] = set()  # of what is wrong with
        self._is_troubled = False

    def has_files(self) -> bool:
        """Tell whether there are files of jobs at all, held or not."""
        return bool(self._listed(time.monotonic()))

    def look(self, now: float) -> None:
        """End what is to be ended, if it is time for that at *now* (monotonic seconds); never raises AgentError."""
        if now < self._due:
            return
        self._due = now + LOOK_S
        names = self._listed(now)
        self._told &= set(names)
        ended = 0
        for name in names:
            try:
                ended += self._take_up(os.path.join(os.path.dirname(self._path), name))
            except OutboxError as exc:
                if not self._is_troubled:  # once, however long it lasts
                    logger.error("%s; trying again", exc.message, extra={"action": "outbox_error"})  # noqa: TRY400
                self._is_troubled = True
                self._due = now + AGAIN_S
                return
            except OSError as exc:
                self._tell(name, f"can't be used: {exc.strerror or exc}")
            if ended >= ENDS_A_LOOK:
                self._due = now
                break
        self._is_troubled = False

    def _listed(self, now: float) -> list[str]:
        """Return the names of job files; those known are not looked for again while the directory is as it was.

        A wrapper's death does not change the directory, so they have to be remembered.
        """
        try:
            changed_ns = os.stat(os.path.dirname(self._path)).st_mtime_ns
            if changed_ns != self._changed_ns or now >= self._list_due:
                self._names = jobs.names(self._path)
                is_settled = time.time_ns() - changed_ns > SETTLED_NS
                self._changed_ns = changed_ns if is_settled else None
                self._list_due = now + LIST_S
        except OSError:  # whoever delivers meets the same error and says so
            return []
        return self._names

    def _take_up(self, path: str) -> bool:
        """End the job in the file at *path*, if nobody holds it; True if there was one to be ended."""
        name = os.path.basename(path)
        try:
            if jobs.is_unfinished(name):
                is_over = jobs.is_abandoned(path, time.time())
                if is_over:
                    os.unlink(path)
                return is_over
            with jobs.taken(path) as found:
                if found is not None:
                    self._end(found)
                    os.unlink(path)  # before its lock is free
                return found is not None
        except Garbage as exc:
            os.unlink(path)
            self._tell(name, f"was no job of ours and is removed: {exc}")
            return True

    def _tell(self, name: str, words: str) -> None:
        if name not in self._told:
            self._told.add(name)
            logger.error("the job file %s %s", name, words, extra={"action": "job_file"})

    def _end(self, found: Found) -> None:
        """Queue the end of a job whose beginning was queued, unless it is there; raises OutboxError."""
        job = found.job
        start = self._state(job, job.started_id)
        if start in REFUSED[job.kind] or not (found.is_started or start) or self._state(job, job.last_id):
            return
        end = found.end or End("aborted", {"error": UNKNOWN}, "")
        event = job.event(end.status, end.added, completed_at=end.completed_at)
        # On a connection of its own: the flusher notices only what others commit (PRAGMA data_version).
        outbox = Outbox(self._path, busy_timeout=self._ledger.store.busy_timeout, queued_by=job.queued_by)
        with self._ledger.at_length("queuing the end of a job whose wrapper was killed"), outbox:
            (receipt,) = outbox.enqueue_all([event], run_attempt=job.run_attempt, new=True, event_ids=[job.last_id])
        words = "%s, started %s: its wrapper was killed; queued %d as %s"
        extra = {"action": end.status, "record": receipt.id, "product": receipt.product_name}
        logger.warning(words, job.command, age(job.started_at, time.time()), receipt.id, end.status, extra=extra)
        for warning in receipt.warnings:
            logger.warning("%s", warning)

    def _state(self, job: Job, event_id: str) -> tuple[str, str | None] | None:
        """Return state and reason of an event of the job; None where it is not queued."""
        fields = job.fields
        run = (fields["invoke_id"], fields["product_name"], fields.get("environment_name"))
        with self._ledger.store.read() as connection:
            return connection.execute(FIND_STATE, (*run, event_id)).fetchone()  # type: ignore[no-any-return]
