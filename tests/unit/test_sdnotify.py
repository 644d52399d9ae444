"""What systemd is told, word for word (sd_notify(3)), over a real socket."""

from __future__ import annotations

import contextlib
import os

import pytest
from manager import Manager

from versioner_agent import sdnotify
from versioner_agent.sdnotify import EXTEND_EVERY_S, Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request):
    address = f"@versioner-agent-test-{os.getpid()}" if request.param == "abstract" else None
    with contextlib.closing(Manager(address)) as made:
        yield made


def test_without_a_socket_nobody_is_told():
    notifier = Notifier({})

    notifier.ready("up")
    notifier.alive(1e9)

    assert not notifier.is_heard


@pytest.mark.parametrize("address", ["relative/path", "vsock:2:1", "/no/such/socket"])
def test_an_address_that_leads_nowhere_stops_nothing(address):
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})

    notifier.ready("up")
    notifier.alive(1e9)
    notifier.stopping("bye")


def test_a_life_from_start_to_end(manager):
    notifier = Notifier({**manager.env, "WATCHDOG_USEC": "40000000"})

    notifier.status("opening")
    notifier.alive(100.0)
    notifier.ready("up: 0 pending")
    notifier.alive(100.1)
    notifier.reloading()
    notifier.ready("up: 1 pending")
    notifier.stopping("stopping")

    heard = manager.waiting()
    microseconds = heard[4].pop()
    assert heard == [
        ["STATUS=opening"],
        ["EXTEND_TIMEOUT_USEC=60000000"],
        ["READY=1", "STATUS=up: 0 pending"],
        ["WATCHDOG=1"],
        ["RELOADING=1"],
        ["READY=1", "STATUS=up: 1 pending"],
        ["STOPPING=1", "STATUS=stopping"],
    ]
    assert microseconds.startswith("MONOTONIC_USEC=")


def test_a_sign_of_life_is_given_four_times_as_often_as_wanted(manager):
    notifier = Notifier({**manager.env, "WATCHDOG_USEC": "40000000", "WATCHDOG_PID": str(os.getpid())})
    notifier.ready("up")

    for now in (100.0, 105.0, 109.9, 110.0, 115.0, 120.0):
        notifier.alive(now)

    assert [lines for lines in manager.waiting() if "READY=1" not in lines] == [["WATCHDOG=1"]] * 3


@pytest.mark.parametrize(
    "env", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "9" * 400}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}]
)
def test_a_watchdog_that_is_not_ours_gets_no_sign(manager, env):
    notifier = Notifier({**manager.env, **env})
    notifier.ready("up")

    notifier.alive(1e9)

    assert notifier.watchdog_s == 0
    assert len(manager.waiting()) == 1


def test_a_long_start_asks_for_more_time_now_and_then(manager):
    notifier = Notifier(manager.env)

    for now in (0.0, 1.0, EXTEND_EVERY_S, EXTEND_EVERY_S + 1):
        notifier.alive(now)

    assert manager.waiting() == [["EXTEND_TIMEOUT_USEC=60000000"]] * 2


def test_what_takes_long_asks_to_be_left_alone_and_takes_that_back(manager):
    notifier = Notifier({**manager.env, "WATCHDOG_USEC": "40000000"})
    with notifier.allowing(90.0):
        notifier.ready("up")
    manager.waiting()

    with pytest.raises(ZeroDivisionError), notifier.allowing(90.0):
        raise ZeroDivisionError

    assert manager.waiting() == [
        ["EXTEND_TIMEOUT_USEC=90000000"],
        ["READY=1", "STATUS=up"],
        ["WATCHDOG_USEC=40000000", "WATCHDOG=1"],
        ["WATCHDOG_USEC=90000000", "WATCHDOG=1"],
        ["WATCHDOG_USEC=40000000", "WATCHDOG=1"],
    ]


def test_the_same_status_is_told_once_and_stays_one_line(manager):
    notifier = Notifier(manager.env)

    for words in ("up", "up", "forged\nREADY=1", "up", "x" * 5000):
        notifier.status(words)

    assert manager.waiting() == [["STATUS=up"], ["STATUS=forged READY=1"], ["STATUS=up"], ["STATUS=" + "x" * 999 + "…"]]


def test_what_everybody_can_see_holds_no_key_and_steers_no_terminal(manager):
    notifier = Notifier(manager.env)

    notifier.status("unknown key 'sk_acme_k2_s3cret' \x1b[31m")

    assert manager.waiting() == [["STATUS=unknown key 'sk_acme_***' \\x1b[31m"]]


def test_ready_is_said_again_where_nobody_took_it(monkeypatch):
    monkeypatch.setattr(sdnotify, "SEND_S", 0.05)
    with contextlib.closing(Manager()) as manager:
        notifier = Notifier({**manager.env, "WATCHDOG_USEC": "40000000"})
        sent = 0
        while notifier._send("STATUS=the queue is full"):
            sent += 1

        notifier.ready("up")
        notifier.status("up: 1 pending")
        manager.waiting()
        notifier.alive(1.0)
        notifier.status("up: 1 pending")

        assert manager.waiting()[sent:] == [["READY=1"], ["WATCHDOG=1"], ["STATUS=up: 1 pending"]]
