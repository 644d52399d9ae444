"""Runs commands through the wrapper, each in a process of its own, and looks at what became of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

from versioner_agent import jobs
from versioner_agent.storage import Store

#: Runs `wrapper.run` on what the first argument says; the rest is the command.
CODE = """
import json, os, sys, time
from versioner_agent import wrapper
from versioner_agent.outbox import Outbox
given = json.loads(sys.argv[1])

def gate(receipt):
    if "asked" in given:
        open(given["asked"], "w").close()
        time.sleep(60)
    return given.get("gate", 0)

def tell(words):
    os.write(2, (words + chr(10)).encode("utf-8", "replace"))

sys.exit(wrapper.run(wrapper.Plan(
    given.get("kind", "build"), given["fields"], sys.argv[2:],
    lambda: Outbox(given["path"], busy_timeout=given.get("busy_timeout", 10), queued_by="me"),
    tell, gate=gate if {"gate", "asked"} & given.keys() else None,
)))
"""
FIELDS = {"product_name": "payments", "version": "1", "extra_metadata": {"team": "core"}}


def wrapped(path, *command, fields=FIELDS, **options):
    """The command line that runs *command* through the wrapper, on the outbox at *path*."""
    given = {"path": str(path), "fields": fields, **options}
    return (sys.executable, "-c", CODE, json.dumps(given), *map(str, command))


def run(path, *command, stdin=b"", within=60, how=None, **options):
    """Run *command* through the wrapper to its end."""
    return subprocess.run(
        wrapped(path, *command, **options), input=stdin, capture_output=True, timeout=within, check=False, **(how or {})
    )


def events_of(path):
    """What was queued: (status, body) each, in order."""
    if not os.path.exists(path):
        return []
    with contextlib.closing(Store(path)) as store, store.read() as connection:
        rows = connection.execute("SELECT status, payload FROM record ORDER BY id").fetchall()
    return [(status, json.loads(payload)) for status, payload in rows]


def statuses(path):
    return [status for status, _ in events_of(path)]


def files(path):
    """The job files beside the outbox."""
    return jobs.names(str(path))
