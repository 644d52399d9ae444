"""`config`: every setting with its value and source, no secret among them; and the check of one file."""

from __future__ import annotations

import json
import os

import pytest

from versioner_agent import config

KEYS = ["key", "value", "source", "line"]


@pytest.fixture
def path(tmp_path):
    """The configuration file that the environment names."""
    return tmp_path / "config.toml"


def rows_of(done):
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert all(list(row) == KEYS for row in rows)
    assert [row["key"] for row in rows] == list(config.BY_KEY)
    return {row["key"]: tuple(row.values())[1:] for row in rows}


def cells_of(done):
    """The rows of the table, split at its gaps."""
    assert done.code == 0, done.err
    header, *lines = done.out.splitlines()
    assert header.split() == ["key", "value", "source"]
    return {key: rest for key, *rest in (line.split(maxsplit=2) for line in lines)}


def test_json_shows_every_setting_with_its_source(cli, path, db, monkeypatch):
    path.write_text("# ours\ntimeout = 5\n\nallow_insecure_http = true\n")
    monkeypatch.setenv("VERSIONER_AGENT_RETENTION_DAYS", "7")

    rows = rows_of(cli("config", "--json", "--concurrency", "8"))

    assert rows["timeout"] == (5, str(path), 2)
    assert rows["allow_insecure_http"] == (True, str(path), 4)
    assert rows["retention_days"] == (7, "VERSIONER_AGENT_RETENTION_DAYS", None)
    assert rows["concurrency"] == (8, "--concurrency", None)
    assert rows["db"] == (str(db), "VERSIONER_AGENT_DB", None)
    assert rows["ca_bundle"] == (None, "default", None)
    assert rows["api_key"] == (None, "default", None)


def test_text_shows_the_same_for_people(cli, path):
    path.write_text("# ours\ntimeout = 5.5\n\nretention_days = 7\nallow_insecure_http = true\n")

    cells = cells_of(cli("config", "--concurrency", "8"))

    assert cells["timeout"] == ["5.5", f"{path}:2"]
    assert cells["retention_days"] == ["7", f"{path}:4"]
    assert cells["allow_insecure_http"] == ["true", f"{path}:5"]
    assert cells["concurrency"] == ["8", "--concurrency"]
    assert cells["give_up_after"] == ["3600", "default"]
    assert cells["api_key"] == cells["proxy"] == ["-", "default"]
    assert list(cells) == list(config.BY_KEY)


def test_the_outbox_that_nobody_named_is_shown_where_it_lies(cli, monkeypatch, tmp_path):
    monkeypatch.delenv("VERSIONER_AGENT_DB")

    rows = rows_of(cli("config", "--json"))

    assert rows["db"] == (str(tmp_path / "xdg-state" / "versioner-agent" / "outbox.db"), "default", None)
    assert not (tmp_path / "xdg-state").exists()


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("place", ["environment", "credential", "key file", "configuration"])
def test_the_key_is_never_shown_but_its_public_part_and_true_source(cli, path, tmp_path, monkeypatch, place, as_json):
    """In the order in which it is looked for: each place is there together with all the weaker ones."""
    key_file, credential = tmp_path / "key", tmp_path / "credentials" / "api_key"
    text = '\napi_key = "sk_acme_k4_s3cret"\n'
    path.chmod(0o600)
    expected = ("sk_acme_k4_…", str(path), 2)
    if place != "configuration":
        key_file.write_text("sk_acme_k3_s3cret\n")
        text += f"api_key_file = '{key_file}'\n"
        expected = ("sk_acme_k3_…", str(key_file), None)
    if place in ("credential", "environment"):
        credential.parent.mkdir()
        credential.write_text("sk_acme_k2_s3cret")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credential.parent))
        expected = ("sk_acme_k2_…", str(credential), None)
    if place == "environment":
        monkeypatch.setenv("VERSIONER_API_KEY", "sk_acme_k1_s3cret")
        expected = ("sk_acme_k1_…", "VERSIONER_API_KEY", None)
    path.write_text(text)

    done = cli("config", "-v", *(["--json"] if as_json else []))

    assert "s3cret" not in done.out + done.err
    if as_json:
        assert rows_of(done)["api_key"] == expected
    else:
        source = f"{expected[1]}:{expected[2]}" if expected[2] else expected[1]
        assert cells_of(done)["api_key"] == [expected[0], source]


def test_a_key_that_cannot_be_read_is_a_note(cli, path, tmp_path):
    """It is not the other settings' fault."""
    path.write_text(f"api_key_file = '{tmp_path}/none'\ntimeout = 5\n")

    done = cli("config", "--json")

    assert f"note: no API key: api_key_file: {tmp_path}/none does not exist\n" in done.err
    assert rows_of(done)["api_key"] == (None, f"{tmp_path}/none", None)
    assert rows_of(done)["timeout"] == (5, str(path), 2)


def test_a_key_where_a_files_name_belongs_is_masked(cli, path):
    path.write_text('api_key_file = "/sk_acme_k1_s3cret"\n')

    for done in (cli("config", "-v"), cli("config", "--json", "-v")):
        assert done.code == 0
        assert "sk_acme_***" in done.out
        assert "s3cret" not in done.out + done.err


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_the_password_of_a_proxy_is_masked(cli, path, as_json):
    path.write_text("proxy = 'http://me:s3cret@proxy:3128'\n")

    done = cli("config", "-v", *(["--json"] if as_json else []))

    assert "http://***@proxy:3128" in done.out
    assert "s3cret" not in done.out + done.err


def test_a_proxy_of_the_environment_is_a_note_without_its_password(cli, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:s3cret@proxy:3128")

    done = cli("config")

    assert "note: the environment's proxy is used: http://***@proxy:3128\n" in done.err
    assert "note" not in cli("config", "--proxy", "http://other:1").err


@pytest.mark.parametrize("proxy", ["http://[proxy", "garbage://x:99999", "http://me:s3cret@"])
def test_a_proxy_of_the_environment_that_run_would_refuse_is_told_as_such(cli, monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", proxy)

    for done in (cli("config"), cli("run")):
        assert done.code == 3
        assert "the proxy that the environment names (HTTPS_PROXY" in done.err
        assert "s3cret" not in done.err


def test_what_a_file_says_cannot_steer_the_terminal(cli, path):
    path.write_text('no_proxy = "a\\u001b[2J\\nb"\n')

    done = cli("config")

    assert "\x1b" not in done.out
    assert cells_of(done)["no_proxy"] == ["a\\x1b[2J\\nb", f"{path}:1"]


def test_the_files_looked_for_are_told_beside_the_table(cli, path, monkeypatch, tmp_path):
    """A name with a slip in it is not an error, so it must be seen."""
    system = tmp_path / "etc.toml"
    monkeypatch.setattr(config, "SYSTEM_FILE", str(system))
    by_variable = cli("config")
    by_flag = cli("config", "--config", f"{path}.typo")
    monkeypatch.delenv("VERSIONER_AGENT_CONFIG")
    system.write_text("")
    standard = cli("config")

    assert f"file {path} (named by VERSIONER_AGENT_CONFIG; no other is looked for): read\n" in by_variable.err
    assert f"file {path}.typo (named by --config; no other is looked for): not there\n" in by_flag.err
    assert standard.err.splitlines() == [
        f"file {tmp_path}/xdg-config/versioner-agent/config.toml: not there",
        f"file {system}: read",
    ]


def test_json_tells_the_files_with_verbose_only(cli, path):
    assert cli("config", "--json").err == ""
    assert f"file {path} " in cli("config", "--json", "-v").err


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_broken_configuration_is_told_as_a_whole(cli, path, monkeypatch, as_json):
    path.write_text('concurency = 3\nlog_level = "loud"\n')
    monkeypatch.setenv("VERSIONER_AGENT_TIMEOUT", "x")

    done = cli("config", "--max-backoff", "y", *(["--json"] if as_json else []))

    assert (done.code, done.out) == (3, "")
    told = done.err[done.err.index("error: ") :].splitlines()
    assert told[1:] == [
        f"  {path}:1: unknown key 'concurency'; did you mean 'concurrency'?",
        f"  {path}:2: log_level: must be one of debug, info, warning, error",
        "  timeout (VERSIONER_AGENT_TIMEOUT): must be a number from 0.1 to 600",
        "  max_backoff (--max-backoff): must be a number from 0.1 to 3600",
    ]


def test_flags_are_those_of_run():
    from versioner_agent.cli.config import config as shown
    from versioner_agent.cli.run import run

    def flags(command):
        return {word for option in command.params for word in option.opts}

    assert flags(shown) == flags(run) | {"--check", "--json"}


# --- one file alone


def test_a_good_file_is_ok(cli, tmp_path):
    new = tmp_path / "new.toml"
    new.write_text("timeout = 5\n")

    assert cli("config", "--check", str(new)) == (0, f"{new}: ok\n", "")
    assert json.loads(cli("config", "--check", str(new), "--json").out) == {
        "file": str(new),
        "ok": True,
        "problems": [],
    }


def test_a_bad_file_is_told_with_lines(cli, tmp_path):
    new = tmp_path / "new.toml"
    new.write_text("\nconcurency = 3\ntimeout = 0\n")
    words = ["unknown key 'concurency'; did you mean 'concurrency'?", "timeout: must be a number from 0.1 to 600"]

    text, as_json = cli("config", "--check", str(new)), cli("config", "--check", str(new), "--json")

    assert (text.code, text.out) == (3, "")
    assert text.err == f"error: configuration:\n  {new}:2: {words[0]}\n  {new}:3: {words[1]}\n"
    assert (as_json.code, as_json.err) == (3, "")
    assert json.loads(as_json.out) == {
        "file": str(new),
        "ok": False,
        "problems": [
            {"line": 2, "problem": words[0], "hint": None},
            {"line": 3, "problem": words[1], "hint": None},
        ],
    }


def test_nothing_but_the_file_is_looked_at(cli, path, tmp_path, monkeypatch):
    path.write_text("timeout = ")
    monkeypatch.setenv("VERSIONER_AGENT_CONCURRENCY", "x")
    monkeypatch.setenv("VERSIONER_AGENT_DB", "")
    monkeypatch.setenv("HOME", "")
    new = tmp_path / "new.toml"
    new.write_text("api_key_file = '/none/key'\ndb = '/none/outbox.db'\n")

    assert cli("config", "--check", str(new)).code == 0


@pytest.mark.parametrize("more", [("--config", "x"), ("--concurrency", "3"), ("--db", "x")])
def test_other_layers_beside_check_are_wrong_usage(cli, path, more):
    assert cli("config", "--check", str(path), *more).code == 2


def test_a_secret_in_a_wrong_place_is_not_repeated(cli, tmp_path):
    new = tmp_path / "new.toml"
    new.write_text("sk_acme_k1_s3cret = 1\n")

    for more in ((), ("--json",)):
        done = cli("config", "--check", str(new), *more)
        assert done.code == 3
        assert "s3cret" not in done.out + done.err


def made(tmp_path, kind):
    place = tmp_path / kind
    if kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "loop":
        place.symlink_to(place)
    elif kind == "private":
        place.write_text("api_key = 'sk_acme_k1_s3cret'")
        place.chmod(0o644)
    elif kind != "missing":
        place.write_bytes(CONTENTS[kind])
    return str(place)


CONTENTS = {
    "binary": bytes(range(256)) * 10,
    "huge": b"#" * (3 * 1024 * 1024),
    "deep": b"x = " + b"[" * 100_000,
    "deep table": b"x = " + b"{a = " * 100_000,
    "long key": b"[" + b"a." * 400_000 + b"a]",
    "number": b"x = " + b"1" * 10_000,
    "utf-16": "timeout = 5\n".encode("utf-16"),
    "escape": b"\x1b[2J = 5\n",
}


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "loop", "private", *CONTENTS])
def test_what_is_no_configuration_is_one_line_and_exit_3(cli, tmp_path, kind):
    place = made(tmp_path, kind)

    text, as_json = cli("config", "--check", place), cli("config", "--check", place, "--json")

    assert (text.code, text.out) == (3, "")
    first, *more = text.err.splitlines()
    assert first.startswith("error: configuration: ")
    assert place in first
    assert all(line.startswith("hint: chmod 600") for line in more)
    assert not any(secret in text.err for secret in ("Traceback", "internal", "s3cret", "\x1b"))
    assert (as_json.code, as_json.err) == (3, "")
    assert json.loads(as_json.out)["ok"] is False
    assert len(json.loads(as_json.out)["problems"]) == 1


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbftimeout = 5\n", b"timeout = 5\r\nlog_level = 'info'\r\n", b"", b"\n# x"]
)
def test_marks_and_line_ends_of_other_systems_are_fine(cli, tmp_path, data):
    new = tmp_path / "new.toml"
    new.write_bytes(data)

    assert cli("config", "--check", str(new)).code == 0


def test_stdin_can_be_checked(cli):
    good, bad = (
        cli("config", "--check", "-", stdin=b"timeout = 5"),
        cli("config", "--check", "-", stdin=b"\ntimeut = 5"),
    )

    assert (good.code, good.out) == (0, "<stdin>: ok\n")
    assert bad.err == "error: configuration: <stdin>:2: unknown key 'timeut'; did you mean 'timeout'?\n"


def test_stdin_without_end_is_no_configuration(host_for):
    with open("/dev/zero", "rb") as endless:
        import subprocess

        from host import COMMAND

        done = subprocess.run(
            (*COMMAND, "config", "--check", "-"),
            stdin=endless,
            capture_output=True,
            env=host_for().env,
            timeout=60,
            check=False,
        )

    assert done.returncode == 3
    assert b"which is no configuration file" in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("proxy = 'ftp://me:s3cret@h'", "proxy: must be an http:// or https:// URL with a host"),
        ("proxy = 'http://me:s3cret@'", "proxy: must be an http:// or https:// URL with a host"),
        ("ca_bundle = '/no/such.pem'", "ca_bundle: can't read certificates from /no/such.pem"),
        ("api_url = 'https://xn--a'", "api_url: "),
        ("api_url = 'https://999.999.1.1'", "api_url: "),
    ],
)
def test_what_run_would_refuse_is_told_by_config_and_its_check(cli, path, line, words):
    path.write_text(f"\n{line}\n")

    for done in (cli("config"), cli("config", "--check", str(path)), cli("run")):
        assert done.code == 3
        assert words in done.err
        assert "s3cret" not in done.err
    assert f"{path}:2: " in cli("config").err


def test_a_key_that_can_not_be_one_fails_the_check(cli, path):
    path.write_text("api_key = 'two words'\n")
    path.chmod(0o600)

    done = cli("config", "--check", str(path))

    assert done.code == 3
    assert done.err == f"error: configuration: {path}:1: api_key: holds characters that no key has\n"
