"""Rows become records, each column of its own type whatever a damaged file holds."""

from __future__ import annotations

import pytest

from versioner_agent.records import _COLUMN_KINDS, Record, as_record

OF_KIND = {"str": "word", "int": 7, "float": 1.5, "bytes": b"raw"}
SOUND = [OF_KIND[kind.removesuffix(" | None")] for kind in _COLUMN_KINDS]
EMPTY = {"str": "", "int": 0, "float": 0.0, "bytes": b""}


def test_a_sound_row_is_taken_as_it_is():
    assert as_record(SOUND) == Record(*SOUND)


@pytest.mark.parametrize("column", range(len(SOUND)), ids=Record._fields)
@pytest.mark.parametrize("value", ["word", 7, 1.5, b"raw", None], ids=["text", "whole", "number", "bytes", "none"])
def test_whatever_a_column_holds_the_record_has_its_own_type(column, value):
    kind = _COLUMN_KINDS[column]
    plain = kind.removesuffix(" | None")

    found = as_record([*SOUND[:column], value, *SOUND[column + 1 :]])[column]

    allowed = (int, float) if plain == "float" else (type(OF_KIND[plain]),)
    if isinstance(value, allowed):
        assert found == value
    else:
        assert found == EMPTY[plain] or isinstance(found, allowed) or (found is None and kind != plain)
