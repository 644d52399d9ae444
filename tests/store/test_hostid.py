"""Which machine this is."""

from __future__ import annotations

import contextlib
import sqlite3

from versioner_agent import hostid


def test_a_machine_is_known_by_a_hash_of_its_id_and_not_by_the_id(tmp_path):
    path = tmp_path / "machine-id"
    path.write_text("0123456789abcdef" * 2 + "\n")

    assert hostid.machine(str(path)) == hostid.machine(str(path))
    assert "0123456789abcdef" not in hostid.machine(str(path))
    assert len(hostid.machine(str(path))) == 32


def test_another_machine_is_another(tmp_path):
    path = tmp_path / "machine-id"
    found = []
    for digit in "ab":
        path.write_text(digit * 32)
        found.append(hostid.machine(str(path)))

    assert found[0] != found[1]


def test_a_machine_without_an_id_is_none(tmp_path):
    (tmp_path / "uninitialized").write_text("uninitialized\n")

    assert hostid.machine(str(tmp_path / "absent")) is None
    assert hostid.machine(str(tmp_path / "uninitialized")) is None
    assert hostid.machine(str(tmp_path)) is None


def test_an_outbox_knows_itself_and_the_machine_it_was_made_on(tmp_path, outbox):
    outbox.enqueue("build", {"product_name": "p", "version": "1", "status": "completed"})
    with contextlib.closing(sqlite3.connect(tmp_path / "outbox.db")) as connection:
        ((_, uid, machine),) = connection.execute("SELECT * FROM outbox").fetchall()

    assert len(uid) == 32
    assert machine == hostid.machine()
