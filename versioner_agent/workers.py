"""Threads that send: a request goes in, its answer comes out, whatever happens on the way."""

from __future__ import annotations

import queue
import threading
import time
from typing import NamedTuple, Protocol

from versioner_agent.outcomes import Outcome, no_answer
from versioner_agent.records import Record


class Sender(Protocol):
    """What is needed to send."""

    def send(self, kind: str, payload: bytes, idempotency_key: str) -> Outcome:
        """POST one event."""


class Answer(NamedTuple):
    """What became of a request; *at* is in seconds since 1970."""

    record: Record
    outcome: Outcome
    at: float
    duration_s: float
    payload: bytes


class Workers:
    """As many threads as requests were under way at once."""

    def __init__(self, inbox: queue.SimpleQueue[Answer | None]) -> None:
        """Put answers into *inbox*."""
        self._inbox = inbox
        self._work: queue.SimpleQueue[tuple[Sender, Record, bytes] | None] = queue.SimpleQueue()
        self._count = 0

    def send(self, sender: Sender, record: Record, payload: bytes, wanted: int) -> None:
        """Have *record* sent, by up to *wanted* threads."""
        self._work.put((sender, record, payload))
        if self._count < wanted:
            self._count += 1
            threading.Thread(target=self._serve, name=f"sender-{self._count}", daemon=True).start()

    def stop(self) -> None:
        """Let them end when they are done."""
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self) -> None:
        while True:
            task = self._work.get()
            if task is None:
                return
            sender, record, payload = task
            started = time.monotonic()
            try:
                outcome = sender.send(record.kind, payload, record.idempotency_key)
            except Exception as exc:  # noqa: BLE001  # an answer must come back, or its key would wait for ever
                outcome = no_answer(f"internal error while sending: {type(exc).__name__}")
            self._inbox.put(Answer(record, outcome, time.time(), time.monotonic() - started, payload))
