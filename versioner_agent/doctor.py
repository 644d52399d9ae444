"""Checks of an outbox, as functions that return findings; nothing here changes anything."""

from __future__ import annotations

from typing import NamedTuple

from versioner_agent import damage, review, schema
from versioner_agent.errors import OutboxError
from versioner_agent.storage import OutboxMissing, Store


class Finding(NamedTuple):
    """What one check found, and what to do about it."""

    check: str
    level: str  # ok | warning | error
    finding: str
    action: str = ""


def examine(store: Store, *, deep: bool) -> list[Finding]:
    """Run all checks; *deep* reads the whole file, however large."""
    return [_outbox(store, deep=deep), *_past_damage(store)]


def _outbox(store: Store, *, deep: bool) -> Finding:
    try:
        found = damage.find(store, deep=deep)
        if found is not None:
            return Finding("outbox", "error", found.message, found.hint or "")
        bytes_ = review.stats(store).bytes
    except OutboxMissing as exc:
        return Finding("outbox", "ok", exc.message, exc.hint or "")
    except OutboxError as exc:
        return Finding("outbox", "error", exc.message, exc.hint or "")
    if store.version > schema.VERSION:
        newer = store.unknown_version(store.version)
        return Finding("outbox", "error", f"{newer.message}: events are queued and not delivered", newer.hint or "")
    is_whole = deep or not damage.is_large(store)
    how = "the whole file is" if is_whole else "header and tables (--deep reads it all, while queuing waits) are"
    return Finding("outbox", "ok", f"{store.path} ({bytes_ / 1024:.0f} KiB): {how} sound")


def _past_damage(store: Store) -> list[Finding]:
    try:
        noted = review.stats(store).damage
    except OutboxError:
        return []  # the check of the outbox says why
    if noted is None:
        return []
    action = "look at what was kept and queue again what is missing, then `versioner-agent doctor --acknowledge`"
    return [Finding("damage", "warning", f"the outbox was damaged: {noted}", action)]
