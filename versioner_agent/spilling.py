"""`flush --spill`: deliver what can be delivered, then export the rest: the last step of a job whose disk vanishes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import closing
from types import FrameType
from typing import NamedTuple

from versioner_agent.config import Settings
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.exporting import Exported, check_free, export
from versioner_agent.flush import Drained, flush, others_can_write
from versioner_agent.opening import handled_by
from versioner_agent.storage import Store


class Spilled(NamedTuple):
    """What was delivered, and what was exported."""

    drained: Drained  # an empty one where flushing failed
    exported: Exported | None  # None where nothing was left
    trouble: str = ""  # why flushing failed, or what ended it


def flush_and_spill(
    settings: Settings,
    env: Mapping[str, str],
    path: str,
    *,
    timeout: float,
    rebind: bool = False,
    on_progress: Callable[[int | None], None] = lambda _: None,
) -> Spilled:
    """Flush as `flush.flush` does, and export what is pending then to the new file *path*, whatever became of that.

    SIGTERM and SIGINT end the flushing, not the exporting: who ends a job sends one after the other. Raises
    UsageError, before anything is done, where others can write the outbox or *path* is taken, and AgentError where
    nothing could be exported.
    """
    check(settings, path)
    with handled_by(lambda *_: None, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        drained, failure, words = Drained([], 0), None, ""
        try:
            with handled_by(_Stop(), signal.SIGTERM, signal.SIGINT):
                drained = flush(
                    settings, env, timeout=timeout, rebind=rebind, on_progress=on_progress, is_hurried=False
                )
        except _StoppedError as exc:
            words = f"flushing was ended by {signal.Signals(exc.args[0]).name}"
        except AgentError as exc:
            failure, words = exc, " ".join(exc.message.split())
        exported = export(settings, path)
        if exported is None and failure is not None:
            raise failure
        return Spilled(drained, exported, words)


def check(settings: Settings, path: str) -> None:
    """Refuse what could not be spilled in the end, by raising UsageError."""
    with closing(Store(settings.db, settings.busy_timeout)) as store:
        sharing = others_can_write(store.path) if os.path.exists(store.path) else ""
        if sharing:
            raise UsageError(
                f"{sharing}: --spill would take other people's events away; nothing was done",
                "leave them to the agent, or export them: `versioner-agent export FILE`",
            )
        check_free(store, path)


class _StoppedError(BaseException):
    """A signal has ended the flushing where nothing else handles it."""


class _Stop:
    """Ends the flushing at the first signal; a second one must not end what the first one has ended."""

    def __init__(self) -> None:
        self._is_told = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Raise _StoppedError, once."""
        if not self._is_told:
            self._is_told = True
            raise _StoppedError(number)
