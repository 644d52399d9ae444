"""A host with an outbox of its own: runs the real command line against it, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

from versioner_agent import review
from versioner_agent.events import validate
from versioner_agent.locks import FlusherLock
from versioner_agent.notices import LOST_WITH_CONTAINER
from versioner_agent.outbox import Outbox
from versioner_agent.storage import Store

KEY = "sk_acme_k1_journeysecret"
COMMAND = (sys.executable, "-m", "versioner_agent")


def eventually(predicate, within=30.0):
    """Wait until *predicate* returns something true, and return that."""
    end = time.monotonic() + within
    while True:
        found = predicate()
        if found:
            return found
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.02)


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Host:
    """One outbox, one configured API, the processes started here, and all that they said."""

    def __init__(self, directory, api_url):
        self.directory = directory
        self.path = str(directory / "state" / "outbox.db")
        (directory / "state").mkdir(mode=0o700)
        self.config = directory / "config.toml"
        self.config.write_text("")
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "LANG": "C.UTF-8",
            "VERSIONER_AGENT_DB": self.path,
            "VERSIONER_AGENT_CONFIG": str(self.config),
            "VERSIONER_API_URL": api_url,
            "VERSIONER_API_KEY": KEY,
            "VERSIONER_AGENT_MAX_BACKOFF": "0.1",
        }
        self._outbox = Outbox(self.path)
        self._processes = []

    def queue(self, product, count=1, first=1, **fields):
        """Queue versions *first*, *first*+1 … of *product*, several at once; returns the ids."""
        event = {"product_name": product, "status": "completed", **fields}
        kind = "deployment" if "environment_name" in event else "build"
        valid = [validate(kind, {**event, "version": str(number)}) for number in range(first, first + count)]
        several = [valid[start : start + 100] for start in range(0, count, 100)]  # few enough for one transaction each
        return [receipt.id for each in several for receipt in self._outbox.enqueue_all(each)]

    def run(self, *args, stdin=b"", within=60, **env):
        """Run a command to its end; what it says of the container that the tests run in, if any, is left out."""
        done = subprocess.run(
            (*COMMAND, *args), input=stdin, capture_output=True, timeout=within, env={**self.env, **env}, check=False
        )
        done.stderr = done.stderr.replace(f"warning: {LOST_WITH_CONTAINER}\n".encode(), b"")
        return done

    def json(self, *args):
        """Run a command with --json; returns one object per line."""
        done = self.run(*args, "--json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def start(self, *args, before=(), **env):
        """Start a command in the background, through the command *before*; what it says goes to a file."""
        log = self.directory / f"process-{len(self._processes)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                (*before, *COMMAND, *args), stdout=file, stderr=file, env={**self.env, **env}, start_new_session=True
            )
        process.log = log
        self._processes.append(process)
        return process

    def agent(self, *args, **how):
        """Start an agent and wait until it delivers."""
        process = self.start("run", *args, **how)
        eventually(lambda: "delivers from" in process.log.read_text() or process.poll() is not None)
        assert process.poll() is None, process.log.read_text()
        return process

    def end(self, process, number=signal.SIGTERM, within=30):
        """Send a signal and return the exit status."""
        process.send_signal(number)
        return process.wait(within)

    def presence(self):
        return FlusherLock(self.path).presence()

    def record(self, record_id):
        """The record, its payload and its attempts."""
        with contextlib.closing(Store(self.path)) as store:
            return review.show(store, record_id)

    def counts(self):
        """Records by state, without the states that nothing is in."""
        with contextlib.closing(Store(self.path)) as store:
            return {state: count for state, count in review.stats(store).counts.items() if count}

    def health(self):
        with contextlib.closing(Store(self.path)) as store:
            return review.stats(store).health

    def said(self):
        """All that background processes said."""
        return b"".join(process.log.read_bytes() for process in self._processes)

    def close(self):
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        self.close_outbox()

    def close_outbox(self):
        self._outbox.close()


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
