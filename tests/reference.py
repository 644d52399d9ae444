"""The man page and the completions, written from the commands themselves: `python tests/reference.py` renews them.

They are static files, so that a TAB starts no program, and a package can put them where they belong.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import sys
from typing import NamedTuple

import click

from versioner_agent import __version__, cli, config, events, filters

ROOT = pathlib.Path(__file__).parent.parent
SHARE = ROOT / "versioner_agent" / "share"
NAME = "versioner-agent"
DATE = events.rfc3339(events.RELEASED_AT)[:10]
#: Placeholders of values that are files.
FILES = ("PATH", "FILE", "FILE|-", "DIR", "FILE.tar.gz")
#: What options take that say no more than VALUE or TEXT.
WORDS = {
    "log_format": ("text", "json"),
    "log_level": ("debug", "info", "warning", "error"),
    "reason": filters.REASONS,
    "unset": tuple(field.name for field in events.FIELDS),
    **{option.key: ("true", "false") for option in config.OPTIONS if isinstance(option.default, bool)},
}


class Option(NamedTuple):
    """One option of a command."""

    names: tuple[str, ...]
    value: str  # how --help names its value, empty for a flag
    words: tuple[str, ...]  # what it takes, where that is known
    is_file: bool
    help: str

    @property
    def takes_next(self):
        """Whether the next word is its value: one that may be left out is written behind `=`."""
        return bool(self.value) and not self.value.startswith("[")


class Command(NamedTuple):
    """One command, by the words that call it."""

    path: str
    summary: str
    usage: str
    paragraphs: list[str]
    examples: list[str]
    options: list[Option]
    subcommands: list[str]
    words: tuple[str, ...]  # what its arguments may be, where that is known
    takes_files: bool
    runs_commands: bool


def commands():
    """Every command, in the order of --help, groups before what is in them."""
    root = click.Context(cli.root, info_name=NAME, **cli.root.context_settings)
    for name, entry in cli.COMMANDS.items():
        command = cli.root.get_command(root, name)
        context = click.Context(command, info_name=name, parent=root)
        yield described(command, context, name, entry.summary)
        if isinstance(command, click.Group):
            for sub in command.list_commands(context):
                inner = command.get_command(context, sub)
                deeper = click.Context(inner, info_name=sub, parent=context)
                yield described(inner, deeper, f"{name} {sub}", inner.get_short_help_str(120))


def described(command, context, path, summary):
    paragraphs, examples = told(command.help or "")
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    metavars = (
        [each.make_metavar(context) for each in arguments] if _WITH_CONTEXT else [a.make_metavar() for a in arguments]
    )
    return Command(
        path,
        summary,
        " ".join([NAME, path, *command.collect_usage_pieces(context)]),
        paragraphs,
        examples,
        [option for option in map(option_of, command.get_params(context)) if option],
        command.list_commands(context) if isinstance(command, click.Group) else [],
        tuple(word for each in arguments for word in getattr(each.type, "choices", ())),
        takes_files=any(re.search("FILE|PATH", metavar) for metavar in metavars),
        runs_commands=path.startswith("exec "),
    )


_WITH_CONTEXT = "ctx" in click.Argument.make_metavar.__code__.co_varnames


def told(text):
    """A help text's paragraphs, and the examples in it."""
    paragraphs, examples = [], []
    for part in re.split(r"\n\s*\n", text.strip()):
        if part.lstrip().startswith("\b"):
            lines = [line.strip() for line in part.strip().split("\n")[1:]]
            examples += [line for line in lines if line and not line.endswith(":")]
        else:
            paragraphs.append(" ".join(part.split()))
    return paragraphs, examples


def option_of(parameter):
    if not isinstance(parameter, click.Option) or parameter.hidden:
        return None
    value = "" if parameter.is_flag or parameter.count else (parameter.metavar or parameter.type.name.upper())
    words = tuple(map(str, getattr(parameter.type, "choices", WORDS.get(parameter.name, ()))))
    if "--status" in parameter.opts:
        words = ("auto", *events.STATUSES)
    is_file = value in FILES or isinstance(parameter.type, click.Path)
    return Option(
        (*parameter.opts, *parameter.secondary_opts),
        "|".join(words) if value == "CHOICE" else value,
        words,
        is_file,
        parameter.help or "",
    )


# --- the man page


def roff(text):
    """*text* as roff takes it: nothing in it is a request, an escape, or a dash that can't be copied."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("'", "\\(aq").replace("…", "...")
    return re.sub(r"(?m)^\.", r"\\&.", text)


def man_page():
    lines = [
        f'.TH VERSIONER\\-AGENT 1 "{DATE}" "{NAME} {__version__}" "User Commands"',
        ".SH NAME",
        f"{roff(NAME)} \\- buffer Versioner events on this host and deliver them in order",
        ".SH SYNOPSIS",
        f".B {roff(NAME)}",
        "\\fICOMMAND\\fR [\\fIOPTIONS\\fR] ...",
        ".SH DESCRIPTION",
    ]
    lines += paragraphs(told(cli.root.help)[0])
    lines.append(".SH COMMANDS")
    for command in commands():
        lines += [".SS " + roff(command.usage)]
        lines += paragraphs(command.paragraphs)
        if command.examples:
            lines += [".PP", "Examples:", ".PP", ".nf", ".RS", *map(roff, command.examples), ".RE", ".fi"]
        for option in command.options:
            value = f" \\fI{roff(option.value)}\\fR" if option.value else ""
            names = ", ".join(f"\\fB{roff(name)}\\fR" for name in option.names)
            lines += [".TP", names + value, roff(option.help)]
    return "\n".join([*lines, *exit_codes(), *environment(), *FOOT]) + "\n"


def paragraphs(texts):
    return "\n.PP\n".join(map(roff, texts)).split("\n")


def table(heading):
    """The rows of the first table behind a heading of README."""
    parts = (ROOT / "README.md").read_text("utf-8").split(f"\n### {heading}\n")[1].split("\n\n")
    rows = next(part for part in map(str.strip, parts) if part.startswith("|")).split("\n")[2:]
    return [[cell.replace("`", "").strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def exit_codes():
    yield ".SH EXIT STATUS"
    for code, meaning in table("Exit codes"):
        yield from (".TP", f"\\fB{roff(code)}\\fR", roff(re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", meaning)))


def environment():
    yield ".SH ENVIRONMENT"
    for option in config.OPTIONS:
        default = f" Default: {option.default}." if option.default not in (None, False) else ""
        yield from (".TP", f"\\fB{option.env}\\fR", roff(option.help + default))
    yield from (".TP", f"\\fB{config.ENV_CONFIG}\\fR", "Configuration file; replaces both standard ones.")


FOOT = (
    ".SH FILES",
    ".TP",
    f"\\fI{config.SYSTEM_FILE.replace('-', chr(92) + '-')}\\fR",
    "Settings of the host, for every user to read.",
    ".TP",
    "\\fI~/.config/versioner\\-agent/config.toml\\fR",
    "Settings of the user, which come first.",
    ".TP",
    "\\fI/var/lib/versioner\\-agent/outbox.db\\fR",
    "The outbox of the service.",
    ".TP",
    "\\fI~/.local/state/versioner\\-agent/outbox.db\\fR",
    "The outbox of the user, where nothing else is said.",
    ".SH SEE ALSO",
    ".BR systemctl (1),",
    ".BR journalctl (1)",
)


# --- completions


def groups():
    """Path -> what may come next; the empty path is the program itself."""
    found = {"": list(cli.COMMANDS)}
    return found | {command.path: command.subcommands for command in commands() if command.subcommands}


def bash():
    every = list(commands())
    known = "|".join(f'" {command.path}"' for command in every)
    lines = [
        f"# bash completion for {NAME}; static, no program is run",
        "shopt -s extglob",
        "_versioner_agent() {",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} path= word i",
        "    COMPREPLY=()",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        word=${COMP_WORDS[i]}",
        '        if [[ $word == -- && $path == " exec "* ]]; then',
        '            COMPREPLY=($(compgen -c -- "$cur"))',
        '            ((i + 1 < COMP_CWORD)) && COMPREPLY=($(compgen -f -- "$cur")) && compopt -o filenames 2>/dev/null',
        "            return",
        "        fi",
        f'        case "$path $word" in {known}) path="$path $word" ;; esac',
        "    done",
        "    # bash breaks words at `=`",
        '    [[ $cur == "=" ]] && cur=',
        '    [[ $prev == "=" ]] && prev=${COMP_WORDS[COMP_CWORD - 2]}',
        '    case "$path $prev" in',
    ]
    for command in every:
        named = {}
        for option in command.options:
            if option.takes_next:
                named.setdefault(bash_values(option), []).extend(option.names)
        for action, names in named.items():
            lines.append(f'        " {command.path} "@({"|".join(names)})) {action}; return ;;')
    lines += ["    esac", '    case "$path" in']
    for path, following in groups().items():
        options = "--help --version" if not path else "--help"
        where = f'" {path}"' if path else '""'
        lines.append(f"        {where}) COMPREPLY=($(compgen -W '{' '.join(following)} {options}' -- \"$cur\")) ;;")
    for command in every:
        if command.subcommands:
            continue
        names = " ".join([*command.words, *(name for option in command.options for name in option.names)])
        offered = f"COMPREPLY=($(compgen -W '{names}' -- \"$cur\"))"
        if command.takes_files:
            offered = f"if [[ $cur == -* ]]; then {offered}; else {BASH_FILES}; fi"
        lines.append(f'        " {command.path}") {offered} ;;')
    lines += ["    esac", "}", f"complete -F _versioner_agent {NAME}", ""]
    return "\n".join(lines)


BASH_FILES = 'COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames 2>/dev/null'


def bash_values(option):
    if option.is_file:
        return BASH_FILES
    return f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(option.words))} -- "$cur"))' if option.words else ":"


def zsh():
    every = list(commands())
    lines = [f"#compdef {NAME}", "# static, no program is run"]
    for command in every:
        name = zsh_name(command.path)
        if command.subcommands:
            following = {each.path: each.summary for each in every}
            lines += zsh_group(
                name, [(sub, following[f"{command.path} {sub}"]) for sub in command.subcommands], command.path
            )
            continue
        lines += [f"{name}() {{", "    _arguments -s \\"]
        lines += [f"        {zsh_option(option)} \\" for option in command.options]
        if command.runs_commands:
            lines.append("        '*:::command:_normal'")
        else:
            words = f"({' '.join(command.words)})" if command.words else ""
            lines.append("        '*:file:_files'" if command.takes_files else f"        '*: :{words}'")
        lines.append("}")
    lines += zsh_group("_versioner_agent", [(name, entry.summary) for name, entry in cli.COMMANDS.items()], "")
    return "\n".join([*lines, '_versioner_agent "$@"', ""])


def zsh_name(path):
    return "_versioner_agent_" + re.sub(r"\W", "_", path)


def zsh_quoted(text):
    return (
        text.replace("\\", "\\\\")
        .replace("'", "'\\''")
        .replace("[", "\\[")
        .replace("]", "\\]")
        .replace(":", "\\:")
        .replace("`", "\\`")
    )


def zsh_option(option):
    names = option.names[0] if len(option.names) == 1 else "{" + ",".join(option.names) + "}"
    value = ""
    if option.takes_next:
        action = "_files" if option.is_file else f"({' '.join(option.words)})" if option.words else " "
        value = f":{zsh_quoted(option.value)}:{action}"
    many = "*" if option.names[0] in ("--meta", "--set", "--unset") else ""
    equals = "=" if option.takes_next and len(option.names) == 1 else ""
    quoted_names = f"'{many}{names}{equals}" if len(option.names) == 1 else f"{names}'"
    return f"{quoted_names}[{zsh_quoted(option.help)}]{value}'"


def zsh_group(name, following, path):
    lines = [f"{name}() {{", "    local context state line", "    local -a following=("]
    lines += [f"        '{sub}:{zsh_quoted(summary)}'" for sub, summary in following]
    lines += [
        "    )",
        "    _arguments -C '(- *)'{-h,--help}'[Show the help and exit.]' '1:command:->command' '*::argument:->argument'",
        "    case $state in",
        "        command) _describe command following ;;",
        "        argument)",
        "            case $words[1] in",
    ]
    lines += [f"                {sub}) {zsh_name(f'{path} {sub}'.strip())} ;;" for sub, _ in following]
    return [*lines, "            esac ;;", "    esac", "}"]


def fish():
    lines = [
        f"# fish completion for {NAME}; static, no program is run",
        "function __versioner_agent_at",
        "    # Whether the words so far call the command that is named by the arguments.",
        "    set -l words (commandline -opc)",
        "    set -e words[1]",
        "    set -l called",
        "    for word in $words",
        '        string match -q -- "-*" $word; and continue',
        "        set -a called $word",
        "    end",
        "    set -l wanted (count $argv)",
        "    test (count $called) -ge $wanted; or return 1",
        '    test $wanted -eq 0; or test "$called[1..$wanted]" = "$argv"',
        "end",
        "function __versioner_agent_next",
        "    # Whether the next word is the first one behind the command that is named by the arguments.",
        "    set -l words (commandline -opc)",
        "    set -e words[1]",
        '    set -l called (string match -v -- "-*" $words)',
        '    test "$called" = "$argv"',
        "end",
        f"complete -c {NAME} -f",
    ]
    summaries = {command.path: command.summary for command in commands()}
    for path, following in groups().items():
        for sub in following:
            summary = fish_quoted(summaries[f"{path} {sub}".strip()])
            lines.append(f"complete -c {NAME} -n '__versioner_agent_next {path}' -a {sub} -d {summary}")
    for command in commands():
        at = f"complete -c {NAME} -n '__versioner_agent_at {command.path}'"
        lines += [f"{at} {fish_option(option)}" for option in command.options if not command.subcommands]
        if command.words:
            lines.append(f"{at} -a {fish_quoted(' '.join(command.words))}")
        if command.takes_files or command.runs_commands:
            lines.append(f"{at} -F")
    return "\n".join([*lines, ""])


def fish_quoted(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def fish_option(option):
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
    value = ""
    if option.takes_next:
        value = (
            " -r -F" if option.is_file else f" -x -a {fish_quoted(' '.join(option.words))}" if option.words else " -x"
        )
    return f"{names}{value} -d {fish_quoted(option.help)}"


#: Where each file belongs below `share/` of a prefix -> what writes it.
WRITTEN = {
    "man/man1/versioner-agent.1": man_page,
    "bash-completion/completions/versioner-agent": bash,
    "zsh/site-functions/_versioner-agent": zsh,
    "fish/vendor_completions.d/versioner-agent.fish": fish,
}


def main():
    for name, write in WRITTEN.items():
        path = SHARE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(write(), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
