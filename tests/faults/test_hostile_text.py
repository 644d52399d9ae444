"""What products, versions and the API call themselves cannot forge a line, a row or what a terminal shows."""

from __future__ import annotations

import json
import unicodedata

import pytest
from host import eventually
from scripted import answer, refused

HOSTILE = {
    "escapes": "\x1b[2J\x1b[1;31mpwned\x1b]0;title\x07",
    "8-bit escapes": "\x9b31mpwned\x9d0;title\x9c",
    "newlines": "x\n2026-11-25T00:00:00Z info: delivered 99: forged\r\nerror: forged",
    "other line ends": "x\u2028forged\u2029forged\x85forged\x0bforged\x0c",
    "bidi": "abc\u202egnp.exe\u2066\u2069\u200f",
    "backspaces": "paid\b\b\b\bfree\x7f",
    "invisible": "pay\u200bments\ufeff\u00ad",
    "tags": "ok\U000e0041\U000e007f",
}
#: Two in one name by default, for each character is looked for in what is shown; each alone with `-m long`.
NAMES = list(HOSTILE)
PAIRS = {f"{one}, {two}": HOSTILE[one] + HOSTILE[two] for one, two in zip(NAMES[::2], NAMES[1::2], strict=True)}
all_words = pytest.mark.parametrize(
    "words",
    [*PAIRS.values(), *(pytest.param(words, marks=pytest.mark.long) for words in HOSTILE.values())],
    ids=[*PAIRS, *HOSTILE],
)
SIZE = 70_000


def check_harmless(output):
    """Nothing in *output* can move a cursor or hide; its lines end where we ended them."""
    text = output.decode()
    found = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}
    assert not found, ascii(found)
    return text.split("\n")


@pytest.fixture
def host(host_for, serve):
    server = serve(lambda _: refused(422, "no"))
    made = host_for(server.url)
    made.server = server
    return made


def enqueue(host, words):
    event = {"product_name": f"p{words}q", "version": f"1{words}2", "status": "ok", "extra_metadata": {words: [words]}}
    return host.run("enqueue", "json", "--kind", "build", stdin=json.dumps(event).encode())


@all_words
def test_names_and_refusals_are_shown_harmlessly_and_kept_as_they_are(host, words):
    host.server.script = lambda _: refused(422, f"detail {words}")
    done = enqueue(host, words)
    assert done.returncode == 0, done.stderr
    assert len(check_harmless(done.stdout)) == 2
    agent = host.agent()
    eventually(lambda: host.counts() == {"failed": 1})
    held = enqueue(host, f"{words}again")
    host.server.script = lambda _: refused(503, f"busy {words}")
    eventually(lambda: host.health().state == "down" or host.counts() == {"failed": 2})
    host.end(agent)

    assert held.returncode == 0
    outputs = {name: host.run(*name.split()) for name in ("list", "list --json", "show 1", "show 1 --json", "status",
                                                          "status --json", "doctor --offline", "retry 1", "discard 1")}  # fmt: skip
    lines = {name: check_harmless(done.stdout + done.stderr) for name, done in outputs.items()}
    assert len(lines["list"]) == 4  # a header, two rows, and the end
    assert len(lines["list --json"]) == 3
    log = check_harmless(host.said())
    assert all(line.startswith("20") for line in log if line)
    assert sum("error: refused" in line for line in log) >= 1
    (shown,) = [json.loads(line) for line in lines["show 1 --json"] if line]
    assert shown["payload"]["product_name"] == shown["product_name"] == f"p{words}q".strip()
    assert shown["payload"]["extra_metadata"][words] == [words]
    assert shown["detail"] == f"detail {words}".strip()


@all_words
def test_json_log_lines_are_one_harmless_object_each(host, words):
    host.server.script = lambda _: refused(409, f"detail {words}")
    enqueue(host, words)
    host.agent(VERSIONER_AGENT_LOG_FORMAT="json")
    eventually(lambda: b'"failed"' in host.said())  # said after the commit

    objects = [json.loads(line) for line in check_harmless(host.said()) if line]
    (refusal,) = [entry for entry in objects if entry.get("action") == "failed"]
    assert refusal["product"] == f"p{words}q".strip()


@pytest.mark.parametrize("words", [HOSTILE["escapes"], HOSTILE["bidi"], HOSTILE["newlines"]], ids=ascii)
@pytest.mark.parametrize(
    "args",
    [
        ("{}",), ("enqueue", "{}"), ("enqueue", "build", "{}"), ("enqueue", "build", "--{}", "x"), ("show", "{}"),
        ("enqueue", "build", "--product", "p", "--version", "1", "--status", "{}"), ("list", "--state", "{}"),
        ("enqueue", "build", "--product", "p", "--version", "1", "--meta", "{}"), ("enqueue", "json", "{}"),
        ("enqueue", "build", "--product", "p", "--version", "1", "--started-at", "{}"), ("status", "--db", "/{}/x"),
        ("status", "--config", "{}"), ("flush", "--api-url", "http://{}"), ("run", "--concurrency", "{}"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_arguments_in_error_messages_are_harmless(host, words, args):
    done = host.run(*(part.replace("{}", words) for part in args))

    said = check_harmless(done.stdout + done.stderr)
    assert not any(line.startswith(("2026-11-25T00", "error: forged")) for line in said)
    assert b"Traceback" not in done.stderr


VARIABLES = ("VERSIONER_API_URL", "VERSIONER_AGENT_TIMEOUT", "VERSIONER_AGENT_DB", "USER", "VERSIONER_API_KEY")
COMMANDS = (("enqueue", "build", "--product", "p", "--version", "1"), ("status",), ("flush",), ("list",))


@all_words
def test_values_of_the_environment_are_harmless(host, words):
    """Every variable meets every command with some of the words; with `-m long` with each of them."""
    shift = list(PAIRS.values()).index(words) if words in PAIRS.values() else None
    for at, name in enumerate(VARIABLES):
        for command in COMMANDS if shift is None else (COMMANDS[(at + shift) % len(COMMANDS)],):
            done = host.run(*command, **{name: f"/tmp/va-hostile-{words}/x" if name.endswith("DB") else words})
            check_harmless(done.stdout + done.stderr)
            assert done.returncode in (0, 1, 3, 4), (name, command)
            assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("form", ["detail", "message", "list", "rule", "headers"])
def test_answers_of_any_size_are_stored_bounded(host, form):
    big = "x" * (SIZE if form == "headers" else 60_000)
    bodies = {
        "detail": {"detail": big},
        "message": {"error": big[:30_000], "message": big[:30_000]},
        "list": {"detail": [{"loc": ["body", big[:900]] * 4, "msg": big[:5000], "type": "t"}] * 6},
        "rule": {
            "message": "no",
            "code": big[:15_000],
            "retry_after": big[:15_000],
            "details": {"rule_name": big[:15_000]},
        },
        "headers": {"detail": "no"},
    }
    headers = {"retry_after": "9" * 4000, "date": "Mon" * 999, "location": big[:9000]} if form == "headers" else {}
    host.server.script = lambda _: answer(409, bodies[form], **headers)
    host.queue("payments")
    host.run("flush", "--timeout", "5")

    record, _, attempts = host.record(1)
    assert record.state == "failed"
    assert len(record.detail) <= 2000
    assert all(len(value or "") <= 2000 for value in (record.code, record.rule, record.retry_after, attempts[0].detail))
    assert all(len(line) < 3000 for line in host.run("list").stdout.decode().splitlines())


@pytest.mark.parametrize("words", [HOSTILE["newlines"], HOSTILE["escapes"]], ids=ascii)
def test_paths_in_errors_are_one_harmless_line(host, words, tmp_path):
    name = words.replace("/", "_")
    directory = tmp_path / name
    directory.mkdir()
    for args in (("--config", directory), ("--db", directory / "missing" / "outbox.db"), ("--db", directory)):
        done = host.run("enqueue", "build", "--product", "p", "--version", "1", args[0], str(args[1]))
        said = check_harmless(done.stderr)
        assert done.returncode in (1, 3)
        assert len([line for line in said if line]) <= 2
    done = host.run("run", "--ca-bundle", str(directory))
    assert len([line for line in check_harmless(done.stderr) if line]) <= 2
