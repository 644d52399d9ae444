"""How options may be spelled: `--flag=false`, as the official client has it, and `--wait` beside `--wait=30`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

#: What Go's strconv.ParseBool takes, in lower case, and what people write.
_TRUTH = {
    "1": True, "t": True, "true": True, "yes": True, "on": True,
    "0": False, "f": False, "false": False, "no": False, "off": False,
}  # fmt: skip


class Bare(click.Option):
    """An option whose value may be left out: then it is *bare*. It follows an equals sign; a number, also a space."""

    def __init__(self, *args: Any, bare: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bare = bare

    def takes(self, word: str) -> bool:
        """Tell whether *word*, which stands behind it, is its value."""
        return isinstance(self.type, click.FloatRange) and word.replace(".", "", 1).isdecimal()


class SpelledCommand(click.Command):
    """A command that understands all of these spellings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write each option as click reads it."""
        return super().parse_args(ctx, _spelled(ctx, self.params, args))


def _spelled(ctx: click.Context, params: Iterable[click.Parameter], args: Sequence[str]) -> list[str]:
    options = {word: option for option in params if isinstance(option, click.Option) for word in option.opts}
    result: list[str] = []
    left = list(reversed(args))
    while left:
        word = left.pop()
        if word == "--" or (not ctx.allow_interspersed_args and not word.startswith("-")):
            return [*result, word, *reversed(left)]
        name, equals, value = word.partition("=")
        option = options.get(name)
        if isinstance(option, Bare):
            given = left.pop() if not equals and left and option.takes(left[-1]) else option.bare
            result.append(word if equals else f"{word}={given}")
        elif option is not None and option.is_flag and equals:
            result += [name] if _truth(ctx, option, value) else []
        else:
            result.append(word)
            if option is not None and not option.is_flag and not equals and left:
                result.append(left.pop())  # its value, whatever that looks like
    return result


def _truth(ctx: click.Context, option: click.Option, value: str) -> bool:
    found = truth_of(value)
    if found is None:
        raise click.BadParameter("must be true or false", ctx=ctx, param=option)
    return found


def truth_of(word: str) -> bool | None:
    """Return the truth value that *word* names, None where it names none."""
    return _TRUTH.get(word.strip().lower())


def as_truth(ctx: click.Context, param: click.Parameter, value: str | None) -> bool | None:
    """Return what an option says in any of these words; None where it is not given."""
    found = None if value is None else truth_of(value)
    if found is None and value is not None:
        raise click.BadParameter("must be true or false", ctx=ctx, param=param)
    return found
