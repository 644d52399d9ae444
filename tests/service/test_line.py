"""A line to the API: loops of others that its guard ends, and answers that nobody asked for."""

from __future__ import annotations

import contextlib
import select
import socket
import time

import httpcore
import pytest

from versioner_agent import network
from versioner_agent.delivery import Sender, Target

PATIENCE_S = 20.0
UNASKED = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{"id": "evt-1"}'


def test_a_loop_that_knows_no_deadline_is_ended_by_the_guard():
    """Httpcore sends in a loop, with the timeout anew for each step: any progress keeps it going."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE_S)

    class Looping(httpcore.NetworkStream):
        def write(self, buffer, timeout=None):
            if theirs.recv(1) == b"":  # TimeoutError when nobody ends it
                raise httpcore.WriteError("the connection ended")

        def get_extra_info(self, info):
            return False

        def close(self):
            ours.close()

    with theirs, contextlib.closing(network._Stream(Looping(), ours.dup())) as stream:
        network.current.deadline = time.monotonic() + 0.2
        network.current.has_written = False
        with pytest.raises(httpcore.WriteError, match="the connection ended"):
            stream.write(b"a request")
        assert network.is_over()


def test_an_answer_that_was_there_before_the_question_is_not_its_answer(monkeypatch):
    connect = httpcore.SyncBackend.connect_tcp
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def connect_and_hear(self, *args, **kwargs):
            stream = connect(self, *args, **kwargs)
            server, _ = listener.accept()
            stack.enter_context(server).sendall(UNASKED)
            assert select.select([stream.get_extra_info("socket")], [], [], PATIENCE_S)[0]
            return stream

        monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_and_hear)
        target = Target(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10)
        sender = stack.enter_context(contextlib.closing(Sender(target, lambda: "sk_acme_k1_x")))
        outcome = sender.send("build", b"{}", "event-1")

    assert outcome.reason == "no_answer"
    assert "the server spoke before it was asked" in outcome.detail
