"""What can go wrong, as a tree; each class knows the process's exit status.

AgentError (1)
├── UsageError (2)
│   └── ValidationError      every problem of the events given, at once
├── ConfigError (3)          every bad setting, at once
│   ├── OtherDestination     the outbox belongs to another API or account
│   └── CredentialsMissing
├── OutboxError (1)
│   ├── OutboxBusy           the write queue did not move in time
│   ├── OutboxDamaged        the file is not what was written; `salvage` mends it
│   ├── OutboxFull           no room on the disk
│   └── OutboxOutdated       an older schema, without the tables that are needed
└── LockHeld (1)             somebody else delivers from this outbox, or has it lent

A refusal by the API is no exception: it is an outcome (see `outcomes`).
"""

from __future__ import annotations

MAX_PROBLEMS_SHOWN = 50  # lines; the rest is counted


class AgentError(Exception):
    """Something a person can act on: a message, and in `hint` the next action."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        """Keep what happened and what to do about it."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def lines(self) -> list[str]:
        """The message as people are shown it: a line break in one of these is somebody else's."""
        return [self.message]


class UsageError(AgentError):
    """The call itself makes no sense."""

    exit_code = 2


class ValidationError(UsageError):
    """An event that the API would refuse; `problems` lists all that is wrong with it."""

    def __init__(self, problems: list[str], hint: str | None = None) -> None:
        """Join *problems* (one line each) into the message."""
        super().__init__("\n  ".join(_listed("invalid event", problems)), hint)
        self.problems = problems

    @property
    def lines(self) -> list[str]:
        """A line for each problem, if there are several."""
        return _listed("invalid event", self.problems)


class ConfigError(AgentError):
    """Settings that can't be used; `problems` lists all of them."""

    exit_code = 3

    def __init__(self, problems: list[str] | str, hint: str | None = None) -> None:
        """Join *problems* (one line each) into the message."""
        listed = [problems] if isinstance(problems, str) else problems
        super().__init__("\n  ".join(_listed("configuration", listed)), hint)
        self.problems = listed

    @property
    def lines(self) -> list[str]:
        """A line for each problem, if there are several."""
        return _listed("configuration", self.problems)


class OtherDestination(ConfigError):
    """The outbox delivers to another API or account than the one configured."""


class CredentialsMissing(ConfigError):
    """There is no API key to send with."""


class OutboxError(AgentError):
    """The outbox can't be read or written."""


class OutboxBusy(OutboxError):
    """Other writers held the outbox for longer than `busy_timeout`."""


class OutboxDamaged(OutboxError):
    """The outbox's file is not what was written: *what* is wrong, and the device and inode of the file it was seen in.

    Not *is_certain* where a statement failed that can't fail on a sound file: the file has to be looked through.
    """

    def __init__(
        self, message: str, hint: str | None, what: str, inode: tuple[int, int] | None, *, is_certain: bool = True
    ) -> None:
        """Keep where the damage was seen, so that it is not mended twice."""
        super().__init__(message, hint)
        self.what = what
        self.inode = inode
        self.is_certain = is_certain


class OutboxFull(OutboxError):
    """The disk under the outbox has no room."""


class OutboxOutdated(OutboxError):
    """The outbox has an older schema, which knows nothing of what is asked."""

    def __init__(self) -> None:
        """Say who upgrades it."""
        super().__init__(
            "the outbox is still one of an earlier version of versioner-agent",
            "restart the agent, which upgrades it; where there is none, let `versioner-agent run` do it",
        )


class LockHeld(AgentError):
    """Somebody else holds the flusher lock."""


def _listed(title: str, problems: list[str]) -> list[str]:
    shown = problems[:MAX_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown = [*shown, f"… and {len(problems) - len(shown)} more"]
    return [f"{title}: {shown[0]}"] if len(shown) == 1 else [f"{title}:", *shown]
