"""What checks find, and what that means for an exit status. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Finding(NamedTuple):
    """What one check found, and what to do about it.

    An `error` keeps events from being queued or delivered until somebody acts; a `warning` is to be looked at.
    """

    check: str
    level: str  # ok | warning | error
    finding: str
    action: str = ""


def ok(check: str, finding: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(check, "ok", finding)


def not_looked_at(check: str, why: str) -> Finding:
    """Return what stands for a check that another one, or a permission, made impossible."""
    return Finding(check, "warning", f"not looked at: {why}")


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 where there is an error, or damage that nobody has acknowledged; else 0."""
    return int(any(found.level == "error" or (found.check, found.level) == ("damage", "warning") for found in findings))


def total(findings: Sequence[Finding]) -> str:
    """Say how many of which level there are."""
    errors, warnings = (sum(found.level == level for found in findings) for level in ("error", "warning"))
    if not errors and not warnings:
        return "nothing to do"
    return ", ".join(_counted(number, word) for number, word in ((errors, "error"), (warnings, "warning")) if number)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
