"""Fixtures of the service tests; puts helper modules within reach of `import`."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.append(os.path.dirname(__file__))
sys.path.append(os.path.join(os.path.dirname(os.path.dirname(__file__)), "journey"))

from host import Host
from scripted import ScriptedServer


@pytest.fixture
def serve():
    """Start scripted servers; all of them are stopped in the end."""
    running = []

    def start(*args, **kwargs):
        running.append(ScriptedServer(*args, **kwargs))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def host_for(tmp_path):
    """Make hosts that deliver to a URL; their processes are gone in the end."""
    made = []

    def make(api_url):
        directory = tmp_path / f"host-{len(made)}"
        directory.mkdir()
        made.append(Host(directory, api_url))
        return made[-1]

    yield make
    for each in made:
        each.close()
