"""Prometheus' text format, read strictly: what the format and the naming conventions forbid fails."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def read(text):
    """Return {(name, frozenset of labels): value}, as a public parser has it, from text that is valid to the letter."""
    assert text.endswith("\n")
    assert "\r" not in text
    seen, open_family, typed = set(), None, set()
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name, words = line.removeprefix("# HELP ").split(" ", 1)
            assert NAME.fullmatch(name)
            assert words
            assert name not in seen, f"{name} comes twice, or in pieces"
            seen.add(name)
            open_family = name
        elif line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split(" ")
            assert name == open_family
            assert name not in typed
            assert kind == ("counter" if name.endswith("_total") else "gauge")
            typed.add(name)
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] == open_family
            assert match[1] in typed
            float(match[3])
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.samples, f"{family.name} has no samples"
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found, name, **labels):
    """The value of a series of ours."""
    return found[f"versioner_agent_{name}", frozenset(labels.items())]


def has(found, name):
    """Tell whether there is a series of this name."""
    return any(key[0] == f"versioner_agent_{name}" for key in found)
