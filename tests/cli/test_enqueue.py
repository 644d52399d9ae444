"""`enqueue`: what it takes, what it refuses, what it prints, and that a refusal writes nothing."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from contextlib import closing

import pytest
from host import COMMAND

from versioner_agent.storage import Store

BUILD = ("enqueue", "build", "--product", "payments", "--version", "1.2.3", "--completed-at", "2026-11-06T15:30:00Z")
DEPLOYMENT = ("enqueue", "deployment", "--product", "payments", "--version", "1.2.3", "--environment", "production")
JSON = ("enqueue", "json")
EVENT = {"product_name": "payments", "version": "1.2.3", "status": "success"}
RECEIPT_KEYS = [
    *("outcome", "id", "event_id", "invoke_id", "kind", "product_name", "version", "environment_name", "status"),
    "warnings",
]


def event(**changes):
    return json.dumps({**EVENT, **changes}).encode()


def payload(db, record_id=1):
    connection = sqlite3.connect(db)
    try:
        return json.loads(connection.execute("SELECT payload FROM record WHERE id = ?", (record_id,)).fetchone()[0])
    finally:
        connection.close()


BAD_OPTIONS = {
    "no product": (("enqueue", "build", "--version", "1"), "product_name: is required"),
    "no version": (("enqueue", "build", "--product", "p"), "version: is required"),
    "no environment": (("enqueue", "deployment", "--product", "p", "--version", "1"), "environment_name: is required"),
    "an empty product": ((*BUILD, "--product", ""), "product_name: must not be empty"),
    "a blank version": ((*BUILD, "--version", " \t "), "version: must not be empty"),
    "a blank environment": ((*DEPLOYMENT, "--environment", " "), "environment_name: must not be empty"),
    "an unknown status": ((*BUILD, "--status", "sucess"), "did you mean 'success'"),
    "a status without likeness": ((*BUILD, "--status", "zzz"), "one of pending, started, completed"),
    "a status of a deployment": ((*BUILD, "--status", "deployed"), "unknown status 'deployed' for a build"),
    "a status of a build": ((*DEPLOYMENT, "--status", "built"), "unknown status 'built' for a deployment"),
    "a time without offset": ((*BUILD, "--completed-at", "2026-11-06T15:30:00"), "completed_at: "),
    "a time that never was": ((*BUILD, "--started-at", "2026-02-30T00:00:00Z"), "started_at: "),
    "a date only": ((*BUILD, "--started-at", "2026-11-06"), "RFC 3339"),
    "an epoch": ((*BUILD, "--started-at", "1793491200"), "RFC 3339"),
    "meta without value": ((*BUILD, "--meta", "team"), "--meta team: must be KEY=VALUE"),
    "meta without key": ((*BUILD, "--meta", "=x"), "must be KEY=VALUE"),
    "metadata that is no JSON": ((*BUILD, "--extra-metadata", "{team: a}"), "extra_metadata"),
    "metadata that is a list": ((*BUILD, "--extra-metadata", "[1]"), "must be one JSON object"),
    "metadata with NaN": ((*BUILD, "--extra-metadata", '{"a": NaN}'), "NaN"),
    "metadata with Infinity": ((*BUILD, "--extra-metadata", '{"a": -Infinity}'), "Infinity"),
    "metadata with 1e999": ((*BUILD, "--extra-metadata", '{"a": 1e999}'), "finite"),
    "metadata given twice": ((*BUILD, "--extra-metadata", '{"a": 1, "a": 2}'), "'a' is given twice"),
    "metadata in no file": ((*BUILD, "--extra-metadata", "@/does/not/exist"), "/does/not/exist"),
    "metadata in a directory": ((*BUILD, "--extra-metadata", "@/"), "can't read /"),
    "metadata with a NUL": ((*BUILD, "--extra-metadata", '{"a": "\\u0000"}'), "NUL"),
    "metadata with half a character": ((*BUILD, "--extra-metadata", '{"a": "\\ud800"}'), "surrogate"),
    "too much metadata": ((*BUILD, "--meta", "a=" + "x" * 103_000), "over the limit of 102400"),
    "bytes that are not UTF-8": ((*BUILD, "--product", "caf\udce9"), "not UTF-8"),
    "an unknown option": ((*BUILD, "--produkt", "p"), "--produkt"),
    "an option of the other kind": ((*BUILD, "--environment", "production"), "--environment"),
    "a loose argument": ((*BUILD, "production"), "production"),
    "an option without value": ((*BUILD, "--scm-sha"), "--scm-sha"),
    "no such command": (("enqueue", "biuld"), "biuld"),
}

BAD_JSON = {
    "nothing": (b"", "empty"),
    "blanks": (b" \n\n", "empty"),
    "no JSON": (b"product_name: payments", "line 1 column 1"),
    "half an object": (event()[:-1], "not valid JSON"),
    "an empty array": (b"[]", "holds no event"),
    "a number": (b"42", "must be a JSON object, not a number"),
    "null": (b"null", "not null"),
    "not UTF-8": (b'{"product_name": "caf\xe9"}', "0xe9"),
    "UTF-16": (event().decode().encode("utf-16"), "not UTF-8"),
    "a key given twice": (b'{"version": "1", "version": "2"}', "'version' is given twice"),
    "NaN": (b'{"version": NaN}', "NaN"),
    "a nesting bomb": (b"[" * 200_000, "nested"),
    "deep metadata": (event(extra_metadata=json.loads('{"a":' * 70 + "1" + "}" * 70)), "nested deeper"),
    "a number of 5000 digits": (b'{"version": ' + b"9" * 5000 + b"}", "event"),
    "a version that is a number": (event(version=1.2), "version: must be a string, not a number"),
    "no status": (b'{"product_name": "p", "version": "1"}', "status: is required"),
    "null for a required field": (event(version=None), "version: is required"),
    "a mistyped field": (event(scm_hsa="abc"), "did you mean 'scm_sha'"),
    "a field of nobody": (event(colour="red"), "--allow-unknown-fields"),
    "a deployment without environment": (event(deployed_by="jo"), "deployed_by: belongs to a deployment"),
    "a deployment's status without environment": (event(status="deployed"), "status deployed: belongs to a deployment"),
    "a kind of nobody": (event(kind="release"), "kind: must be"),
    "a flag that is a word": (event(environment_name="e", skip_preflight_checks="yes"), "must be true or false"),
    "one bad in three": (b"\n".join((event(), event(status="wat"), event())), "event 2: status"),
    "garbage behind an event": (event() + b" garbage", "not valid JSON"),
    "a body that is too long": (event(build_url="x" * 270_000), "over the limit of 262144"),
}


def assert_refused(done, words):
    assert done.code == 2, done
    assert words in done.err
    assert "Traceback" not in done.err
    assert "internal error" not in done.err
    assert done.out == ""


@pytest.mark.parametrize(("args", "words"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_bad_call_is_named_and_leaves_no_outbox(cli, db, args, words):
    assert_refused(cli(*args), words)

    assert list(db.parent.iterdir()) == []


@pytest.mark.parametrize(("stdin", "words"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_named_and_leaves_no_outbox(cli, db, stdin, words):
    assert_refused(cli(*JSON, stdin=stdin), words)

    assert list(db.parent.iterdir()) == []


def test_a_refusal_leaves_an_outbox_as_it_was(cli, db):
    cli(*BUILD)
    before = db.read_bytes()

    assert cli(*BUILD, "--status", "wat").code == 2
    assert cli(*JSON, stdin=event() + b"\n" + event(status="wat")).code == 2
    assert db.read_bytes() == before


def test_all_problems_are_listed_at_once(cli):
    done = cli("enqueue", "deployment", "--status", "wat", "--meta", "x")

    assert all(words in done.err for words in ("product_name", "version", "environment_name", "status", "--meta x"))


def test_kinds_that_contradict_each_other_are_refused(cli, db):
    assert_refused(cli(*JSON, "--kind", "build", stdin=event(kind="deployment")), "says deployment")
    assert_refused(cli(*JSON, "--kind", "release", stdin=event()), "release")
    assert not db.exists()


@pytest.mark.parametrize(
    ("args", "stdin"),
    [(("enqueue", "build", "--status", "wat"), b""), (JSON, b"[" * 100_000), (JSON, b"\xff\xfe")],
    ids=["options", "bomb", "bytes"],
)
def test_a_real_process_refuses_without_a_traceback(host_for, args, stdin):
    host = host_for()

    done = host.run(*args, stdin=stdin)

    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert b"Traceback" not in done.stderr
    assert not os.path.exists(host.path)


# --- what it prints


@pytest.mark.parametrize("args", [BUILD, (*DEPLOYMENT, "--invoke-id", "42")], ids=["build", "deployment"])
def test_a_receipt_has_exactly_the_documented_keys(cli, args):
    done = cli(*args, "--json")

    receipt = json.loads(done.out)
    assert done.code == 0
    assert list(receipt) == RECEIPT_KEYS
    assert (receipt["outcome"], receipt["id"], receipt["status"]) == ("queued", 1, "completed")
    assert receipt["kind"] == args[1]
    assert done.out.count("\n") == 1


def test_a_receipt_for_people_is_one_line(cli):
    assert cli(*DEPLOYMENT).out == "queued 1: deployment payments 1.2.3 production completed\n"


def test_a_repeat_of_a_run_is_a_duplicate_with_the_first_id(cli):
    first = json.loads(cli(*BUILD, "--invoke-id", "42", "--json").out)
    done = cli(*BUILD, "--invoke-id", "42", "--json")
    again = json.loads(done.out)

    assert done.code == 0
    assert (again["outcome"], again["id"], again["event_id"]) == ("duplicate", first["id"], first["event_id"])
    assert cli(*BUILD, "--invoke-id", "42").out.startswith("duplicate of 1: ")
    assert json.loads(cli(*BUILD, "--invoke-id", "42", "--new", "--json").out)["outcome"] == "queued"


def test_several_events_get_a_receipt_each_in_their_order(cli):
    done = cli(*JSON, "--json", stdin=b"\n".join(event(version=str(number)) for number in range(3)))

    receipts = [json.loads(line) for line in done.out.splitlines()]
    assert [(each["id"], each["version"]) for each in receipts] == [(1, "0"), (2, "1"), (3, "2")]


def test_many_receipts_are_summed_up_for_people(cli):
    done = cli(*JSON, stdin=b"\n".join(event(version=str(number)) for number in range(700)))

    assert done.out == "queued 700 events (records 1 to 700), 0 duplicates\n"


def test_verbose_says_where_the_outbox_is(cli, db):
    assert f"outbox {db} (from VERSIONER_AGENT_DB)" in cli(*BUILD, "--verbose").err


def test_a_hostile_name_cannot_steer_the_terminal(cli):
    done = cli(*BUILD, "--product", "a\x1b[2J\u202eb\nc")

    assert done.out == "queued 1: build a\\x1b[2J\\u202eb\\nc 1.2.3 completed\n"


# --- what it takes


def test_json_in_every_form(cli, tmp_path):
    array = json.dumps([EVENT, {**EVENT, "version": "2"}]).encode()
    file = tmp_path / "event.json"
    file.write_bytes(b"\xef\xbb\xbf" + event(version="3"))

    assert cli(*JSON, stdin=event()).code == 0
    assert cli(*JSON, "-", stdin=array).code == 0
    assert cli(*JSON, str(file)).code == 0
    assert cli(*JSON, "--json", stdin=b'\n{"product_name": "p",\n"version": "4", "status": "ok"}\n' * 2).code == 0


@pytest.mark.parametrize(
    ("changes", "args", "kind"),
    [
        ({}, (), "build"),
        ({"environment_name": "e"}, (), "deployment"),
        ({"kind": "build"}, (), "build"),
        ({"kind": "deployment", "environment_name": "e"}, (), "deployment"),
        ({"environment_name": "e"}, ("--kind", "deployment"), "deployment"),
    ],
)
def test_the_kind_of_a_json_event(cli, changes, args, kind):
    assert json.loads(cli(*JSON, *args, "--json", stdin=event(**changes)).out)["kind"] == kind


def test_unknown_fields_pass_where_that_was_asked_for(cli, db):
    assert cli(*JSON, "--allow-unknown-fields", stdin=event(colour="red")).code == 0
    assert payload(db)["colour"] == "red"


def test_metadata_of_all_sources_is_merged_the_more_specific_on_top(cli, db, tmp_path):
    (tmp_path / "meta.json").write_text('{"team": "core", "a": 1, "error": "x"}')

    done = cli(
        *BUILD, "--extra-metadata", f"@{tmp_path}/meta.json", "--meta", "a=2", "--meta", "b=c=d", "--error", "boom"
    )

    metadata = payload(db)["extra_metadata"]
    assert done.code == 0
    assert {key: value for key, value in metadata.items() if not key.startswith("vi_agent_")} == {
        "team": "core", "a": "2", "b": "c=d", "error": "boom",
    }  # fmt: skip


@pytest.mark.parametrize(("given", "stdin"), [('{"team": "core"}', b""), ("-", b'{"team": "core"}')])
def test_metadata_from_the_option_and_from_stdin(cli, db, given, stdin):
    assert cli(*BUILD, "--extra-metadata", given, stdin=stdin).code == 0
    assert payload(db)["extra_metadata"]["team"] == "core"


def test_the_canonical_status_and_trimmed_names_are_queued(cli, db):
    cli(*BUILD, "--product", "  payments ", "--status", "SUCCESS", "--scm-branch", "")

    queued = payload(db)
    assert (queued["product_name"], queued["status"]) == ("payments", "completed")
    assert "scm_branch" not in queued


# --- where it goes


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (("--api-url", "https://other.example"), {}),
        ((), {"VERSIONER_API_URL": "https://other.example"}),
        ((), {"VERSIONER_API_KEY": "sk_rival_k1_x"}),
    ],
    ids=["flag", "environment", "key"],
)
def test_an_event_meant_for_another_destination_is_refused_naming_both(cli, db, monkeypatch, args, env):
    cli(*BUILD)
    connection = sqlite3.connect(db)
    connection.execute("UPDATE destination SET origin = 'https://api.example', account = 'acme'")
    connection.commit()
    connection.close()
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    done = cli(*BUILD, *args)

    assert done.code == 3
    assert "https://api.example (account acme)" in done.err
    assert "rival" in done.err or "https://other.example" in done.err
    assert "sk_rival_k1_x" not in done.err


@pytest.mark.parametrize("setting", ["nonsense", "http://api.example", "https://u:p@api.example"])
def test_a_url_that_cannot_be_used_exits_3(cli, db, setting):
    done = cli(*BUILD, "--api-url", setting)

    assert done.code == 3
    assert "api_url (--api-url)" in done.err
    assert not db.exists()


def test_enqueue_needs_no_network_configuration(cli, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")

    assert cli(*BUILD).code == 0


# --- trouble around it


def shell(host, line):
    command = " ".join(COMMAND)
    return subprocess.run(
        ["/bin/sh", "-c", line.format(command=f"{command} enqueue build --product p --version 1")],
        env=host.env, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "--json >/dev/full", "</dev/null >&- 2>&-"])
def test_an_event_that_is_committed_exits_0_whatever_becomes_of_stdout(host_for, redirection):
    host = host_for()

    done = shell(host, "{command} " + redirection)

    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert host.counts() == {"pending": 1}


def test_an_event_that_is_committed_exits_0_when_the_reader_has_left(host_for):
    host = host_for()

    done = shell(host, "{{ {command}; echo $? >&2; }} | true")

    assert done.stderr.strip().endswith(b"0"), done.stderr
    assert host.counts() == {"pending": 1}


def test_a_file_that_is_no_outbox_is_left_as_it_is(cli, db):
    db.write_text("my diary")

    done = cli(*BUILD)

    assert done.code == 1
    assert str(db) in done.err
    assert db.read_text() == "my diary"


@pytest.mark.parametrize("db", ["/dev/null/outbox.db", "/proc/outbox.db"])
def test_a_place_where_no_outbox_can_be_exits_1_with_a_message(cli, db):
    done = cli(*BUILD, "--db", db)

    assert done.code == 1
    assert db in done.err
    assert "Traceback" not in done.err
    assert "internal error" not in done.err


def test_a_directory_in_place_of_the_outbox_exits_1(cli, db):
    db.mkdir(parents=True)

    done = cli(*BUILD)

    assert done.code == 1
    assert str(db) in done.err
    assert "internal error" not in done.err


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_directory_without_permission_exits_1(cli, unprivileged, mode):
    directory = unprivileged / "state"
    directory.mkdir(mode=mode)

    done = cli(*BUILD, "--db", str(directory / "outbox.db"), "--config", "/dev/null")

    directory.chmod(0o700)
    assert done.code == 1
    assert "permission" in done.err.lower()


def test_a_blank_key_does_not_hide_the_one_that_holds(host_for, tmp_path):
    host = host_for()
    host.queue("payments")
    with closing(Store(host.path)) as store, store.write() as connection:
        connection.execute("UPDATE destination SET account = 'other'")
    host.config.write_text('api_key = "sk_acme_k1_secret"')
    host.config.chmod(0o600)

    done = host.run("enqueue", "build", "--product", "p", "--version", "1", VERSIONER_API_KEY=" ")

    assert done.returncode == 3
    assert host.counts() == {"pending": 1}
