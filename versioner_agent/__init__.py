"""versioner-agent: a local-first, offline-buffering agent for the Versioner event API.

For scripts: `from versioner_agent import Outbox`; `Outbox(path).enqueue("build", {...})` returns a `Receipt` once the
event is synced to the disk. Names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what type checkers take for true; importing typing would cost 5 ms
if TYPE_CHECKING:
    from versioner_agent.errors import AgentError, OutboxError, ValidationError
    from versioner_agent.outbox import Outbox, Receipt

__version__ = "0.1.0"
__all__ = ["AgentError", "Outbox", "OutboxError", "Receipt", "ValidationError", "__version__"]

_HOME = {
    "AgentError": "errors",
    "Outbox": "outbox",
    "OutboxError": "errors",
    "Receipt": "outbox",
    "ValidationError": "errors",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
