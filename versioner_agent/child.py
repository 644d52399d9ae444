"""A command run in our place: descriptors, environment, signals and exit status are as if we were not there.

Knows nothing of events. Signals are blocked and taken one by one (sigwaitinfo(2)), which tells whether the kernel sent
one, and so the terminal to the command as well, or a process to us alone.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

#: What tells a process to stop.
STOPPING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
#: What is passed on. Who sends SIGTSTP, SIGCONT or SIGWINCH sends it to the group, in which the command is too.
_PASSED_ON = STOPPING | {signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}
#: What a terminal sends.
_TERMINALS = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
#: What Python ignores for itself (https://docs.python.org/3/library/signal.html).
_PYTHONS_OWN = (signal.SIGPIPE, signal.SIGXFSZ)

NOT_FOUND = 127
NOT_EXECUTABLE = 126
BY_SIGNAL = 128  # and its number; all three as shells have it (https://pubs.opengroup.org/onlinepubs/9699919799/)


class Ended(NamedTuple):
    """How a command ended."""

    exit_code: int
    duration_s: float = 0.0
    signal: int = 0  #: that killed it
    told: int = 0  #: the signal that told us to stop while it ran
    problem: str = ""  #: why it could not be started


class Signals:
    """What is sent to this process: kept from the moment this is made, for good.

    They stay blocked, because a late one must not change the exit status. What was ignored or blocked before stays so.
    """

    def __init__(self) -> None:
        # Where SIGCHLD is ignored the kernel throws exit statuses away (wait(2)).
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        heard = {number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN}
        #: As it was, for the command to start with.
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*heard, signal.SIGCHLD})
        self.heard = heard - self.mask
        self.stopping = self.heard & STOPPING

    def stopped_by(self) -> int:
        """Take a signal that has told us to stop; 0 where there is none."""
        found = signal.sigtimedwait(self.stopping, 0)
        return found.si_signo if found else 0


def run(command: list[str], signals: Signals) -> Ended:
    """Run *command* to its end, passing signals on; never raises OSError."""
    started = time.monotonic()
    try:
        pid = _spawn(command, signals)
    except OSError as exc:
        is_missing = exc.errno == errno.ENOENT
        words = "command not found" if is_missing and "/" not in command[0] else exc.strerror
        code = NOT_FOUND if is_missing else NOT_EXECUTABLE
        return Ended(code, time.monotonic() - started, problem=f"{os.path.basename(command[0])}: {words}")
    return _await(pid, signals, signals.heard, started)


def fork(act: Callable[[], int], signals: Signals) -> Ended:
    """Do *act* in a process of its own, and let its result be the exit code; what tells us to stop is passed on.

    What it leaves behind, threads above all, would take signals that the command must get. It does not outlive us.
    Raises OSError where there can be no process more.
    """
    started = time.monotonic()
    watched, held = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(watched)
        os.close(held)
        raise
    if pid:
        os.close(watched)
        try:
            return _await(pid, signals, signals.stopping, started)
        finally:
            os.close(held)
    code = 0
    try:
        os.close(held)
        threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, signals.mask)
        code = act()
    except KeyboardInterrupt:
        code = BY_SIGNAL + signal.SIGINT
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _end_with_parent(watched: int) -> None:
    os.read(watched, 1)  # returns when nobody holds the other end any more
    os._exit(BY_SIGNAL + signal.SIGKILL)


def name_of(number: int) -> str:
    """Return the name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"


def _spawn(command: list[str], signals: Signals) -> int:
    """Start *command*; raises OSError.

    By posix_spawn(3), for between fork and exec nothing of ours runs that a signal could hit, or that would hold a lock
    after our death; and a thread that waits for a lock does no harm.
    """
    if not command[0]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))  # as execvp(3); Python's own words are others
    env = _environment()
    try:
        return os.posix_spawnp(command[0], command, env, setsigmask=signals.mask, setsigdef=_PYTHONS_OWN)
    except OSError as exc:
        if exc.errno != errno.ENOEXEC:
            raise
    # A script without `#!`, which shells run, and execvp(3).
    words = ["sh", shutil.which(command[0]) or command[0], *command[1:]]
    return os.posix_spawn("/bin/sh", words, env, setsigmask=signals.mask, setsigdef=_PYTHONS_OWN)


def _environment() -> dict[bytes, bytes]:
    """Return our environment but for what Python itself has put there: LC_CTYPE, in the C locale (PEP 538)."""
    env = dict(os.environb)
    with suppress(OSError), open("/proc/self/environ", "rb") as file:
        given = [line for line in file.read().split(b"\0") if line.startswith(b"LC_CTYPE=")]
        env.pop(b"LC_CTYPE", None)
        env.update(line.split(b"=", 1) for line in given)  # type: ignore[misc]
    return env


def _await(pid: int, signals: Signals, heard: set[signal.Signals], started: float) -> Ended:
    """Pass those of *heard* on until the process *pid*, begun at *started* (monotonic seconds), has ended."""
    # What came before there was a command, it did not get from the terminal.
    told = signals.stopped_by()
    if told:
        _pass_on(pid, told)
    waited_for = {*heard, signal.SIGCHLD}
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            duration_s = time.monotonic() - started
            if os.WIFSIGNALED(status):
                number = os.WTERMSIG(status)
                return Ended(BY_SIGNAL + number, duration_s, number, told)
            return Ended(os.WEXITSTATUS(status), duration_s, told=told)
        found = signal.sigwaitinfo(waited_for)
        if found.si_signo == signal.SIGCHLD:
            continue
        if found.si_signo in STOPPING:
            told = told or found.si_signo
        if _is_for_us_alone(found, pid):
            _pass_on(pid, found.si_signo)


def _pass_on(pid: int, number: int) -> None:
    with suppress(PermissionError):  # a command that has become somebody else, as sudo does
        os.kill(pid, number)


def _is_for_us_alone(found: signal.struct_siginfo, pid: int) -> bool:
    """Tell whether the command *pid* did not get the signal itself: the terminal's go to its foreground group.

    Others of the kernel's, as of alarm(2), are for us, who took the command's place. A hang-up goes to the session's
    leader (termios(3), credentials(7)), and a command may be in a group of its own.
    """
    if found.si_code <= 0:  # sent by a process (sigaction(2))
        return found.si_pid != pid
    if found.si_signo not in _TERMINALS:
        return True
    with suppress(ProcessLookupError):
        if os.getpgid(pid) != os.getpgrp():
            return True
    return found.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
