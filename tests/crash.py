"""SIGKILL from outside, at a named system call: strace kills the process as it enters the call, which never happens."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
from host import eventually

COMMAND = (sys.executable, "-m", "versioner_agent")
#: What changes the disk, or is told to others. Entering the next of them is "after" the one before.
DISK = ("pwrite64", "fdatasync", "fsync", "unlink", "rename", "ftruncate", "flock", "write", "exit_group")
NETWORK = ("sendto", "recvfrom")

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to kill at a system call")


def _strace(*options):
    # Python would write what it compiled on a first run only, which is no point of ours to kill at.
    return ("strace", "-f", "-qq", "-E", "PYTHONDONTWRITEBYTECODE=1", *options)


def killed_at(call, number, command, *, env, stdin=b"", within=60):
    """Run *command* and kill it at its *number*th *call*; returns (whether it was, the finished process)."""
    tracer = _strace("-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
    done = subprocess.run((*tracer, *command), env=env, input=stdin, capture_output=True, timeout=within, check=False)
    return done.returncode == -signal.SIGKILL, done


def killed_in_background(call, number, command, is_over, *, env, within=60):
    """Run *command*, which does not end by itself, until it is killed at its *number*th *call* or *is_over*."""
    tracer = _strace("-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
    process = subprocess.Popen(
        (*tracer, *command), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        eventually(lambda: process.poll() is not None or is_over(), within)
    finally:
        was_killed = process.poll() == -signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    return was_killed


def traced(command, calls, *, env, stdin=b"", options=()):
    """Run *command*; returns the finished process and its calls, (name, line) each, in order."""
    with tempfile.NamedTemporaryFile("r") as log:
        tracer = _strace(*options, "-o", log.name, "-e", f"trace={','.join(calls)}")
        done = subprocess.run((*tracer, *command), env=env, input=stdin, capture_output=True, check=False)
        lines = [re.sub(r"^\d+\s+", "", line).strip() for line in log]
    return done, [(line.partition("(")[0], line) for line in lines if "(" in line]


def points_of(command, calls, **how):
    """Run *command* once; returns every point at which it can be killed, in their order: (call, number)."""
    done, seen = traced(command, calls, **how)
    assert done.returncode == 0, done.stderr
    counts = collections.Counter()
    points = []
    for name, _ in seen:
        counts[name] += 1
        points.append((name, counts[name]))
    return points


def turns_of(points):
    """Of each row of like calls among *points* the first and the one in its middle: before it, and half way through.

    Its end is the start of the next row. Where nothing but the same call lies between, the disk is at the same step.
    """
    rows = (list(row) for _, row in itertools.groupby(points, key=lambda point: point[0]))
    return [point for row in rows for point in dict.fromkeys((row[0], row[len(row) // 2]))]


#: A sweep over what it makes of all points: the turns by default, and with `-m long` every single one.
sweep = pytest.mark.parametrize(
    "chosen", [turns_of, pytest.param(list, marks=pytest.mark.long)], ids=["turns", "everywhere"]
)


def side_by_side(function, arguments):
    """Call *function* with each tuple of *arguments*, two at once, where it waits for processes of its own.

    The first that raised is raised here, when all have ended.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        done = [threads.submit(function, *each) for each in arguments]
    for each in done:
        each.result()
