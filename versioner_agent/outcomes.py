"""What an answer means: `classify` turns a status, headers and body into an Outcome.

One ordered table, total over every status code and every body. An answer is believed only if it is proven to come from
the API: a proxy, a captive portal or a load balancer can answer with any status, a 200 included, and neither delivers
nor fails an event. Response codes: Event Tracking API documentation, Error Handling; RFC 9110; RFC 6585.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from versioner_agent.text import bounded, mask_keys

MAX_DETAIL_CHARS = 2000
MAX_WORDS_CHARS = 200  # of an id, a code, a rule's name
MAX_RETRY_AFTER_S = 3600.0

#: Reasons that settle one event.
EVENT_REASONS = frozenset({"delivered", "conflict", "blocked", "invalid"})
#: Reasons that speak of the destination -> the state it is in then.
STATE_OF = {
    "unavailable": "down",
    "no_answer": "down",
    "rate_limited": "rate_limited",
    "proxy": "proxy",
    "unauthorized": "unauthorized",
    "misrouted": "misrouted",
    "not_authentic": "not_authentic",
}
#: What a person does about a destination's state.
ADVICE = {
    "down": "nothing to do: events wait and are sent when the API answers again",
    "rate_limited": "nothing to do: the API asked to slow down",
    "proxy": "check the proxy setting and its credentials",
    "unauthorized": "check the API key (VERSIONER_API_KEY, api_key_file); it is read again before each try",
    "misrouted": "check api_url: what answers there is not the event API",
    "not_authentic": "something between this host and the API answers in its place (portal, proxy, firewall)",
}

_WAIT = frozenset({408, 425, 429})
_UNAUTHORIZED = frozenset({401, 402, 403})
_MISROUTED = frozenset({404, 405, 410, 421, 426})
_INVALID = frozenset({400, 411, 413, 414, 415, 422, 431})
_RULE = frozenset({423, 428})


class Outcome(NamedTuple):
    """What one attempt taught us."""

    reason: str  # one of EVENT_REASONS or STATE_OF
    detail: str  # for people, at most MAX_DETAIL_CHARS, keys masked
    http_status: int | None = None
    server_id: str | None = None
    code: str | None = None  # a rule's code
    rule: str | None = None  # a rule's name
    retry_after: str | None = None  # a rule's own words on when to come back
    wait_s: float | None = None  # Retry-After, 0…MAX_RETRY_AFTER_S
    counts: bool = False  # may speak of the event rather than of the API (see policy)
    server_time: float | None = None  # the answer's Date, seconds since 1970
    account: str | None = None  # of the key it was sent with
    was_sent: bool = True  # False: no request was made (no key to send with)
    is_cut: bool = False  # we did not wait long enough to learn anything of the API

    @property
    def is_verdict(self) -> bool:
        """Whether it settles the event."""
        return self.reason in EVENT_REASONS

    @property
    def is_answered(self) -> bool:
        """Whether anything answered at all."""
        return self.http_status is not None


def classify(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Outcome:
    """Return the meaning of an answer; *headers* have lower-case names, *now* is seconds since 1970.

    The first case that fits decides; every status and body fits one.
    """
    answer = _json_object(body)
    words = _refusal_words(answer)
    server_time = _http_date(headers.get("date"))
    server_id = _server_id(answer) if 200 <= status <= 299 else None
    detail = _for_people(status, headers, words)
    reason = _reason(status, answer, has_id=server_id is not None, has_words=words is not None)
    rule = _rule(answer) if reason == "blocked" else {}
    return Outcome(
        reason,
        detail if reason != "delivered" else "",
        http_status=status,
        server_id=server_id if reason == "delivered" else None,
        code=rule.get("code"),
        rule=rule.get("rule"),
        retry_after=rule.get("retry_after"),
        wait_s=retry_after_s(headers.get("retry-after"), server_time, now)
        if reason in ("rate_limited", "unavailable")
        else None,
        # A proven 500/501, or a filter's 403/413, may be about this one body.
        counts=(status in (500, 501) and words is not None) or (status in (403, 413) and words is None),
        server_time=server_time,
    )


def no_answer(problem: str) -> Outcome:
    """Return the outcome of an attempt without a complete answer: DNS, TCP, TLS, timeout, broken or oversized."""
    return Outcome("no_answer", _clean(problem))


def proxy_refused(problem: str, status: int | None = None) -> Outcome:
    """Return the outcome of an attempt that a proxy refused to pass on."""
    return Outcome("proxy", _clean(problem), http_status=status)


def no_key(problem: str) -> Outcome:
    """Return the outcome of not sending for want of an API key."""
    return Outcome("unauthorized", _clean(problem), was_sent=False)


def retry_after_s(value: str | None, server_time: float | None, now: float) -> float | None:
    """Read a Retry-After (RFC 9110 section 10.2.3) as 0…3600 seconds; None for what can't be read.

    A date is judged by the answer's own Date, so that a wrong clock on either side can't park us.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        # Cut before int(): a header of thousands of digits is refused by Python itself.
        return min(float(int(text[:12])), MAX_RETRY_AFTER_S) if len(text) <= 12 else MAX_RETRY_AFTER_S
    date = _http_date(text)
    if date is None:
        return None
    return min(max(date - (server_time if server_time is not None else now), 0.0), MAX_RETRY_AFTER_S)


def _reason(status: int, answer: dict[str, Any] | None, *, has_id: bool, has_words: bool) -> str:
    # Numbered as in README's table of answers.
    if has_id:
        return "delivered"  # 1: a proven success
    if status == 429:
        return "rate_limited"  # 2: the destination asks for time, whoever says so
    if status in _WAIT or (500 <= status <= 599 and status != 511):
        return "unavailable"
    if status == 407:
        return "proxy"  # 3
    if 300 <= status <= 399:
        return "misrouted"  # 4: never followed, the key would go along
    if not has_words or status < 400 or status == 511:
        return "not_authentic"  # 5: not provably from the API
    if status in _UNAUTHORIZED:
        return "unauthorized"  # 6
    if status in _MISROUTED:
        return "misrouted"  # 7
    if status in _RULE or (status == 409 and _rule(answer).get("code") not in (None, "409")):
        return "blocked"  # 9, before 8: a rule's 409 is told from a conflict by its code
    if status == 409:
        return "conflict"  # 8
    if status in _INVALID:
        return "invalid"  # 10
    return "misrouted"  # 11: an unknown code may delay events, never fail them


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _server_id(answer: dict[str, Any] | None) -> str | None:
    value = answer.get("id") if answer else None
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return _clean(str(value)[:300], MAX_WORDS_CHARS).strip() or None


def _refusal_words(answer: dict[str, Any] | None) -> str | None:
    """Return what a refusal says, from each documented shape; None when nothing proves it to be one."""
    if answer is None:
        return None
    detail = answer.get("detail")
    if isinstance(detail, str) and detail.strip():
        return detail.strip()
    if isinstance(detail, list) and detail:
        return "; ".join(_field_error(item) for item in detail[:20])
    if isinstance(detail, dict) and detail:
        return _rule_words(detail) or _compact(detail)
    return _rule_words(answer)


def _field_error(item: Any) -> str:
    if not isinstance(item, dict):
        return _compact(item)
    location = item.get("loc")
    path = [str(part) for part in location[:10]] if isinstance(location, list) else []
    where = ".".join(path[1:] if path[:1] == ["body"] and len(path) > 1 else path)
    message = item.get("msg")
    says = message if isinstance(message, str) and message else _compact(item)
    return f"{where}: {says}" if where else says


def _rule_words(form: dict[str, Any]) -> str | None:
    found = [form[name].strip() for name in ("message", "error") if isinstance(form.get(name), str)]
    found = [words for words in found if words]
    if not found:
        return None
    words = found[0]
    details = form.get("details")
    reason = details.get("reason") if isinstance(details, dict) else None
    return f"{words} ({reason})" if isinstance(reason, str) and reason and reason not in words else words


def _rule(answer: dict[str, Any] | None) -> dict[str, str]:
    """Find code, rule name and retry_after in the rule form, flat or inside `detail`."""
    if answer is None:
        return {}
    inner = answer.get("detail")
    form = {**answer, **inner} if isinstance(inner, dict) else answer
    details = form.get("details")
    name = details.get("rule_name") if isinstance(details, dict) else None
    found = {"code": form.get("code"), "rule": name, "retry_after": form.get("retry_after")}
    return {
        key: _clean(str(value), MAX_WORDS_CHARS)
        for key, value in found.items()
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip()
    }


def _for_people(status: int, headers: Mapping[str, str], words: str | None) -> str:
    if words is not None:
        return _clean(words)
    location = headers.get("location")
    if 300 <= status <= 399 and location:
        return _clean(f"redirected to {location[:300]} (redirects are not followed)")
    kind = headers.get("content-type", "").split(";")[0].strip() or "an answer without a type"
    return _clean(f"HTTP {status} with {kind[:100]}, which is not the API's form")


def _compact(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)[:MAX_DETAIL_CHARS]
    except RecursionError:
        return "an answer nested too deeply to show"


def _clean(text: str, limit: int = MAX_DETAIL_CHARS) -> str:
    return mask_keys(bounded(text, limit))


def _http_date(value: str | None) -> float | None:
    if not value or len(value) > 100:
        return None
    try:
        date = parsedate_to_datetime(value)
        # RFC 9110 section 5.6.7: all of them are GMT, though the oldest form does not say so.
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
