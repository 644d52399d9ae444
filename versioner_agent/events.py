"""The event model: fields, statuses, validation, canonical payload, identity.

Everything that knows a field's name derives from `FIELDS`: command-line options, JSON input, messages, README's table.
Pure: no clock, no environment, no I/O; what the caller measured comes in as arguments. The rules come from the Event
Tracking API's documentation (required fields, status values) and from running the official clients.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from versioner_agent.errors import ValidationError
from versioner_agent.integrity import hash_of
from versioner_agent.values import json_type, shorten, shown, string_problem, tree_problems

KINDS = ("build", "deployment")
MAX_BODY_BYTES = 256 * 1024
MAX_METADATA_BYTES = 100 * 1024
#: Clocks before this are wrong: the package did not exist yet (seconds since 1970, 2026-11-01 UTC).
RELEASED_AT = 1_793_491_200
#: Prefix of what the agent adds to extra_metadata (`vi_` is the ecosystem's prefix for automatic values).
AGENT_PREFIX = "vi_agent_"


class Field(NamedTuple):
    """One field of an event: where it applies, what it holds, how it is offered."""

    name: str
    option: str
    type: str  # string | timestamp | boolean | object | status
    help: str
    kinds: tuple[str, ...] = KINDS
    required: bool = False


_BUILD = ("build",)
_DEPLOYMENT = ("deployment",)

FIELDS = (
    Field("product_name", "--product", "string", "Product or service.", required=True),
    Field("version", "--version", "string", "Version built or deployed.", required=True),
    Field("environment_name", "--environment", "string", "Target environment.", _DEPLOYMENT, required=True),
    Field("status", "--status", "status", "What happened; the API's aliases work, in any case.", required=True),
    Field("scm_branch", "--scm-branch", "string", "Branch."),
    Field("scm_sha", "--scm-sha", "string", "Commit; the API binds a version to its first one."),
    Field("scm_repository", "--scm-repository", "string", "Repository."),
    Field("build_url", "--build-url", "string", "Link to the CI run."),
    Field("build_number", "--build-number", "string", "Number of the CI run."),
    Field("source_system", "--source-system", "string", "CI system."),
    Field("invoke_id", "--invoke-id", "string", "Id of the run; repeats within a run are queued once."),
    Field("built_by", "--built-by", "string", "Who built it.", _BUILD),
    Field("built_by_email", "--built-by-email", "string", "Their e-mail address.", _BUILD),
    Field("built_by_name", "--built-by-name", "string", "Their full name.", _BUILD),
    Field("started_at", "--started-at", "timestamp", "When it started (RFC 3339 with an offset).", _BUILD),
    Field("deployed_by", "--deployed-by", "string", "Who deployed it.", _DEPLOYMENT),
    Field("deployed_by_email", "--deployed-by-email", "string", "Their e-mail address.", _DEPLOYMENT),
    Field("deployed_by_name", "--deployed-by-name", "string", "Their full name.", _DEPLOYMENT),
    Field("deploy_url", "--deploy-url", "string", "Link to the deployment.", _DEPLOYMENT),
    Field("completed_at", "--completed-at", "timestamp", "When it ended (RFC 3339 with an offset)."),
    Field(
        "skip_preflight_checks",
        "--skip-preflight-checks",
        "boolean",
        "Ask the API to skip its checks (deprecated there).",
        _DEPLOYMENT,
    ),
    Field("extra_metadata", "--extra-metadata", "object", "A JSON object, @FILE, or - for stdin."),
)

ALL_NAMES = frozenset(field.name for field in FIELDS)
FIELDS_OF = {kind: {f.name: f for f in FIELDS if kind in f.kinds} for kind in KINDS}
_REQUIRED_OF = {kind: tuple(f.name for f in FIELDS if kind in f.kinds and f.required) for kind in KINDS}

#: canonical status -> (aliases for both kinds, for deployments only, for builds only), all lower case.
STATUSES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "pending": (("queued", "scheduled"), (), ()),
    "started": (("in_progress", "init"), ("deploying",), ("building",)),
    "completed": (
        ("success", "complete", "finished", "succeeded", "succeededwithissues", "passed", "ok"),
        ("deployed",),
        ("built",),
    ),
    "failed": (("fail", "failure", "error", "timed_out", "unstable"), (), ()),
    "aborted": (("abort", "cancelled", "cancel", "skipped", "canceled", "not_built"), (), ()),
}
_CANONICAL_OF: dict[str, dict[str, str]] = {
    kind: {
        word: canonical
        for canonical, (both, deployment, build) in STATUSES.items()
        for word in (canonical, *both, *(build if kind == "build" else deployment))
    }
    for kind in KINDS
}
ENDED = ("completed", "failed", "aborted")

# Compiled on first use (re keeps them): most calls of `enqueue` need neither.
_TIMESTAMP = r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d):(\d\d)(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)"


class Event(NamedTuple):
    """A valid event: canonical status, trimmed strings, known kind; not yet stamped with times or an id."""

    kind: str
    fields: dict[str, Any]

    @property
    def product_name(self) -> str:
        """The ordering key."""
        return str(self.fields["product_name"])


class Stamp(NamedTuple):
    """What is known only at the moment of queuing."""

    event_id: str
    queued_at: float  # seconds since 1970
    host: str
    agent_version: str


def validate(kind: str, fields: Mapping[str, Any], *, allow_unknown: bool = False) -> Event:
    """Check *fields* of an event of *kind* and return it in canonical form; raises ValidationError with all problems.

    Optional fields that are null or empty are left out: a template whose variable is unset should not fail a build.
    """
    if kind not in KINDS:
        raise ValidationError([f"kind must be build or deployment, not {kind!r}"])
    known = FIELDS_OF[kind]
    checked: dict[str, Any] = {}
    problems: list[str] = []
    given: Mapping[Any, Any] = fields  # a script may pass anything
    for name, value in given.items():
        field = known.get(name)
        if field is not None:
            _check_field(field, kind, value, checked, problems)
        elif not isinstance(name, str):
            problems.append(f"{name!r}: field names are strings")
        elif not allow_unknown:
            problems.append(_unknown_field(name, kind))
        else:
            problem = string_problem(name)
            problems += [f"{shorten(shown(name))}: {problem}"] if problem else tree_problems(name, value)
            checked[name] = value
    for name in _REQUIRED_OF[kind]:
        if name not in checked and not any(problem.startswith(f"{name}:") for problem in problems):
            problems.append(f"{name}: is required")
    if not problems and _may_be_too_large(checked):
        size = len(_encode(checked))
        if size > MAX_BODY_BYTES:
            largest = max(checked, key=lambda name: len(_encode(checked[name])))
            problems.append(
                f"the event is {size} bytes of JSON, over the limit of {MAX_BODY_BYTES} (largest field: {largest})"
            )
    if problems:
        raise ValidationError(problems)
    return Event(kind, checked)


def _may_be_too_large(fields: Mapping[str, Any]) -> bool:
    """Tell whether the JSON of *fields* has to be measured: a character takes at most six bytes in it."""
    characters = 0
    for name, value in fields.items():
        if not isinstance(value, str):
            return True
        characters += len(name) + len(value) + len('"":"",')
    return 6 * characters > MAX_BODY_BYTES


def canonical_status(kind: str, word: str) -> str | None:
    """Return the API's own word for *word* (any case), or None where it has none."""
    return _CANONICAL_OF[kind].get(word.strip().lower())


def content_digest(event: Event) -> bytes:
    """SHA-256 (32 bytes) of what the event says, without what the agent adds by itself."""
    metadata = event.fields.get("extra_metadata")
    fields = event.fields
    if metadata is not None:
        kept = {key: value for key, value in metadata.items() if not key.startswith(AGENT_PREFIX)}
        fields = {name: value for name, value in fields.items() if name != "extra_metadata"}
        if kept:
            fields["extra_metadata"] = kept
    return hash_of(_encode(fields))


def contents_of(kind: str, payload: bytes, queued_at: float) -> list[bytes]:
    """Return what `content_digest` can have been of an event whose *payload* is known, the likeliest first.

    A time in it that is the moment of queuing was probably added there, but may have been the author's own.
    """
    fields = json.loads(payload)
    moment = rfc3339(queued_at)
    ours = [name for name in ("started_at", "completed_at") if fields.get(name) == moment]
    without = {name: value for name, value in fields.items() if name not in ours}
    return [content_digest(Event(kind, each)) for each in ((without, fields) if ours else (fields,))]


def identity(kind: str, invoke_id: str | None, run_attempt: str | None, content: bytes) -> bytes | None:
    """SHA-256 (32 bytes) of kind, run, run attempt and content; None without an invoke_id: nothing is a repeat then."""
    if invoke_id is None:
        return None
    named = f"{kind}\0{invoke_id}\0{run_attempt or ''}\0".encode()
    return hash_of(named + content)


def payload(event: Event, stamp: Stamp) -> bytes:
    """Return the exact JSON body: the fields, automatic times, and the agent's metadata where it fits.

    The bytes are fixed here for good: every attempt, whenever it comes, sends just these.
    """
    moment = rfc3339(stamp.queued_at)
    times = {}
    if clock_is_plausible(stamp.queued_at):
        times = dict.fromkeys(automatic_times(event), moment)
    ours: dict[str, Any] = {
        f"{AGENT_PREFIX}event_id": stamp.event_id,
        f"{AGENT_PREFIX}queued_at": moment,
        f"{AGENT_PREFIX}host": stamp.host,
        f"{AGENT_PREFIX}version": stamp.agent_version,
    }
    # What does not fit is left out, ours first: the event itself was found to fit.
    return next(filter(None, (_body(event, *added) for added in ((times, ours), (times, {}), ({}, {})))))


def _body(event: Event, times: dict[str, str], ours: dict[str, Any]) -> bytes | None:
    """Return the body with *times* and *ours* added, None where they make it too large."""
    fields = {**event.fields, **times}
    metadata = ours | event.fields.get("extra_metadata", {})
    if metadata:
        fields["extra_metadata"] = metadata
    body = _encode(fields)
    if not (times or ours) or len(body) <= MAX_METADATA_BYTES:
        return body
    if ours and len(_encode(metadata)) > MAX_METADATA_BYTES:
        return None
    return body if len(body) <= MAX_BODY_BYTES else None


def automatic_times(event: Event) -> tuple[str, ...]:
    """Name the time fields that queuing fills in: delivery may come weeks later, the event's time must not."""
    status = event.fields["status"]
    wanted: tuple[str, ...] = ()
    if status in ENDED:
        wanted = ("completed_at",)
    elif status == "started" and event.kind == "build":
        wanted = ("started_at",)
    return tuple(name for name in wanted if name not in event.fields)


def clock_is_plausible(now: float) -> bool:
    """Tell whether *now* (seconds since 1970) can be true."""
    return now >= RELEASED_AT


@lru_cache(maxsize=1)  # a batch has one time
def rfc3339(seconds: float) -> str:
    """Format seconds since 1970 as RFC 3339 in UTC, to the millisecond; out-of-range clocks become the nearest end."""
    bounded = min(max(seconds, 0.0), 253_402_300_799.0)
    return datetime.fromtimestamp(bounded, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word closest to *word*, if any is close."""
    import difflib  # noqa: PLC0415  # only for people who mistyped

    found = difflib.get_close_matches(word[:64], list(known), n=1, cutoff=0.6)
    return found[0] if found else None


_CANONICAL = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def _encode(value: Any) -> bytes:
    return _CANONICAL.encode(value).encode()


def _check_field(field: Field, kind: str, value: Any, checked: dict[str, Any], problems: list[str]) -> None:
    """Put the canonical value into *checked*, or what is wrong into *problems*."""
    if value is None:
        return
    if field.type == "object":
        problems += metadata_problems(value)
        if value:
            checked[field.name] = value
        return
    if field.type == "boolean":
        if isinstance(value, bool):
            checked[field.name] = value
        else:
            problems.append(f"{field.name}: must be true or false, not {json_type(value)}")
        return
    if not isinstance(value, str):
        problems.append(f"{field.name}: must be a string, not {json_type(value)}")
        return
    problem = string_problem(value)
    if problem:
        problems.append(f"{field.name}: {problem}")
        return
    trimmed = value.strip()
    if not trimmed:
        if field.required:
            problems.append(f"{field.name}: must not be empty")
        return
    canonical, problem = _CHECKS[field.type](kind, trimmed)
    if problem:
        problems.append(f"{field.name}: {problem}")
    checked[field.name] = canonical


def _check_string(_kind: str, value: str) -> tuple[str, str]:
    return value, ""


def _check_status(kind: str, value: str) -> tuple[str, str]:
    canonical = canonical_status(kind, value)
    if canonical is not None:
        return canonical, ""
    words = _CANONICAL_OF[kind]
    close = nearest(value.lower(), words)
    advice = f"did you mean {close!r}?" if close else f"one of {', '.join(STATUSES)}"
    return value, f"unknown status {shown(value)} for a {kind}; {advice}"


def _check_timestamp(_kind: str, value: str) -> tuple[str, str]:
    wrong = f"{shown(value)} is not an RFC 3339 time with an offset, like 2026-11-06T15:30:00Z"
    match = re.fullmatch(_TIMESTAMP, value, re.ASCII)
    if match is None:
        return value, wrong
    date, minutes, seconds, fraction, offset = match.groups()
    # RFC 3339 section 5.6 allows a leap second, which datetime does not know.
    checked = "59" if seconds == "60" else seconds
    try:
        datetime.fromisoformat(f"{date}T{minutes}:{checked}{offset.upper()}")
    except ValueError:
        return value, wrong
    # One spelling for each time, the one in which the official client sends it (Go's RFC3339Nano).
    fraction = (fraction or "").rstrip("0").rstrip(".")
    return f"{date}T{minutes}:{seconds}{fraction}{'Z' if offset[1:] == '00:00' else offset.upper()}", ""


_CHECKS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "string": _check_string,
    "status": _check_status,
    "timestamp": _check_timestamp,
}


def metadata_problems(value: Any) -> list[str]:
    """Say what keeps *value* from being extra_metadata; empty when it can be."""
    if not isinstance(value, dict):
        return [f"extra_metadata: must be a JSON object, not {json_type(value)}"]
    problems = tree_problems("extra_metadata", value)
    if not problems:
        size = len(_encode(value))
        if size > MAX_METADATA_BYTES:
            problems.append(f"extra_metadata: is {size} bytes of JSON, over the limit of {MAX_METADATA_BYTES}")
    return problems


def _unknown_field(name: str, kind: str) -> str:
    if name in ALL_NAMES:
        other = "deployment" if kind == "build" else "build"
        return f"{name}: is a field of a {other}, not of a {kind}"
    close = nearest(name, FIELDS_OF[kind])
    advice = f"did you mean {close!r}?" if close else "put it into extra_metadata, or --allow-unknown-fields"
    return f"{shorten(shown(name))}: unknown field; {advice}"
