"""A healthy outbox as `gauges` measures it, for what is pure."""

from __future__ import annotations

from versioner_agent.schema import FAILED_REASONS, STATES
from versioner_agent.snapshot import Snapshot

NOW = 1_794_000_000.0
HEALTHY = Snapshot(
    is_there=True,
    counts=dict(zip(STATES, (3, 1_000_000, 0, 2, 0), strict=True)),
    bytes=565248,
    free_bytes=2**40,
    oldest_pending_at=NOW - 59.75,
    last_delivered_at=NOW - 5,
    deliveries=1_000_001,
    failures=9,
    failed=dict.fromkeys(FAILED_REASONS, 0),
    held=1,
    batches=2,
    oldest_batch_at=NOW - 3600,
    state="up",
    reason=None,
    since=NOW - 600,
    damage=None,
    last_sign_at=NOW - 590,
    has_agent=True,
    is_delivering=True,
)
