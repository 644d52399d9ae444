"""`metrics`: valid text, and a file that is whole at any moment."""

from __future__ import annotations

import os
import signal
import stat
import subprocess

import pytest
from exposition import has, read, value
from host import COMMAND

from versioner_agent import __version__, metrics_file

REPLACE = """
import sys
from versioner_agent.metrics_file import OURS, replace
is_told = False
content = OURS.decode() + "x\\n" + "y" * 300_000 + "\\n# EOF\\n"
while True:
    replace(sys.argv[1], content, outbox="/nowhere/outbox.db", synced=False)
    if not is_told:
        print("wrote", flush=True)
    is_told = True
"""


def test_metrics_of_an_outbox_that_was_never_made(cli, db):
    done = cli("metrics")
    found = read(done.out)

    assert (done.code, done.err) == (0, "")
    assert value(found, "records", state="pending") == 0
    assert not has(found, "last_loop_timestamp_seconds"), "only an agent has a loop"
    assert not db.exists()


def test_metrics_say_what_is_there_and_what_is_running(cli, host_for):
    host = host_for()
    host.queue('a"b\\c|d', 3)

    found = read(host.run("metrics").stdout.decode())

    assert value(found, "records", state="pending") == 3
    (build,) = (dict(labels) for name, labels in found if name == "versioner_agent_build_info")
    assert build["version"] == __version__
    assert set(build) == {"version", "python", "sqlite"}


def test_no_name_of_others_becomes_a_label(host_for, serve):
    """What a product is called is not ours to bound, nor to print where a line means something."""
    host = host_for(serve().url)
    host.queue("product-of-others", 2)
    host.run("flush")

    assert "product-of-others" not in host.run("metrics").stdout.decode()


def test_a_broken_outbox_is_told_and_exits_1(cli, db, tmp_path):
    db.write_bytes(b"x" * 5000)
    target = tmp_path / "versioner.prom"

    done, filed = cli("metrics"), cli("metrics", "--textfile", str(target))

    for each, text in ((done, done.out), (filed, target.read_text())):
        assert each.code == 1
        assert "error: " in each.err
        assert value(read(text), "outbox_readable") == 0
        assert not has(read(text), "records")


@pytest.mark.parametrize(
    ("command", "code"), [("metrics", 1), ("status", 0), ("list", 0), ("list --new mail", 0), ("list --groups", 0)]
)
def test_a_directory_that_is_not_there_is_told_and_is_no_empty_outbox(host_for, tmp_path, command, code):
    """All zeros would say that all is well on a host whose disk is not mounted."""
    done = host_for().run(*command.split(), VERSIONER_AGENT_DB=str(tmp_path / "unmounted" / "outbox.db"))

    assert done.returncode == code
    assert b"is its disk mounted?" in done.stderr


def test_metrics_of_a_directory_that_is_not_there_tell_no_numbers(host_for, tmp_path):
    done = host_for().run("metrics", VERSIONER_AGENT_DB=str(tmp_path / "unmounted" / "outbox.db"))

    assert value(read(done.stdout.decode()), "outbox_readable") == 0
    assert not has(read(done.stdout.decode()), "records")


def test_textfile_is_for_every_reader_whatever_the_umask(cli, tmp_path, umask):
    umask(0o077)
    target = tmp_path / "versioner.prom"
    target.touch()

    done = cli("metrics", "--textfile", str(target))

    assert (done.code, done.out, done.err) == (0, "", "")
    assert read(target.read_text())
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir() if ".prom" in path.name] == ["versioner.prom"]
    assert cli("metrics", "--textfile", str(target)).code == 0, "its own file is replaced"


def test_textfile_may_be_named_as_it_is_seen_from_here(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert cli("metrics", "--textfile", "versioner.prom").code == 0
    assert read((tmp_path / "versioner.prom").read_text())


NOT_OURS = {
    "a link": "link.prom",
    "a dangling link": "dangling.prom",
    "a directory": "folder.prom",
    "a pipe": "pipe.prom",
    "somebody's file": "diary",
    "the outbox": "state/outbox.db",
    "the outbox's queue": "state/outbox.db.queue",
    "no directory": "missing/versioner.prom",
    "a file as a directory": "diary/versioner.prom",
    "a name too long": "x" * 300,
}


@pytest.mark.parametrize("name", NOT_OURS.values(), ids=NOT_OURS)
def test_what_is_not_ours_to_replace_is_left_alone(cli, db, tmp_path, name):
    assert cli("enqueue", "build", "--product", "p", "--version", "1").code == 0
    (tmp_path / "diary").write_text("dear diary")
    (tmp_path / "link.prom").symlink_to(tmp_path / "diary")
    (tmp_path / "dangling.prom").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.prom").mkdir()
    os.mkfifo(tmp_path / "pipe.prom")
    before = db.read_bytes()

    done = cli("metrics", "--textfile", str(tmp_path / name))

    assert done.code == 1
    assert done.err.startswith("error: can't write ")
    assert "hint: " in done.err
    assert (tmp_path / "diary").read_text() == "dear diary"
    assert (tmp_path / "link.prom").is_symlink()
    assert not (tmp_path / "nothing").exists()
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe.prom").st_mode)
    assert db.read_bytes() == before
    assert not list(tmp_path.rglob("*.new"))


def test_a_reader_sees_whole_files_whatever_kills_the_writers(child, tmp_path):
    """A collector reads at any moment, and a writer may die at any."""
    target = tmp_path / "versioner.prom"
    for _ in range(6):
        writer = child(REPLACE, target)
        assert writer.says() == "wrote"
        for _ in range(150):
            text = target.read_text()
            assert text.startswith(metrics_file.OURS.decode())
            assert text.endswith("# EOF\n")
        writer.kill()
        assert target.read_text().endswith("# EOF\n")
    left = [path.name for path in tmp_path.iterdir() if path != target and path.is_file()]

    assert not [name for name in left if name.endswith(".prom")], "what a killed writer leaves is no collector's file"
    assert len(left) <= 6


def test_a_reader_that_has_seen_enough_is_no_error(host_for):
    host = host_for()
    command = subprocess.Popen((*COMMAND, "metrics"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=host.env)
    command.stdout.close()

    assert command.stderr.read() == b""
    command.stderr.close()
    assert command.wait(30) in (0, -signal.SIGPIPE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give an outbox to another user")
def test_root_reads_as_the_owner_and_writes_as_root(host_for, reachable, tmp_path):
    """A cron line of root's writes into a directory of root's, about an outbox of the service's account."""
    host = host_for()
    place = reachable / "state"
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)
    env = {"VERSIONER_AGENT_DB": str(place / "outbox.db")}
    assert host.run("enqueue", "build", "--product", "p", "--version", "1", **env).returncode == 0
    target = tmp_path / "versioner.prom"

    done = host.run("metrics", "--textfile", str(target), **env)

    assert done.returncode == 0, done.stderr
    assert value(read(target.read_text()), "records", state="pending") == 1
    assert target.stat().st_uid == 0
    assert {path.stat().st_uid for path in place.iterdir()} == {65534}
    os.chown(place / "outbox.db", 0, 0)
    assert value(read(host.run("metrics", **env).stdout.decode()), "outbox_readable") == 0, "the owner can't read it"
