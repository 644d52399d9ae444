"""`completion`: what makes a shell complete our commands and options."""

from __future__ import annotations

import click

from versioner_agent import shipped


@click.command()
@click.argument("shell", type=click.Choice(tuple(shipped.COMPLETIONS)))
def completion(shell: str) -> None:
    """Print the completion of commands, options and their words for bash, zsh or fish.

    It is static: no program is run at a TAB. `service install` puts it where all users' shells find it.

    \b
    eval "$(versioner-agent completion bash)"
    versioner-agent completion zsh > ~/.zfunc/_versioner-agent
    versioner-agent completion fish > ~/.config/fish/completions/versioner-agent.fish
    """
    click.echo(shipped.read(shipped.COMPLETIONS[shell]), nl=False)
