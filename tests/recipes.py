"""README's recipes, followed as they are written."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = "/usr/bin/python3"  # as the recipes have it


def blocks(mark):
    """README's code blocks behind a comment that starts with *mark*: [(comment, code)]."""
    return re.findall(rf"<!-- ({mark}[^>]*?) -->\n```\w+\n(.*?)```", README, re.DOTALL)


def recipe(mark):
    """The code of the only block with this comment."""
    ((_, code),) = blocks(mark)
    return code


def follow(mark, place, *, check=True, env=None, instead=None):
    """Do in the folder *place* what README says; *instead* are words of it that are others here."""
    code = recipe(mark).replace(PYTHON, interpreter())
    for word, other in (instead or {}).items():
        assert word in code
        code = code.replace(word, str(other))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=place, env=env, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, f"{mark}: {done.stdout}{done.stderr}"
    return done


@functools.cache
def interpreter():
    """README's Python, or the tests' own where that one is too old or can't make environments."""
    code = "import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))"
    try:
        fits = not subprocess.run([PYTHON, "-c", code], capture_output=True, check=False).returncode
    except OSError:
        fits = False
    return PYTHON if fits else sys.executable


@functools.cache
def why_no_wheels():
    """Say why no wheels can be made here; empty where they can."""
    missing = [tool for tool in ("bash", "sed", "sha256sum") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--dest", place]
        done = subprocess.run([*pip, "hatchling"], capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()
    return f"no package index can be reached: {said[-1] if said else ''}" if done.returncode else ""


def copy_of_the_repository(place):
    """Copy what the package is built from to *place*, so that no recipe writes into the repository."""
    shutil.copytree(ROOT / "versioner_agent", place / "versioner_agent", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.endswith(".pyz"):
            shutil.copy(path, place)
    if (ROOT / "systemd").is_dir():
        shutil.copytree(ROOT / "systemd", place / "systemd")
    return place


def without_index(**more):
    """An environment without any setting for pip, and where nobody answers on the network."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PIP_")}
    nobody = "http://127.0.0.1:1"
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "http_proxy": nobody, "https_proxy": nobody, **more}
