"""`doctor`: what is wrong with the outbox, and what to do about it."""

from __future__ import annotations

from typing import Any

import click

from versioner_agent.cli._common import echo, echo_json, json_option, outbox_settings, settings_options
from versioner_agent.text import printable


@click.command()
@click.option("--acknowledge", is_flag=True, help="Take note of past damage: `status` stops telling of it.")
@click.option("--deep", is_flag=True, help="Read the whole outbox, however large; queuing waits meanwhile.")
@settings_options()
@json_option
def doctor(acknowledge: bool, deep: bool, as_json: bool, **options: Any) -> int:
    """Look for damage of the outbox; exits 1 where there is something to do.

    After damage, `status` tells of it until somebody has looked at it and said --acknowledge.

    \b
    versioner-agent doctor
    """
    from versioner_agent.damage import acknowledged  # noqa: PLC0415
    from versioner_agent.doctor import Finding, examine  # noqa: PLC0415
    from versioner_agent.storage import Store  # noqa: PLC0415

    settings = outbox_settings(options)
    store = Store(settings.db, settings.busy_timeout)
    try:
        if acknowledge:
            damage = acknowledged(store)
            words = "there was nothing to acknowledge" if damage is None else f"acknowledged: {damage}"
            findings = [Finding("damage", "ok", words)]
        else:
            findings = examine(store, deep=deep)
    finally:
        store.close()
    for finding in findings:
        if as_json:
            echo_json(finding._asdict())
        else:
            echo(f"{finding.level:<8} {finding.check:<8} {printable(finding.finding)}")
            if finding.action:
                echo(f"{'':<17} {printable(finding.action)}")
    return 0 if all(finding.level == "ok" for finding in findings) else 1
