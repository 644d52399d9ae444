"""The agent and `flush`: whose outbox it is, where it delivers to, and configuration read again."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from host import KEY, eventually
from scripted import accepted, refused

from versioner_agent import binding, config
from versioner_agent.errors import CredentialsMissing, LockHeld, OtherDestination
from versioner_agent.flush import Drained, flush, others_can_write
from versioner_agent.ledger import Ledger
from versioner_agent.locks import FlusherLock
from versioner_agent.outbox import Destination, Outbox
from versioner_agent.storage import Store

EVENT = {"product_name": "payments", "version": "1.2.3", "status": "completed"}
ENV = {"VERSIONER_API_KEY": KEY}


@pytest.fixture
def outbox(tmp_path):
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    with Outbox(directory / "outbox.db") as made:
        made.enqueue("build", EVENT)
        yield made


@pytest.fixture
def ledger(outbox):
    with contextlib.closing(Store(outbox.store.path)) as store:
        yield Ledger(store)


def settings(outbox, api_url, **values):
    return config.resolve({"db": outbox.store.path, "api_url": api_url, "max_backoff": 0.1, **values}, {}, [])


def bind(ledger, origin, account):
    with ledger.store.write() as connection:
        connection.execute("UPDATE destination SET origin = ?, account = ?", (origin, account))


def deliver(ledger):
    with ledger.store.write() as connection:
        connection.execute("UPDATE record SET state = 'delivered'")


# --- who else can write


def test_a_private_outbox_is_nobody_elses(outbox):
    assert others_can_write(outbox.store.path) == ""


@pytest.mark.parametrize("mode", [0o620, 0o660, 0o602, 0o666])
def test_a_file_that_others_can_write_is_shared(outbox, mode):
    os.chmod(outbox.store.path, mode)

    assert f"{mode:04o}" in others_can_write(outbox.store.path)


@pytest.mark.parametrize("mode", [0o770, 0o2770, 0o777, 0o730])
def test_a_directory_that_others_can_write_is_shared(outbox, mode):
    directory = os.path.dirname(outbox.store.path)
    os.chmod(directory, mode)

    assert directory in others_can_write(outbox.store.path)


def test_a_sticky_directory_protects_a_private_file(outbox):
    os.chmod(os.path.dirname(outbox.store.path), 0o1777)

    assert others_can_write(outbox.store.path) == ""


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_file_that_others_can_only_read_is_not_shared(outbox, mode):
    os.chmod(outbox.store.path, mode)

    assert others_can_write(outbox.store.path) == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("which", ["file", "directory"])
def test_an_outbox_of_somebody_else_is_shared(outbox, which):
    path = outbox.store.path
    os.chown(path if which == "file" else os.path.dirname(path), 12345, -1)

    assert "uid 12345" in others_can_write(path)


def test_flush_sends_nothing_from_a_shared_outbox(outbox, serve):
    server = serve()
    os.chmod(outbox.store.path, 0o660)

    drained = flush(settings(outbox, server.url), ENV, timeout=0.3)

    assert drained.pending == 1
    assert "only its agent" in drained.note
    assert "none is running" in drained.note
    assert server.requests == []


# --- one destination


@pytest.mark.parametrize(
    "here",
    [
        Destination("https://api.example", "acme"),
        Destination("https://api.example", None),
        Destination(None, "acme"),
        Destination(None, None),
    ],
)
def test_the_same_destination_may_deliver(ledger, here):
    bind(ledger, "https://api.example", "acme")

    binding.check(ledger, here)

    assert ledger.destination()[0] == Destination("https://api.example", "acme")


@pytest.mark.parametrize(
    "here",
    [
        Destination("https://other.example", "acme"),
        Destination("http://api.example", "acme"),
        Destination("https://api.example:8443", "acme"),
        Destination("https://api.example", "rival"),
        Destination(None, "rival"),
    ],
)
def test_another_destination_is_refused_while_anything_is_pending(ledger, here):
    bind(ledger, "https://api.example", "acme")

    with pytest.raises(OtherDestination) as caught:
        binding.check(ledger, here)

    assert "https://api.example" in caught.value.message
    assert str(here.origin or here.account) in caught.value.message
    assert caught.value.exit_code == 3


def test_an_outbox_with_nothing_pending_may_move(ledger):
    bind(ledger, "https://api.example", "acme")
    deliver(ledger)

    binding.check(ledger, Destination("https://other.example", "acme"))

    assert ledger.destination()[0] == Destination(None, None)


def test_an_unbound_outbox_takes_any_destination(ledger):
    binding.check(ledger, Destination("https://other.example", "rival"))


def test_flush_sends_nothing_to_another_destination(outbox, ledger, serve):
    server = serve()
    bind(ledger, "https://api.example", None)

    with pytest.raises(OtherDestination):
        flush(settings(outbox, server.url), ENV, timeout=1)

    assert server.requests == []


def test_flush_with_a_new_destination_rebinds_and_delivers_there(outbox, ledger, serve):
    server = serve()
    bind(ledger, "https://api.example", "rival")

    drained = flush(settings(outbox, server.url), ENV, timeout=20, rebind=True)

    assert drained.pending == 0
    assert len(server.requests) == 1
    assert ledger.destination()[0] == Destination(server.url, "acme")


def test_rebinding_is_refused_while_an_agent_delivers(outbox, ledger, serve):
    server = serve()
    bind(ledger, "https://api.example", None)
    other = FlusherLock(outbox.store.path)
    other.claim_agent()
    try:
        with pytest.raises(LockHeld):
            flush(settings(outbox, server.url), ENV, timeout=1, rebind=True)
    finally:
        other.close()

    assert ledger.destination()[0].origin == "https://api.example"
    assert server.requests == []


def test_flush_without_a_key_says_so(outbox, serve):
    server = serve()

    with pytest.raises(CredentialsMissing):
        flush(settings(outbox, server.url), {}, timeout=1)

    assert server.requests == []


def test_flush_of_an_outbox_that_was_never_made_does_nothing(tmp_path):
    path = tmp_path / "none" / "outbox.db"
    found = config.resolve({"db": str(path), "api_url": "http://127.0.0.1:9"}, {}, [])

    assert flush(found, ENV, timeout=1) == Drained([], 0)
    assert not path.parent.exists()


def test_flush_reports_what_was_refused_while_it_ran(outbox, serve):
    drained = flush(settings(outbox, serve(lambda _: refused(409, "other SHA")).url), ENV, timeout=20)

    assert [(record.reason, record.product_name) for record in drained.refused] == [("conflict", "payments")]
    assert drained.pending == 0


def test_flush_says_why_something_is_left(outbox, serve):
    drained = flush(settings(outbox, serve(lambda _: refused(401, "no such key")).url), ENV, timeout=0.5)

    assert drained.pending == 1
    assert "unauthorized" in drained.note
    assert "no such key" in drained.note


# --- SIGHUP, with a real process


def reloading(host, url, **more):
    """Let the configuration file, not the environment, name the API."""
    host.env.pop("VERSIONER_API_URL")
    lines = [f'api_url = "{url}"', *(f"{key} = {value!r}" for key, value in more.items())]
    host.config.write_text("\n".join(lines))


@pytest.mark.parametrize(
    "broken",
    [
        "concurrency = 'many'",
        "not TOML at all [",
        "api_url = 'http://example.org'",
        "ca_bundle = '/does/not/exist'",
        "nosuchkey = 1",
    ],
)
def test_a_broken_configuration_leaves_the_old_one_in_force(host_for, serve, broken):
    server = serve()
    host = host_for(server.url)
    reloading(host, server.url)
    process = host.agent()
    lines = host.config.read_text() if broken.startswith("ca_bundle") else ""
    host.config.write_text(f"{lines}\n{broken}\n")

    process.send_signal(signal.SIGHUP)
    eventually(lambda: "the old configuration stays" in process.log.read_text())
    (record_id,) = host.queue("payments")
    eventually(lambda: host.record(record_id)[0].state == "delivered")

    assert len(server.requests) == 1
    assert host.end(process) == 0


def test_a_good_configuration_is_taken_without_a_restart(host_for, serve):
    server, other = serve(), serve()
    host = host_for(server.url)
    reloading(host, server.url)
    process = host.agent()
    host.queue("payments")
    eventually(lambda: host.counts() == {"delivered": 1})
    host.config.write_text(f'api_url = "{other.url}"')

    process.send_signal(signal.SIGHUP)
    eventually(lambda: "configuration read again" in process.log.read_text())
    host.queue("payments", first=2)
    eventually(lambda: host.counts() == {"delivered": 2})

    assert (len(server.requests), len(other.requests)) == (1, 1)


def test_a_reload_does_not_send_what_waits_for_one_api_to_another(host_for, serve):
    server = serve(lambda seen: accepted() if seen.number == 0 else refused(503))
    other = serve()
    host = host_for(server.url)
    reloading(host, server.url)
    process = host.agent()
    host.queue("payments", 2)
    server.wait_for(3)
    host.config.write_text(f'api_url = "{other.url}"')

    process.send_signal(signal.SIGHUP)
    eventually(lambda: "the old configuration stays" in process.log.read_text())
    server.wait_for(len(server.requests) + 2)

    assert other.requests == []
    assert host.counts() == {"delivered": 1, "pending": 1}


def test_a_reload_cannot_change_the_outbox(host_for, serve):
    server = serve()
    host = host_for(server.url)
    host.env.pop("VERSIONER_AGENT_DB")
    host.config.write_text(f'db = "{host.path}"')
    process = host.agent()
    host.config.write_text(f'db = "{host.directory}/other.db"')

    process.send_signal(signal.SIGHUP)
    eventually(lambda: "takes a restart" in process.log.read_text())

    assert host.end(process) == 0
    assert not os.path.exists(f"{host.directory}/other.db")


def test_a_refused_configuration_does_not_change_how_lines_look(host_for, serve):
    host = host_for(serve().url)
    process = host.agent()
    host.config.write_text('log_format = "json"\nca_bundle = "/no/such.pem"\n')

    process.send_signal(signal.SIGHUP)
    eventually(lambda: "the old configuration stays" in process.log.read_text())
    host.config.write_text('log_format = "json"\n')
    process.send_signal(signal.SIGHUP)
    eventually(lambda: "configuration read again" in process.log.read_text())

    lines = process.log.read_text().splitlines()
    assert lines[-1].startswith("{")
    assert not [line for line in lines[:-1] if line.startswith("{")]


def test_a_directory_that_is_a_file_is_not_waited_for(host_for, tmp_path):
    (tmp_path / "file").touch()

    done = host_for().run("run", VERSIONER_AGENT_DB=str(tmp_path / "file" / "outbox.db"))

    assert done.returncode == 1
    assert b"it would lie in a file, not in a directory" in done.stderr
