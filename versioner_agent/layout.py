"""Where the files of a service are: for the whole host, or for one user."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from versioner_agent import config, shipped
from versioner_agent.units import wanted_by


class Layout(NamedTuple):
    """Absolute paths, as the running system knows them."""

    units: str  # directory
    config: str
    key: str
    state: str  # directory
    link: str | None = None  # puts the command on everybody's PATH
    sysusers: str | None = None
    tmpfiles: str | None = None
    share: str | None = None  # directory of what all users read: the man page, completions

    @property
    def unit_files(self) -> dict[str, str]:
        """Paths of the units -> their shipped names."""
        if self.sysusers is None:
            return {os.path.join(self.units, shipped.SERVICE): shipped.USER_SERVICE}
        names = (shipped.SERVICE, shipped.KEY_SERVICE, shipped.KEY_PATH)
        return {os.path.join(self.units, name): name for name in names}

    @property
    def other_files(self) -> dict[str, str]:
        """Paths of what declares account and directories, and of what helps users -> their shipped names."""
        pairs = ((self.sysusers, shipped.SYSUSERS), (self.tmpfiles, shipped.TMPFILES))
        found = {path: name for path, name in pairs if path is not None}
        if self.share is not None:
            names = (shipped.MAN_PAGE, *shipped.COMPLETIONS.values())
            found |= {os.path.join(os.path.dirname(self.share), name): name for name in names}
        return found

    @property
    def wants(self) -> dict[str, str]:
        """Links that enable the units -> where they lead."""
        return {
            os.path.join(self.units, f"{target}.wants", os.path.basename(path)): path
            for path, name in self.unit_files.items()
            for target in wanted_by(shipped.read(name))
        }


SYSTEM = Layout(
    units="/etc/systemd/system",
    config=config.SYSTEM_FILE,
    key="/etc/versioner-agent/credentials/api_key",
    state="/var/lib/versioner-agent",
    link="/usr/local/bin/versioner-agent",
    sysusers="/etc/sysusers.d/versioner-agent.conf",
    tmpfiles="/etc/tmpfiles.d/versioner-agent.conf",
    share="/usr/local/share",
)


def of_user(env: Mapping[str, str]) -> Layout:
    """Return where the files of the current user's service are."""
    directory = config.user_directory("config", env)
    return Layout(
        units=os.path.join(os.path.dirname(directory), "systemd", "user"),
        config=os.path.join(directory, "config.toml"),
        key=os.path.join(directory, "credentials", "api_key"),
        state=config.user_directory("state", env),
    )
