"""Real processes beside the test, started and stepped by pipes: nothing here sleeps to be in time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


class Child:
    """A Python process that runs *code*; `input()` in it waits for `go`, `print` answers `says`."""

    def __init__(self, code, *args):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self):
        return self.process.stdout.readline().strip()

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def ends(self):
        return self.process.wait()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()


@pytest.fixture
def child():
    """Start child processes; none outlives the test."""
    running = []

    def start(code, *args):
        running.append(Child(code, *args))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def umask():
    """Set the umask; the old one is back after the test."""
    old = os.umask(0)
    os.umask(old)
    yield os.umask
    os.umask(old)
