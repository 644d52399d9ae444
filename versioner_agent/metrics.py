"""The outbox in numbers for Prometheus: the text format 0.0.4, and the families there are.

Pure. Names, units and types follow https://prometheus.io/docs/practices/naming/; moments are told instead of ages, so
that an age goes on growing while nobody writes. No product is a label: each value of one is a series of its own for
ever, and nobody bounds the number of products (`list` and `status` name them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from versioner_agent.outcomes import STATE_OF
from versioner_agent.snapshot import Snapshot

PREFIX = "versioner_agent_"
STATES = ("unknown", "up", *dict.fromkeys(STATE_OF.values()))
_IN_HELP = str.maketrans({"\\": "\\\\", "\n": "\\n"})
_IN_LABELS = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})

Labels = Mapping[str, str]


class Family(NamedTuple):
    """Samples of one name."""

    name: str
    kind: str  # gauge | counter
    help: str
    samples: list[tuple[Labels, float]]


def render(families: Iterator[Family]) -> str:
    """Return *families* as text; one without samples is left out."""
    return "".join(_lines(family) for family in families if family.samples)


def families(view: Snapshot | None, build: Labels, last_loop_at: float | None = None) -> Iterator[Family]:
    """Yield what is known of an outbox, None of one that can't be read.

    *last_loop_at* (seconds since 1970) is for the agent alone to say, from its main loop.
    """
    yield Family(f"{PREFIX}build_info", "gauge", "What is running.", [(build, 1)])
    yield _one("last_loop_timestamp_seconds", "When the agent's main loop wrote this.", last_loop_at)
    yield _one("outbox_readable", "Whether the outbox can be read, or is not made yet.", view is not None)
    if view is not None:
        yield from _of_records(view)
        yield from _of_the_place(view)
        yield from _of_the_destination(view)


def _of_records(view: Snapshot) -> Iterator[Family]:
    yield _by("records", "Records in the outbox.", "state", view.counts)
    yield _one("oldest_pending_timestamp_seconds", "When the first pending event was queued.", view.oldest_pending_at)
    yield _by("failed_records", "Failed records by reason; blocked_late: by a rule, long after.", "reason", view.failed)
    yield _one("failures_total", "Records that failed, ever.", view.failures, "counter")
    yield _one("deliveries_total", "Events delivered from this outbox, ever.", view.deliveries, "counter")
    yield _one("last_delivery_timestamp_seconds", "When an event was delivered last.", view.last_delivered_at)
    yield _one("held_products", "Products whose next event waits after a try that failed.", view.held)
    yield _one("exported_batches", "Exported batches without a receipt for all their records.", view.batches)
    yield _one("oldest_export_timestamp_seconds", "When the oldest of these was written.", view.oldest_batch_at)


def _of_the_place(view: Snapshot) -> Iterator[Family]:
    yield _one("outbox_bytes", "Size of the outbox's file.", view.bytes)
    yield _one("free_bytes", "Free space beside the outbox.", view.free_bytes)
    yield _one("damaged", "Whether the outbox was damaged and nobody has acknowledged it.", view.damage is not None)
    yield _one("agent_running", "Whether there is an agent.", view.has_agent)


def _of_the_destination(view: Snapshot) -> Iterator[Family]:
    yield _one("destination_up", "Whether the API answered when it was asked last.", view.state == "up")
    state = view.state if view.state in STATES else "unknown"
    yield _by(
        "destination_state",
        "State of the destination, as seen last.",
        "state",
        {each: each == state for each in STATES},
    )


def _one(name: str, words: str, value: float | None, kind: str = "gauge") -> Family:
    return Family(PREFIX + name, kind, words, [] if value is None else [({}, value)])


def _by(name: str, words: str, label: str, values: Mapping[str, float] | None) -> Family:
    return Family(PREFIX + name, "gauge", words, [({label: each}, value) for each, value in (values or {}).items()])


def _lines(family: Family) -> str:
    name, kind, words, samples = family
    lines = [f"# HELP {name} {words.translate(_IN_HELP)}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{_in_braces(labels)} {_value(value)}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _in_braces(labels: Labels) -> str:
    pairs = ",".join(f'{name}="{value.translate(_IN_LABELS)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _value(value: float) -> str:
    if isinstance(value, int):
        return str(int(value))  # a boolean too
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
