"""Which values can be sent as JSON, and how messages name those that can't. Pure, and safe against any input."""

from __future__ import annotations

import math
from typing import Any

MAX_DEPTH = 64  # levels of nesting in extra_metadata


def tree_problems(name: str, root: Any) -> list[str]:
    """Say what in *root* can't be sent as JSON; walks without recursion, so no input can exhaust the stack."""
    stack: list[tuple[str, Any, int]] = [(name, root, 1)]
    problems: list[str] = []
    while stack and len(problems) < 10:
        path, value, depth = stack.pop()
        if isinstance(value, str):
            problem = string_problem(value)
        elif isinstance(value, dict | list | tuple):
            problem = "" if depth <= MAX_DEPTH else f"nested deeper than {MAX_DEPTH} levels"
            if not problem:
                stack += _children(path, value, depth + 1, problems)
        else:
            problem = _scalar_problem(value)
        if problem:
            problems.append(f"{shorten(path)}: {problem}")
    return problems


def _children(path: str, value: Any, depth: int, problems: list[str]) -> list[tuple[str, Any, int]]:
    if not isinstance(value, dict):
        return [(f"{path}[{index}]", child, depth) for index, child in enumerate(value)]
    found = []
    for key, child in value.items():
        problem = string_problem(key) if isinstance(key, str) else "keys must be strings"
        if problem:
            problems.append(f"{shorten(path)}: key {shown(key)}: {problem}")
        else:
            found.append((f"{path}.{key}", child, depth))
    return found


def _scalar_problem(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, int):
        # Python refuses to print integers over 4300 digits, and no API reads them.
        return "" if value.bit_length() <= 1024 else "the number is too large"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "must be a finite number (no NaN, no Infinity)"
    return f"{type(value).__name__} is not a JSON value"


def string_problem(value: str) -> str:
    """Say why a string can't be sent; empty when it can."""
    if value.isascii():
        return "must not hold a NUL character" if "\0" in value else ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate or bytes that are not UTF-8"
    return "must not hold a NUL character" if "\0" in value else ""


def json_type(value: Any) -> str:
    """Name the JSON type of *value*, with its article."""
    names = ((bool, "a boolean"), (dict, "an object"), (list, "an array"), (str, "a string"), (type(None), "null"))
    for kind, name in names:
        if isinstance(value, kind):
            return name
    return "a number" if isinstance(value, int | float) else type(value).__name__


def shown(value: Any) -> str:
    """Return *value* as a message may quote it: short, and harmless to a terminal."""
    return shorten(ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value))


def shorten(text: str) -> str:
    """Return *text* as long as a message can bear."""
    return text if len(text) <= 120 else text[:117] + "..."
