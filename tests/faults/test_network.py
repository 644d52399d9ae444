"""Hostile networks on real sockets: an event waits with a reason a person understands, and goes on when all is well."""

from __future__ import annotations

import contextlib
import gzip
import re
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest
from authority import Authority, needs_openssl
from host import eventually, free_port
from scripted import Reaction, accepted, answer, closed, dripped, hanging, raw, refused, reset

OK = b'{"id": "evt-1"}'
PORTAL = b"<html><title>Welcome to Hotel Wi-Fi</title><form action='/login'></form></html>"
SILENT = "no complete answer from .* within 1 s"
TIMEOUT = {"VERSIONER_AGENT_TIMEOUT": "1"}
MEMORY_KB = 120 * 1024  # an agent has a third of it


def endless(head, chunk):
    """Gigabytes, for as long as the client takes them; says how many bytes went out."""

    def act(server, connection):
        connection.settimeout(5)
        connection.sendall(head)
        sent = 0
        with contextlib.suppress(OSError):
            while not server.stopping.is_set() and sent < 10**10:
                sent += connection.send(chunk)
        server.sent.append(sent)

    return Reaction(act)


FAULTS = {
    "an end before the answer": (closed(), "Server disconnected|ended early"),
    "a reset after the request": (reset(), "reset by peer|connection broke"),
    "half an answer": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + OK), "ended early.*received 15 bytes, expected 99"),
    "one byte a second": (dripped(b"HTTP/1.1 200 OK\r\nX-Pad: " + b"a" * 999, 1.0), SILENT),
    "no answer": (hanging(), SILENT),
    "1 MB of headers": (raw(b"HTTP/1.1 200 OK\r\n" + b"X-A: %s\r\n" % (b"a" * 999) * 1000), "not HTTP"),
    "one endless header": (endless(b"HTTP/1.1 200 OK\r\nX-A: ", b"a" * 65536), "not HTTP"),
    "gigabytes of body": (endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536), "HTTP 200 with an answer of over 65536 bytes"),
    "a length too large": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n" + OK), "ended early"),
    "a length too small": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + OK), "HTTP 200 .*not the API's form"),
    "two lengths": (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nContent-Length: 3\r\n\r\n" + OK), "not HTTP"),
    "chunked garbage": (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n" + OK), "not HTTP"),
    "endless chunks": (
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
        "over 65536 bytes",
    ),
    "a gzip bomb": (answer(200, gzip.compress(bytes(10**8)), content_encoding="gzip"), "over 65536 bytes"),
    "a bomb of bombs": (endless(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", gzip.compress(bytes(10**6))), "over 65536"),
    "no gzip": (answer(200, OK, content_encoding="gzip"), "is not gzip, as it says"),
}  # fmt: skip
PORTALS = {
    "a page with 200": (answer(200, PORTAL), "not_authentic", "HTTP 200 with text/html, which is not the API's form"),
    "a redirect": (answer(302, b"", location="http://wifi.example/login"), "misrouted", "redirected to http://wifi.example/login"),
    "a redirect that keeps the method": (answer(307, PORTAL, location="http://wifi.example/"), "misrouted", "redirected to"),
    "network authentication required": (answer(511, PORTAL), "not_authentic", "HTTP 511"),
    "a page with 403": (answer(403, PORTAL), "not_authentic", "HTTP 403 with text/html"),
    "a page with 409": (answer(409, PORTAL), "not_authentic", "HTTP 409 with text/html"),
    "nothing with 204": (answer(204), "not_authentic", "HTTP 204"),
    "JSON that is not the API's": (answer(200, {"status": "ok"}), "not_authentic", "HTTP 200 with application/json"),
    "an empty id": (answer(200, {"id": ""}), "not_authentic", "not the API's form"),
}  # fmt: skip


def put_right(host, server, agent):
    """The network is well again: the event goes, once, and the agent needed neither a restart nor much memory."""
    server.script = lambda seen: accepted(f"evt-{seen.key}")
    eventually(lambda: host.counts() == {"delivered": 1})
    with open(f"/proc/{agent.pid}/status") as file:
        (most,) = re.findall(r"VmHWM:\s+(\d+) kB", file.read())
    assert int(most) < MEMORY_KB
    assert host.end(agent) == 0
    assert b"Traceback" not in host.said()


def waits(host, state, words):
    """Wait until the event was tried and waits; the record, `status` and the log tell why."""
    eventually(lambda: host.record(1)[0].attempts > 0)
    record, _, attempts = host.record(1)
    assert record.state == "pending"
    assert re.search(words, record.detail), record.detail
    assert re.search(words, attempts[0].detail)
    eventually(lambda: host.health().state == state)
    (status,) = eventually(lambda: [s for s in host.json("status") if s["destination"]["state"] == state])
    assert re.search(words, status["destination"]["reason"])
    (held,) = status["held"]
    assert held["id"] == 1
    assert re.search(words, host.run("status").stdout.decode())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_answer_leaves_the_event_waiting(host_for, serve, fault):
    reaction, words = FAULTS[fault]
    server = serve(lambda _: reaction)
    server.sent = []
    host = host_for(server.url)
    host.queue("payments")
    agent = host.agent(**TIMEOUT)

    waits(host, "not_authentic" if "API's form" in words else "down", words)
    put_right(host, server, agent)

    assert all(sent < 50_000_000 for sent in server.sent)  # what fits into socket buffers, not what was offered


@pytest.mark.parametrize("portal", PORTALS)
def test_a_captive_portal_neither_delivers_nor_fails_an_event(host_for, serve, portal):
    reaction, state, words = PORTALS[portal]
    server = serve(lambda _: reaction)
    host = host_for(server.url)
    host.queue("payments")
    agent = host.agent()

    waits(host, state, words)
    put_right(host, server, agent)


def test_a_refused_connection_is_named(host_for, serve):
    server = serve()
    server.stop()
    host = host_for(server.url)
    host.queue("payments")
    agent = host.agent()

    waits(host, "down", rf"can't connect \(127.0.0.1:{server.port}\): .*refused")
    server.start()
    put_right(host, server, agent)


def test_packets_into_the_void_end_by_the_deadline(host_for, serve):
    """A listener whose queue is full: the kernel drops every further SYN."""
    void = socket.socket()
    void.bind(("127.0.0.1", 0))
    void.listen(0)
    port = void.getsockname()[1]
    fillers = []
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
        fillers.append(filler)
    host = host_for(f"http://127.0.0.1:{port}")
    host.queue("payments")
    agent = host.agent(**TIMEOUT)

    waits(host, "down", SILENT)
    void.close()
    for filler in fillers:
        filler.close()
    put_right(host, serve(port=port), agent)


def test_a_reset_before_the_request_was_read(host_for, serve):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        host = host_for(f"http://127.0.0.1:{port}")
        host.queue("payments", scm_branch="b" * 60_000)
        agent = host.agent(**TIMEOUT)
        connection, _ = listener.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

        # It may be noticed before the request is written, or after.
        waits(host, "down", "connection broke|reset|closed the connection|Server disconnected")
    put_right(host, serve(port=port), agent)


FROZEN = """
import http.server
class Silent(http.server.BaseHTTPRequestHandler):
    pass
server = http.server.HTTPServer(("127.0.0.1", 0), Silent)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_server_that_is_stopped_in_its_tracks(host_for, serve):
    """Its kernel goes on to accept connections; nothing ever answers on them."""
    with subprocess.Popen([sys.executable, "-c", FROZEN], stdout=subprocess.PIPE, text=True) as frozen:
        port = int(frozen.stdout.readline())
        frozen.send_signal(signal.SIGSTOP)
        host = host_for(f"http://127.0.0.1:{port}")
        host.queue("payments")
        agent = host.agent(**TIMEOUT)
        waits(host, "down", SILENT)
        frozen.kill()
    put_right(host, serve(port=port), agent)


def test_a_name_that_is_not_resolved(host_for):
    host = host_for("https://api.nowhere.invalid")
    host.queue("payments")
    agent = host.agent(**TIMEOUT)

    waits(host, "down", "the name api.nowhere.invalid (can't be resolved|was not resolved in time)")
    assert host.end(agent) == 0


# --- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


CERTIFICATES = {
    "expired": ({"names": ["IP:127.0.0.1"], "days": -1}, True, "is not trusted: certificate has expired"),
    "of another host": ({"names": ["DNS:other.example"]}, True, "is not trusted: .*(mismatch|not valid for)"),
    "of an unknown authority": ({"names": ["IP:127.0.0.1"]}, False, r"issued by .*is not trusted: .*unable to get local issuer"),
}  # fmt: skip


@needs_openssl
@pytest.mark.parametrize("how", ["SSL_CERT_FILE", "ca_bundle"])
@pytest.mark.parametrize("name", CERTIFICATES)
def test_a_certificate_that_is_not_trusted_holds_events_until_it_is(host_for, serve, authority, name, how):
    options, knows_authority, words = CERTIFICATES[name]
    server = serve(tls=authority.context(**options))
    trust = {"SSL_CERT_FILE" if how == "SSL_CERT_FILE" else "VERSIONER_AGENT_CA_BUNDLE": str(authority.certificate)}
    host = host_for(server.url)
    host.queue("payments")
    agent = host.agent(**(trust if knows_authority else {}))
    waits(host, "down", words)
    assert server.requests == []
    assert host.end(agent) == 0

    server.stop()
    right = serve(tls=authority.context(names=["IP:127.0.0.1"]), port=server.port)
    assert host.run("flush", **trust).returncode == 0
    assert host.counts() == {"delivered": 1}
    assert right.requests[0].event["product_name"] == "payments"


@needs_openssl
def test_a_portal_that_breaks_into_tls_gets_neither_key_nor_event(host_for, serve, authority):
    portal = serve(lambda _: answer(200, PORTAL), tls=authority.context(names=["IP:127.0.0.1"]))
    host = host_for(portal.url)
    host.queue("payments")
    agent = host.agent()

    waits(host, "down", "is not trusted")
    assert portal.requests == []
    assert host.end(agent) == 0


def test_plain_http_in_place_of_tls(host_for, serve):
    server = serve()
    host = host_for(server.url.replace("http:", "https:"))
    host.queue("payments")
    agent = host.agent(**TIMEOUT)

    waits(host, "down", "127.0.0.1")
    assert host.end(agent) == 0


# --- proxies


@pytest.mark.parametrize(("status", "words"), [(407, "refused: 407"), (403, "refused: 403"), (502, "refused: 502")])
def test_a_proxy_that_wants_a_password_is_named(host_for, serve, status, words):
    proxy = serve(lambda _: answer(status, b"<h1>Proxy Authentication Required</h1>", connection="close"))
    host = host_for("https://api.nowhere.invalid")
    host.queue("payments")
    agent = host.agent(HTTPS_PROXY=f"http://user:pa55word@127.0.0.1:{proxy.port}")

    waits(host, "proxy", f"the proxy 127.0.0.1:{proxy.port} {words}")
    assert host.end(agent) == 0
    assert b"pa55word" not in host.said() + host.run("status").stdout + host.run("show", "1").stdout
    assert all("authorization" not in seen.headers for seen in proxy.requests)


def test_a_407_of_a_plain_proxy_is_the_proxys(host_for, serve):
    proxy = serve(lambda _: answer(407, b"who are you?"))
    host = host_for("http://api.nowhere.invalid")
    host.queue("payments")
    host.env |= {"HTTP_PROXY": proxy.url, "VERSIONER_AGENT_ALLOW_INSECURE_HTTP": "true"}
    agent = host.agent()

    waits(host, "proxy", "407")
    assert host.end(agent) == 0


def test_a_proxy_that_is_not_there(host_for):
    host = host_for("https://api.nowhere.invalid")
    host.queue("payments")
    port = free_port()
    agent = host.agent(HTTPS_PROXY=f"http://127.0.0.1:{port}")

    waits(host, "down", f"can't connect .*through the proxy 127.0.0.1:{port}")
    assert host.end(agent) == 0


@needs_openssl
def test_an_https_proxy_is_checked_against_ca_bundle_and_named(host_for, serve, authority):
    """Its certificate is its own business, not the API's."""
    proxy = serve(tls=authority.context(names=["IP:127.0.0.1"]))
    host = host_for("https://api.nowhere.invalid")
    host.queue("payments")
    agent = host.agent(HTTPS_PROXY=proxy.url)
    waits(host, "down", "the certificate of 127.0.0.1 .*is not trusted")
    assert host.end(agent) == 0
    proxy.script = lambda _: answer(403, b"no", connection="close")
    agent = host.agent(HTTPS_PROXY=proxy.url, VERSIONER_AGENT_CA_BUNDLE=str(authority.certificate))
    eventually(lambda: host.health().state == "proxy")
    assert host.end(agent) == 0


def through(port):
    """Answer a CONNECT by leading to *port*."""

    def act(server, connection):
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", port)) as inner:
            back = threading.Thread(target=pump, args=(inner, connection), daemon=True)
            back.start()
            pump(connection, inner)
            back.join(5)

    return Reaction(act)


def pump(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@needs_openssl
@pytest.mark.parametrize(
    "broken",
    [raw(b"HTTP/1.1 200 OK\r\n\r\n"), raw(b"HTTP/1.1 200 OK\r\n\r\ngarbage"), raw(b"HTTP/1.1 204 No\r\n\r\n"), closed()],
    ids=["then closed", "then garbage", "204", "closed"],
)  # fmt: skip
def test_an_agent_is_not_worn_out_by_a_proxy_whose_tunnels_break(host_for, serve, authority, broken):
    """More of them than there are connections; when the tunnel holds, the event goes."""
    api = serve(lambda seen: accepted(f"evt-{seen.key}"), tls=authority.context(names=["DNS:api.example.test"]))
    proxy = serve(lambda _: broken)
    host = host_for("https://api.example.test")
    host.queue("payments")
    agent = host.agent(
        HTTPS_PROXY=proxy.url, VERSIONER_AGENT_CA_BUNDLE=str(authority.certificate), VERSIONER_AGENT_TIMEOUT="3"
    )
    proxy.wait_for(12)
    proxy.script = lambda _: through(api.port)

    eventually(lambda: host.counts() == {"delivered": 1})
    assert host.end(agent) == 0


# --- what is left over, and what was closed


def two(first, second):
    """Two answers in one go, to one request."""

    def act(_, connection):
        connection.sendall(
            b"".join(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(b), b) for b in (first, second))
        )

    return Reaction(act, keeps=True)


@pytest.mark.parametrize(
    "leftover",
    [
        lambda: two(b'{"id": "first"}', b'{"id": "smuggled"}'),
        lambda: Reaction(lambda _, c: c.sendall(b"HTTP/1.1 304 Not Modified\r\n\r\n" + OK), keeps=True),
        lambda: Reaction(lambda _, c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n" + OK), keeps=True),
    ],
    ids=["a second answer", "a 304 with a body", "a length too small"],
)
def test_what_is_left_over_of_one_answer_is_not_taken_for_the_next(host_for, serve, leftover):
    def script(seen):
        if seen.event["version"] == "1" and not seen.number:
            return leftover()
        return refused(409, "exists") if seen.event["version"] == "2" else accepted(f"evt-{seen.event['version']}")

    server = serve(script)
    host = host_for(server.url)
    host.queue("payments", 3)
    host.agent()

    eventually(lambda: host.counts() == {"delivered": 2, "failed": 1})
    assert host.record(1)[0].server_id in ("first", "evt-1")
    assert host.record(2)[0].reason == "conflict"
    assert host.record(3)[0].server_id == "evt-3"


@pytest.mark.parametrize("pause_s", [0, 0.02])
def test_a_server_that_closes_after_each_answer_costs_no_try(host_for, serve, pause_s):
    """A connection found closed is no failure of the API: the same request goes once more, on a new one."""

    def act(server, connection):
        accepted().act(server, connection)
        server.stopping.wait(pause_s)

    server = serve(lambda _: Reaction(act))
    host = host_for(server.url)
    host.queue("payments", 30)
    assert host.run("flush", "--timeout", "30").returncode == 0

    assert [host.record(number)[0].attempts for number in range(1, 31)] == [1] * 30
    assert len(server.requests) == 30


def test_a_server_that_takes_the_request_in_drips_is_cut_off_by_the_deadline(host_for, serve):
    """Each byte that it takes is progress to a socket; only a total deadline ends it."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)
    taken, stop = [], threading.Event()

    def drip():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            while not stop.wait(0.05) and (data := connection.recv(200)):
                taken.append(len(data))

    thread = threading.Thread(target=drip)
    thread.start()
    host = host_for(f"http://127.0.0.1:{listener.getsockname()[1]}")
    host.queue("p", scm_branch="b" * 250_000)
    agent = host.agent(**TIMEOUT)
    eventually(lambda: host.record(1)[0].attempts > 0)
    stop.set()
    listener.close()
    thread.join(10)

    assert sum(taken) < 250_000
    assert re.search(f"{SILENT}|connection broke", host.record(1)[0].detail)
    assert host.end(agent) == 0
