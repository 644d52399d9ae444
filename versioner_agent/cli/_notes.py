"""Warnings and errors on stderr, in GitHub Actions as annotations: where people look there.

An annotation is a line that the runner takes for a workflow command. It reads both streams; stdout is for data. Escapes
by GitHub's documentation (Workflow commands for GitHub Actions) and its toolkit.
"""

from __future__ import annotations

import os

import click

from versioner_agent.text import harmless

TITLE = "versioner-agent"
_IN_MESSAGE = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_IN_PROPERTY = _IN_MESSAGE | str.maketrans({":": "%3A", ",": "%2C"})


def is_github() -> bool:
    """Tell whether GitHub Actions reads what is said."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def warn(text: str) -> None:
    """Say *text*, one line made harmless, as a warning."""
    _say("warning", TITLE, text)


def problem(title: str, text: str) -> None:
    """Say *text* likewise as an error; *title* is the annotation's, and said nowhere else."""
    _say("error", title, text)


def note(text: str) -> None:
    """Say *text* likewise as no more than talk."""
    click.echo(f"note: {harmless(text)}", err=True)


def _say(level: str, title: str, text: str) -> None:
    line = f"{level}: {harmless(text)}"
    if is_github():
        head = harmless(title).translate(_IN_PROPERTY)
        line = f"::{level} title={head}::{harmless(text).translate(_IN_MESSAGE)}"
    click.echo(line, err=True)
