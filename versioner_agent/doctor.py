"""`doctor` on this host: configuration, the outbox, who delivers from it, the key. Nothing here changes anything.

Each check returns findings and raises nothing. What is around the outbox's file is in `premises`, the network in
`probing`, systemd in `servicing`.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any, NamedTuple

from versioner_agent import config, damage, gauges, layout, masked, notices, premises, review, schema, urls
from versioner_agent.atonce import at_once
from versioner_agent.config import Key, Settings
from versioner_agent.configfile import File, Problem
from versioner_agent.errors import OutboxBusy, OutboxError, OutboxOutdated
from versioner_agent.events import clock_is_plausible
from versioner_agent.findings import Finding, not_looked_at, ok
from versioner_agent.locks import FlusherLock, Presence
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import ADVICE
from versioner_agent.review import Stats
from versioner_agent.storage import OutboxMissing, Store, is_wal
from versioner_agent.text import duration, key_account, key_public_part, mask_keys, utc_time

BUSY_S = 5.0  # no writer is waited for any longer
OLD_S = 3600.0  # what waits for longer is worth a word
RECEIPT_DUE_S = 30 * 86_400.0
#: States of a destination that no waiting ends.
_NEEDS_A_PERSON = ("unauthorized", "misrouted", "not_authentic", "proxy")
#: Versions that can corrupt a file with write-ahead logging (https://sqlite.org/wal.html#walresetbug).
_WAL_UNSAFE = ((3, 7, 0), (3, 51, 2))
#: Where commands find outbox and configuration is for them to say.
_OF_COMMANDS = ("VERSIONER_AGENT_DB", config.ENV_CONFIG)
RUNBOOK = "see Runbooks in README"


class Case(NamedTuple):
    """What is to be looked at: settings, with the default in place of what can't be used, and what is wrong there."""

    settings: Settings
    env: Mapping[str, str]
    files: list[File]
    problems: list[Problem]

    def unknown(self, *keys: str) -> str:
        """Say which of *keys* is not known, and why; empty where all are."""
        for key in keys:
            if any(problem.key == key for problem in self.problems):
                return f"{key} can't be used as it is configured"
            if not self.settings.is_explicit(key) and not config.is_complete(self.files):
                return f"{key} may be in a configuration file that can't be read"
        return ""


def case_of(flags: Mapping[str, Any], env: Mapping[str, str], named: str | None) -> Case:
    """Read the configuration as commands do, *named* by --config; whatever is wrong with it is kept."""
    files = config.read_files(env, named)
    settings, problems = config.resolved_from(flags, env, files)
    usable = dict(settings.values)
    for key in {problem.key for problem in problems if problem.key}:
        usable[key] = config.BY_KEY[key].default
    return Case(settings._replace(values=usable), env, files, problems)


def is_services(case: Case, service: layout.Layout = layout.SYSTEM) -> bool:
    """Tell whether the outbox is the one that the *service* delivers from: of its directory, or its configuration."""
    if case.unknown("db"):
        return False
    if f"{directory_of(case)}/".startswith(f"{service.state}/"):
        return True
    named = [file.content.get("db") for file in case.files if file.name == service.config]
    return any(isinstance(db, str) and os.path.realpath(db) == os.path.realpath(case.settings.db) for db in named)


def environment_of(case: Case, unit: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the service has from its *unit* in place of ours: what leads it to the API."""
    own = {name: value for name, value in case.env.items() if not (unit and _leads(name))}
    theirs = {name: value for name, value in unit.items() if name.startswith("VERSIONER_") or _leads(name)}
    return {**own, **{name: value for name, value in theirs.items() if name not in _OF_COMMANDS}}


def _leads(variable: str) -> bool:
    """Tell whether a shell has *variable* for other purposes, while for the service it decides alone."""
    return variable.lower().endswith("_proxy") or variable == "VERSIONER_API_KEY"


def directory_of(case: Case) -> str:
    """Return where the outbox lies, without links; the root directory where that is not known."""
    return "/" if case.unknown("db") else os.path.dirname(os.path.realpath(case.settings.db))


def rows(case: Case, found: Key) -> list[masked.Row]:
    """Return the settings in force as they may be shown, *found* as the key."""
    return masked.rows(case.settings, found, {file.name: file for file in case.files})


def configuration(case: Case) -> list[Finding]:
    """Tell what is set and by whom, or each thing that is wrong."""
    if case.problems:
        return [
            Finding("configuration", "error", mask_keys(str(problem)), problem.hint or "") for problem in case.problems
        ]
    shown = rows(case, config.find_key(case.settings, case.env))
    named = [row.cells for row in shown if row.source != "default" and row.value is not None]
    words = "; ".join(f"{key} {value} ({source})" for key, value, source in named)
    return [ok("configuration", words or "nothing is set: all defaults")]


def clock(now: float) -> list[Finding]:
    """Look whether *now* (seconds since 1970) can be true."""
    if clock_is_plausible(now):
        return []
    words = f"this host's clock says {utc_time(now)}: events are queued without their times"
    return [Finding("clock", "error", words, "set the clock (timedatectl set-ntp true)")]


# --- the outbox


def outbox(case: Case, key: Key, now: float, *, deep: bool) -> tuple[list[Finding], Presence]:
    """Look at the outbox and who is at it; *deep* reads the whole file, however large."""
    if why := case.unknown("db"):
        return [not_looked_at("outbox", why)], Presence(is_delivering=False, has_agent=False, pid=None, agent_pid=None)
    settings = case.settings
    with closing(Store(settings.db, min(settings.busy_timeout, BUSY_S))) as store:
        store.patience = 1
        presence = FlusherLock(store.path).presence()
        whole = _outbox(store, deep=deep)
        found = [whole, *premises.examine(store.path, is_named=settings.is_explicit("db"))]
        with suppress(OutboxError, OSError):  # the check of the outbox says why
            with at_once(store) as connection:
                stats = review.stats_of(store, connection)
                sign = gauges.last_sign_at(store, connection, stats, settings.max_backoff)
            found += [*_past_damage(stats), *_sqlite(store), *_machine(stats), *_exports(stats, now)]
            found += [
                *_destination(stats, _here(case, key)),
                *_agent(stats, presence, sign, now),
                *_pending(stats, now),
            ]
    return found, presence


def _outbox(store: Store, *, deep: bool) -> Finding:
    try:
        found = damage.find(store, deep=deep)
        if found is not None:
            return Finding("outbox", "error", found.message, found.hint or "")
        bytes_ = review.stats(store).bytes
    except OutboxMissing as exc:
        return Finding("outbox", "ok", exc.message, exc.hint or "")
    except OutboxBusy as exc:
        by = premises.holders(store.path)
        return Finding("outbox", "error", exc.message + (f"; locked by {by}" if by else ""), exc.hint or "")
    except OutboxError as exc:
        return Finding("outbox", "error", exc.message, exc.hint or "")
    if store.version > schema.VERSION:
        newer = store.unknown_version(store.version)
        return Finding("outbox", "error", f"{newer.message}: events are queued and not delivered", newer.hint or "")
    is_whole = deep or not damage.is_large(store)
    how = "the whole file is" if is_whole else "header and tables (--deep reads it all, while queuing waits) are"
    words = f"{store.path} ({bytes_ / 1024:.0f} KiB, schema {store.version}): {how} sound"
    if store.version < schema.VERSION:
        older = OutboxOutdated()
        return Finding("outbox", "warning", f"{words}; {older.message}", older.hint or "")
    return ok("outbox", words)


def _past_damage(stats: Stats) -> list[Finding]:
    if stats.damage is None:
        return []
    action = "look at what was kept and queue again what is missing, then `versioner-agent doctor --acknowledge`"
    return [Finding("damage", "warning", f"the outbox was damaged: {stats.damage}", action)]


def _sqlite(store: Store) -> list[Finding]:
    with store.read() as connection:
        has_wal = is_wal(connection)
    version = sqlite3.sqlite_version
    if has_wal and _WAL_UNSAFE[0] <= sqlite3.sqlite_version_info <= _WAL_UNSAFE[1]:
        words = f"a program keeps the outbox in write-ahead logging, which SQLite {version} can corrupt"
        return [Finding("sqlite", "warning", words, "end that program (fuser); the outbox is switched back then")]
    return [ok("sqlite", f"SQLite {version}{', write-ahead logging' if has_wal else ''}")]


def _machine(stats: Stats) -> list[Finding]:
    if not stats.other_machine:
        return []
    pending = stats.counts["pending"]
    words = "the outbox was made on another machine"
    if pending:
        words += f"; {pending} pending here may be delivered from there too"
    action = (
        f"moved or restored: `versioner-agent doctor --acknowledge`; a clone: start with a fresh outbox ({RUNBOOK})"
    )
    return [Finding("machine", "warning", words, action)]


def _exports(stats: Stats, now: float) -> list[Finding]:
    overdue = [now - each.created_at for each in stats.exports.batches if now - each.created_at > RECEIPT_DUE_S]
    if not overdue:
        return []
    batches = "1 exported batch has" if len(overdue) == 1 else f"{len(overdue)} exported batches have"
    words = f"{batches} no receipt, the oldest for {duration(max(overdue))}"
    return [Finding("exports", "warning", words, "import the far side's receipts, or export again what was lost")]


def _here(case: Case, key: Key) -> Destination | None:
    """Return where this is configured to send; None where that is not known."""
    if case.unknown("api_url"):
        return None
    return Destination(urls.origin_of(case.settings.api_url), key_account(key.key) if key.key else None)


def _destination(stats: Stats, here: Destination | None) -> list[Finding]:
    pending, health, bound = stats.counts["pending"], stats.health, stats.destination
    if here is not None and pending and here.differs_from(bound):
        words = f"{pending} pending events are for {bound}, this is configured for {here}"
        action = "correct api_url and key, use another outbox (--db), or `flush --new-destination`"
        return [Finding("destination", "error", words, action)]
    if health.state in ("up", "unknown"):
        return [ok("destination", f"{bound.origin or 'none yet'}: {health.state}")]
    where = bound.origin or (here.origin if here else None) or "the API"
    words = f"{where}: {health.state}{f': {health.reason}' if health.reason else ''}"
    level = "error" if pending and health.state in _NEEDS_A_PERSON else "warning"
    return [Finding("destination", level, words, ADVICE.get(health.state, ""))]


def _agent(stats: Stats, presence: Presence, sign: float | None, now: float) -> list[Finding]:
    pending = stats.counts["pending"]
    if not presence.has_agent:
        if presence.is_delivering:
            return [ok("agent", f"none runs; a flush (pid {presence.pid or 'unknown'}) delivers")]
        if not pending:
            return [ok("agent", "none runs, and nothing waits")]
        action = "start it (`versioner-agent service install --now`), or `versioner-agent flush`"
        return [Finding("agent", "warning", f"none runs, and {pending} pending", action)]
    pid = presence.agent_pid
    if pid is not None and premises.is_stopped(pid):
        return [Finding("agent", "error", f"pid {pid} holds the lock and is stopped", f"kill -CONT {pid}")]
    if presence.has_borrower:
        words = f"running (pid {pid or 'unknown'}), lent to an export (pid {presence.borrower_pid or 'unknown'})"
        return [ok("agent", words)]
    if sign is not None and (idle_s := now - sign) > notices.UNATTENDED_S:
        words = f"pid {pid or 'unknown'} holds the lock and has tried nothing for {duration(idle_s)}, {pending} pending"
        return [Finding("agent", "error", words, "restart it (`systemctl restart versioner-agent`)")]
    return [ok("agent", f"running (pid {pid or 'unknown'})")]


def _pending(stats: Stats, now: float) -> list[Finding]:
    count, oldest = stats.counts["pending"], stats.oldest_pending_at
    if not count or oldest is None:
        return [ok("pending", "nothing waits")]
    words = f"{count} pending, the oldest for {duration(now - oldest)}"
    if stats.held:
        held = stats.held[0]
        words += f"; {held.product_name} waits for record {held.id} ({held.reason})"
    if now - oldest <= OLD_S:
        return [ok("pending", words)]
    return [Finding("pending", "warning", words, "`versioner-agent status` says what they wait for")]


# --- the API key


def key_of(case: Case, service: layout.Layout = layout.SYSTEM) -> Key:
    """Return the key that delivers from the outbox: of the settings, else the service's where the outbox is its own."""
    settings = case.settings
    found = config.find_key(settings, case.env)
    if found.key or found.problem or not is_services(case, service):
        return found
    return config.find_key(settings._replace(values={**settings.values, "api_key_file": service.key}), {})


def key(case: Case, found: Key, presence: Presence, *, offline: bool) -> list[Finding]:
    """Look at the key, and who else could read it; *offline* is where events are exported, which needs none."""
    if found.key is None:
        return [_no_key(case, found, presence, offline=offline)]
    shown, source = key_public_part(found.key), mask_keys(found.source)
    if key_account(found.key) is None:
        words = f"the key in {source} is not of the form sk_ACCOUNT_…"
        return [Finding("key", "warning", words, "give the key alone, as the API's administrators made it")]
    return [ok("key", f"{shown} ({source})"), *_key_file(found.source, case.env)]


def _no_key(case: Case, found: Key, presence: Presence, *, offline: bool) -> Finding:
    if presence.agent_key:
        return ok("key", f"the agent uses {presence.agent_key}; not looked at here (root can)")
    if found.source == layout.SYSTEM.key and os.geteuid() != 0:
        words = f"not looked at: the service's key is in {found.source}, for root alone"
        return Finding("key", "warning", words, "sudo versioner-agent doctor")
    if why := case.unknown("api_key_file"):
        return not_looked_at("key", why)
    words = mask_keys(found.problem) or "there is no API key: nothing can be delivered from here"
    if case.settings.api_key_file and not found.problem:
        words += f" ({mask_keys(case.settings.api_key_file)} is empty)"
    action = "set VERSIONER_API_KEY or api_key_file; for the service, `versioner-agent service set-key`"
    return Finding("key", "warning" if offline else "error", words, action)


def _key_file(source: str, env: Mapping[str, str]) -> list[Finding]:
    if source.startswith(env.get("CREDENTIALS_DIRECTORY") or "\0"):
        return []  # systemd's business
    try:
        found = os.stat(source)
    except OSError:
        return []  # a variable's name
    if not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return []
    shown = mask_keys(source)
    words = f"{shown} can be read by others than its owner (mode {stat.S_IMODE(found.st_mode):04o})"
    return [Finding("key", "warning", words, f"chmod 600 {shown}, and have a new key made if others were there")]
