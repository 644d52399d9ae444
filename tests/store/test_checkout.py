"""What is read from the files of real git repositories, with git itself as the witness."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from versioner_agent.checkout import describe, repository_of

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed, so there is no repository")

URL = "git@git.example:acme/payments.git"


@pytest.fixture(autouse=True)
def _no_settings_of_this_host(monkeypatch):
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "Jane Doe")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "jane@example.com")


def git(directory, *arguments):
    """What git says in *directory*."""
    command = ["git", "-c", "protocol.file.allow=always", *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True).stdout.decode().strip()


def commit(directory):
    git(directory, "commit", "-q", "--allow-empty", "-m", "change")
    return git(directory, "rev-parse", "HEAD")


def repository_at(path, *options):
    git(path.parent, "init", "-q", "-b", "main", *options, path)
    git(path, "remote", "add", "origin", URL)
    commit(path)
    return path


@pytest.fixture
def repository(tmp_path):
    """A work tree with one commit on `main`."""
    return repository_at(tmp_path / "work")


def as_git_says(directory):
    return {
        "scm_sha": git(directory, "rev-parse", "HEAD"),
        "scm_branch": git(directory, "symbolic-ref", "--short", "HEAD"),
        "scm_repository": "git.example/acme/payments",
    }


def test_a_work_tree_tells_its_commit_branch_and_repository(repository):
    found = describe(str(repository))

    assert found == as_git_says(repository)
    assert found["scm_branch"] == "main"


def test_a_directory_within_belongs_to_the_work_tree_around_it(repository, monkeypatch, tmp_path):
    within = repository / "a" / "b"
    within.mkdir(parents=True)
    os.symlink(within, tmp_path / "link")

    assert describe(str(within)) == describe(str(repository)) != {}
    assert describe(str(tmp_path / "link")) == as_git_says(within)
    monkeypatch.chdir(within)
    assert describe(".") == as_git_says(within)


@pytest.mark.parametrize("branch", ["feature/api/v2", "ünïcode", "a.b-c_d#1@2"])
def test_a_branch_keeps_its_whole_name(repository, branch):
    git(repository, "checkout", "-q", "-b", branch)
    commit(repository)

    assert describe(str(repository)) == as_git_says(repository)
    assert describe(str(repository))["scm_branch"] == branch


def test_a_branch_that_is_no_text_is_left_out(repository):
    git(repository, "checkout", "-q", "-b", b"f\xfcr")
    sha = commit(repository)

    assert describe(str(repository)) == {"scm_sha": sha, "scm_repository": "git.example/acme/payments"}


def test_packed_refs_are_read(repository):
    for name in ("mai", "main2", "x/main"):
        git(repository, "branch", name)
        commit(repository)
    git(repository, "tag", "-a", "-m", "tag", "v1")
    git(repository, "pack-refs", "--all")
    assert not (repository / ".git/refs/heads/main").exists()

    assert describe(str(repository)) == as_git_says(repository)


def test_a_loose_ref_is_newer_than_a_packed_one(repository):
    git(repository, "pack-refs", "--all")
    sha = commit(repository)

    assert describe(str(repository))["scm_sha"] == sha


def test_a_directory_left_in_the_place_of_a_ref_does_not_hide_the_packed_one(repository):
    git(repository, "pack-refs", "--all")
    (repository / ".git/refs/heads/main").mkdir()

    assert describe(str(repository)) == as_git_says(repository)


def test_sha_256_repositories_are_read(tmp_path):
    try:
        made = repository_at(tmp_path / "work", "--object-format=sha256")
    except subprocess.CalledProcessError:
        pytest.skip("this git knows no SHA-256 repositories")

    assert len(describe(str(made))["scm_sha"]) == 64
    assert describe(str(made)) == as_git_says(made)


# Where nothing is said.


def test_no_repository(tmp_path):
    assert describe(str(tmp_path)) == {}
    assert describe(str(tmp_path / "missing")) == {}
    assert describe("\0") == {}


def test_detached_head(repository):
    git(repository, "checkout", "-q", "--detach")

    assert describe(str(repository)) == {}


def test_no_commit_yet(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "remote", "add", "origin", URL)

    assert describe(str(tmp_path)) == {}


def test_a_linked_worktree(repository, tmp_path):
    git(repository, "worktree", "add", "-q", "-b", "other", tmp_path / "linked")

    assert describe(str(tmp_path / "linked")) == {}
    assert describe(str(repository)) == as_git_says(repository)


def test_a_submodule_is_not_told_as_what_it_lies_in(repository, tmp_path):
    library = repository_at(tmp_path / "library")
    git(repository, "submodule", "add", "-q", library, "library")

    assert describe(str(repository / "library")) == {}
    assert describe(str(repository)) == as_git_says(repository)


def test_a_git_directory_elsewhere(repository, tmp_path):
    os.rename(repository / ".git", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", repository / ".git")

    assert describe(str(repository)) == {}


def test_a_bare_repository_is_not_told_as_what_it_lies_in(repository):
    bare = repository / "cache" / "bare.git"
    git(repository, "clone", "-q", "--bare", repository, bare)

    assert describe(str(bare)) == {}
    assert describe(str(bare / "refs")) == {}


def test_within_the_git_directory(repository):
    assert describe(str(repository / ".git")) == {}
    assert describe(str(repository / ".git" / "refs")) == {}


@pytest.mark.parametrize(("key", "value"), [("core.bare", "true"), ("core.worktree", "/elsewhere")])
def test_a_git_directory_that_is_of_no_work_tree_or_another(repository, key, value):
    git(repository, "config", key, value)

    assert describe(str(repository)) == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize("part", [".", ".git"])
def test_what_another_user_owns(repository, part):
    """As git's own safe.directory: others may plant what is read there."""
    os.chown(repository / part, 65534, -1)
    refused = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, check=False)
    assert b"dubious ownership" in refused.stderr

    assert describe(str(repository)) == {}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a file system")
def test_the_walk_ends_where_another_file_system_begins(repository):
    inner = repository / "mounted"
    (inner / "deep").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", inner], check=True)
    try:
        (inner / "deep").mkdir()
        refused = subprocess.run(["git", "rev-parse", "HEAD"], cwd=inner, capture_output=True, check=False)
        assert b"filesystem boundary" in refused.stderr

        assert describe(str(inner / "deep")) == {}
    finally:
        subprocess.run(["umount", "--lazy", inner], check=True)


@pytest.mark.parametrize("name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_CEILING_DIRECTORIES"])
def test_variables_that_send_git_elsewhere(repository, name):
    assert describe(str(repository), {name: ""}) == {}
    assert describe(str(repository), {"GIT_EDITOR": "vi"}) != {}


def test_a_file_in_the_place_of_a_refs_directory(repository):
    """Git can't read such a branch either."""
    git(repository, "checkout", "-q", "-b", "a/b")
    git(repository, "pack-refs", "--all")
    shutil.rmtree(repository / ".git/refs/heads/a", ignore_errors=True)
    (repository / ".git/refs/heads/a").write_text("")
    assert subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, check=False).returncode

    assert describe(str(repository)) == {}


def test_reftables(repository):
    """As git 2.45 lays them out: HEAD and refs/heads are there for older programs to stumble over."""
    shutil.rmtree(repository / ".git/refs/heads")
    (repository / ".git/refs/heads").write_text("this repository uses the reftable format\n")
    (repository / ".git/HEAD").write_text("ref: refs/heads/.invalid\n")

    assert describe(str(repository)) == {}


@pytest.mark.parametrize(
    "head",
    [
        "", "\n", "ref:", "ref: main", "ref: refs/tags/v1", "ref: refs/remotes/origin/main", "ref: refs/heads/",
        "ref: refs/heads/../../secret", "ref: refs/heads/a//b", "ref: refs/heads/ma in", "ref: refs/heads/main\0",
        "ref: refs/heads/none", "ref: refs/heads/mai", "ref: refs/heads//main", "main", "x" * 5000, "ref: refs/heads/" + "x" * 3000, "0" * 40,
    ],
    ids=lambda head: ascii(head[:20]),
)  # fmt: skip
def test_an_odd_head(repository, head):
    (repository / ".git/secret").write_text("1" * 40 + "\n")
    for ref in ("refs/tags/v1", "refs/remotes/origin/main", "refs/elsewhere/refs/heads/none"):
        git(repository, "update-ref", ref, "HEAD")
    git(repository, "pack-refs", "--all")
    commit(repository)
    (repository / ".git/HEAD").write_text(head)

    assert describe(str(repository)) == {}


@pytest.mark.parametrize(
    "text",
    ["", "\n", "1" * 39, "1" * 41, "1" * 63, "g" * 40, "A" * 40, "ref: refs/heads/other", "1" * 40 + " x", "1" * 9999],
    ids=lambda text: text[:12] + str(len(text)),
)  # fmt: skip
def test_an_odd_ref(repository, text):
    """Never a packed one instead, which would be an older commit."""
    git(repository, "branch", "other")
    git(repository, "pack-refs", "--all")
    (repository / ".git/refs/heads/main").write_text(text)

    assert describe(str(repository)) == {}


@pytest.mark.parametrize("path", [".git/HEAD", ".git/refs/heads/main"])
def test_a_link_or_a_pipe_in_the_place_of_a_file(repository, tmp_path, path):
    """A pipe would make the build wait for ever."""
    os.rename(repository / path, tmp_path / "file")
    os.symlink(tmp_path / "file", repository / path)
    assert describe(str(repository)) == {}

    os.unlink(repository / path)
    os.mkfifo(repository / path)
    assert describe(str(repository)) == {}


@pytest.mark.parametrize("path", [".git/HEAD", ".git/refs/heads/main", ".git"])
def test_files_that_may_not_be_read(unprivileged, path):
    made = repository_at(unprivileged / "work")
    assert describe(str(made)) == as_git_says(made)
    os.chmod(made / path, 0)
    try:
        assert describe(str(made)) == {}
    finally:
        os.chmod(made / path, 0o700)


def test_too_many_packed_refs_are_not_read(repository):
    git(repository, "pack-refs", "--all")
    packed = repository / ".git/packed-refs"
    line = f"{'1' * 40} refs/heads/another\n"
    packed.write_text(packed.read_text() + line * (1024 * 1024 // len(line)))
    assert packed.stat().st_size > 1024 * 1024

    assert describe(str(repository)) == {}


# The repository, from git's configuration.


def configured(repository, text):
    """Write *text* as the configuration; return what is told of the repository, and what git reads of it."""
    (repository / ".git/config").write_bytes(text.encode("utf-8", "surrogateescape"))
    read = subprocess.run(
        ["git", "config", "-z", "--file", repository / ".git/config", "--get-all", "remote.origin.url"],
        capture_output=True,
        check=False,
    )
    found = describe(str(repository))
    assert set(found) >= {"scm_sha", "scm_branch"}
    return found.get("scm_repository"), read.stdout.decode("utf-8", "surrogateescape").split("\0")[0]


@pytest.mark.parametrize(
    "text",
    [
        '[remote "origin"]\n\turl = git@h:a/b.git\n',
        '[remote "origin"]\r\n\turl = git@h:a/b.git\r\n\tfetch = x\r\n',
        '[remote "origin"]url=git@h:a/b.git',
        '[core]\nbare = false\n[ReMoTe   "origin"]  # the first\n  URL = "git@h:a/b.git" ; quoted\n',
        '[remote "origin"]\nurl = git@h:"a/b".git#comment\n',
        '[remote "other"]\nurl = git@h:x/y\n[remote "origin"]\nfetch = +refs/*:refs/*\nurl = git@h:a/b\n',
        '[remote "origin"]\nurl = git@h:a/b\nurl = git@h:second/one\n[remote "Origin"]\nurl = git@h:x/y\n',
        '; [remote "origin"]\n[remote "origin"]\nurl = git@h:a/b\n[branch "main"]\n\tremote = origin\n',
        '[alias]\nx = "!f() { \\\n[remote \\"origin\\"]\\\nurl = git@h:x/y\\\n}"\n[remote "origin"]\nurl = git@h:a/b\n',
        '[remote "o\\"x"]\nurl = git@h:x/y\n[remote "origin"]\nurl = git@h:a/b\n',
        '[remote "origin"]\nfetch = x\n[remote "a\\\\b"]\nurl = git@h:x/y\n[remote "origin"]\nurl = git@h:a/b\n',
        '[remote "origin"]\nfetch = x\\\nurl = git@h:x/y\nurl = git@h:a/b\n',
        "[remote.origin]\nurl = git@h:a/b\n",
    ],
)  # fmt: skip
def test_the_url_is_read_as_git_reads_it(repository, text):
    told, read = configured(repository, text)

    assert told == repository_of(read) == "h/a/b"


@pytest.mark.parametrize(
    "text",
    [
        "", '[remote "other"]\nurl = git@h:a/b\n', '[remote "origin"]\n#url = git@h:a/b\n', "url = git@h:a/b\n",
        '[remote "origin"]\nurl\n', '[remote "origin"]\nurl =\n', '[remote "origin"]\npushurl = git@h:a/b\n',
        '[remote "origin"]\nurl = git@h:a\\tb\n', '[remote "origin"]\nurl = "git@h:a/b\n',
        '[remote "origin"]\nurl = git@h:\udcff/b\n', '[include]\npath = other\n[remote "x"]\n', "\0\1\2[[[",
        '[remote "origin"\nurl = git@h:a/b\n', '[remote "origin"]\nurl = /srv/git/payments.git\n',
    ],
    ids=ascii,
)  # fmt: skip
def test_where_the_repository_cannot_be_told_the_commit_is(repository, text):
    assert configured(repository, text)[0] is None


def test_a_large_configuration_is_not_read(repository):
    assert configured(repository, f'[remote "origin"]\nurl = {URL}\n' + "#" * 64 * 1024)[0] is None


def test_a_missing_configuration(repository):
    os.unlink(repository / ".git/config")

    assert set(describe(str(repository))) == {"scm_sha", "scm_branch"}


@pytest.mark.parametrize(
    "url",
    [
        "https://git.example/acme/payments.git", "https://git.example/acme/payments", "http://git.example:8080/acme/payments/",
        "https://jane@git.example/acme/payments.git", "https://jane:s3cret@git.example/acme/payments.git",
        "https://t0ken@git.example/acme/payments.git/", "https://jane:s3@cret@git.example/acme/payments.git",
        "ssh://git@git.example/acme/payments.git", "ssh://git@git.example:2222/acme/payments.git",
        "git://git.example/acme/payments.git", "git@git.example:acme/payments.git", "git.example:acme/payments",
        "git@git.example:/acme/payments.git", "HTTPS://git.example//acme/payments",
    ],
)  # fmt: skip
def test_all_ways_to_a_repository_name_it_alike(url):
    assert repository_of(url) == "git.example/acme/payments"


@pytest.mark.parametrize(
    "url",
    [
        "", "/srv/git/payments.git", "../payments.git", "./a:b", "file:///srv/git/payments.git", "payments", "~/x",
        "https://", "https://git.example", "https://git.example/", "https://git.example/.git", "git@git.example:",
        "https://git.example/x?private_token=s3cret", "https://git.example/x#s3cret", "ext::sh -c s3cret",
        "persistent::https://jane:s3cret@git.example/x", "jane:s3cret@git.example:acme/payments",
        "jane:s3cret@git.example/acme/payments", "https://ja/ne:s3cret@git.example/x", "a b:c", "https://git.example/a:b/c", "https://git.example/a b",
        "ftp://git.example/x", "https:///git.example/x", "git@[::1]:x", "x\n.example:y", "https://git.example/x\ny",
    ],
    ids=ascii,
)  # fmt: skip
def test_what_is_local_odd_or_secret_is_not_told(url):
    assert repository_of(url) == ""
