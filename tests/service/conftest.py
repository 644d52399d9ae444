"""A pretended machine for the commands of the service, bare or with the service on it."""

from __future__ import annotations

import pytest
from pretend import OLD_KEY, Pretend, work

from versioner_agent import service


@pytest.fixture
def usual_umask(umask):
    umask(0o022)


@pytest.fixture
def bare(tmp_path, usual_umask):
    return Pretend(tmp_path)


@pytest.fixture
def installed(bare):
    """With a key, and nothing noted of the commands that the installation ran."""
    service.install(bare.site, work(), key=OLD_KEY, now=True)
    bare.commands.clear()
    return bare
