"""What people are shown of strings that others chose."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from versioner_agent import text


@pytest.mark.parametrize("value", ["", "payments", "zürich 日本 🚀", "tab-free ~!", "a\\b"], ids=ascii)
def test_harmless_text_is_shown_as_it_is(value):
    assert text.printable(value) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"), ("a\nb\r\t", "a\\nb\\r\\t"), ("\x00", "\\x00"), ("\x9b2J", "\\x9b2J"),
        ("\u202eabc", "\\u202eabc"), ("a\u200bb", "a\\u200bb"), ("\u2028", "\\u2028"), ("\ud800", "\\ud800"),
        ("\ue000", "\\ue000"), ("\U000e0041", "\\U000e0041"), ("\ufeff", "\\ufeff"),
    ],
    ids=ascii,
)  # fmt: skip
def test_what_steers_a_terminal_is_shown_as_an_escape(value, shown):
    assert text.printable(value) == shown


@pytest.mark.parametrize(
    "value",
    [
        "##vso[task.setvariable variable=PATH]/tmp/evil",
        "a ##[stop-commands]x",
        "###[x",
        "##[##[",
        "#\u200b#[x",
        "##VSO[x",
    ],
    ids=ascii,
)
def test_nothing_commands_a_ci_system_wherever_it_stands_in_a_line(value):
    """Azure DevOps and GitHub Actions look for these marks in every line of a log."""
    shown = text.printable(f"warning: {value}")
    line = text.json_line({"scm_sha": value}, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))

    assert not re.search(r"##\w*\[", shown)
    assert not re.search(r"##\w*\[", line)
    assert json.loads(line) == {"scm_sha": value}


@pytest.mark.parametrize("value", ["issue ## 7 [x]", "#[x]", "a##b"])
def test_what_commands_nobody_stays_as_it_is(value):
    assert text.printable(value) == value


@given(st.text(st.characters()))
def test_anything_becomes_one_encodable_line(value):
    shown = text.printable(value)

    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert "\x1b" not in shown
    assert text.printable(shown) == shown


@given(st.text(st.characters(), max_size=30), st.integers(1, 20))
def test_bounded_text_can_be_stored(value, limit):
    cut = text.bounded(value, limit)

    assert len(cut) <= limit
    assert "\0" not in cut
    assert (len(value) <= limit) == (not cut.endswith("…") or (value.endswith("…") and len(value) <= limit))
    cut.encode()


@pytest.mark.parametrize(("value", "cut"), [("abc", "abc"), ("abcd", "ab…"), ("a\0\ud800", "a\ufffd?")], ids=ascii)
def test_bounded_text_says_that_it_was_cut(value, cut):
    assert text.bounded(value, 3) == cut


@pytest.mark.parametrize(
    ("value", "masked"),
    [
        ("sk_acme_k1_abc", "sk_acme_***"), ("Bearer sk_acme_k1_a-b_c.", "Bearer sk_acme_***."),
        ('{"key":"sk_a-b_k1_x"}', '{"key":"sk_a-b_***"}'), ("sk_a_b sk_c_d", "sk_a_*** sk_c_***"),
        ("task_list", "task_list"), ("sk_", "sk_"), ("sk_acme", "sk_acme"),
    ],
)  # fmt: skip
def test_keys_are_masked_but_their_account(value, masked):
    assert text.mask_keys(value) == masked


def test_long_key_is_masked_to_its_end():
    assert text.mask_keys("sk_acme_k1_" + "x" * 5000) == "sk_acme_***"


@pytest.mark.parametrize(
    ("key", "account"),
    [("sk_acme_k1_x", "acme"), (" sk_acme-2_k1_x\n", "acme-2"), ("sk_acme", None), ("", None), ("token", None)],
)
def test_account_is_read_from_a_key(key, account):
    assert text.key_account(key) == account


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("sk_acme_k2_s3cr-et_1", "sk_acme_k2_…"),
        (" sk_my-company_k1_x\n", "sk_my-company_k1_…"),
        ("sk_acme_s3cret", "sk_acme_…"),
        ("sk_acme_s3cretthatislongerthananid_x", "sk_acme_…"),
        ("s3cret", "(a key of another form)"),
        ("", "(a key of another form)"),
    ],
)
def test_of_a_key_only_account_and_id_are_shown(key, shown):
    assert text.key_public_part(key) == shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-1, "0 s"), (0, "0 s"), (0.9, "0 s"), (1, "1 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"),
     (86_399, "23 h"), (86_400, "1 d"), (1e9, "11574 d")],
)  # fmt: skip
def test_duration_uses_the_largest_unit_that_fits(seconds, said):
    assert text.duration(seconds) == said


@pytest.mark.parametrize(
    ("then", "said"),
    [(None, "never"), (100.0, "just now"), (100.5, "just now"), (99.0, "1 s ago"), (40.0, "1 min ago"),
     (160.0, "in 1 min")],
)  # fmt: skip
def test_age_speaks_of_now(then, said):
    assert text.age(then, 100.0) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "1970-01-01 00:00:00 UTC"), (-1e99, "1970-01-01 00:00:00 UTC"), (1e99, "9999-12-31 23:59:59 UTC"),
     (1_794_000_000.9, "2026-11-06 21:20:00 UTC")],
)  # fmt: skip
def test_any_moment_can_be_said(seconds, said):
    assert text.utc_time(seconds) == said
