"""Settings: one table of options, resolved by one pure function; `load` does the little I/O.

Flags > environment > user file > system file > defaults, key by key; each value's source is kept, and the problems of
all layers are told together. The API key is not a setting that travels: it is read when it is needed.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from versioner_agent.configfile import File, Problem, contents, read_file
from versioner_agent.errors import MAX_PROBLEMS_SHOWN, ConfigError

DEFAULT_API_URL = "https://api.versioner.io"
SYSTEM_FILE = "/etc/versioner-agent/config.toml"
APP_NAME = "versioner-agent"
MAX_KEY_BYTES = 4096
MAX_SHOWN = 80  # characters of an unknown key


class Option(NamedTuple):
    """One setting; `parse` raises ValueError with what is wrong."""

    key: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    env: str
    flag: str
    is_secret: bool = False


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004  # one kind of error for all of them
    if not value.strip():
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not hold a NUL character")
    return value.strip()


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004
    return value.strip()


def _path(value: Any) -> str:
    try:
        path = os.path.abspath(os.path.expanduser(_text(value)))
        os.fsencode(path)
    except FileNotFoundError:
        raise ValueError("must be absolute: the current directory is gone") from None
    except UnicodeEncodeError:
        raise ValueError("can't be the name of a file in this locale (LANG)") from None
    return path


def _number(least: float, most: float, *, whole: bool = False) -> Callable[[Any], Any]:
    kind = "a whole number" if whole else "a number"

    def parse(value: Any) -> float | int:
        wrong = ValueError(f"must be {kind} from {least:g} to {most:g}")
        if isinstance(value, bool):
            raise wrong
        try:
            number = int(value) if whole and not isinstance(value, float) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if not least <= number <= most or (whole and number != int(number)):
            raise wrong
        return int(number) if whole else number

    return parse


def _flag(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    found = words.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be true or false")
    return found


def _choice(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value.strip().lower() not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return value.strip().lower()

    return parse


def _option(key: str, parse: Callable[[Any], Any], default: Any, help_: str, **more: Any) -> Option:
    env = more.pop("env", f"VERSIONER_AGENT_{key.upper()}")
    flag = more.pop("flag", "--" + key.replace("_", "-"))
    return Option(key, parse, default, help_, env, flag, **more)


OPTIONS = (
    _option("api_url", _text, DEFAULT_API_URL, "Where the event API is.", env="VERSIONER_API_URL"),
    _option("api_key", _text, None, "The API key.", env="VERSIONER_API_KEY", flag="", is_secret=True),
    _option("api_key_file", _path, None, "File that holds the API key; read before each request."),
    _option("db", _path, None, "The outbox."),
    _option("concurrency", _number(1, 64, whole=True), 4, "Requests under way at once."),
    _option("timeout", _number(0.1, 600), 30.0, "Seconds one request may take in all.", flag="--request-timeout"),
    _option("max_backoff", _number(0.1, 3600), 120.0, "Longest pause between tries, in seconds."),
    _option("max_event_attempts", _number(1, 100_000, whole=True), 20, "Answers about one event before giving it up."),
    _option("give_up_after", _number(0, 31_536_000), 3600.0, "Seconds that these answers must span at least."),
    _option("retention_days", _number(0, 36_500), 30.0, "Days that delivered and discarded records are kept."),
    _option(
        "exported_retention_days", _number(0, 36_500), 0.0, "Days until exported records are given up; 0 is never."
    ),
    _option("busy_timeout", _number(0.1, 600), 10.0, "Seconds to wait for other writers of the outbox."),
    _option("gate_timeout", _number(0, 3600), 15.0, "Seconds a deployment's start waits for its verdict; 0 is never."),
    _option("best_effort", _flag, False, "An outbox that can't be used never fails a job (true or false)."),
    _option("ca_bundle", _path, None, "File of certificates to trust instead of the system's store."),
    _option("proxy", _text, None, "Proxy URL; else the usual variables (HTTPS_PROXY …)."),
    _option("no_proxy", _any_text, None, "Hosts reached without a proxy, separated by commas."),
    _option("allow_insecure_http", _flag, False, "Allow http:// to hosts other than this one (true or false)."),
    _option("metrics_file", _path, None, "File of metrics for Prometheus that the agent rewrites every 15 s."),
    _option("log_format", _choice("text", "json"), "text", "Form of log lines: text or json."),
    _option("log_level", _choice("debug", "info", "warning", "error"), "info", "Least serious log line shown."),
)
BY_KEY = {option.key: option for option in OPTIONS}
ENV_CONFIG = "VERSIONER_AGENT_CONFIG"
OWN_OUTBOX = "outbox.db"  # in the user's state directory, where nothing else is said


class Settings(NamedTuple):
    """Resolved values by key, where each came from, and the system file's say on the outbox."""

    values: dict[str, Any]
    sources: dict[str, str]

    def __getattr__(self, key: str) -> Any:
        """Return the value of *key*."""
        try:
            return self.values[key]
        except KeyError:
            raise AttributeError(key) from None

    def is_explicit(self, key: str) -> bool:
        """Tell whether somebody set *key*."""
        return self.sources[key] != "default"

    def __repr__(self) -> str:
        """Show everything but secrets."""
        shown = {key: "***" if value and _may_hold_secret(key, value) else value for key, value in self.values.items()}
        return f"Settings({shown})"


def _may_hold_secret(key: str, value: Any) -> bool:
    return BY_KEY[key].is_secret or (key == "proxy" and "@" in str(value))


def resolve(flags: Mapping[str, Any], env: Mapping[str, str], files: list[File]) -> Settings:
    """Return settings from all layers, *files* with the stronger first; raises ConfigError with all problems."""
    settings, problems = _resolved(flags, env, files)
    refuse(problems)
    return settings


def check(file: File) -> list[Problem]:
    """Return all that is wrong with one file, taken alone."""
    return _resolved({}, {}, [file])[1]


def load(flags: Mapping[str, Any], env: Mapping[str, str], config: str | None = None) -> Settings:
    """Read the configuration files and resolve; *config* (a flag) or VERSIONER_AGENT_CONFIG replaces both files.

    Raises ConfigError with the problems of all layers.
    """
    return load_from(flags, env, read_files(env, config))


def load_from(flags: Mapping[str, Any], env: Mapping[str, str], files: list[File]) -> Settings:
    """Resolve, with the user's own outbox where none is named; raises ConfigError."""
    settings, problems = resolved_from(flags, env, files)
    refuse(problems)
    return settings


def resolved_from(
    flags: Mapping[str, Any], env: Mapping[str, str], files: list[File]
) -> tuple[Settings, list[Problem]]:
    """Do so and return the problems too; a value that can't be used stays as it was given."""
    settings, problems = _resolved(flags, env, files)
    if settings.values["db"] is None:
        settings.values["db"] = os.path.join(user_directory("state", env), OWN_OUTBOX)
        if not os.path.isabs(settings.db) and is_complete(files):
            words = "there is no home directory to keep the outbox in"
            problems.append(Problem(words, hint="set HOME, or name it with --db", key="db"))
    return settings, problems


def read_files(env: Mapping[str, str], config: str | None = None) -> list[File]:
    """Return the configuration files in force, the stronger first, also those that are missing or broken."""
    named = config or env.get(ENV_CONFIG)
    if named:
        return [read_file(named)]
    own = os.path.join(user_directory("config", env), "config.toml")
    # Without a home the user's directories are relative: each place would have its own.
    found = [read_file(own)] if os.path.isabs(own) else []
    if found and found[0].state == "closed" and not _is_home_of_ours():
        found = [File(own, state="another user's")]  # after `sudo -E`, or in a container with a foreign HOME
    return [*found, read_file(SYSTEM_FILE)]


def _is_home_of_ours() -> bool:
    """Tell whether HOME is a directory of this user: another's settings are none of ours, and many have /dev/null."""
    try:
        found = os.stat(os.path.expanduser("~"))
    except PermissionError:
        return False
    except OSError:
        return True
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


class Key(NamedTuple):
    """The API key, None where there is none; where it comes from; and why it can't be used, empty where it can."""

    key: str | None
    source: str
    problem: str = ""


def read_key(settings: Settings, env: Mapping[str, str]) -> str | None:
    """Return the API key as it is now, None where there is none; raises ConfigError for one that can't be read."""
    found = find_key(settings, env)
    if found.problem:
        raise ConfigError([found.problem])
    return found.key


def find_key(settings: Settings, env: Mapping[str, str]) -> Key:
    """Look for the API key.

    VERSIONER_API_KEY, else $CREDENTIALS_DIRECTORY/api_key, else api_key_file, else api_key of a private file.
    """
    key = env.get("VERSIONER_API_KEY", "").strip()
    source = "VERSIONER_API_KEY"
    try:
        if not key and env.get("CREDENTIALS_DIRECTORY"):
            source = os.path.join(env["CREDENTIALS_DIRECTORY"], "api_key")
            key = _read_key_file(source, missing_is_error=False)
        if not key and settings.api_key_file:
            source = settings.api_key_file
            key = _read_key_file(source, missing_is_error=True)
    except ConfigError as exc:
        return Key(None, source, exc.problems[0])
    if not key:
        source = settings.sources["api_key"]
        key = settings.api_key or ""
    if not key:
        return Key(None, source)
    if words := key_problem(key):
        return Key(None, source, f"the API key in {source} {words}")
    return Key(key, source)


def key_problem(key: str) -> str:
    """Say why *key* can't be sent; empty where it can."""
    return "" if key.isascii() and (key.isprintable() and " " not in key) else "holds characters that no key has"


def _resolved(flags: Mapping[str, Any], env: Mapping[str, str], files: list[File]) -> tuple[Settings, list[Problem]]:
    problems = [file.problem for file in files if file.problem]
    problems += [problem for file in files for problem in _unknown_keys(file)]
    settings = Settings({}, {})
    bad = set()
    for option in OPTIONS:
        value, source, file = _find(option, flags, env, files)
        if source != "default":
            try:
                value = _parsed(option, value, file)
            except ValueError as exc:
                problems.append(_problem(option.key, str(exc), source, file))
                bad.add(option.key)
        settings.values[option.key], settings.sources[option.key] = value, source
    if settings.is_explicit("api_url") and "api_url" not in bad:
        from versioner_agent.urls import url_problem  # noqa: PLC0415  # 3 ms, only for who names an API

        # What can't be read might have allowed it.
        is_allowed = settings.allow_insecure_http or "allow_insecure_http" in bad or not is_complete(files)
        if words := url_problem(settings.api_url, insecure=is_allowed):
            problems.append(located("api_url", words, flags, env, files))
    order = {file.name: place for place, file in enumerate(files)}
    problems.sort(key=lambda problem: (order.get(problem.file, len(files)), problem.line or 0))
    return settings, problems


def _parsed(option: Option, value: Any, file: File | None) -> Any:
    """Return the value as it is used; raises ValueError. In a file a path must mean the same wherever it is read."""
    parsed = option.parse(value)
    if file is not None and option.parse is _path and not os.path.isabs(os.path.expanduser(value.strip())):
        raise ValueError("must be an absolute path, as commands are called from many places")
    return parsed


def located(key: str, words: str, flags: Mapping[str, Any], env: Mapping[str, str], files: list[File]) -> Problem:
    """Return what is wrong with the value of *key* that holds, with the place where it was given."""
    _, source, file = _find(BY_KEY[key], flags, env, files)
    return _problem(key, words, source, file)


def refuse(problems: list[Problem]) -> None:
    """Raise ConfigError if there are any problems."""
    if problems:
        hint = next((problem.hint for problem in problems if problem.hint), None)
        raise ConfigError([str(problem) for problem in problems], hint)


def is_complete(files: list[File]) -> bool:
    """Tell whether all that the files say is known."""
    return all(file.state not in ("closed", "unusable") for file in files)


def _find(
    option: Option, flags: Mapping[str, Any], env: Mapping[str, str], files: list[File]
) -> tuple[Any, str, File | None]:
    if flags.get(option.key) is not None:
        return flags[option.key], option.flag, None
    given = env.get(option.env, "")
    if given.strip() or (given and not option.is_secret):  # a secret that was not filled in is none
        return given, option.env, None
    for file in files:
        if option.key in file.content:
            return file.content[option.key], file.name, file
    return option.default, "default", None


def _problem(key: str, words: str, source: str, file: File | None) -> Problem:
    if file is None:
        return Problem(f"{key} ({source}): {words}", key=key)
    return Problem(f"{key}: {words}", file.name, file.line_of(key), key=key)


def _unknown_keys(file: File) -> list[Problem]:
    problems: list[Problem] = []
    for key in file.content:
        if key not in BY_KEY:
            from versioner_agent.events import nearest  # noqa: PLC0415  # only for mistyped keys

            shown = key if len(key) <= MAX_SHOWN else key[:MAX_SHOWN] + "…"
            # Looking for near names is slow: a file of something else altogether has thousands of keys.
            close = nearest(key, BY_KEY) if len(problems) < MAX_PROBLEMS_SHOWN else None
            words = f"unknown key {shown!r}" + (f"; did you mean {close!r}?" if close else "")
            problems.append(Problem(words, file.name, file.line_of(key)))
    return problems


def _read_key_file(path: str, *, missing_is_error: bool) -> str:
    try:
        content, _ = contents(path, MAX_KEY_BYTES)
    except FileNotFoundError as exc:
        if not missing_is_error:
            return ""
        raise ConfigError([f"api_key_file: {path} does not exist"]) from exc
    except OSError as exc:
        raise ConfigError([f"can't read the API key from {path}: {exc.strerror}"]) from exc
    if len(content) > MAX_KEY_BYTES:
        raise ConfigError([f"{path}: over {MAX_KEY_BYTES} bytes, which is no API key"])
    return content.decode("utf-8", "replace").strip()


def user_directory(purpose: str, env: Mapping[str, str]) -> str:
    """Return the user's directory for `config` or `state`, as platformdirs names it.

    On Linux that is the XDG Base Directory Specification, read here: importing platformdirs would take a tenth of the
    time of an `enqueue`. A test holds the two together.
    """
    variable, default = _XDG[purpose]
    if _IS_LINUX:
        base = env.get(variable, "").strip()
        home = default if env.get("HOME") == "" else os.path.expanduser(default)
        return os.path.join(base if os.path.isabs(base) else home, APP_NAME)
    import platformdirs

    found = platformdirs.user_config_dir if purpose == "config" else platformdirs.user_state_dir
    return found(APP_NAME, appauthor=False)


_IS_LINUX = sys.platform.startswith("linux")
_XDG = {"config": ("XDG_CONFIG_HOME", "~/.config"), "state": ("XDG_STATE_HOME", "~/.local/state")}
