"""A new API key for the service: checked, tried on the API, stored, and taken by the agent that runs.

A key that the API refuses does not replace one that may work. It is tried with an empty event, which the API refuses
as invalid once it has accepted the key: nothing is created.
"""

from __future__ import annotations

import os
import select
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from types import MappingProxyType
from typing import NamedTuple

from versioner_agent import binding, config, review, shipped
from versioner_agent.config import Settings
from versioner_agent.errors import AgentError, OtherDestination, OutboxError, UsageError
from versioner_agent.files import open_plain
from versioner_agent.outbox import Destination
from versioner_agent.outcomes import Outcome
from versioner_agent.privileges import as_owner_of
from versioner_agent.service import POLL_S, Site, check_key_is_named
from versioner_agent.steps import Work, content_of
from versioner_agent.storage import OutboxMissing, Store
from versioner_agent.text import key_account, key_public_part

STDIN_S = 60.0  # what a pipe gets to hand over a key
LEAST_TRY_S = 1.0
PAUSES_S = (0.5, 1.0, 2.0, 4.0)  # between two tries; the last one again and again
TAKEN_S = 45.0  # the unit's own limit for stopping is 30 s
#: Where systemd keeps the credentials of a service that runs; root can read them.
CREDENTIAL = f"/run/credentials/{shipped.SERVICE}/api_key"


class Verdict(NamedTuple):
    """What the API says of a key."""

    word: str  # accepted | refused | none
    detail: str


def read_given(source: str) -> str:
    """Return the key in the file *source*, or on stdin for `-`; raises UsageError, without ever quoting it."""
    if source == "-":
        content, name = _from_stdin(), "stdin"
    else:
        try:
            with open(open_plain(source), "rb") as file:
                content, name = file.read(config.MAX_KEY_BYTES + 1), source
        except OSError as exc:
            raise UsageError(
                f"can't read the key from {source}: {exc.strerror or exc}", "name a file, or - for stdin"
            ) from exc
    return checked(content, name)


def checked(content: bytes, name: str) -> str:
    """Return the key in *content*, from *name*; raises UsageError for what is no key."""
    key = content.strip().decode("ascii", "replace")
    problem = ""
    if len(content) > config.MAX_KEY_BYTES:
        problem = f"is over {config.MAX_KEY_BYTES} bytes, which is no key"
    elif not key:
        problem = "is empty"
    elif len(key.splitlines()) > 1:
        problem = "is more than one line"
    elif not (key.isascii() and key.isprintable()) or " " in key:
        problem = "holds characters that no key has"
    if problem:
        raise UsageError(f"the key from {name} {problem}", "give the key alone, as the API's administrators made it")
    return key


def _from_stdin() -> bytes:
    """Read at most a byte more than a key may have, for STDIN_S seconds: a pipe may never end."""
    fd = sys.stdin.fileno()
    end = time.monotonic() + STDIN_S
    content = b""
    while len(content) <= config.MAX_KEY_BYTES:
        ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise UsageError(f"no key came on stdin within {STDIN_S:g} s", "pipe the key in, or name a file")
        piece = os.read(fd, config.MAX_KEY_BYTES + 1 - len(content))
        if not piece:
            break
        content += piece
    return content


def settings_of(site: Site, env: Mapping[str, str], unit: Mapping[str, str] = MappingProxyType({})) -> Settings:
    """Return the settings that the service has: of its file and its *unit*, whatever *env* says. Raises ConfigError."""
    path = site.machine.at(site.layout.config)
    kept = {name: value for name, value in env.items() if name == "HOME" or name.startswith("XDG_")}
    settings = config.load({}, {**kept, **unit, config.ENV_CONFIG: path})
    if not settings.is_explicit("db"):
        settings.values["db"] = site.machine.at(os.path.join(site.layout.state, "outbox.db"))
    return settings


def set_key(
    site: Site, work: Work, key: str, *, settings: Settings, env: Mapping[str, str], timeout: float, force: bool = False
) -> Verdict:
    """Try *key* on the API for *timeout* seconds and store it unless the API refuses it, or *force*.

    Raises OtherDestination for the key of another account than pending events are for (unless *force*), AgentError.
    """
    directory = os.path.dirname(site.machine.at(site.layout.key))
    if not site.machine.is_user and not os.path.isdir(directory):
        raise AgentError(f"there is no {directory}", "`versioner-agent service install` makes it")
    if not force:
        _check_account(key, settings)
    verdict = ask(settings, key, env, timeout)
    if verdict.word == "refused" and not force:
        return verdict
    if site.machine.is_user:
        work.directory(directory, 0o700, None)
    path = site.machine.at(site.layout.key)
    is_new = work.write(path, f"{key}\n".encode(), 0o600, action="key", detail=key_public_part(key))
    if site.machine.is_user:
        check_key_is_named(site, work)
    elif site.machine.has_systemd:
        _hand_over(site, work, key, is_new=is_new)
    return verdict


def _check_account(key: str, settings: Settings) -> None:
    """Raise OtherDestination where events wait for another account than the key's."""
    try:
        with (
            as_owner_of(os.path.dirname(os.path.realpath(settings.db))),
            closing(Store(settings.db, settings.busy_timeout)) as store,
        ):
            found = review.stats(store)
    except (OutboxMissing, OutboxError):
        return  # nothing is known of it; the agent checks again before it sends
    account, pending = key_account(key), found.counts["pending"]
    if pending and Destination(None, account).differs_from(found.destination):
        raise OtherDestination(
            f"{settings.db} has events for account {found.destination.account} ({pending} pending), this is a key of "
            f"account {account}; it was not stored",
            "give it a key of that account; --force stores this one, and the agent sends nothing with it",
        )


def ask(
    settings: Settings,
    key: str,
    env: Mapping[str, str],
    timeout: float,
    *,
    pause: Callable[[float], None] = time.sleep,
) -> Verdict:
    """Return what the API says of *key*, trying for *timeout* seconds; `none` where it says nothing."""
    end = time.monotonic() + timeout
    pauses = list(PAUSES_S)
    while True:
        outcome = _try(settings, key, env, max(LEAST_TRY_S, end - time.monotonic()))
        word = verdict_of(outcome)
        wait = pauses.pop(0) if len(pauses) > 1 else pauses[0]
        if word != "none" or time.monotonic() + wait >= end:
            return Verdict(word, outcome.detail if word != "accepted" else "")
        pause(wait)


def verdict_of(outcome: Outcome) -> str:
    """Return what an answer to an empty event says of the key: accepted, refused, or none."""
    if outcome.reason == "unauthorized" and outcome.was_sent:
        return "refused"
    # What gateways answer before anybody looks at the key (413, 415 …) says nothing of it.
    is_invalid = outcome.reason == "invalid" and outcome.http_status in (400, 422)
    return "accepted" if is_invalid or outcome.reason == "delivered" else "none"


def _try(settings: Settings, key: str, env: Mapping[str, str], within_s: float) -> Outcome:
    bounded = settings._replace(values={**settings.values, "timeout": min(settings.timeout, within_s)})
    sender, _, _ = binding.sending(bounded, {**env, "VERSIONER_API_KEY": key}, binding.Account(None))
    with closing(sender):
        return sender.send("build", b"{}", str(uuid.uuid4()))


def _hand_over(site: Site, work: Work, key: str, *, is_new: bool) -> None:
    """See that the service that runs has the key; a stopped one takes it when it starts."""
    machine, service = site.machine, shipped.SERVICE
    if machine.shown(service, "ActiveState")["ActiveState"] in ("", "inactive") or _has_taken(site, key):
        return
    is_watched = machine.shown(shipped.KEY_PATH, "ActiveState")["ActiveState"] == "active"
    if is_watched and is_new:
        work.step("restart", service, True, lambda: None, f"by {shipped.KEY_PATH}")
    else:
        work.step("restart", service, True, lambda: machine.must_systemctl("--no-block", "try-restart", service))
    if work.dry_run:
        return
    end = time.monotonic() + TAKEN_S
    while not (_has_taken(site, key) and machine.shown(service, "ActiveState")["ActiveState"] == "active"):
        if time.monotonic() >= end:
            work.warn(f"{service} has not taken the key yet: systemctl status {service}")
            return
        time.sleep(POLL_S)


def _has_taken(site: Site, key: str) -> bool:
    content = content_of(site.machine.at(CREDENTIAL))
    return content is not None and content.strip() == key.encode()
