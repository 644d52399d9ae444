"""The man page and the completions are those of the commands that there are, and the shells make sense of them."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess

import pytest
from reference import NAME, SHARE, WRITTEN, commands

BASH, ZSH, FISH = list(WRITTEN)[1:]
COMPLETED = {
    "": {"enqueue", "list", "flush", "service"},
    "fl": {"flush"},
    "enqueue ": {"build", "deployment", "json"},
    "service inst": {"install"},
    "list --state fa": {"failed"},
    "enqueue build --product payments --sta": {"--started-at", "--status"},
    "enqueue build --status comp": {"completed"},
    "list --stat": {"--state"},
    "list --reason ga": {"gave_up"},
    "amend 7 --unset scm_s": {"scm_sha"},
    "completion f": {"fish"},
}


def needs(tool):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool}")


def ran(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, **more).stdout


@pytest.mark.parametrize("name", WRITTEN)
def test_each_file_is_what_the_commands_say(name):
    """`python tests/reference.py` renews them."""
    assert (SHARE / name).read_text("utf-8") == WRITTEN[name]()


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: command.path)
def test_every_command_has_examples_that_call_it(command):
    assert any(f"{NAME} {command.path}" in example for example in command.examples)


@needs("mandoc")
def test_the_man_page_is_sound():
    found = ran("mandoc", "-T", "lint", "-W", "warning", str(SHARE / next(iter(WRITTEN))))

    assert found == ""


def by_bash(line):
    words = [NAME, *line.split(" ")]
    script = f'source "$1"; COMP_WORDS=("${{@:2}}"); COMP_CWORD={len(words) - 1}; _versioner_agent; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return set(ran("bash", "-c", script, "bash", str(SHARE / BASH), *words).split())


def by_fish(line):
    script = f'source {SHARE / FISH}; complete -C "{NAME} {line}"'
    return {offered.split("\t")[0] for offered in ran("fish", "--no-config", "-c", script).splitlines()}


def by_zsh(line):
    """What zsh offers on a terminal of its own when TAB is pressed."""
    setting_up = (
        f"PS1=; fpath=({(SHARE / ZSH).parent} $fpath); autoload -Uz compinit; compinit -u -D",
        'compadd() { builtin compadd -O offered "$@"; print -rl -- "" "offer "$^offered; builtin compadd "$@" }',
        "listed() { _main_complete; print THE''-END; exit }; zle -C listed complete-word listed; bindkey '^I' listed",
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("zsh", ["zsh", "-f", "-i"])
    os.write(terminal, "".join(f"{each}\n" for each in (*setting_up, f"{NAME} {line}\t")).removesuffix("\n").encode())
    seen = b""
    while b"THE-END" not in seen:
        assert select.select([terminal], [], [], 60)[0], seen  # else it would be waited for without an end
        seen += os.read(terminal, 65536)
    os.close(terminal)
    os.waitpid(pid, 0)
    return {found.decode().strip() for found in re.findall(rb"^offer (.*)\r$", seen, re.MULTILINE)}


@pytest.mark.parametrize("line", COMPLETED)
@pytest.mark.parametrize(
    "shell",
    [
        pytest.param(by_bash, marks=needs("bash")),
        pytest.param(by_fish, marks=needs("fish")),
        pytest.param(by_zsh, marks=needs("zsh")),
    ],
    ids=["bash", "fish", "zsh"],
)
def test_a_tab_offers_what_fits(shell, line):
    offered = shell(line)

    assert COMPLETED[line] <= offered
    typed = line.split(" ")[-1]
    assert {word for word in offered if not word.startswith(typed)} == set()


@needs("bash")
def test_files_are_offered_where_a_file_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "events.json").touch()

    assert by_bash("enqueue json ev") == {"events.json"}
    assert by_bash("status --db ") == {"events.json"}
    assert by_bash("run --ca-bundle ") == by_bash("doctor --metrics-file ev") == {"events.json"}


@needs("bash")
def test_behind_two_dashes_commands_are_offered():
    assert "bash" in by_bash("exec build --product p -- bas")
