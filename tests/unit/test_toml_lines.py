"""The lines of a file's keys: exact for any valid TOML, and no text whatever makes the search fail."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from versioner_agent import config
from versioner_agent.configfile import file_of
from versioner_agent.toml_lines import NotToml, key_lines, parse

BASE = 'a = 1\n\n"b" = 2 # x = 1\n'


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (BASE + "'c d' = 3", {"a": 1, "b": 3, "c d": 4}),
        ("\n\n  a = 1\n\t''.x = 2\n\"\" . y = 3", {"a": 3, "": 4}),
        ("a.b = 1\na.c = 2\n1.5 = 2", {"a": 1, "1": 3}),
        ("[agent]\na = 1\n[ 'other' . x ]\nb = 2\n[[list]]\nc = 3\n[agent.more]", {"agent": 1, "other": 3, "list": 5}),
        ('a = """\nb = 1\n[c]\n"""\nc = 3', {"a": 1, "c": 5}),
        ("a = '''\nb = 1\n'''''\nc = 3", {"a": 1, "c": 4}),
        ('a = """x""""\nb = "1"', {"a": 1, "b": 2}),
        ("a = '''x''''\nb = '1'", {"a": 1, "b": 2}),
        ('a = """x"\n\\""" \n"""""\nc = 3', {"a": 1, "c": 4}),
        ('a = "# \\" b" # "\nc = \'"\' # \'\nd = 1', {"a": 1, "c": 2, "d": 3}),
        ("a = [ # [[\n  'x]',\n  {b = 1, c = [\n]},\n]\nd = 1", {"a": 1, "d": 6}),
        ("a = {b = 1}\n[c] # [d]\nx = 1\n", {"a": 1, "c": 2}),
        ('["a]b"]\nx = 1\n["#c".d]\n', {"a]b": 1, "#c": 3}),
        ('"\\u0061\\"b" = 1\n', {'a"b': 1}),
        ("a = 1979-05-27 07:32:00\nb = -inf\n", {"a": 1, "b": 2}),
        ("", {}),
        ("# a = 1", {}),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_key_at_the_top_has_its_line(text, lines, end):
    content, parsed = parse(text.replace("\n", end).encode())

    assert key_lines(parsed) == lines
    assert set(content) == set(lines)


def problems_of(text):
    return [str(problem) for problem in config.check(file_of("f", text))]


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))))
def test_no_content_makes_checking_fail(data):
    """It is TOML or not, and what is wrong is told; nothing else is ever raised."""
    problems_of(data)
    with contextlib.suppress(config.ConfigError):
        config.resolve({}, {}, [file_of("f", data)])


PIECES = st.sampled_from(
    ['"', '"""', "'", "'''", "\\", "\n", "\r\n", "[", "[[", "]", "]]", "{", "}", "=", ".", ",", "#", " ", "a", "timeout",
     "api_key", "db", "= 1\n", "9", "-", "\0", "\u202e", "\ufeff", "1979-05-27", "25:00:00", "1e999", "nan", "~x"]
)  # fmt: skip


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_no_mixture_of_tomls_own_words_makes_checking_fail(text):
    problems_of(text.encode())


@settings(max_examples=500)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_valid_toml_has_a_line_for_every_key(text):
    try:
        content, parsed = parse(text.encode())
    except NotToml:
        return
    lines = key_lines(parsed)

    assert set(lines) == set(content)
    assert all(1 <= line <= parsed.count("\n") for line in lines.values())


# Statements that are right, with what could be taken for the key that is wrong.
BAIT = "concurency = 3"
GOOD = {
    "api_url": ["'https://api.example'"],
    "api_key_file": ['"/x # y"', "'''/a\n" + BAIT + "\n'''"],
    "concurrency": ["3", " 0x4 # " + BAIT],
    "timeout": ["5.5", "1_0"],
    "no_proxy": [
        '"""\n' + BAIT + '\n"""',
        '"""\\\n  ""\\""" \n' + BAIT + '"""""',
        "'''\n[x]\n" + BAIT + "'''",
        '"a,b"',
    ],
    "ca_bundle": ["'/a\"b'", '"/\\"a"'],
    "log_level": ["'info'"],
}
QUOTES = st.sampled_from(["{}", '"{}"', "'{}'", " {}", "\t{} "])
#: The same key misspelt, as its statement may look; a header ends what is at the top, so it goes last.
WRONG = st.sampled_from(
    ["concurency = 3", '"concurency" = 3', "'concurency'=[\n1,\n]", "concurency.x = 3", '"con\\u0063urency" = 3',
     "concurency = {a = 1}", 'concurency = """\n"""']
)  # fmt: skip
WRONG_TABLES = st.sampled_from(
    ["[concurency]\ntimeout = 'x'", "[ concurency . x ]", "[[concurency]]\na = 1", '["concurency"]']
)
GAP = st.sampled_from(["", "\n", "# " + BAIT + "\n", " \t\n\n"])


@st.composite
def files_with_one_misspelt_key(draw):
    """Text of valid statements with one wrong key at a random place, and the line of that."""
    keys = draw(st.permutations(list(GOOD)).flatmap(lambda all_: st.integers(0, len(all_)).map(lambda n: all_[:n])))
    good = [f"{draw(QUOTES).format(key)}= {draw(st.sampled_from(GOOD[key]))}" for key in keys]
    is_table = draw(st.booleans())
    place = len(good) if is_table else draw(st.integers(0, len(good)))
    statements = [*good[:place], draw(WRONG_TABLES if is_table else WRONG), *good[place:]]
    gaps = [draw(GAP) for _ in statements]
    before = "".join(gap + each + "\n" for gap, each in zip(gaps[:place], statements, strict=False)) + gaps[place]
    text = "\n".join(gap + each for gap, each in zip(gaps, statements, strict=True))
    if draw(st.booleans()):
        text += "\n"
    return text.replace("\n", draw(st.sampled_from(["\n", "\r\n"]))), before.count("\n") + 1


@settings(max_examples=500)
@given(files_with_one_misspelt_key())
def test_a_misspelt_key_is_told_in_its_line(case):
    text, line = case

    assert problems_of(text.encode()) == [f"f:{line}: unknown key 'concurency'; did you mean 'concurrency'?"]
