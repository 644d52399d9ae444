"""`exec`: a command whose beginning and end are queued, and whose exit status is always preserved.

Whatever keeps an event from being queued is one line on stderr: it neither keeps the command from running nor changes
how it ends. Order: job file, `started`, gate, command, last event, job file removed; see `jobs` for what happens when
this process is killed between any two of them.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from versioner_agent import child, events
from versioner_agent.child import Ended, Signals
from versioner_agent.errors import AgentError
from versioner_agent.jobs import MAX_NAME_CHARS, End, Job, JobFile
from versioner_agent.outbox import Destination, Outbox, Receipt
from versioner_agent.privileges import as_owner_of
from versioner_agent.text import bounded, printable


class Plan(NamedTuple):
    """What to run, and what to tell of it."""

    kind: str
    fields: Mapping[str, Any]  #: of both events, without the status; valid with `started`
    command: list[str]
    #: Makes the outbox; what it raises counts as an outbox that can't be used.
    open_outbox: Callable[[], Outbox]
    #: Says one line on stderr.
    tell: Callable[[str], None]
    run_attempt: str | None = None
    destination: Destination | None = None
    #: Asked in a process of its own when `started` is queued: 0 to go on, else the exit code to leave with, without
    #: running the command.
    gate: Callable[[Receipt], int] | None = None


def run(plan: Plan) -> int:
    """Run the command between its two events; returns the exit code to leave with, as a shell has it.

    Signals that would end this process stay blocked when this returns: nothing should be left to do but to exit.
    """
    signals = Signals()
    telling = _Telling(plan)
    receipt = telling.begin()
    code, number = telling.ask(receipt, signals)
    if number:
        telling.say(f"{telling.command} is not run: {child.name_of(number)} came before")
        telling.stop(f"stopped by {child.name_of(number)} before {telling.command} was run")
        return child.BY_SIGNAL + number
    if code:
        telling.withdraw()
        return code
    ended = child.run(plan.command, signals)
    if ended.problem:
        telling.say(ended.problem)
    telling.end(_status(ended), _metadata(plan.kind, telling.command, ended))
    return ended.exit_code


def _status(ended: Ended) -> str:
    if ended.exit_code == 0:
        return "completed"
    return "aborted" if ended.signal or ended.told else "failed"


def _metadata(kind: str, command: str, ended: Ended) -> dict[str, Any]:
    """Return what the last event says in addition (names: Event Tracking API documentation, extra_metadata)."""
    added: dict[str, Any] = {f"{kind}_duration_seconds": round(ended.duration_s, 3), "exit_code": ended.exit_code}
    if ended.signal:
        added["signal"] = child.name_of(ended.signal)
        added["error"] = f"{command} was killed by {added['signal']}"
    elif ended.exit_code:
        added["error"] = printable(ended.problem) or f"{command} exited {ended.exit_code}"
    return added


def _line(exc: Exception) -> str:
    """Say in one line what keeps us from the outbox."""
    if isinstance(exc, AgentError):
        words = f"{exc.message}; {exc.hint}" if exc.hint else exc.message
    else:
        words = str(exc) if isinstance(exc, OSError) else f"internal error: {type(exc).__name__}: {exc}"
    return " ".join(words.split())


class _Telling:
    """The two events of a job, and its file while it runs."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._directory = ""  # of the outbox, once it is known
        self.command = bounded(printable(os.path.basename(plan.command[0])) or "the command", MAX_NAME_CHARS)
        self._job = Job(
            plan.kind,
            {**plan.fields, "invoke_id": plan.fields.get("invoke_id") or str(uuid.uuid4())},
            plan.run_attempt or None,
            started_id=str(uuid.uuid4()),
            last_id=str(uuid.uuid4()),
            started_at=time.time(),
            queued_by="",
            command=self.command,
        )
        self._file: JobFile | None = None
        self._is_started = False

    def begin(self) -> Receipt | None:
        """Queue `started`; None where that could not be done."""
        problem: OSError | None = None
        try:
            with self._outbox() as outbox:
                try:
                    queued_by = bounded(printable(outbox.queued_by), MAX_NAME_CHARS)
                    self._file = JobFile.create(outbox.store.path, self._job._replace(queued_by=queued_by))
                except OSError as exc:
                    problem = exc
                receipt = self._queue(outbox, self._job.event("started"), self._job.started_id)
        except Exception as exc:  # noqa: BLE001  # not even a mistake of ours may keep the command from running
            self.say(f"{self.command} is run, but its start is not queued: {_line(exc)}")
            return None
        self._is_started = True
        if problem is not None:
            self.say(f"should we be killed, nobody could tell how {self.command} ended: {_line(problem)}")
        elif self._file is not None:
            with suppress(OSError):  # a full disk; the record tells
                self._file.note_started()
        return receipt

    def ask(self, receipt: Receipt | None, signals: Signals) -> tuple[int, int]:
        """Ask the gate, where there is one; returns (its exit code, a signal that told us to stop).

        A gate that fails keeps nothing from running: what it must keep, it says by its exit code.
        """
        gate = self._plan.gate
        if gate is None:
            return 0, signals.stopped_by()
        if receipt is None:
            self.say(f"{self.command} is run, NOT checked against the rules")
            return 0, signals.stopped_by()

        def act() -> int:
            try:
                with as_owner_of(self._directory):
                    return gate(receipt)
            except Exception as exc:  # noqa: BLE001  # as above
                self.say(f"{self.command} is run, NOT checked against the rules: {_line(exc)}")
                return 0

        try:
            asked = child.fork(act, signals)
        except OSError as exc:  # no more processes, or files
            self.say(f"{self.command} is run, NOT checked against the rules: {_line(exc)}")
            return 0, signals.stopped_by()
        was_ended = asked.exit_code > child.BY_SIGNAL
        if asked.told and (was_ended or asked.exit_code == 0):
            return 0, asked.told
        if was_ended:
            self.say(f"{self.command} is run, NOT checked against the rules: what asked them was killed")
            return 0, signals.stopped_by()
        return asked.exit_code, 0

    def end(self, status: str, added: dict[str, Any]) -> None:
        """Queue the last event. Where that can't be done, its file keeps it for whoever delivers next."""
        end = End(status, added, events.rfc3339(time.time()) if events.clock_is_plausible(time.time()) else "")
        is_kept = self._note(end)
        try:
            with self._outbox() as outbox:
                self._queue(outbox, self._job.event(status, added), self._job.last_id)
        except Exception as exc:  # noqa: BLE001  # not even a mistake of ours may change the exit status
            then = "; it will be, by the agent or the next flush" if is_kept else ""
            self.say(f"the end of {self.command} ({status}) is not queued{then}: {_line(exc)}")
            if is_kept and self._file is not None:
                self._file.close()
                return
        self.withdraw()  # also where others would find there less than we know

    def stop(self, why: str) -> None:
        """End a job whose command is not going to be run; nobody learns of one that was not queued as started."""
        if self._is_started:
            self.end("aborted", {"error": why})
        else:
            self.withdraw()

    def withdraw(self) -> None:
        """Remove the job's file: nothing is left to tell."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError), as_owner_of(self._directory):  # whoever finds it knows that it is over
                file.remove()

    def say(self, words: str) -> None:
        """Say one line; a stderr that is closed is no reason to fail."""
        with suppress(OSError, ValueError):
            self._plan.tell(words)

    def _note(self, end: End) -> bool:
        """Note the end in the job's file; False where whoever finds it there would not queue it."""
        if self._file is None or not self._is_started:
            return False
        try:
            self._file.note_end(end)
        except OSError:
            return False
        return True

    def _queue(self, outbox: Outbox, event: events.Event, event_id: str) -> Receipt:
        (receipt,) = outbox.enqueue_all(
            [event],
            run_attempt=self._job.run_attempt,
            new=True,  # each run is one of its own
            destination=self._plan.destination,
            event_ids=[event_id],
        )
        for warning in receipt.warnings:
            self.say(warning)
        return receipt

    @contextmanager
    def _outbox(self) -> Iterator[Outbox]:
        """Open the outbox for the block, as root with no more rights than its owner has: the command keeps ours."""
        outbox = self._plan.open_outbox()
        self._directory = os.path.dirname(outbox.store.path)
        with as_owner_of(self._directory), outbox:
            yield outbox
