"""What git's own files say of the work tree that a build outside CI runs in, without running git.

Only of a plain one, with a branch and a commit, that belongs to who asks. Of all else (a worktree of another, a
submodule, a detached HEAD, reftables, git told by variables where to look) nothing is said: a wrong commit binds the
version for good, a missing one binds nothing. Never fails, never prints.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping

from versioner_agent.values import string_problem

#: Larger files are not read (bytes).
_MAX_REF = 4 * 1024
_MAX_CONFIG = 64 * 1024
_MAX_PACKED_REFS = 1024 * 1024
#: With one of these git would look elsewhere.
_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_CEILING_DIRECTORIES")
_HEADS = "refs/heads/"
#: A pipe in a file's place is empty; it must not make the build wait.
_OPEN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)


def describe(directory: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return scm_sha, scm_branch and scm_repository of the work tree around *directory*, as far as they can be told.

    Empty where any variable of *env* sends git elsewhere, and where anything about the repository is unusual.
    """
    if env and any(name in env for name in _VARIABLES):
        return {}
    try:
        git = _git_directory(os.path.realpath(directory))
        if git is None:
            return {}
        ref = _current_ref(git)
        sha = _commit(git, ref)
        settings = _settings(git)
    except (OSError, ValueError):
        return {}
    if settings.get("core.bare", "false").lower() != "false" or "core.worktree" in settings:
        return {}
    repository = repository_of(settings.get("remote.origin.url", ""))
    found = {"scm_sha": sha, "scm_branch": ref.removeprefix(_HEADS), "scm_repository": repository}
    return {name: value for name, value in found.items() if value and not string_problem(value)}


def repository_of(url: str) -> str:
    """Return a remote's *url* as host/owner/repository, so that ssh and https name it alike; empty for all else.

    Without scheme, user, password, port and `.git`. A local path, a query, an `@` or a colon in the path say nothing:
    they may be a secret, or not what they look like.
    """
    host = r"(?P<host>[A-Za-z0-9._-]+)"
    path = r"/*(?P<path>[^\s?#@:]+)"
    usual = rf"(?:https?|ssh|git)://(?:[^/]*@)?{host}(?::\d*)?/{path}"
    short = rf"(?:[^/@:]+@)?{host}:(?!//){path}"  # as scp has it
    match = re.fullmatch(usual, url, re.ASCII | re.IGNORECASE) or re.fullmatch(short, url, re.ASCII)
    if match is None:
        return ""
    path = match["path"].rstrip("/").removesuffix(".git").rstrip("/")
    return f"{match['host']}/{path}" if path else ""


def _git_directory(directory: str) -> str | None:
    """Return the `.git` around *directory*, up to where another file system begins; None where there is none for us."""
    device = os.stat(directory).st_dev
    while os.stat(directory).st_dev == device:
        git = os.path.join(directory, ".git")
        try:
            found = os.lstat(git)
        except FileNotFoundError:
            if _is_bare(directory):
                return None
        else:
            is_ours = found.st_uid == os.stat(directory).st_uid == os.geteuid()
            return git if is_ours and stat.S_ISDIR(found.st_mode) else None
        above = os.path.dirname(directory)
        if above == directory:
            break
        directory = above
    return None


def _is_bare(directory: str) -> bool:
    """Tell whether *directory* is itself what a `.git` is: of a bare repository, or from within one."""
    return all(os.path.exists(os.path.join(directory, name)) for name in ("HEAD", "objects", "refs"))


def _current_ref(git: str) -> str:
    """Return the full name of the branch that HEAD is on; raises ValueError where it is on none."""
    match = re.fullmatch(rb"ref:\s*(refs/heads/[^\s\0-\x1f\x7f]+)\s*", _read(os.path.join(git, "HEAD"), _MAX_REF))
    if match is None or b".." in match[1] or b"//" in match[1]:
        raise ValueError("HEAD names no branch")
    return os.fsdecode(match[1])


def _commit(git: str, ref: str) -> str:
    """Return the commit that *ref* names, as hex digits; raises OSError or ValueError where it names none."""
    try:
        text = _read(os.path.join(git, ref), _MAX_REF)
    except (FileNotFoundError, IsADirectoryError):  # git leaves empty directories behind
        text = _packed(_read(os.path.join(git, "packed-refs"), _MAX_PACKED_REFS), os.fsencode(ref))
    match = re.fullmatch(rb"([0-9a-f]{40}|[0-9a-f]{64})\s*", text)
    if match is None:
        raise ValueError("the branch names no commit")
    return match[1].decode()


def _packed(text: bytes, ref: bytes) -> bytes:
    for line in text.split(b"\n"):
        sha, _, name = line.partition(b" ")
        if name == ref:
            return sha
    return b""


def _settings(git: str) -> dict[str, str]:
    """Return the repository's own configuration; empty where it can't be read."""
    try:
        text = os.fsdecode(_read(os.path.join(git, "config"), _MAX_CONFIG))
    except (OSError, ValueError):
        return {}
    found: dict[str, str] = {}
    for name, value in _assignments(text.replace("\\\n", "")):
        found.setdefault(name, value)  # of several URLs git fetches from the first
    return found


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    """Give (section.subsection.key, value) of git's configuration syntax, but for values with a backslash in them."""
    section = ""
    for line in text.split("\n"):
        assignment = line
        if line.lstrip().startswith("["):
            header = re.match(r'\s*\[\s*([\w.-]+)\s*(?:"([^"\\]*)"\s*)?\]', line, re.ASCII)
            if header is None:
                section = "?"
                continue
            section = header[1].lower() + (f".{header[2]}" if header[2] is not None else "")
            assignment = line[header.end() :]
        match = re.fullmatch(r'\s*([\w-]+)\s*(?:=((?:"[^"\\]*"|[^"\\#;])*))?(?:[#;].*)?', assignment, re.ASCII)
        if match:
            value = "true" if match[2] is None else match[2].replace('"', "").strip()
            yield f"{section}.{match[1].lower()}", value


def _read(path: str, limit: int) -> bytes:
    """Return the content of the file at *path*; raises OSError for a link, ValueError over *limit* bytes."""
    descriptor = os.open(path, _OPEN)
    try:
        content = b""
        while part := os.read(descriptor, limit + 1 - len(content)):
            content += part
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise ValueError(f"{path} is too large")
    return content
