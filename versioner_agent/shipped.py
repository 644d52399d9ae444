"""The files that come with the package: read as they are, from a wheel, a zip archive or a checkout.

Those for systemd lie in a folder of their own, beside the package where this is a checkout. The man page and the
completions are in `share`, under the names they have below the `share` of a prefix.
"""

from __future__ import annotations

import os

SERVICE = "versioner-agent.service"
USER_SERVICE = f"user/{SERVICE}"
KEY_PATH = "versioner-agent-key.path"
KEY_SERVICE = "versioner-agent-key.service"
SYSUSERS = "sysusers.d/versioner-agent.conf"
TMPFILES = "tmpfiles.d/versioner-agent.conf"
CONFIG = "config.toml"
MAN_PAGE = "share/man/man1/versioner-agent.1"
#: By the shell.
COMPLETIONS = {
    "bash": "share/bash-completion/completions/versioner-agent",
    "zsh": "share/zsh/site-functions/_versioner-agent",
    "fish": "share/fish/vendor_completions.d/versioner-agent.fish",
}


def read(name: str) -> str:
    """Return the text of a file by its name below `systemd/`, or below the package where it begins with `share/`."""
    from importlib import resources  # noqa: PLC0415  # only for who installs

    folder = () if name.startswith("share/") else ("systemd",)
    inside = resources.files("versioner_agent").joinpath(*folder, *name.split("/"))
    if inside.is_file():
        return inside.read_text("utf-8")
    # A checkout keeps the folder beside the package.
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(checkout, "systemd", name), encoding="utf-8") as file:
        return file.read()
