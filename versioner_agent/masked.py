"""Settings as they may be shown: where each comes from, of secrets only what is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from versioner_agent import config
from versioner_agent.config import Key, Settings
from versioner_agent.configfile import File
from versioner_agent.text import key_public_part, mask_keys
from versioner_agent.urls import without_password


class Row(NamedTuple):
    """A setting as it is shown: a secret's value is masked already."""

    key: str
    value: str | float | bool | None
    source: str
    line: int | None

    @property
    def cells(self) -> tuple[str, str, str]:
        """Key, value and place as text."""
        value = self.value
        if value is None:
            text = "-"
        elif isinstance(value, bool):
            text = str(value).lower()
        else:
            text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
        return self.key, text, f"{self.source}:{self.line}" if self.line else self.source


def rows(settings: Settings, key: Key, files: Mapping[str, File]) -> list[Row]:
    """Return all settings; *files* by name."""
    found = []
    for option in config.OPTIONS:
        source = key.source if option.is_secret else settings.sources[option.key]
        file = files.get(source)
        line = file.line_of(option.key) if file else None
        found.append(Row(option.key, _shown(option.key, settings.values[option.key], key), mask_keys(source), line))
    return found


def _shown(name: str, value: Any, key: Key) -> Any:
    if config.BY_KEY[name].is_secret:
        return key_public_part(key.key) if key.key else None
    if not isinstance(value, str):
        return value
    # A key that was put where a file's name belongs is a secret all the same.
    return mask_keys(without_password(value) if name == "proxy" else value)
