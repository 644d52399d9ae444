"""The files that come with the package for systemd: read as they are, from a wheel, a zip archive or a checkout."""

from __future__ import annotations

import os

SERVICE = "versioner-agent.service"
USER_SERVICE = f"user/{SERVICE}"
KEY_PATH = "versioner-agent-key.path"
KEY_SERVICE = "versioner-agent-key.service"
SYSUSERS = "sysusers.d/versioner-agent.conf"
TMPFILES = "tmpfiles.d/versioner-agent.conf"
CONFIG = "config.toml"


def read(name: str) -> str:
    """Return the text of a file below `systemd/`."""
    from importlib import resources  # noqa: PLC0415  # only for who installs

    inside = resources.files("versioner_agent").joinpath("systemd", *name.split("/"))
    if inside.is_file():
        return inside.read_text("utf-8")
    # A checkout keeps the folder beside the package.
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(checkout, "systemd", name), encoding="utf-8") as file:
        return file.read()
