"""`track`: what the official client would have posted is what is queued."""

from __future__ import annotations

import json
import random
import sqlite3

import official
import pytest

TRIALS = 200
BASE = {"product": "payments", "version": "1.2.3", "environment": "production"}


def flag(name, value):
    text = json.dumps(value) if isinstance(value, dict) else value
    return f"--{name.replace('_', '-')}={text}"


def payloads(db):
    connection = sqlite3.connect(db)
    try:
        return [json.loads(row[0]) for row in connection.execute("SELECT payload FROM record ORDER BY id")]
    finally:
        connection.close()


def as_the_official_client_has_it(payload, expected):
    """Take away what is known to differ: nothing else may."""
    body = dict(payload)
    for name in ("started_at", "completed_at"):
        body.pop(name, None)
    metadata = {name: value for name, value in body.pop("extra_metadata").items() if not name.startswith("vi_agent_")}
    if metadata:
        body["extra_metadata"] = metadata
    if "deploy_url" in expected:
        body.pop("build_url", None)
    if expected["source_system"] == "unknown":
        body["source_system"] = "unknown"
    return body


def random_values(dice):
    def word():
        return dice.choice(("", "a", "main", "feature/é x", "42", "org/team/name", "b" * 40, "0123456789abcdef" * 2))

    return word


REPOSITORIES = (
    "acme/payments", "payments", "acme/team/payments", "git@github.com:acme/payments.git", "http://host:8080/a/b",
    "https://github.com/acme/payments.git", "ssh://git@host:22/a/b.git", "/srv/git/a.git", "acme/",
)  # fmt: skip


def random_environment(dice):
    word, env = random_values(dice), {}
    for system in dice.sample(list(official.MARKS), dice.choice((0, 1, 1, 1, 2, 3, 8))):
        env[official.MARKS[system][0]] = official.MARKS[system][1]
    signs = {sign for sign, _ in official.MARKS.values()}
    for name in official.variables():
        if name not in signs and dice.random() < 0.6:
            is_repository = "REPO" in name or "GIT_URL" in name or "PATH" in name
            env[name] = dice.choice(REPOSITORIES) if is_repository and dice.random() < 0.8 else word()
    names = {option for options in official.STRING_OPTIONS.values() for option in options}
    for option in (*names, "product", "version", "environment", "status"):
        if dice.random() < 0.15:
            env[f"VERSIONER_{option.upper()}"] = word()
    return env


def random_flags(dice, kind):
    word = random_values(dice)
    flags = {name: word() for name in official.STRING_OPTIONS[kind] if dice.random() < 0.15}
    flags |= {name: value for name, value in BASE.items() if dice.random() < 0.6}
    if kind == "build":
        flags.pop("environment", None)
    if dice.random() < 0.3:
        flags["status"] = dice.choice(("completed", "failed", "aborted", "pending"))
    if dice.random() < 0.3:
        flags["extra_metadata"] = {"team": "core", "vi_gh_job": "mine", "n": dice.choice((1, 1.5, None, [True]))}
    return flags


@pytest.mark.parametrize("kind", ["build", "deployment"])
def test_what_is_queued_is_what_the_official_client_posts(cli, db, monkeypatch, tmp_path, kind):
    """In random environments of all eight systems, several at once and none, with random flags."""
    monkeypatch.chdir(tmp_path)
    refused = 0
    expected = []
    for trial in range(TRIALS):
        dice = random.Random(f"{kind} {trial}")
        env, flags = random_environment(dice), random_flags(dice, kind)
        body = official.posted(kind, flags, env)
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            done = cli("track", kind, *(flag(name, value) for name, value in flags.items()), "--new")
        if body is None:
            refused += 1
            assert done.code == 2, (env, flags, done)
        else:
            assert done.code == 0, (env, flags, done)
            expected.append(body)
    found = payloads(db)
    assert TRIALS / 20 < refused < TRIALS * 0.6
    assert len(found) == len(expected)
    for payload, body in zip(found, expected, strict=True):
        assert as_the_official_client_has_it(payload, body) == body
