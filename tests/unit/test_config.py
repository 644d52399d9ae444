"""Where settings come from, which are refused, and how the key is found."""

from __future__ import annotations

import os
import sys

import platformdirs
import pytest

from versioner_agent import config
from versioner_agent.config import MAX_KEY_BYTES, check, find_key, load, read_files, read_key, resolve
from versioner_agent.configfile import MAX_FILE_BYTES, File, file_of, read_file
from versioner_agent.errors import ConfigError

USER = "/home/me/config.toml"
SYSTEM = "/etc/versioner-agent/config.toml"
#: key -> five valid values, one per layer, and what they become.
SAMPLES = {
    "api_url": [f"https://{n}.example" for n in "abcd"],
    "api_key": [f"sk_{n}_k_x" for n in "abcd"],
    "api_key_file": [f"/keys/{n}" for n in "abcd"],
    "db": [f"/var/{n}.db" for n in "abcd"],
    "concurrency": [1, 2, 3, 5],
    "timeout": [1.5, 2.5, 3.5, 5.5],
    "max_backoff": [1.0, 2.0, 3.0, 5.0],
    "max_event_attempts": [1, 2, 3, 5],
    "give_up_after": [1.0, 2.0, 3.0, 5.0],
    "retention_days": [1.0, 2.0, 3.0, 5.0],
    "exported_retention_days": [1.0, 2.0, 3.0, 5.0],
    "busy_timeout": [1.0, 2.0, 3.0, 5.0],
    "gate_timeout": [0.0, 1.0, 2.0, 3.0],
    "best_effort": [True, True, True, True],
    "ca_bundle": [f"/ca/{n}.pem" for n in "abcd"],
    "proxy": [f"http://{n}:3128" for n in "abcd"],
    "no_proxy": list("abcd"),
    "allow_insecure_http": [True, True, True, True],
    "metrics_file": [f"/metrics/{n}.prom" for n in "abcd"],
    "log_format": ["json", "json", "json", "json"],
    "log_level": ["debug", "warning", "error", "debug"],
}
DEFAULTS = {
    "api_url": "https://api.versioner.io", "concurrency": 4, "timeout": 30, "max_backoff": 120,
    "max_event_attempts": 20, "give_up_after": 3600, "retention_days": 30, "busy_timeout": 10, "exported_retention_days": 0,
    "gate_timeout": 15, "best_effort": False,
    "allow_insecure_http": False, "log_format": "text", "log_level": "info",
}  # fmt: skip


def problems_of(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert caught.value.exit_code == 3
    return caught.value.problems


def write(path, text, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_samples_name_every_option():
    assert set(SAMPLES) == set(config.BY_KEY)


def test_defaults_are_the_documented_ones():
    settings = resolve({}, {}, [])

    assert {key: value for key, value in settings.values.items() if value is not None} == DEFAULTS
    assert set(settings.sources.values()) == {"default"}
    assert not settings.is_explicit("timeout")


def test_variables_keep_the_official_names():
    names = {option.key: option.env for option in config.OPTIONS}

    assert (names.pop("api_key"), names.pop("api_url")) == ("VERSIONER_API_KEY", "VERSIONER_API_URL")
    assert names == {key: f"VERSIONER_AGENT_{key.upper()}" for key in names}


@pytest.mark.parametrize("key", SAMPLES)
def test_flag_wins_over_environment_over_user_over_system(key):
    option = config.BY_KEY[key]
    of_flag, of_env, of_user, of_system = SAMPLES[key]
    flags, env = {key: of_flag}, {option.env: str(of_env)}
    user, system = File(USER, {key: of_user}), File(SYSTEM, {key: of_system})
    layers = [
        (resolve(flags, env, [user, system]), of_flag, option.flag),
        (resolve({key: None}, env, [user, system]), of_env, option.env),
        (resolve({}, {option.env: ""}, [user, system]), of_user, USER),
        (resolve({}, {}, [system]), of_system, SYSTEM),
    ]

    for settings, value, source in layers:
        assert getattr(settings, key) == value
        assert settings.sources[key] == source
        assert settings.is_explicit(key)


def test_layers_are_merged_key_by_key():
    files = [File(USER, {"timeout": 5}), File(SYSTEM, {"timeout": 6, "concurrency": 8})]
    settings = resolve({"max_backoff": "7"}, {"VERSIONER_AGENT_RETENTION_DAYS": "9"}, files)

    assert (settings.timeout, settings.concurrency, settings.max_backoff, settings.retention_days) == (5, 8, 7, 9)
    assert settings.sources["timeout"] == USER
    assert settings.sources["concurrency"] == SYSTEM


def test_all_bad_values_are_reported_at_once():
    files = [File(USER, {"timeout": "soon", "cocurrency": 2}), File(SYSTEM, {"log_level": 5, "allow_insecure_http": 2})]
    found = problems_of(
        resolve,
        {"concurrency": "many"},
        {"VERSIONER_AGENT_MAX_BACKOFF": "-1", "VERSIONER_AGENT_LOG_FORMAT": "x"},
        files,
    )

    assert len(found) == 7
    for part in (
        f"{USER}: unknown key 'cocurrency'; did you mean 'concurrency'?", f"{USER}: timeout: must", f"{SYSTEM}: log_level: must",
        "allow_insecure_http", "concurrency (--concurrency)", "max_backoff (VERSIONER_AGENT_MAX_BACKOFF)", "log_format",
    ):  # fmt: skip
        assert any(part in problem for problem in found)


def test_unknown_key_without_a_near_name():
    assert problems_of(resolve, {}, {}, [File(USER, {"zzzzzz": 1})]) == [f"{USER}: unknown key 'zzzzzz'"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("concurrency", 0), ("concurrency", 65), ("concurrency", 1.5), ("concurrency", True), ("concurrency", "4.0"),
        ("concurrency", "9" * 5000), ("concurrency", float("nan")), ("concurrency", float("inf")), ("timeout", "nan"),
        ("timeout", "inf"), ("timeout", 0), ("timeout", [1]), ("timeout", {}), ("timeout", "9" * 5000),
        ("retention_days", -1), ("db", ""), ("db", " "), ("db", 5), ("db", "a\0b"), ("proxy", ""), ("no_proxy", 1),
        ("allow_insecure_http", "maybe"), ("allow_insecure_http", 1), ("log_level", "loud"), ("log_level", ["info"]),
        ("api_key", 7), ("api_url", False),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_bad_value_is_refused(key, value):
    (problem,) = problems_of(resolve, {}, {}, [File(USER, {key: value})])

    assert problem.startswith(f"{USER}: {key}: must ")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("concurrency", " 8 ", 8), ("timeout", "0.5", 0.5), ("allow_insecure_http", "YES", True),
        ("allow_insecure_http", "off", False), ("log_level", " DEBUG ", "debug"), ("no_proxy", " a,b ", "a,b"),
    ],
)  # fmt: skip
def test_text_of_a_variable_is_read(key, text, value):
    assert getattr(resolve({}, {config.BY_KEY[key].env: text}, []), key) == value


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = resolve({"db": "x/outbox.db", "ca_bundle": "~/ca.pem"}, {}, [])

    assert settings.db == str(tmp_path / "x/outbox.db")
    assert settings.ca_bundle == os.path.join(os.environ["HOME"], "ca.pem")


@pytest.mark.parametrize("url", ["http://api.internal", "api.versioner.io", "https://u:pw@x", "https://x/?q=1"])
def test_unusable_url_is_refused_with_its_source(url):
    (problem,) = problems_of(resolve, {}, {"VERSIONER_API_URL": url}, [])

    assert problem.startswith("api_url (VERSIONER_API_URL): ")
    assert "pw" not in problem


def test_plain_http_can_be_allowed_from_another_layer():
    files = [File(SYSTEM, {"allow_insecure_http": True})]

    assert resolve({}, {"VERSIONER_API_URL": "http://api.internal"}, files).api_url == "http://api.internal"


def test_repr_masks_secrets():
    settings = resolve({}, {"VERSIONER_API_KEY": "sk_acme_k1_s3cret"}, [])

    assert "s3cret" not in repr(settings)
    assert "***" in repr(settings)


def test_repr_masks_the_password_of_a_proxy():
    assert "s3cret" not in repr(resolve({"proxy": "http://me:s3cret@proxy:3128"}, {}, []))


def test_unknown_setting_is_no_attribute():
    with pytest.raises(AttributeError):
        _ = resolve({}, {}, []).nothing


def test_bad_key_is_never_repeated():
    settings = resolve({}, {"VERSIONER_API_KEY": "sk_acme_k1 s3cret"}, [])
    (problem,) = problems_of(read_key, settings, {"VERSIONER_API_KEY": "sk_acme_k1 s3cret"})

    assert "VERSIONER_API_KEY" in problem
    assert "s3cret" not in problem


@pytest.fixture
def no_system_file(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "SYSTEM_FILE", str(tmp_path / "etc" / "config.toml"))
    return tmp_path / "etc" / "config.toml"


def test_missing_files_are_absent(no_system_file, tmp_path):
    settings = load({}, os.environ)

    assert set(settings.sources.values()) == {"default"}
    assert settings.db == str(tmp_path / "xdg-state" / "versioner-agent" / "outbox.db")


def test_user_and_system_file_are_found(no_system_file, tmp_path):
    user = write(tmp_path / "xdg-config" / "versioner-agent" / "config.toml", "timeout = 5\n")
    system = write(no_system_file, 'timeout = 6\ndb = "/var/outbox.db"\n')
    settings = load({}, os.environ)

    assert (settings.timeout, settings.sources["timeout"]) == (5, user)
    assert (settings.db, settings.sources["db"]) == ("/var/outbox.db", system)


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_named_file_replaces_both(by, no_system_file, tmp_path):
    write(tmp_path / "xdg-config" / "versioner-agent" / "config.toml", "timeout = 5\n")
    write(no_system_file, "concurrency = 7\n")
    named = write(tmp_path / "mine.toml", "max_backoff = 9\n")
    settings = load({}, {}, named) if by == "flag" else load({}, {"VERSIONER_AGENT_CONFIG": named})

    assert (settings.timeout, settings.concurrency, settings.max_backoff) == (30, 4, 9)


def test_named_file_that_is_missing_is_absent(tmp_path):
    assert load({}, {}, str(tmp_path / "none.toml")).timeout == 30


def test_empty_file_says_nothing(tmp_path):
    assert load({}, {}, write(tmp_path / "c.toml", " \n")).timeout == 30


def test_directory_in_place_of_a_file_is_an_error(tmp_path):
    assert "can't read" in problems_of(load, {}, {}, str(tmp_path))[0]


def test_file_below_a_file_is_an_error(tmp_path):
    below = write(tmp_path / "c.toml", "") + "/config.toml"

    assert "can't read" in problems_of(load, {}, {}, below)[0]


def test_unreadable_file_is_an_error(unprivileged):
    assert "can't read" in problems_of(load, {}, {}, write(unprivileged / "c.toml", "timeout = 5", 0o000))[0]


def test_file_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.open", refuse)

    assert problems_of(load, {}, {}, "/etc/x.toml") == ["can't read /etc/x.toml: Permission denied"]


def test_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "c.toml").symlink_to("c.toml")

    assert "can't read" in problems_of(load, {}, {}, str(tmp_path / "c.toml"))[0]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"timeout", ":1: not valid TOML: Expected '=' after a key in a key/value pair (column 8)"),
        (b"# one\ntimeout = ", ":2: not valid TOML: Invalid value (column 11)"),
        (b"timeout = 5\r\n\r\ntimeout = 6", ":3: not valid TOML: 'timeout' is set twice, first in line 1"),
        (b"timeout = 5\n[timeout]", ":2: not valid TOML: 'timeout' is set twice, first in line 1"),
        (b"db = [\n1,\n]\ndb = [\n2,\n]\n", ":4: not valid TOML: 'db' is set twice, first in line 1"),
        (b"[a]\n[a.b]\nx = 1\nx = 2\n", ":4: not valid TOML: Cannot overwrite a value (column 6)"),
        (b"a = 1\n\xff", ":2: not valid TOML: byte 0xff is not UTF-8"),
        (b"\xef\xbb\xbfa = 1\n\n\xfe", ":3: not valid TOML: byte 0xfe is not UTF-8"),
        (b"x = " + b"[" * 100_000, ": not valid TOML: nested too deeply"),
        (b"x = " + b"9" * 5_000, ": not valid TOML: a number has thousands of digits"),
        (b"x = 1\n" + b"a." * 100_000 + b"a = 1", ":2: not valid TOML: a key of over 200 parts"),
        (b'x = 1\n["a"' + b' . "a"' * 100_000 + b"]", ":2: not valid TOML: a key of over 200 parts"),
        (b'x = """\ny = 1\n', ": not valid TOML: Unterminated string (at end of document)"),
        (b"\0" * 100, ":1: not valid TOML: Invalid statement (column 1)"),
    ],
    ids=lambda value: repr(value[:15]),
)
def test_broken_file_is_an_error_in_its_line(data, problem, tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(data)

    assert problems_of(load, {}, {}, str(path)) == [f"{path}{problem}"]


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o644, 0o610])
def test_key_in_a_file_that_others_reach_is_refused(mode, tmp_path):
    path = write(tmp_path / "c.toml", '# mine\napi_key = "sk_acme_k1_s3cret"', mode)

    with pytest.raises(ConfigError) as caught:
        load({}, {}, path)

    assert caught.value.problems == [f"{path}:2: holds api_key but others can read the file"]
    assert caught.value.hint.startswith(f"chmod 600 {path}, or ")


def test_key_in_a_private_file_is_read(tmp_path):
    path = write(tmp_path / "c.toml", 'api_key = "sk_acme_k1_x"')

    assert read_key(load({}, {}, path), {}) == "sk_acme_k1_x"


def test_file_without_a_key_may_be_read_by_all(tmp_path):
    assert load({}, {}, write(tmp_path / "c.toml", "timeout = 5", 0o644)).timeout == 5


def test_key_is_looked_for_in_this_order(tmp_path):
    """Variable, credential of the service, key file, configuration file; an empty one is absent."""
    of_file = tmp_path / "key"
    path = write(tmp_path / "c.toml", f'api_key = "sk_config"\napi_key_file = "{of_file}"')
    of_file.write_text("sk_file\n")
    credential = tmp_path / "credentials" / "api_key"
    write(credential, " sk_credential\n")
    env = {"VERSIONER_API_KEY": "sk_env", "CREDENTIALS_DIRECTORY": str(credential.parent)}
    settings = load({}, {}, path)

    assert read_key(settings, env) == "sk_env"
    assert read_key(settings, {**env, "VERSIONER_API_KEY": " "}) == "sk_credential"
    credential.write_text("\n")
    assert read_key(settings, {**env, "VERSIONER_API_KEY": ""}) == "sk_file"
    credential.unlink()
    assert read_key(settings, {**env, "VERSIONER_API_KEY": ""}) == "sk_file"
    of_file.write_text("")
    assert read_key(settings, {}) == "sk_config"


def test_key_file_is_read_anew_each_time(tmp_path):
    path = tmp_path / "key"
    settings = resolve({"api_key_file": str(path)}, {}, [])
    for key in ("sk_a", "sk_b"):
        path.write_text(key)

        assert read_key(settings, {}) == key


def test_no_key_is_none():
    assert read_key(resolve({}, {}, []), {}) is None


def test_missing_key_file_is_an_error(tmp_path):
    settings = resolve({"api_key_file": str(tmp_path / "none")}, {}, [])

    assert "does not exist" in problems_of(read_key, settings, {})[0]


def test_key_file_that_is_a_directory_is_an_error(tmp_path):
    settings = resolve({"api_key_file": str(tmp_path)}, {}, [])

    assert "can't read the API key" in problems_of(read_key, settings, {})[0]


@pytest.mark.parametrize("key", ["sk a", "sk\na", "sk_é", "sk\x00", "sk\x7f"], ids=ascii)
def test_key_that_no_header_can_carry_is_refused(key):
    (problem,) = problems_of(read_key, resolve({}, {}, []), {"VERSIONER_API_KEY": key})

    assert problem == "the API key in VERSIONER_API_KEY holds characters that no key has"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere platformdirs is asked")
@pytest.mark.parametrize("home", [None, "", "  ", "/elsewhere"], ids=["unset", "empty", "blank", "set"])
@pytest.mark.parametrize("purpose", ["config", "state"])
def test_directories_are_those_of_platformdirs(monkeypatch, purpose, home):
    """The enqueue path spares itself the import; the answer must be the same."""
    variable = f"XDG_{purpose.upper()}_HOME"
    monkeypatch.delenv(variable, raising=False)
    if home is not None:
        monkeypatch.setenv(variable, home)
    expected = {"config": platformdirs.user_config_dir, "state": platformdirs.user_state_dir}[purpose]

    assert config.user_directory(purpose, os.environ) == expected("versioner-agent", appauthor=False)


@pytest.mark.parametrize("home", ["~", "relative"])
def test_without_a_home_there_must_be_an_outbox_named(monkeypatch, home):
    """Or each directory would get one of its own, from which nobody delivers."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))

    (problem,) = problems_of(load, {}, {})
    assert "no home directory" in problem
    assert problems_of(load, {}, {"HOME": ""}) == [problem]
    assert load({"db": "/named/outbox.db"}, {}).db == "/named/outbox.db"
    assert [file.name for file in read_files({})] == [SYSTEM]


def test_a_key_file_that_is_too_long_is_refused_and_not_cut(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"k" * (MAX_KEY_BYTES + 1))
    (problem,) = problems_of(read_key, resolve({"api_key_file": str(path)}, {}, []), {})

    assert problem == f"{path}: over {MAX_KEY_BYTES} bytes, which is no API key"


def test_a_key_file_that_cannot_be_read_costs_no_descriptor(tmp_path):
    """It is read before each try, for days."""
    settings = resolve({"api_key_file": str(tmp_path)}, {}, [])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        problems_of(read_key, settings, {})

    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["config", "key"])
def test_a_pipe_is_refused_at_once(tmp_path, kind):
    """Its writer may never come."""
    os.mkfifo(tmp_path / "pipe")
    if kind == "config":
        assert problems_of(load, {}, {}, str(tmp_path / "pipe")) == [
            f"can't read {tmp_path}/pipe: it is a pipe, not a file"
        ]
    else:
        settings = resolve({"api_key_file": str(tmp_path / "pipe")}, {}, [])
        assert "it is a pipe" in problems_of(read_key, settings, {})[0]


def test_a_file_without_end_is_no_configuration():
    assert "which is no configuration file" in problems_of(load, {}, {}, "/dev/zero")[0]


def test_a_terminal_is_no_configuration():
    """Nobody may be typing."""
    leader, follower = os.openpty()
    try:
        assert read_file(os.ttyname(follower)).problem.words.endswith("it is a terminal, not a file")
    finally:
        os.close(leader)
        os.close(follower)


# --- the problems of all layers, each in its line


def test_problems_of_both_files_the_environment_and_flags_come_together(no_system_file, tmp_path):
    """A file that can't be used does not hide what is wrong elsewhere."""
    user = write(tmp_path / "xdg-config" / "versioner-agent" / "config.toml", "timeout = 5\n\nlog_level = loud\n")
    system = write(no_system_file, "\ntimeout = 0\nconcurency = 1\n")
    env = {**os.environ, "VERSIONER_AGENT_CONCURRENCY": "many"}

    assert problems_of(load, {"max_backoff": "x"}, env) == [
        f"{user}:3: not valid TOML: Invalid value (column 13)",
        f"{system}:2: timeout: must be a number from 0.1 to 600",
        f"{system}:3: unknown key 'concurency'; did you mean 'concurrency'?",
        "concurrency (VERSIONER_AGENT_CONCURRENCY): must be a whole number from 1 to 64",
        "max_backoff (--max-backoff): must be a number from 0.1 to 3600",
    ]


def test_a_user_file_that_cannot_be_read_does_not_hide_the_system_file(no_system_file, tmp_path):
    (tmp_path / "xdg-config" / "versioner-agent" / "config.toml").mkdir(parents=True)
    write(no_system_file, "zzzzzz = 1")

    found = problems_of(load, {}, os.environ)

    assert f"{no_system_file}:1: unknown key 'zzzzzz'" in found
    assert any("can't read" in problem for problem in found)


def test_a_key_that_others_can_read_does_not_hide_other_problems(tmp_path):
    path = write(tmp_path / "c.toml", 'timeout = 0\napi_key = "sk_a_k_x"\nzzzzzz = 1\n', 0o644)

    assert [problem.split(": ")[0] for problem in problems_of(load, {}, {}, path)] == [
        f"{path}:{line}" for line in (1, 2, 3)
    ]


def test_url_is_checked_beside_other_problems():
    files = [file_of(USER, b'timeout = 0\napi_url = "http://api.internal"\n')]

    assert [problem.partition(": ")[0] for problem in problems_of(resolve, {}, {}, files)] == [f"{USER}:1", f"{USER}:2"]


@pytest.mark.parametrize(
    "text", ['allow_insecure_http = "maybe"', "allow_insecure_http = 0", "allow_insecure_http = tru"]
)
def test_plain_http_is_not_blamed_where_what_allows_it_cannot_be_read(text):
    (problem,) = problems_of(resolve, {}, {"VERSIONER_API_URL": "http://api.internal"}, [file_of(USER, text.encode())])

    assert "plain http" not in problem


def test_without_a_home_a_broken_file_is_told_alone(monkeypatch, tmp_path):
    """It may name the outbox."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)

    assert len(problems_of(load, {}, {}, write(tmp_path / "c.toml", "db = "))) == 1
    assert len(problems_of(load, {}, {}, write(tmp_path / "c.toml", "timeout = 0"))) == 2


def test_relative_path_without_a_directory_is_a_problem(monkeypatch):
    def fail():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", fail)

    assert problems_of(resolve, {"db": "outbox.db"}, {}, []) == [
        "db (--db): must be absolute: the current directory is gone"
    ]


def test_a_long_unknown_key_is_shortened():
    (problem,) = problems_of(resolve, {}, {}, [file_of(USER, b"k" * 100_000 + b" = 1")])

    assert len(problem) < 200


def test_a_long_key_in_a_problem_of_the_parser_is_shortened():
    key = b"k" * 100_000
    (problem,) = problems_of(resolve, {}, {}, [file_of(USER, b"[%s]\n[%s]" % (key, key))])

    assert len(problem) < 300


def test_thousands_of_unknown_keys_are_told_in_one_pass(monkeypatch):
    """Each with its line, without reading the file again, and without looking for a near name for each."""
    from versioner_agent import events, toml_lines

    asked, scans = [], []
    scan = toml_lines._statements
    monkeypatch.setattr(events, "nearest", lambda *args: asked.append(args))
    monkeypatch.setattr(toml_lines, "_statements", lambda text: scans.append(1) or scan(text))
    text = "".join(f"unknown-{number} = 1\n" for number in range(3_000))

    found = problems_of(resolve, {}, {}, [file_of(USER, text.encode())])

    assert found[-1] == f"{USER}:3000: unknown key 'unknown-2999'"
    assert (len(found), len(scans)) == (3_000, 1)
    assert len(asked) < 100


def test_check_takes_a_file_alone(monkeypatch, no_system_file):
    monkeypatch.setenv("VERSIONER_AGENT_TIMEOUT", "x")
    write(no_system_file, "timeout = ")
    found = check(file_of("new.toml", b"timeout = 5\nlog_level = 'loud'"))

    assert check(file_of("new.toml", b"timeout = 5\n")) == []
    assert [(problem.file, problem.line) for problem in found] == [("new.toml", 2)]


def test_the_files_looked_for_are_told(no_system_file, tmp_path):
    user = write(tmp_path / "xdg-config" / "versioner-agent" / "config.toml", "timeout = ")

    assert [(file.name, file.state) for file in read_files(os.environ)] == [
        (user, "unusable"),
        (str(no_system_file), "not there"),
    ]
    assert [(file.name, file.state) for file in read_files({}, write(tmp_path / "c.toml", ""))] == [
        (str(tmp_path / "c.toml"), "read")
    ]


def test_the_source_of_the_key_is_told(tmp_path):
    of_file = tmp_path / "key"
    of_file.write_text("sk_file")
    path = write(tmp_path / "c.toml", f'api_key = "sk_config"\napi_key_file = "{of_file}"')
    write(tmp_path / "credentials" / "api_key", "sk_credential")
    env = {"VERSIONER_API_KEY": "sk_env", "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    settings = load({}, {}, path)

    assert find_key(settings, env) == ("sk_env", "VERSIONER_API_KEY", "")
    assert find_key(settings, env | {"VERSIONER_API_KEY": ""}).source == str(tmp_path / "credentials" / "api_key")
    assert find_key(settings, {}) == ("sk_file", str(of_file), "")
    of_file.write_text("")
    assert find_key(settings, {}) == ("sk_config", path, "")
    of_file.unlink()
    assert find_key(settings, {}) == (None, str(of_file), f"api_key_file: {of_file} does not exist")
    assert find_key(resolve({}, {}, []), {}) == (None, "default", "")


def test_a_file_at_the_limit_is_read_and_one_over_it_is_not():
    at_limit = b"timeout = 5".ljust(MAX_FILE_BYTES)

    assert check(file_of(USER, at_limit)) == []
    assert [str(problem) for problem in check(file_of(USER, at_limit + b" "))] == [
        f"{USER}: over {MAX_FILE_BYTES} bytes, which is no configuration file"
    ]


def test_a_byte_order_mark_is_no_problem():
    (problem,) = check(file_of(USER, b"\xef\xbb\xbftimeout = 5\r\nzzzzzz = 1\r\n"))

    assert str(problem) == f"{USER}:2: unknown key 'zzzzzz'"


@pytest.mark.parametrize("key", ["db", "api_key_file", "ca_bundle"])
def test_a_relative_path_in_a_file_is_an_error(tmp_path, key):
    """It would be another file for each directory that a command is called from."""
    path = write(tmp_path / "c.toml", f'\n{key} = "outbox.db"')

    assert problems_of(load, {}, {}, path) == [
        f"{path}:2: {key}: must be an absolute path, as commands are called from many places"
    ]
    assert load({key: "outbox.db"}, {}, str(tmp_path / "none.toml")).values[key] == os.path.abspath("outbox.db")


def test_a_path_that_this_locale_has_no_name_for_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("ascii"))

    (problem,) = problems_of(load, {"db": "/日本/o.db"}, {}, "/dev/null")

    assert problem == "db (--db): can't be the name of a file in this locale (LANG)"


@pytest.mark.parametrize("home", ["/dev/null", "/proc/1/cwd"])
def test_a_home_of_nobody_or_of_another_user_has_no_settings_of_ours(unprivileged, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_CONFIG_HOME")

    assert config.read_files({})[0].state == "another user's"


def test_a_key_that_was_not_filled_in_is_none(tmp_path):
    assert load({}, {"VERSIONER_API_KEY": " "}, str(tmp_path / "none.toml")).api_key is None


def test_a_broken_file_in_a_home_of_another_user_is_an_error_all_the_same(tmp_path, monkeypatch):
    """It could be opened: whoever set HOME so means it, and it may name the outbox."""
    monkeypatch.setattr(config, "_is_home_of_ours", lambda: False)
    (tmp_path / "versioner-agent").mkdir()
    write(tmp_path / "versioner-agent" / "config.toml", "log_level = info")

    assert "not valid TOML" in problems_of(load, {}, {"XDG_CONFIG_HOME": str(tmp_path)})[0]
