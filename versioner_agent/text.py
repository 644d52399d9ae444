"""Text for people: foreign strings made harmless, ages and times made readable.

What a product, a version or a server calls itself is not ours to trust: it must not move a cursor, forge a log line or
reverse a row. Pure; values are stored as they came and made harmless only where they are shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

#: What an API key looks like (`sk_{account}_{id}_{random}`, Event Tracking API documentation, Authentication).
#: Behind a word it is none (`task_…`), behind an escape of JSON it may be.
_KEY = r"(?:(?<![A-Za-z0-9])|(?<=\\[bfnrt]))sk_([A-Za-z0-9-]{1,64})_[A-Za-z0-9_-]+"
#: Control, format (bidi, zero width), surrogate, private and line/paragraph separator characters.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
#: What Azure DevOps (`##vso[…]`) and GitHub Actions (`##[…]`) take for a command wherever it stands in a line of a log.
_COMMAND = r"#(?=#\w*\[)"
_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"))


def printable(value: str) -> str:
    """Return *value* with what could steer a terminal, split a line or command a CI system written as escapes."""
    return _escaped(
        value, "\\x23", lambda character: character.encode("unicode_escape", "backslashreplace").decode("ascii")
    )


def json_line(value: Any, stream: TextIO) -> str:
    """Return *value* as JSON on one line, letters as they are and what could steer a terminal as JSON's escapes.

    Where *stream* is not UTF-8, as JSON is (RFC 8259 section 8.1), letters are escaped too.
    """
    is_utf8 = (stream.encoding or "").lower().replace("_", "-") in ("utf-8", "utf8")
    return _escaped(
        json.dumps(value, ensure_ascii=not is_utf8), "\\u0023", lambda character: json.dumps(character)[1:-1]
    )


def _escaped(value: str, mark: str, escape: Callable[[str], str]) -> str:
    """Return *value* with *escape* of what could steer a terminal, and *mark* for a `#` that would begin a command."""
    if "##" in value:
        value = re.sub(_COMMAND, lambda _: mark, value)
    if value.isascii() and value.isprintable():
        return value
    import unicodedata  # noqa: PLC0415  # rarely needed, and the enqueue path imports this module

    return "".join(
        escape(character) if unicodedata.category(character) in _UNSAFE_CATEGORIES else character for character in value
    )


def bounded(value: str, limit: int) -> str:
    """Return at most *limit* characters of *value*, storable as UTF-8 whatever it held."""
    safe = value[: limit + 1].encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def mask_keys(value: str) -> str:
    """Return *value* with everything shaped like an API key masked: servers echo what they refuse."""
    return re.sub(_KEY, r"sk_\1_***", value)


def harmless(value: str) -> str:
    """Return *value* on one line with keys masked; first that: behind an escape a key would be a word's end."""
    return printable(mask_keys(value))


def key_account(key: str) -> str | None:
    """Return the account named in an API key, None for a key of another shape."""
    match = re.fullmatch(_KEY, key.strip())
    return match.group(1) if match else None


def key_public_part(key: str) -> str:
    """Return what may be shown of an API key: account and id (`sk_acme_k2_…`), less where it has another shape."""
    match = re.fullmatch(r"(sk_[A-Za-z0-9-]{1,64}_)(?:([A-Za-z0-9-]{1,16}_)[A-Za-z0-9_-]+|[A-Za-z0-9_-]+)", key.strip())
    return f"{match[1]}{match[2] or ''}…" if match else "(a key of another form)"


def duration(seconds: float) -> str:
    """Say a duration in the largest unit that fits: `42 s`, `3 min`, `5 h`, `12 d`."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "0 s"


def age(then: float | None, now: float) -> str:
    """Say how long ago *then* was (both seconds since 1970)."""
    if then is None:
        return "never"
    if then > now + 1:
        return f"in {duration(then - now)}"
    return "just now" if now - then < 1 else f"{duration(now - then)} ago"


def utc_time(seconds: float) -> str:
    """Say a moment in UTC, to the second."""
    bounded_seconds = min(max(seconds, 0.0), 253_402_300_799.0)
    return datetime.fromtimestamp(bounded_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
