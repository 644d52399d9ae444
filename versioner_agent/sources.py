"""Which source gives an event's field its value: what was given, then the environment, the CI system, git.

Pure: every source comes in as an argument. What the variables are called, and which are not read, follows the official
client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from versioner_agent.events import FIELDS_OF, Field, metadata_problems

#: Fields whose variable the official client does not read, of all kinds and of one.
_NOT_READ = frozenset({"status", "started_at", "completed_at", "skip_preflight_checks", "extra_metadata"})
_NOT_READ_OF = {"build": _NOT_READ, "deployment": _NOT_READ | {"scm_branch", "build_url"}}
_SCM = ("scm_sha", "scm_branch", "scm_repository")


#: The variables that give CI systems away, so that a call outside CI need not load the table in `ci`.
SIGNS = (
    "GITHUB_ACTIONS", "GITLAB_CI", "JENKINS_URL", "CIRCLECI", "BITBUCKET_BUILD_NUMBER", "TF_BUILD", "TRAVIS",
    "RD_JOB_ID",
)  # fmt: skip


class Detected(NamedTuple):
    """What the environment says of the run that this process is a part of."""

    #: Name of the CI system, empty outside CI.
    system: str
    #: Field, or `link` and `by…` which each kind of event names its own way -> (value, variables it came from).
    values: dict[str, tuple[str, str]]
    #: Automatic extra_metadata, `vi_…`.
    metadata: dict[str, str]
    #: What keeps a re-run apart; never sent.
    run_attempt: str | None


NOTHING = Detected("", {}, {}, None)


class Filled(NamedTuple):
    """An event's fields, not yet validated, and where those come from that were not given."""

    fields: dict[str, Any]
    #: Field -> variables, the CI system's name for automatic extra_metadata, or `git`.
    sources: dict[str, str]


class Filler:
    """What environment and CI system say of all events of a kind, looked up once: a call may have thousands."""

    def __init__(self, kind: str, env: Mapping[str, str], detected: Detected) -> None:
        self._kind = kind
        self._detected = detected
        #: Field -> (value, source)
        self._others = fields_of(kind, detected)
        for name, field in FIELDS_OF[kind].items():
            variable = variable_of(field)
            if name not in _NOT_READ_OF[kind] and not _is_blank(env.get(variable)):
                self._others[name] = env[variable], variable

    def fill(self, given: Mapping[str, Any], checkout: Mapping[str, str]) -> Filled:
        """Fill what *given* leaves open, field by field; unknown names in *given* are kept.

        A value that is null or blank leaves its field open; nothing but *given* has a `status`. Of *checkout*, all
        or nothing is used, for builds outside CI: one source must tell commit, branch and repository.
        """
        fields = dict(given)
        sources: dict[str, str] = {}
        for name, (value, source) in self._others.items():
            if _is_blank(given.get(name)) and not _is_blank(value):
                fields[name], sources[name] = value, source
        _add_metadata(fields, sources, self._detected)
        if checkout and self._kind == "build" and not self._detected.system:
            _add_checkout(fields, sources, checkout)
        return Filled(fields, sources)


def _add_checkout(fields: dict[str, Any], sources: dict[str, str], checkout: Mapping[str, str]) -> None:
    if all(_is_blank(fields.get(name)) for name in _SCM):
        found = {name: checkout[name] for name in _SCM if name in checkout}
        fields |= found
        sources |= dict.fromkeys(found, "git")


def variable_of(field: Field) -> str:
    """Return the name of the environment variable for *field*, as the official client has it."""
    return "VERSIONER_" + field.option.removeprefix("--").replace("-", "_").upper()


def fields_of(kind: str, detected: Detected) -> dict[str, tuple[str, str]]:
    """Return an event's field -> (value, variables it came from).

    As the official client: a deployment has no branch, and a link that is both its build's and its own.
    """
    found: dict[str, tuple[str, str]] = {}
    who = "built" if kind == "build" else "deployed"
    for name, told in detected.values.items():
        if name == "link":
            found["build_url"] = told
            if kind == "deployment":
                found["deploy_url"] = told
        elif name.startswith("by"):
            found[f"{who}_{name}"] = told
        elif name != "scm_branch" or kind == "build":
            found[name] = told
    return found


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _add_metadata(fields: dict[str, Any], sources: dict[str, str], detected: Detected) -> None:
    """Put the automatic keys under the user's own, unless they alone make it too large."""
    own = fields.get("extra_metadata")
    if not detected.metadata or not (own is None or isinstance(own, dict)):
        return
    merged = {**detected.metadata, **(own or {})}
    if not metadata_problems(merged):
        fields["extra_metadata"] = merged
        sources["extra_metadata"] = f"{detected.system}, beside your own" if own else detected.system
