"""`service` for who may not install anything."""

from __future__ import annotations

import pytest

# Imported while we may read them: the tests' Python can be root's own.
from versioner_agent import removal, service, service_key  # noqa: F401


@pytest.mark.parametrize("arguments", [("install",), ("set-key",), ("uninstall",)])
def test_an_ordinary_user_is_told_of_sudo_and_user(cli, unprivileged, arguments):
    done = cli("service", *arguments)

    assert done.code == 2
    assert "sudo" in done.err
    assert "--user" in done.err
