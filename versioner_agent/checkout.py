"""What git's own files say of the work tree that a build outside CI runs in, without running git.

Only of a plain one, with a branch and a commit, that belongs to who asks. Of all else (a worktree of another, a
submodule, a detached HEAD, reftables, git told by variables where to look) nothing is said: a wrong commit binds the
version for good, a missing one binds nothing. Never fails, never prints. By hand, for compiling the expressions would
cost more than all the rest.
"""

from __future__ import annotations

import os
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
_HOST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_"
_NOT_IN_PATH = frozenset(" \t\n\r\f\v?#@:")
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
    scheme, is_url, rest = url.partition("://")
    if is_url and scheme.lower() in ("https", "http", "ssh", "git"):
        authority, _, path = rest.partition("/")
        host, _, port = authority.rpartition("@")[2].partition(":")
        is_usual = not port or (port.isascii() and port.isdigit())
    else:  # as scp has it
        place, _, path = url.partition(":")
        user, has_user, host = place.rpartition("@")
        is_usual = not path.startswith("//") and bool(user) == bool(has_user) and not {"/", "@"} & set(user)
    path = path.lstrip("/")
    if not is_usual or not host or not set(host) <= _HOST or set(path) & _NOT_IN_PATH:
        return ""
    path = path.rstrip("/").removesuffix(".git").rstrip("/")
    return f"{host}/{path}" if path else ""


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
    content = _read(os.path.join(git, "HEAD"), _MAX_REF)
    ref = content[4:].strip()
    is_plain = all(byte > 0x20 and byte != 0x7F for byte in ref) and b".." not in ref and b"//" not in ref
    if content[:4] != b"ref:" or not ref.startswith(_HEADS.encode()) or len(ref) == len(_HEADS) or not is_plain:
        raise ValueError("HEAD names no branch")
    return os.fsdecode(ref)


def _commit(git: str, ref: str) -> str:
    """Return the commit that *ref* names, as hex digits; raises OSError or ValueError where it names none."""
    try:
        text = _read(os.path.join(git, ref), _MAX_REF)
    except (FileNotFoundError, IsADirectoryError):  # git leaves empty directories behind
        text = _packed(_read(os.path.join(git, "packed-refs"), _MAX_PACKED_REFS), os.fsencode(ref))
    sha = text.rstrip()
    if len(sha) not in (40, 64) or sha.strip(b"0123456789abcdef"):
        raise ValueError("the branch names no commit")
    return sha.decode()


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
        assignment = line.strip()
        if assignment.startswith("["):
            section, assignment = _header(assignment[1:])
        name, has_value, rest = assignment.partition("=")
        value: str | None = "true"
        if has_value:
            value = _value(rest)
        else:
            name = name.partition("#")[0].partition(";")[0]
        name = name.strip().lower()
        if value is not None and name and not name.replace("-", "").strip(_LETTERS):
            yield f"{section}.{name}", value


def _header(text: str) -> tuple[str, str]:
    """Return a section's name, `?` where it can't be read, and what follows in its line."""
    before, has_quote, rest = text.partition('"')
    if not has_quote or "]" in before:
        name, _, after = text.partition("]")
        return name.strip().lower(), after
    subsection, _, rest = rest.partition('"')
    bracket, after = rest.lstrip()[:1], rest.lstrip()[1:]
    is_read = bracket == "]" and "\\" not in subsection
    return (f"{before.strip().lower()}.{subsection}", after) if is_read else ("?", "")


def _value(text: str) -> str | None:
    """Return a value without its quotes and the comment behind it; None where it holds a backslash or half a string."""
    found = ""
    for number, part in enumerate(text.split('"')):
        is_quoted = number % 2
        marks = () if is_quoted else [part.index(mark) for mark in "#;" if mark in part]
        end = min(marks, default=len(part))
        found += part[:end]
        if end < len(part):
            break
    else:
        if text.count('"') % 2:
            return None
    return None if "\\" in found else found.strip()


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
