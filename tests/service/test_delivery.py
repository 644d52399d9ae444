"""The sender on real sockets: what it sends, and that whatever the network does is an Outcome."""

from __future__ import annotations

import inspect
import json
import shutil
import ssl
import subprocess
import threading
from contextlib import closing

import httpcore
import httpx
import pytest
from scripted import accepted, answer, closed, dripped, hanging, raw, refused, reset

from versioner_agent import __version__, binding, config, network
from versioner_agent.delivery import MAX_ANSWER_BYTES, Sender, Target
from versioner_agent.errors import ConfigError
from versioner_agent.outcomes import Outcome

KEY = "sk_acme_k1_verysecret"
PAYLOAD = '{"product_name":"päyments","version":"1.2.3"}'.encode()
OK = b'{"id": "evt-1"}'


def send(target, *, kind="build", key=KEY, payload=PAYLOAD):
    """Send one event to a Target or URL and return the outcome."""
    target = Target(target, timeout=10) if isinstance(target, str) else target
    with closing(Sender(target, lambda: key)) as sender:
        return sender.send(kind, payload, "event-1")


def send_as_configured(env, **values):
    """Send one event with settings and key found as the agent finds them."""
    settings = config.resolve(values, env, [])
    sender, _, _ = binding.sending(settings, env, binding.Account(None))
    with closing(sender):
        return sender.send("build", PAYLOAD, "event-1")


# --- what is sent


@pytest.mark.parametrize(("kind", "path"), [("build", "/build-events/"), ("deployment", "/deployment-events/")])
def test_each_kind_goes_to_its_path_with_a_trailing_slash(serve, kind, path):
    server = serve()

    assert send(server.url, kind=kind).reason == "delivered"
    assert [(seen.method, seen.path) for seen in server.requests] == [("POST", path)]


def test_a_path_in_api_url_is_kept(serve):
    server = serve()

    send(server.url + "/gateway/versioner/")

    assert server.requests[0].path == "/gateway/versioner/build-events/"


def test_a_request_carries_key_idempotency_key_agent_and_the_exact_bytes(serve):
    server = serve()

    send(server.url)

    seen = server.requests[0]
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["idempotency-key"] == "event-1"
    assert seen.headers["user-agent"] == f"versioner-agent/{__version__}"
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["host"] == f"127.0.0.1:{server.port}"
    assert seen.body == PAYLOAD


def test_a_delivered_event_keeps_the_id_of_the_server(serve):
    assert send(serve(lambda _: accepted("evt-77")).url).server_id == "evt-77"


def test_the_key_is_asked_for_before_each_request(serve):
    server = serve()
    keys = iter(("sk_acme_k1_old", "sk_acme_k2_new"))
    with closing(Sender(Target(server.url), lambda: next(keys))) as sender:
        sender.send("build", PAYLOAD, "1")
        sender.send("build", PAYLOAD, "2")

    sent = [seen.headers["authorization"] for seen in server.requests]
    assert sent == ["Bearer sk_acme_k1_old", "Bearer sk_acme_k2_new"]


# --- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_does_not_reach_the_other_host(serve, status):
    other = serve()
    server = serve(lambda _: answer(status, b"", location=f"{other.url}/build-events/"))

    outcome = send(server.url)

    assert outcome.reason == "misrouted"
    assert other.url in outcome.detail
    assert other.requests == []
    assert len(server.requests) == 1


# --- the deadline


def test_the_deadline_covers_an_answer_dripping_its_headers(serve):
    """Each byte comes in time for a timeout per operation; only a total deadline ends this."""
    sent_whole = threading.Event()
    drip = dripped(b"HTTP/1.1 200 OK\r\n" + b"X-Pad: " + b"a" * 10_000 + b"\r\n\r\n")

    def script(_):
        return drip._replace(act=lambda *where: (drip.act(*where), sent_whole.set()))

    outcome = send(Target(serve(script).url, timeout=1))

    assert outcome.reason == "no_answer"
    assert "within 1 s" in outcome.detail
    assert not sent_whole.is_set()


def test_the_deadline_covers_an_answer_dripping_its_body(serve):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"

    def script(_):
        def act(server, connection):
            connection.sendall(head)
            dripped(b"x" * 10_000).act(server, connection)

        return closed()._replace(act=act)

    outcome = send(Target(serve(script).url, timeout=1))

    assert outcome.reason == "no_answer"
    assert "within 1 s" in outcome.detail


def test_a_server_that_says_nothing_ends_as_unanswered(serve):
    outcome = send(Target(serve(lambda _: hanging()).url, timeout=0.5))

    assert (outcome.reason, outcome.is_answered) == ("no_answer", False)


def test_the_sender_works_on_after_a_deadline(serve):
    server = serve(lambda seen: hanging() if seen.number == 0 else accepted())
    with closing(Sender(Target(server.url, timeout=0.5), lambda: KEY)) as sender:
        reasons = [sender.send("build", PAYLOAD, str(number)).reason for number in range(3)]

    assert reasons == ["no_answer", "delivered", "delivered"]


# --- broken answers

BROKEN = {
    "closed without an answer": closed(),
    "reset": reset(),
    "half a status line": raw(b"HTTP/1."),
    "half the headers": raw(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "half a body": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + OK),
    "no HTTP": raw(b"220 smtp.example ESMTP\r\n"),
    "binary garbage": raw(bytes(range(256)) * 4),
    "a length that is no number": raw(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n" + OK),
    "a negative length": raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + OK),
    "two lengths": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nContent-Length: 3\r\n\r\n" + OK),
    "a broken chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + OK),
    "no last chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n" + OK + b"\r\n"),
    "status 99": raw(b"HTTP/1.1 99 Odd\r\nContent-Length: 0\r\n\r\n"),
    "1 MB of headers": raw(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(1000))),
    "a body over the limit": answer(200, {"id": "evt-1", "pad": "x" * MAX_ANSWER_BYTES}),
    "a refusal over the limit": answer(409, {"detail": "x" * MAX_ANSWER_BYTES}),
    "an endless body": raw(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 500_000),
}


@pytest.mark.parametrize("reaction", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_no_verdict(serve, reaction):
    outcome = send(serve(lambda _: reaction).url)

    assert outcome.reason == "no_answer"
    assert outcome.detail
    assert not outcome.is_verdict


def test_an_answer_longer_than_it_says_is_read_as_far_as_it_says(serve):
    lying = b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n" + OK + b"trailing"
    server = serve(lambda seen: raw(lying) if seen.number == 0 else accepted("evt-2"))
    with closing(Sender(Target(server.url), lambda: KEY)) as sender:
        ids = [sender.send("build", PAYLOAD, str(number)).server_id for number in range(3)]

    # What was left on the connection may cost the next attempt, never be taken for its answer.
    assert ids in (["evt-1", "evt-2", "evt-2"], ["evt-1", None, "evt-2"])


def test_a_connection_kept_alive_and_closed_meanwhile_costs_no_event(serve):
    """A stale connection may cost an attempt, never a verdict."""
    server = serve()
    with closing(Sender(Target(server.url), lambda: KEY)) as sender:
        sender.send("build", PAYLOAD, "1")
        server.stop()
        server.start()
        reasons = [sender.send("build", PAYLOAD, "2").reason for _ in range(2)]

    assert reasons[-1] == "delivered"
    assert set(reasons) <= {"delivered", "no_answer"}


def test_a_refused_connection_names_the_place(serve):
    server = serve()
    server.stop()

    outcome = send(server.url)

    assert outcome.reason == "no_answer"
    assert f"127.0.0.1:{server.port}" in outcome.detail


def test_a_name_without_address_is_no_answer():
    outcome = send(Target("https://api.invalid", timeout=5))

    assert outcome.reason == "no_answer"
    assert "api.invalid" in outcome.detail


# --- the key


@pytest.mark.parametrize("status", [200, 401, 409, 418, 503])
def test_a_key_echoed_by_the_server_goes_no_further(serve, status):
    def script(seen):
        echo = seen.headers["authorization"]
        return answer(status, {"id": echo, "detail": echo, "code": echo, "retry_after": echo, "message": echo})

    assert "verysecret" not in repr(send(serve(script).url))


def test_a_key_of_any_shape_echoed_in_the_body_is_masked(serve):
    outcome = send(serve(lambda seen: refused(401, f"bad {seen.headers['authorization']}")).url, key="hunter2-hunter2")

    assert outcome.detail == "bad Bearer ***"


@pytest.mark.parametrize("key", ["hunter2-hunter2", KEY])
@pytest.mark.parametrize("header", ["location", "content_type"])
def test_a_key_echoed_in_a_header_is_masked(serve, key, header):
    """A redirect may quote the key too: its Location is shown to people."""

    def script(seen):
        value = "https://other.invalid/?key=" + seen.headers["authorization"].partition(" ")[2]
        return answer(302 if header == "location" else 404, b"", **{header: value})

    assert key not in repr(send(serve(script).url, key=key))


def test_a_key_in_json_escapes_is_masked(serve):
    """JSON may write any character as an escape; what it spells is the same key."""

    def script(seen):
        key = seen.headers["authorization"].partition(" ")[2]
        escaped = "".join(f"\\u{ord(letter):04x}" for letter in key)
        body = b'{"detail": "bad key %s"}' % escaped.encode()
        return answer(401, body, content_type="application/json")

    assert "hunter2" not in repr(send(serve(script).url, key="hunter2-hunter2"))


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_nothing_is_sent(serve, key):
    server = serve()

    outcome = send(server.url, key=key)

    assert (outcome.reason, outcome.was_sent) == ("unauthorized", False)
    assert "VERSIONER_API_KEY" in outcome.detail
    assert server.requests == []


def test_a_key_that_cannot_be_read_is_not_sent_and_the_file_is_named(serve, tmp_path):
    server = serve()
    missing = str(tmp_path / "api_key")

    outcome = send_as_configured({}, api_url=server.url, api_key_file=missing)

    assert (outcome.reason, outcome.was_sent) == ("unauthorized", False)
    assert missing in outcome.detail
    assert server.requests == []


@pytest.mark.parametrize(
    "key", ["sk_acme_k1_a\nX-Evil: 1", "sk_acme_k1_a b", "sk_acme_k1_a\x7f", "sk_acme_k1_ä\r\n\r\n"]
)
def test_a_key_with_characters_that_no_key_has_is_neither_sent_nor_shown(serve, tmp_path, key):
    server = serve()
    file = tmp_path / "api_key"
    file.write_text(key + "x", newline="")

    for outcome in (
        send_as_configured({"VERSIONER_API_KEY": key + "x"}, api_url=server.url),
        send_as_configured({}, api_url=server.url, api_key_file=str(file)),
    ):
        assert (outcome.reason, outcome.was_sent) == ("unauthorized", False)
        assert "sk_acme_k1_a" not in outcome.detail
    assert server.requests == []


def test_a_key_file_may_end_in_a_newline(serve, tmp_path):
    server = serve()
    file = tmp_path / "api_key"
    file.write_text(KEY + "\n")

    send_as_configured({}, api_url=server.url, api_key_file=str(file))

    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


# --- proxies


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"])
def test_a_proxy_of_the_environment_does_not_come_between_us_and_loopback(serve, monkeypatch, name):
    server, proxy = serve(), serve()
    monkeypatch.setenv(name, proxy.url)
    env = {name: proxy.url, "VERSIONER_API_KEY": KEY}

    outcome = send_as_configured(env, api_url=server.url)

    assert outcome.reason == "delivered"
    assert (len(server.requests), proxy.requests) == (1, [])


@pytest.mark.parametrize(("status", "words"), [(407, "407"), (403, "403"), (502, "502")])
def test_a_proxy_that_refuses_to_connect_is_named_and_settles_nothing(serve, status, words):
    proxy = serve(lambda _: answer(status, b"<h1>no</h1>", connection="close"))

    outcome = send(Target("https://api.invalid", timeout=5, proxy=proxy.url))

    assert (outcome.reason, outcome.http_status) == ("proxy", status)
    assert words in outcome.detail
    assert f"127.0.0.1:{proxy.port}" in outcome.detail
    assert [(seen.method, seen.path) for seen in proxy.requests] == [("CONNECT", "api.invalid:443")]


def test_the_password_of_a_proxy_is_sent_to_it_and_not_shown(serve):
    proxy = serve(lambda _: answer(407, b"", connection="close"))
    url = f"http://builder:s3cr%40t@127.0.0.1:{proxy.port}"

    outcome = send(Target("https://api.invalid", timeout=5, proxy=url))

    assert proxy.requests[0].headers["proxy-authorization"] == "Basic YnVpbGRlcjpzM2NyQHQ="
    assert "s3cr" not in outcome.detail


def test_the_key_is_not_shown_to_a_proxy_that_refuses(serve):
    proxy = serve(lambda _: answer(403, b"", connection="close"))

    send(Target("https://api.invalid", timeout=5, proxy=proxy.url))

    assert all("authorization" not in seen.headers for seen in proxy.requests)


def test_a_proxy_that_is_not_there_is_no_answer_and_named(serve):
    proxy = serve()
    proxy.stop()

    outcome = send(Target("https://api.invalid", timeout=5, proxy=proxy.url))

    assert outcome.reason == "no_answer"
    assert f"through the proxy 127.0.0.1:{proxy.port}" in outcome.detail


@pytest.mark.parametrize(
    "reaction", [closed(), raw(b"garbage\r\n\r\n"), hanging()], ids=["closed", "garbage", "hanging"]
)
def test_a_broken_proxy_is_no_answer(serve, reaction):
    proxy = serve(lambda _: reaction)

    assert send(Target("https://api.invalid", timeout=1, proxy=proxy.url)).reason == "no_answer"


@pytest.mark.parametrize(
    "proxy",
    ["socks5://127.0.0.1:1", "http://", "ftp://u:p@127.0.0.1", "http://u:p@127.0.0.1:99999", "http://u:p@xn--:1",
     "http://u:p#w@127.0.0.1:1", "http://u:p/w@127.0.0.1", "http://u:p@[::1", "http://u:p@127.0.0.1:0"],
)  # fmt: skip
def test_a_proxy_url_that_cannot_be_used_is_a_configuration_error(proxy):
    with pytest.raises(ConfigError, match="proxy") as caught:
        Sender(Target("https://api.invalid", proxy=proxy), lambda: KEY)

    assert "u:p" not in caught.value.message


@pytest.mark.parametrize("api_url", ["https://xn--", "https://xn--a", "https://"])
def test_an_api_url_whose_host_is_no_name_is_a_configuration_error(api_url):
    with pytest.raises(ConfigError, match="api_url"):
        Sender(Target(api_url), lambda: KEY)


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed, so no certificate can be made")
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
    ]
    command += ["-subj", "/O=Example/CN=Example Test Authority", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def secure(serve, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    return serve(tls=context)


def test_an_untrusted_certificate_is_refused_naming_its_issuer_and_the_store(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)

    outcome = send(secure.url)

    assert outcome.reason == "no_answer"
    assert "issued by Example Test Authority" in outcome.detail
    assert "checked against the system's store" in outcome.detail
    assert secure.requests == []


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_a_store_named_by_the_environment_is_used_and_named(secure, certificate, monkeypatch, tmp_path, name):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    other = tmp_path / "other"
    other.mkdir()
    value = str(certificate / "cert.pem") if name == "SSL_CERT_FILE" else str(other)
    monkeypatch.setenv(name, value)

    outcome = send(secure.url)

    assert outcome.reason == ("delivered" if name == "SSL_CERT_FILE" else "no_answer")
    assert name == "SSL_CERT_FILE" or f"checked against {name} {value}" in outcome.detail


def test_an_environment_that_makes_tls_unusable_is_a_configuration_error(monkeypatch):
    monkeypatch.setenv("SSLKEYLOGFILE", "/nonexistent/keys")
    with pytest.raises(ConfigError, match="can't use SSLKEYLOGFILE /nonexistent/keys: No such file"):
        send("https://api.example")


def test_a_ca_bundle_makes_the_certificate_trusted(secure, certificate):
    outcome = send(Target(secure.url, ca_bundle=str(certificate / "cert.pem")))

    assert outcome.reason == "delivered"
    assert len(secure.requests) == 1


def test_a_certificate_for_another_host_is_refused(secure, certificate):
    url = secure.url.replace("127.0.0.1", "localhost")

    outcome = send(Target(url, ca_bundle=str(certificate / "cert.pem")))

    assert outcome.reason == "no_answer"
    assert "localhost" in outcome.detail
    assert secure.requests == []


def test_plain_http_where_tls_is_expected_is_no_answer(serve):
    url = serve().url.replace("http:", "https:")

    assert send(Target(url, timeout=1)).reason == "no_answer"


@pytest.mark.parametrize("content", [None, b"no certificate"], ids=["missing", "garbage"])
def test_a_ca_bundle_that_cannot_be_read_is_a_configuration_error(tmp_path, content):
    bundle = tmp_path / "ca.pem"
    if content is not None:
        bundle.write_bytes(content)

    with pytest.raises(ConfigError, match="ca_bundle"):
        Sender(Target("https://api.invalid", ca_bundle=str(bundle)), lambda: KEY)


# --- totality


def _exception_classes():
    for module in (httpcore, httpx):
        for _, found in inspect.getmembers(module, inspect.isclass):
            if issubclass(found, Exception):
                yield found
    yield from (OSError, ssl.SSLError, UnicodeError, RuntimeError, ValueError, KeyError, AssertionError, MemoryError)


def _made(kind):
    try:
        return kind(f"words with {KEY}")
    except TypeError:
        return kind("words", request=None, response=None) if kind is httpx.HTTPStatusError else kind()


@pytest.mark.parametrize("kind", list(_exception_classes()), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_whatever_is_raised_on_the_way_ends_as_an_outcome(monkeypatch, kind):
    error = _made(kind)
    with closing(Sender(Target("http://127.0.0.1:9"), lambda: KEY)) as sender:

        def fail(*_args, **_kwargs):
            raise error

        monkeypatch.setattr(network.Line, "handle_request", fail)
        outcome = sender.send("build", PAYLOAD, "event-1")

    assert isinstance(outcome, Outcome)
    assert outcome.reason == ("proxy" if kind is httpcore.ProxyError else "no_answer")
    assert "verysecret" not in repr(outcome)


def test_threads_share_nothing_of_a_sender(serve):
    """Each has its own line, deadline and answer."""
    server = serve(lambda seen: accepted(json.loads(seen.body)["id"]))
    found = {}
    with closing(Sender(Target(server.url), lambda: KEY)) as sender:

        def work(name):
            payload = json.dumps({"id": name}).encode()
            found[name] = [sender.send("build", payload, name).server_id for _ in range(20)]

        threads = [threading.Thread(target=work, args=(f"thread-{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert found == {name: [name] * 20 for name in found}
    assert len(found) == 4
    assert server.most_under_way <= 4
