"""What support needs to see, in one archive: every text of it passes one mask, and a manifest says what is not in it.

The outbox itself, the API key, the environment and the values of `extra_metadata` never are.
"""

from __future__ import annotations

import io
import json
import platform
import re
import shlex
import sqlite3
import ssl
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple
from urllib.parse import unquote

from versioner_agent import __version__, birthplace, config, damage, review, schema, selecting, servicing
from versioner_agent.config import Key
from versioner_agent.doctor import BUSY_S, Case, rows
from versioner_agent.errors import OutboxError
from versioner_agent.findings import Finding, total
from versioner_agent.machine import Machine
from versioner_agent.newfile import NewFile
from versioner_agent.records import record_json, time_json
from versioner_agent.review import Attempt
from versioner_agent.storage import Store
from versioner_agent.text import key_account, mask_keys, printable, utc_time

TOP = "versioner-agent-support"
RECORDS = 200
BATCHES = 200
PACKAGES = ("click", "httpx", "httpcore", "platformdirs")
LEFT_OUT = (
    "the outbox's file, its copies and its journal",
    "API keys: what looks like one is masked wherever it stands, but for the account in it",
    "passwords in URLs, of proxies above all, and what their parameters call a token, a key or a signature",
    "the values of other variables than VERSIONER_… and proxies in units, and the credentials that they set",
    "the values of extra_metadata in records (their names are there)",
    f"all but the last {RECORDS} records",
    "the environment, other than which of its variables sets what",
    "what other programs wrote into the journal, and what is older than a day",
)
_SHORTEST_SECRET = 6
#: Whoever has a link with one of these needs no password: `?token=…`, `#access_token=…`. Bounded, to be linear.
_PARAMETER = (
    r"(?i)([?&#;][\w.%-]{0,64}(?:token|secret|pass|pwd|sig|key|auth|credential|jwt)[\w.%-]{0,64}=)[^&#\s\"'<>\\]+"
)
#: Variables whose values are of use, and masked like all else; so are proxies'.
_SHOWN = {config.ENV_CONFIG, *(option.env for option in config.OPTIONS if not option.is_secret)}


class Part(NamedTuple):
    """A file of the archive, and what of it could not be had."""

    name: str
    content: str
    problem: str = ""


class Mask:
    """Takes out of a text what is secret: keys by their form, passwords in URLs, and *secrets* word for word."""

    def __init__(self, secrets: Iterable[str | None]) -> None:
        """Know *secrets* that have another form than keys."""
        self._secrets = sorted(
            {word for word in secrets if word and len(word) >= _SHORTEST_SECRET}, key=len, reverse=True
        )

    def __call__(self, text: str) -> str:
        """Return *text* without them; JSON stays JSON."""
        for secret in self._secrets:  # first: a key may hold more than its form tells
            shown = mask_keys(secret) if key_account(secret) else "***"
            text = text.replace(secret, shown).replace(json.dumps(secret)[1:-1], shown)
        text = mask_keys(text)
        text = re.sub(r"(VERSIONER_API_KEY\s*=\s*)[^\s\"'\\]+", r"\1***", text)
        text = re.sub(r"(?i)(_proxy\s{0,9}=\s{0,9}(?:https?://)?)([^\s\"'\\]*)", _without_userinfo, text)
        text = re.sub(r"(://)[^/\s\"'<>\\]+@", r"\1***@", text)
        return re.sub(_PARAMETER, r"\1***", text)


def _without_userinfo(variable: re.Match[str]) -> str:
    """Return a proxy's variable without name and password; what has no end yet is read once, or it would take ages."""
    _, at, place = variable[2].rpartition("@")
    return f"{variable[1]}***@{place}" if at else variable[0]


def secrets_of(case: Case, key: str | None) -> list[str | None]:
    """Return the words that must not leave this host: the key, and the passwords of proxies."""
    proxies = [case.settings.proxy, *(value for name, value in case.env.items() if name.lower().endswith("_proxy"))]
    found = [key, case.settings.api_key, case.env.get("VERSIONER_API_KEY", "").strip()]
    for proxy in filter(None, proxies):
        # Not as a URL: a password may hold what belongs into none.
        userinfo = proxy.partition("://")[2 if "://" in proxy else 0].rpartition("@")[0]
        user, _, password = userinfo.partition(":")
        found += [userinfo, password or user, unquote(password or user)]  # a token may stand where the user does
    return found


def write(path: str, parts: Sequence[Part], mask: Mask) -> None:
    """Write the archive, for its owner only; all of it, or nothing. Raises UsageError, AgentError."""
    masked = [part._replace(content=mask(part.content)) for part in parts]
    manifest = _manifest(masked)
    packed = _packed([manifest._replace(content=mask(manifest.content)), *masked], time.time())
    with NewFile(path) as new:
        try:
            new.file.write(packed)
        except OSError as exc:
            raise new.error(exc) from exc
        new.place()


def _packed(parts: Iterable[Part], now: float) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for part in parts:
            data = part.content.encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"{TOP}/{part.name}")
            entry.size, entry.mtime, entry.mode = len(data), int(now), 0o600
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _manifest(parts: Sequence[Part]) -> Part:
    lines = [f"versioner-agent {__version__}, {utc_time(time.time())}", "", "What is here:"]
    lines += [f"  {part.name} ({len(part.content.encode('utf-8', 'replace'))} bytes)" for part in parts if part.content]
    lines += ["", "What could not be had:"]
    lines += [f"  {part.name}: {printable(part.problem)}" for part in parts if part.problem] or ["  nothing"]
    lines += ["", "What was left out:", *(f"  {words}" for words in LEFT_OUT)]
    return Part("manifest.txt", "\n".join(lines) + "\n")


# --- the parts


def about(case: Case, key: Key, findings: Sequence[Finding]) -> list[Part]:
    """Return what the checks found, the settings in force, and the versions of what runs here."""
    cells = [row.cells for row in rows(case, key)]
    told = [f"{each.level:<8} {each.check:<14} {printable(each.finding)}" for each in findings]
    return [
        Part("versions.txt", _versions()),
        Part("configuration.txt", "".join("  ".join(map(printable, row)) + "\n" for row in cells)),
        Part("findings.txt", "\n".join([*told, total(findings)]) + "\n"),
        Part("findings.jsonl", _lines(each._asdict() for each in findings)),
    ]


def _versions() -> str:
    from importlib import metadata  # 20 ms, only for a bundle

    found = {
        "versioner-agent": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "openssl": ssl.OPENSSL_VERSION,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": "unknown",
    }
    with suppress(OSError):
        found["distribution"] = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # in an archive
            found[package] = "unknown"
    return "".join(f"{name} {version}\n" for name, version in found.items())


def of_service(machine: Machine) -> list[Part]:
    """Return the units and the journal; what can't be had is said."""
    if not machine.has_systemd:
        problem = "systemd is not running here"
        return [Part("units.txt", "", problem), Part("journal.txt", "", problem)]
    units, journal = servicing.units(machine), servicing.journal(machine)
    return [Part("units.txt", without_variables(units.content), units.problem), Part("journal.txt", *journal)]


def without_variables(units: str) -> str:
    """Return *units* without the values of variables, but for ours and proxies, and without credentials' content."""
    units = re.sub(r"(?m)^(\s*SetCredential(?:Encrypted)?\s*=\s*[^:\n]*:)(?:.*\\\n)*.*", r"\1***", units)
    return re.sub(r"(?m)^(\s*Environment\s*=)((?:.*\\\n)*.*)", _without_values, units)


def _without_values(line: re.Match[str]) -> str:
    try:
        words = shlex.split(line[2].replace("\\\n", " "))
    except ValueError:  # quoted in a way that only systemd knows
        return f"{line[1]}***"
    pairs = [word.partition("=") for word in words]
    shown = [(name, value if name in _SHOWN or name.lower().endswith("_proxy") else "***") for name, _, value in pairs]
    return line[1] + shlex.join("=".join(pair) for pair in shown)


def of_outbox(case: Case) -> list[Part]:
    """Return the last records and the batches that crossed an air gap; what can't be read is said."""
    if why := case.unknown("db"):
        return [Part("records.jsonl", "", why)]
    with closing(Store(case.settings.db, min(case.settings.busy_timeout, BUSY_S))) as store:
        return [_part("records.jsonl", lambda: _records(store)), _part("batches.jsonl", lambda: _batches(store))]


def _part(name: str, make: Callable[[], Iterable[Any]]) -> Part:
    try:
        return Part(name, _lines(make()))
    except OutboxError as exc:
        return Part(name, "", exc.message)


def _records(store: Store) -> list[dict[str, Any]]:
    found = []
    for page in selecting.select(store, limit=RECORDS):
        for each in page:
            shown = review.show(store, each.id)
            if shown is not None:  # else it was pruned meanwhile
                record, payload, attempts = shown
                log = [_attempt_json(attempt) for attempt in attempts]
                found.append({**record_json(record), "payload": without_values(payload), "attempt_log": log})
    return found


def without_values(payload: bytes) -> Any:
    """Return an event's fields, the values of `extra_metadata` replaced; None for what is no JSON object."""
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    if "extra_metadata" in fields:
        given = fields["extra_metadata"]
        fields["extra_metadata"] = dict.fromkeys(given, "***") if isinstance(given, dict) else "***"
    return fields


def _attempt_json(attempt: Attempt) -> dict[str, Any]:
    return {**attempt._asdict(), "at": time_json(attempt.at)}


def _batches(store: Store) -> list[dict[str, Any]]:
    """Return what was exported and imported; the names are the tables' own."""
    found: list[dict[str, Any]] = []
    with store.read() as connection:
        other_machine = birthplace.is_elsewhere(store, connection)
        noted = damage.damage_json(damage.noted(connection))
        found.append({"schema": store.version, "other_machine": other_machine, "damage": noted})
        if store.version >= schema.EXPORTS_SINCE:
            for table in ("export", "arrival"):
                cursor = connection.execute(f"SELECT * FROM {table} ORDER BY id DESC LIMIT {BATCHES}")  # noqa: S608
                names = [column[0] for column in cursor.description]
                found += [{"table": table, **dict(zip(names, row, strict=True))} for row in cursor.fetchall()]
    return found


def _lines(values: Iterable[Any]) -> str:
    return "".join(json.dumps(value, default=str) + "\n" for value in values)
