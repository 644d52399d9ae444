"""`run`: the agent in the foreground."""

from __future__ import annotations

from typing import Any

import click

from versioner_agent.cli._common import DELIVERY_KEYS, load_settings, settings_options


@click.command()
@settings_options(*DELIVERY_KEYS)
def run(**options: Any) -> None:
    """Deliver events as they are queued, in the foreground, until SIGTERM or SIGINT.

    SIGHUP reads the configuration again. One agent at a time delivers from an outbox. The API key comes from
    VERSIONER_API_KEY, a systemd credential, or api_key_file, and is read again before each request.

    \b
    VERSIONER_API_KEY=sk_acme_k1_... versioner-agent run
    """
    import logging
    import os  # noqa: PLC0415

    from versioner_agent import logs  # noqa: PLC0415
    from versioner_agent.agent import Agent  # noqa: PLC0415
    from versioner_agent.config import Settings  # noqa: PLC0415
    from versioner_agent.errors import AgentError  # noqa: PLC0415
    from versioner_agent.sdnotify import Notifier  # noqa: PLC0415

    def read() -> Settings:
        return load_settings(options | {"verbose": False})

    def log_as_told(settings: Settings) -> None:
        logs.configure(settings.log_format, "debug" if options["verbose"] else settings.log_level)
        logging.getLogger(__name__).debug("outbox %s (from %s)", settings.db, settings.sources["db"])

    try:
        settings = read()
        log_as_told(settings)
        Agent(settings, os.environ, read, log_as_told).run()
    except AgentError as exc:
        Notifier(os.environ).status(exc.message)  # what `systemctl status` shows of one that ended
        raise
