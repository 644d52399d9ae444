"""Warnings and errors on stderr, in GitHub Actions as annotations: where people look there.

An annotation is a line that the runner takes for a workflow command. It reads both streams; stdout is for data. Escapes
by GitHub's documentation (Workflow commands for GitHub Actions) and its toolkit.
"""

from __future__ import annotations

import os

import click

from versioner_agent.text import mask_keys, printable

TITLE = "versioner-agent"
_IN_MESSAGE = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_IN_PROPERTY = _IN_MESSAGE | str.maketrans({":": "%3A", ",": "%2C"})


def warn(text: str) -> None:
    """Say *text*, one line made harmless, as a warning."""
    _say("warning", TITLE, text)


def problem(title: str, text: str) -> None:
    """Say *text* likewise as an error; *title* is the annotation's, and said nowhere else."""
    _say("error", title, text)


def note(text: str) -> None:
    """Say *text* likewise as no more than talk."""
    click.echo(f"note: {_harmless(text)}", err=True)


def _say(level: str, title: str, text: str) -> None:
    line = f"{level}: {_harmless(text)}"
    if os.environ.get("GITHUB_ACTIONS") == "true":
        head = _harmless(title).translate(_IN_PROPERTY)
        line = f"::{level} title={head}::{_harmless(text).translate(_IN_MESSAGE)}"
    click.echo(line, err=True)


def _harmless(text: str) -> str:
    return mask_keys(printable(text))
