"""An outbox delivers for one account, whatever becomes of the key while the agent runs."""

from __future__ import annotations

import signal

from host import eventually
from scripted import accepted, refused


def keys_seen(server):
    return {seen.headers["authorization"] for seen in server.requests}


def with_key_file(host, key):
    """A host whose key is in a file, as a service has it."""
    file = host.directory / "key"
    if key:
        file.write_text(key)
    host.env.pop("VERSIONER_API_KEY")
    host.env["VERSIONER_AGENT_API_KEY_FILE"] = str(file)
    return file


def test_a_key_of_another_account_delivers_nothing(host_for, serve):
    """The file is read before each request, so a check at the start would not be enough."""
    server = serve(lambda seen: accepted() if seen.event["version"] == "1" or is_well else refused(503))
    is_well = False
    host = host_for(server.url)
    file = with_key_file(host, "sk_acme_k1_aaaa")
    process = host.agent()
    host.queue("a")
    eventually(lambda: host.counts() == {"delivered": 1})
    host.queue("a", first=2)
    eventually(lambda: len(server.requests) > 1)

    file.write_text("sk_other_k1_bbbb")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: host.health().state == "unauthorized")
    is_well = True

    assert "account other" in host.health().reason
    assert keys_seen(server) == {"Bearer sk_acme_k1_aaaa"}
    file.write_text("sk_acme_k2_cccc")
    eventually(lambda: host.counts() == {"delivered": 2})
    assert keys_seen(server) == {"Bearer sk_acme_k1_aaaa", "Bearer sk_acme_k2_cccc"}


def test_a_key_that_comes_late_binds_its_account(host_for, serve):
    server = serve(lambda _seen: accepted())
    host = host_for(server.url)
    file = with_key_file(host, None)
    host.agent()
    host.queue("a")
    eventually(lambda: host.health().state == "unauthorized")

    file.write_text("sk_acme_k1_aaaa")
    eventually(lambda: host.counts() == {"delivered": 1})

    (status,) = host.json("status")
    assert status["destination"]["account"] == "acme"


def test_a_drained_outbox_moves_to_another_account_on_reload(host_for, serve):
    server = serve(lambda _seen: accepted())
    host = host_for(server.url)
    file = with_key_file(host, "sk_acme_k1_aaaa")
    process = host.agent()
    host.queue("a")
    eventually(lambda: host.counts() == {"delivered": 1})

    file.write_text("sk_other_k1_bbbb")
    process.send_signal(signal.SIGHUP)
    eventually(lambda: "configuration read again" in process.log.read_text())
    host.queue("a", first=2)
    eventually(lambda: host.counts() == {"delivered": 2})

    (status,) = host.json("status")
    assert status["destination"]["account"] == "other"
