"""One destination per outbox: what this process is configured for, held against what the outbox is bound to."""

from __future__ import annotations

from collections.abc import Mapping

from versioner_agent import config, urls
from versioner_agent.config import Settings
from versioner_agent.delivery import Sender, Target
from versioner_agent.errors import AgentError, ConfigError, OtherDestination
from versioner_agent.flusher import Options
from versioner_agent.ledger import Ledger
from versioner_agent.outbox import Destination
from versioner_agent.text import key_account


class Account:
    """The one account whose key may deliver from this outbox; None while it is not known.

    A key file can change between two requests, so that checking when the agent starts is not enough.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name

    def bind(self, name: str) -> None:
        """Take the account of the first verdict."""
        self.name = self.name or name

    def read_key(self, settings: Settings, env: Mapping[str, str]) -> str | None:
        """Return the API key as it is now; raises OtherDestination for one of another account."""
        key = config.read_key(settings, env)
        account = key_account(key) if key else None
        if self.name and account and account != self.name:
            raise OtherDestination(
                [f"the API key is of account {account}, this outbox delivers to account {self.name}"],
                "give it a key of its own account, or `flush --new-destination`",
            )
        return key


def sending(settings: Settings, env: Mapping[str, str], account: Account) -> tuple[Sender, Options, Destination]:
    """Return a sender as configured, its options and where it sends to; raises ConfigError."""
    proxy = urls.proxy_for(settings.api_url, (settings.proxy, settings.no_proxy), env)
    target = Target(settings.api_url, settings.timeout, settings.ca_bundle, proxy)
    try:
        sender = Sender(target, lambda: account.read_key(settings, env))
    except ConfigError as exc:
        if settings.proxy or not exc.problems[0].startswith("proxy: "):
            raise
        named = "the proxy that the environment names (HTTPS_PROXY, HTTP_PROXY or ALL_PROXY)"
        raise ConfigError([exc.problems[0].replace("proxy:", named, 1)], exc.hint) from exc
    options = Options(**{name: settings.values[name] for name in Options._fields})
    return sender, options, configured(settings, env)


def configured(settings: Settings, env: Mapping[str, str]) -> Destination:
    """Return the destination that settings and key name."""
    key = key_or_none(settings, env)
    return Destination(urls.origin_of(settings.api_url), key_account(key) if key else None)


def key_or_none(settings: Settings, env: Mapping[str, str]) -> str | None:
    """Return the key, None also where it can't be read: the sender says why each time it matters."""
    try:
        return config.read_key(settings, env)
    except AgentError:
        return None


def check(ledger: Ledger, here: Destination) -> Account:
    """Refuse to send elsewhere what waits for one place; an outbox with nothing pending may move."""
    bound, _, _ = ledger.destination()
    if not here.differs_from(bound):
        return Account(bound.account)
    pending = ledger.pending()
    if pending:
        raise OtherDestination(
            f"{pending} pending events of this outbox are for {bound}, this is configured for {here}; nothing was sent",
            "correct api_url and key, use another outbox (--db), or `flush --new-destination` to send them there",
        )
    ledger.unbind()
    return Account(None)
