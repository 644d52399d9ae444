"""What can be measured of an outbox at one moment, as plain values. `gauges` reads it; `metrics`, `checking` use it."""

from __future__ import annotations

from typing import NamedTuple


class Snapshot(NamedTuple):
    """An outbox and who is at it; times are seconds since 1970, sizes bytes.

    None: there is no such moment, or it can't be told of this outbox (one of an older schema knows nothing of exports).
    """

    is_there: bool
    counts: dict[str, int]  # by state, without those of a batch that is not published yet
    bytes: int
    free_bytes: int | None  # beside it, for an ordinary user
    oldest_pending_at: float | None
    last_delivered_at: float | None
    deliveries: int  # ever, by whoever delivers from this outbox
    failures: int | None  # ever
    failed: dict[str, int] | None  # those of now by reason, blocks that came late apart
    held: int | None  # products; None also where they are too many to be counted while a commit may wait
    batches: int | None  # exported ones without a receipt for all their records
    oldest_batch_at: float | None
    state: str  # of the destination, as it was seen last
    reason: str | None
    since: float | None
    damage: str | None  # that nobody has acknowledged
    last_sign_at: float | None  # of whoever delivers, while something waits for him
    has_agent: bool
    is_delivering: bool  # an agent, a flush or a command that waits
    is_read_only: bool = False  # its file system, which only `check` looks at
