"""Who may import whom: the direction that keeps decisions pure and the enqueue path light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "versioner_agent"

#: Module -> the package's modules it may import.
ALLOWED = {
    # Level 0, vocabulary and decisions.
    "errors": set(),
    "text": set(),
    "urls": set(),
    "schema": set(),
    "values": set(),
    "toml_lines": set(),
    "events": {"errors", "integrity", "values"},
    "bodies": {"errors", "events", "values"},
    "ci": {"errors", "events", "sources", "values"},
    "sources": {"bodies", "errors", "events", "values"},
    "outcomes": {"text"},
    "policy": {"outcomes"},
    "integrity": set(),
    "records": {"events", "integrity"},
    "filters": {"outcomes", "records"},
    "pages": set(),
    "hostid": {"integrity"},
    "units": set(),
    "snapshot": set(),
    "checking": {"snapshot", "text"},
    "metrics": {"outcomes", "snapshot"},
    "findings": set(),
    "mounts": set(),
    # Level 1, one outside thing each.
    "configfile": {"toml_lines"},
    "config": {"configfile", "errors", "events", "urls"},
    "masked": {"config", "configfile", "text", "urls"},
    "files": {"errors"},
    "locks": {"files"},
    "creation": {"errors", "files", "hostid", "pages", "schema"},
    "storage": {"creation", "errors", "files", "locks", "schema"},
    "reserve": {"creation", "files", "storage"},
    "settling": {"outcomes", "policy", "records", "reserve", "storage", "text"},
    "batches": {"errors", "storage"},
    "atonce": {"storage"},
    "stepping": set(),
    "exportfile": {"records"},
    "importlines": {"bodies", "errors", "events", "exportfile", "values"},
    "importfile": {"bodies", "errors", "exportfile", "files", "importlines", "values"},
    "birthplace": {"hostid", "schema", "storage"},
    "pruning": {"batches", "errors", "exports", "files", "reserve", "schema", "stepping", "storage"},
    "notices": {"errors", "files", "locks", "storage", "text"},
    "outbox": {"batches", "damage", "errors", "events", "files", "integrity", "mending", "notices", "reserve", "storage"},
    "salvage": {"events", "files", "pages", "records", "schema"},
    "damage": {"errors", "files", "pages", "records", "salvage", "schema", "storage"},
    "mending": {"creation", "damage", "errors", "files", "locks", "salvage", "storage"},
    "migration": {"creation", "errors", "files", "schema", "storage"},
    "ledger": {
        "atonce", "batches", "damage", "errors", "exports", "files", "mending", "migration", "outbox", "pruning", "records", "reserve",
        "settling", "schema", "stepping", "storage", "text",
    },
    "exports": {"batches", "records", "schema", "stepping", "storage"},
    "newfile": {"errors"},
    "borrowing": {"config", "errors", "files", "locks", "opening", "privileges", "storage"},
    "spilling": {"config", "errors", "exporting", "flush", "opening", "storage"},
    "exporting": {
        "borrowing", "config", "errors", "exportfile", "exports", "ledger", "locks", "newfile", "opening", "records",
        "storage",
    },
    "selecting": {"filters", "records", "schema", "storage"},
    "review": {"atonce", "birthplace", "damage", "exports", "ledger", "outbox", "records", "schema", "storage"},
    "cursors": {"errors", "files", "filters", "integrity", "locks", "records", "schema", "storage"},
    "groups": {"errors", "filters", "records", "schema", "storage"},
    "repair": {"filters", "records", "review", "selecting", "stepping", "storage"},
    "amending": {
        "bodies", "errors", "events", "filters", "groups", "integrity", "outbox", "records", "review", "schema",
        "selecting", "storage", "values",
    },
    "gauges": {"atonce", "errors", "files", "locks", "notices", "records", "review", "schema", "snapshot", "storage"},
    "metrics_file": {"errors", "files", "gauges", "metrics", "storage"},
    "jobs": {"bodies", "creation", "errors", "events", "files", "values"},
    "child": set(),
    "tls": {"errors"},
    "checkout": {"values"},
    "network": set(),
    "delivery": {"errors", "network", "outcomes", "text", "tls", "urls"},
    "journal": set(),
    "logs": {"journal", "text"},
    "privileges": set(),
    "sdnotify": {"text"},
    "installed": set(),
    "loopback": set(),
    "shipped": set(),
    "machine": {"errors"},
    "steps": {"creation", "errors", "files"},
    "layout": {"config", "shipped", "units"},
    "program": {"errors", "units"},
    # Level 2, services.
    "chooser": {"ledger", "policy", "records"},
    "upkeep": {"ledger"},
    "reports": {"events", "groups", "ledger", "outbox", "outcomes", "records", "settling", "text"},
    "flusher": {
        "chooser", "errors", "files", "ledger", "outbox", "outcomes", "policy", "records", "reports", "settling", "text",
        "upkeep", "workers",
    },
    "workers": {"outcomes", "records"},
    "binding": {"config", "delivery", "errors", "flusher", "ledger", "outbox", "text", "urls"},
    "opening": {"birthplace", "errors", "files", "ledger", "locks"},
    "receipts": {
        "batches", "config", "errors", "exportfile", "exports", "importfile", "importlines", "newfile", "outcomes",
        "privileges", "records", "stepping", "storage", "text",
    },
    "importing": {
        "batches", "errors", "exportfile", "exports", "files", "importfile", "importlines", "integrity", "locks",
        "migration", "opening", "outbox", "receipts", "records", "schema", "stepping", "storage",
    },
    "orphans": {"errors", "jobs", "ledger", "outbox", "text"},
    "wrapper": {"child", "errors", "events", "jobs", "outbox", "privileges", "text"},
    "vitals": {"errors", "installed", "ledger", "locks", "reports", "sdnotify", "text"},
    "agent": {
        "binding", "birthplace", "config", "creation", "delivery", "errors", "files", "flusher", "installed", "ledger", "locks",
        "metrics_file", "opening", "orphans", "sdnotify", "storage", "text", "vitals",
    },
    "flush": {
        "binding", "config", "errors", "flusher", "ledger", "locks", "opening", "orphans", "records", "reports",
        "review", "storage",
    },
    "waiting": {
        "config", "errors", "exports", "flush", "flusher", "ledger", "locks", "opening", "outcomes", "records", "reports",
        "review", "storage",
    },
    "doctor": {
        "atonce", "config", "configfile", "damage", "errors", "events", "findings", "gauges", "layout", "locks", "masked",
        "notices", "outbox", "outcomes", "premises", "review", "schema", "storage", "text", "urls",
    },
    "premises": {"files", "findings", "locks", "mounts"},
    "servicing": {"errors", "findings", "machine", "shipped"},
    "probing": {
        "binding", "config", "delivery", "doctor", "errors", "findings", "network", "outcomes", "text", "tls", "urls",
    },
    "bundle": {
        "birthplace", "config", "damage", "doctor", "errors", "findings", "machine", "newfile", "records", "review",
        "schema", "selecting", "servicing", "storage", "text",
    },
    "service": {"config", "configfile", "errors", "layout", "machine", "program", "shipped", "steps", "text", "units"},
    "service_key": {
        "binding", "config", "errors", "files", "outbox", "outcomes", "privileges", "review", "service", "shipped", "steps", "storage", "text",
    },
    "removal": {"errors", "files", "locks", "privileges", "review", "service", "service_key", "servicing", "shipped", "steps", "storage"},
    "sandbox": {"events", "loopback"},
    "demo": {"errors", "outbox", "review", "sandbox"},
}  # fmt: skip
#: What no decision may touch: the world, the clock, the dice.
IMPURE = {"httpx", "logging", "os", "random", "secrets", "socket", "sqlite3", "subprocess", "threading", "time"}
PURE = (
    "errors",
    "text",
    "urls",
    "values",
    "events",
    "bodies",
    "ci",
    "sources",
    "outcomes",
    "policy",
    "records",
    "filters",
    "integrity",
    "schema",
    "pages",
    "toml_lines",
    "units",
    "importlines",
    "snapshot",
    "checking",
    "metrics",
    "findings",
    "mounts",
)


def imported(module: str) -> set[str]:
    """The names a module imports anywhere, the package's own as `versioner_agent.x`."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "versioner_agent":
            found |= {f"versioner_agent.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found - {"versioner_agent.__version__"}


def test_every_module_has_its_place():
    """A new module is entered in the table, with what it may know."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}

    assert modules == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_go_downwards(module):
    ours = {name.split(".")[1] for name in imported(module) if name.startswith("versioner_agent.")}

    assert ours <= ALLOWED[module]


@pytest.mark.parametrize("module", PURE)
def test_decisions_touch_neither_world_nor_clock(module):
    assert not {name.split(".")[0] for name in imported(module)} & IMPURE


def test_only_delivery_and_its_network_know_httpx():
    users = {module for module in ALLOWED if {"httpx", "httpcore"} & {name.split(".")[0] for name in imported(module)}}

    assert users == {"delivery", "network"}
