"""Which machine this is, so that an outbox can tell that it was made on another one (moved, restored, or cloned)."""

from __future__ import annotations

from versioner_agent.integrity import hash_of

MACHINE_ID = "/etc/machine-id"
#: The id itself is confidential and never leaves the machine: only a hash made for one purpose does (machine-id(5)).
PURPOSE = b"versioner-agent outbox\0"


def machine(path: str = MACHINE_ID) -> str | None:
    """Return 32 hexadecimal digits that this machine keeps for life; None where it has no id, as many containers."""
    try:
        with open(path, "rb") as file:
            found = file.read(64).strip()
    except OSError:
        return None
    return hash_of(PURPOSE + found).hex()[:32] if len(found) == 32 else None
