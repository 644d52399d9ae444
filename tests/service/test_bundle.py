"""The archive for support: what is in it, what is not, and that no secret is, wherever it was planted."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import tarfile

import pytest
from host import KEY, eventually
from scripted import refused

from versioner_agent import bundle, doctor
from versioner_agent.bundle import TOP, Mask, Part
from versioner_agent.errors import AgentError, UsageError
from versioner_agent.machine import Machine, Ran
from versioner_agent.servicing import JOURNAL_BYTES

SECRET = "journeysecret"  # of the key
PASSWORD = "pa55word/+"
NAMES = {
    "manifest.txt", "versions.txt", "configuration.txt", "findings.txt", "findings.jsonl", "status.json", "records.jsonl",
    "batches.jsonl", "units.txt", "journal.txt",
}  # fmt: skip


def unpacked(path):
    """Names in the archive -> their texts; all below one directory."""
    with tarfile.open(path) as archive:
        entries = archive.getmembers()
        assert all(entry.name.startswith(f"{TOP}/") and entry.isfile() and entry.mode == 0o600 for entry in entries)
        return {entry.name.removeprefix(f"{TOP}/"): archive.extractfile(entry).read().decode() for entry in entries}


def rows(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def host(host_for, serve):
    return host_for(serve(lambda _: refused(422, f"no: Bearer {KEY} https://user:{KEY}@api")).url)


def test_a_bundle_holds_what_support_needs(host):
    host.queue("payments", 3, extra_metadata={"ticket": "OPS-1", "nested": {"a": "private"}})
    host.run("flush")
    path = host.directory / "support.tar.gz"
    done = host.run("doctor", "--bundle", str(path))
    found = unpacked(path)

    assert done.returncode == 0, done.stdout
    assert f"written: {path}" in done.stderr.decode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(found) == NAMES
    assert "api_url" in found["configuration.txt"]
    assert "VERSIONER_API_URL" in found["configuration.txt"]
    status = json.loads(found["status.json"])
    assert status["counts"]["failed"] == 3
    assert list(status) == list(host.json("status")[0])
    assert {each["check"] for each in rows(found["findings.jsonl"])} >= {"outbox", "key", "key_accepted"}
    assert found["findings.txt"].splitlines()[0].startswith("ok       configuration")
    records = rows(found["records.jsonl"])
    assert [each["id"] for each in records] == [3, 2, 1]
    assert records[0]["payload"]["product_name"] == "payments"
    assert records[0]["payload"]["extra_metadata"]["ticket"] == "***"
    assert len(records[0]["attempt_log"]) == 1
    assert "private" not in found["records.jsonl"]
    assert "What was left out:" in found["manifest.txt"]
    assert os.listdir(host.directory).count("support.tar.gz") == 1
    assert not [name for name in os.listdir(host.directory) if name.endswith(".part")]


def test_only_the_last_200_records_go_in(host):
    host.queue("payments", 230)
    path = host.directory / "support.tar.gz"
    host.run("doctor", "--offline", "--bundle", str(path))

    assert [each["id"] for each in rows(unpacked(path)["records.jsonl"])] == list(range(230, 30, -1))


def plant(host):
    """Put the key into every place that takes words of others."""
    url = f"https://user:{KEY}@ci.example/{KEY}"
    event = {"product_name": f"p {KEY}", "version": KEY, "status": "ok", "build_url": url, "invoke_id": KEY,
             "scm_branch": f'say "VERSIONER_API_KEY={KEY}"', "extra_metadata": {KEY: KEY, "x": [KEY]}}  # fmt: skip
    done = host.run("enqueue", "json", "--kind", "build", "-", stdin=json.dumps(event).encode())
    assert done.returncode == 0, done.stderr
    host.agent()
    eventually(lambda: host.counts() == {"failed": 1})
    host.close()
    with contextlib.closing(sqlite3.connect(host.path, isolation_level=None)) as connection:
        connection.execute("UPDATE record SET queued_by = ?, server_id = ?, code = ?, rule = ?", (KEY,) * 4)
        connection.execute("UPDATE destination SET reason = ?, state = 'down', account = ?", (KEY, KEY))
        connection.execute(
            "INSERT INTO export (uid, created_at, state, product_name, file) VALUES (?, 1, 'marked', ?, ?)", (KEY,) * 3
        )
        connection.execute(
            "INSERT INTO arrival (uid, origin, host, sequence, created_at, imported_at, records) VALUES (?, ?, ?, 1, 1, 1, 1)",
            (KEY,) * 3,
        )
        note = {"at": 1.0, "what": KEY, "kept": KEY, "salvaged": {KEY: 1}, "unreadable": 0, "unreadable_ids": []}
        connection.execute("INSERT INTO meta VALUES ('damage', ?)", (json.dumps(note),))
    host.config.write_text(f'{KEY} = "{KEY}"\nca_bundle = "/x/{KEY}"\nno_proxy = "{KEY}"\nlog_level = "{KEY}"\n')
    host.config.chmod(0o644)


@pytest.mark.parametrize("network", [(), ("--offline",)], ids=["online", "offline"])
def test_no_key_gets_out_wherever_it_was_put(host, network):
    plant(host)
    path = host.directory / "support.tar.gz"
    where = {"HTTPS_PROXY": f"http://user:{KEY}@127.0.0.1:1", "NO_PROXY": f"127.0.0.1,{KEY}"}
    done = host.run("doctor", *network, "--bundle", str(path), **where)
    shown = host.run("doctor", *network, "--json", **where)
    found = unpacked(path)

    assert done.returncode == 1
    for text in (*found.values(), done.stdout.decode(), done.stderr.decode(), shown.stdout.decode()):
        assert SECRET not in text
    assert rows(found["records.jsonl"])[0]["payload"]["scm_branch"].startswith("say ")
    assert rows(found["batches.jsonl"])[0]["damage"]["what"] == "sk_acme_***"
    assert [each.get("table") for each in rows(found["batches.jsonl"])] == [None, "export", "arrival"]


def test_a_key_of_another_form_and_a_proxys_password_do_not_get_out(host):
    host.queue("payments", scm_branch="hunter2hunter2")
    host.config.write_text(f'proxy = "http://user:{PASSWORD.replace("/", "%2F")}@127.0.0.1:1"\n')
    path = host.directory / "support.tar.gz"
    host.run(
        "doctor", "--bundle", str(path), VERSIONER_API_KEY="hunter2hunter2", VERSIONER_API_URL="https://api.example"
    )
    text = "".join(unpacked(path).values())

    assert "hunter2hunter2" not in text
    assert "pa55word" not in text


def test_what_the_mask_takes_out_leaves_json_as_it_is():
    mask = Mask(["plain-secret", 'with "quotes"', None, "", "abc"])
    told = {
        "a": 'say "VERSIONER_API_KEY=abc"',
        "b": "http://u:p@h/",
        "c": "x plain-secret y",
        "d": 'with "quotes"',
        "e": KEY,
        "f": "https://ci/7?token=t0&a=1&X-Amz-Signature=s0#top https://ci/8?page=2 https://ci/9#access_token=t0 x?a=1&amp;pwd=p0",
    }
    masked = json.loads(mask(json.dumps(told)))

    assert masked == {
        "a": 'say "VERSIONER_API_KEY=***"',
        "b": "http://***@h/",
        "c": "x *** y",
        "d": "***",
        "e": "sk_acme_***",
        "f": "https://ci/7?token=***&a=1&X-Amz-Signature=***#top https://ci/8?page=2 https://ci/9#access_token=*** x?a=1&amp;pwd=***",
    }
    assert mask("abc") == "abc"  # too short to be a secret


@pytest.mark.parametrize(
    "words", ["_proxy=", "_proxy=http://", "?key", "key", "://", "&token=", "sk_a", "VERSIONER_API_KEY "]
)
def test_whatever_somebody_queued_is_masked_in_a_time_that_grows_with_its_length(words):
    """A hundred events of 256 KiB of these took hours, with an expression that begins anew at each of them."""
    masked = Mask([])("?" + words * (2**20 // len(words)) + " http_proxy=u:p@proxy:1")

    assert masked.endswith(" http_proxy=***@proxy:1")


# --- the service


def machine(answers, **about):
    return Machine(
        run=lambda command: answers[command[0]], account=lambda *_: None, is_root=True, has_systemd=True, **about
    )


def test_units_and_journal_are_in_it_without_secrets(tmp_path):
    answers = {
        "systemctl": Ran(
            0, f"# drop-in\nEnvironment=VERSIONER_API_KEY=other-form HTTPS_PROXY=http://u:{PASSWORD}@p:1\n"
        ),
        "journalctl": Ran(0, f"2026-11-26T12:00:00 host agent: Bearer {KEY}\n" * 3),
    }
    path = tmp_path / "x.tar.gz"
    bundle.write(str(path), bundle.of_service(machine(answers)), Mask([]))
    found = unpacked(path)

    assert "Environment='VERSIONER_API_KEY=***'" in found["units.txt"]
    assert "other-form" not in found["units.txt"]
    assert found["journal.txt"].count("Bearer sk_acme_***") == 3
    assert SECRET not in "".join(found.values())


def test_variables_and_credentials_of_units_are_left_out_however_they_are_written(tmp_path):
    unit = """[Service]
Environment="VERSIONER_API_KEY=two words" HTTPS_PROXY=user:hunter22@proxy:3128 'MY_TOKEN=tok en'
 Environment = ALL_PROXY=http://u:p@ss/hunter33@h:1 VERSIONER_API_KEY_OLD=a1a1a1\\
  DB_PASSWORD=b4b4b4 VERSIONER_API_URL=https://api.example no_proxy=x.example
Environment="not closed=c5c5c5
SetCredential=api_key:d6d6d6\\
e7e7e7
ExecStart=/usr/bin/true
"""
    path = tmp_path / "x.tar.gz"
    bundle.write(
        str(path), bundle.of_service(machine({"systemctl": Ran(0, unit), "journalctl": Ran(0, "x")})), Mask([])
    )
    shown = unpacked(path)["units.txt"]

    for secret in ("two", "words", "hunter", "tok en", "a1a1a1", "b4b4b4", "c5c5c5", "d6d6d6", "e7e7e7", "p@ss"):
        assert secret not in shown
    for kept in (
        "VERSIONER_API_URL=https://api.example",
        "no_proxy=x.example",
        "@proxy:3128",
        "@h:1",
        "MY_TOKEN",
        "ExecStart",
    ):
        assert kept in shown


def test_a_secret_that_only_begins_like_a_key_is_masked_to_its_end():
    assert Mask(["sk_acme_k1_abc.rest/x"])("key sk_acme_k1_abc.rest/x") == "key ***"
    assert Mask([])("http://u:p@ss@h") == "http://***@h"


@pytest.mark.parametrize(
    "proxy", ["http://user:pa/55word@h:1", "user:pa@55word@h:1", "http://pa55wordtoken@h", "u:pa%2F55word@h"]
)
def test_a_proxys_secret_is_known_even_where_it_makes_no_url(proxy):
    case = doctor.case_of({}, {"HTTPS_PROXY": proxy, "HOME": "/nowhere"}, None)
    mask = Mask(bundle.secrets_of(case, None))

    assert "55word" not in mask(f"the proxy said: {proxy.rpartition('@')[0].rpartition('/' * 2)[2]}")


def test_a_long_journal_is_cut_at_its_beginning_between_lines():
    lines = "".join(f"{number} {'x' * 1000}\n" for number in range(JOURNAL_BYTES // 1000 + 500))
    _, journal = bundle.of_service(machine({"systemctl": Ran(0, "unit"), "journalctl": Ran(0, lines)}))

    assert len(journal.content) <= JOURNAL_BYTES
    assert journal.content.endswith(lines[-1000:])
    assert journal.content.split(" ")[0].isdigit()


def test_what_cannot_be_had_is_in_the_manifest(tmp_path):
    answers = {
        "systemctl": Ran(1, "", "No files found for versioner-agent.service."),
        "journalctl": Ran(1, "", "No journal files were opened due to insufficient permissions."),
    }
    path = tmp_path / "x.tar.gz"
    bundle.write(str(path), bundle.of_service(machine(answers)), Mask([]))
    manifest = unpacked(path)["manifest.txt"]

    assert "units.txt: No files found for versioner-agent.service." in manifest
    assert "journal.txt: No journal files were opened due to insufficient permissions." in manifest


def test_an_outbox_that_cannot_be_read_is_no_reason_to_write_nothing(host):
    host.queue("payments")
    host.close_outbox()
    with open(host.path, "r+b") as file:
        file.write(b"garbage" * 100)
    path = host.directory / "support.tar.gz"
    done = host.run("doctor", "--offline", "--bundle", str(path))
    found = unpacked(path)

    assert done.returncode == 1
    assert found["records.jsonl"] == ""
    assert "records.jsonl: the outbox" in found["manifest.txt"]


# --- the file


def test_a_file_that_is_there_is_not_overwritten(host):
    path = host.directory / "support.tar.gz"
    path.write_text("mine")
    done = host.run("doctor", "--offline", "--bundle", str(path))

    assert done.returncode == 2
    assert b"is there already; nothing was done" in done.stderr
    assert path.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    with pytest.raises(AgentError, match="can't write"):
        bundle.write(str(tmp_path / "gone" / "x.tar.gz"), [Part("a", "b")], Mask([]))
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(UsageError):
        bundle.write(str(tmp_path / "link"), [Part("a", "b")], Mask([]))

    assert os.listdir(tmp_path) == ["link"]


def test_acknowledging_looks_at_nothing(host):
    done = host.run("doctor", "--acknowledge", "--bundle", str(host.directory / "x"))

    assert done.returncode == 2
    assert not (host.directory / "x").exists()
