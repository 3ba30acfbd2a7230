"""The scanner finds the line of every value that tomllib finds, whatever spelling the document uses."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.policy.parse.toml_lines import parse_toml

TRICKY = (
    r'''# a comment with [brackets] and "quotes"
top = 1
"quoted key" = "a # is no comment"
a.b."c d" = """
several lines with [x] = 1
and \""" an escaped quote""""
lit = '''
    + "'''"
    + r"""raw "text" # [no]
  table = 2"""
    + "'''"
    + r"""

[table.inner]  # comment
list = [
  "one",   # [two]
  "two",

  # alone
  [ "nested",
    3 ],
  { x = 1, y = [ 2,
     3 ] },
]
when = 2020-01-01T00:00:00Z
[[rows]]
n = 1
[rows.sub]
z = 0
[[rows]]
n = 2
[rows.sub]
z = 1
"""
)

EXPECTED = {
    ("top",): 2,
    ("quoted key",): 3,
    ("a",): 4,
    ("a", "b", "c d"): 4,
    ("lit",): 7,
    ("table", "inner"): 10,
    ("table", "inner", "list"): 11,
    ("table", "inner", "list", 0): 12,
    ("table", "inner", "list", 1): 13,
    ("table", "inner", "list", 2): 16,
    ("table", "inner", "list", 2, 1): 17,
    ("table", "inner", "list", 3): 18,
    ("table", "inner", "list", 3, "y"): 18,
    ("table", "inner", "list", 3, "y", 1): 19,
    ("table", "inner", "when"): 21,
    ("rows", 0): 22,
    ("rows", 0, "n"): 23,
    ("rows", 0, "sub", "z"): 25,
    ("rows", 1): 26,
    ("rows", 1, "n"): 27,
    ("rows", 1, "sub", "z"): 29,
}


def test_every_spelling_of_a_key_has_its_line() -> None:
    _, lines = parse_toml(TRICKY)
    assert {path: lines.get(path) for path in EXPECTED} == EXPECTED


def test_windows_line_ends_count_once() -> None:
    _, lines = parse_toml('a = 1\r\nb = """\r\nx\r\n"""\r\nc = 3\r\n')
    assert (lines["a",], lines["b",], lines["c",]) == (1, 2, 5)


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    if path:
        yield path


_KEYS = st.text("ab-_1", min_size=1, max_size=3) | st.sampled_from(
    ['"x.y"', '"sp ace"', "'li#t'", '"q\\"t"', '"]"', '"="']
)
_ODD = ["#", "[x]", "a = 1", "'", "}", ",", "]]"]


@st.composite
def _value(draw: st.DrawFn, depth: int = 0) -> str:
    """TOML source of a value; newlines only where TOML allows them."""
    kind = draw(st.integers(0, 6 if depth < 3 else 4))
    word = draw(st.sampled_from(_ODD))
    if kind == 0:
        return str(draw(st.integers(-9, 9)))
    if kind == 1:
        return f'"{word}"'
    if kind == 2:
        return "'" + word.replace("'", "") + "'"
    if kind == 3:
        return f'"""\n{word}\n{word}"""'
    if kind == 4:
        return draw(st.sampled_from(["true", "1979-05-27T07:32:00Z", "1.5", "'''\n'\n'''", '"""a""""', "''"]))
    if kind == 5:
        gap = st.sampled_from(["", "\n", " # ] , [\n", "\n\n"])
        inner = draw(st.lists(_value(depth + 1), max_size=3))
        return "[" + "".join(f"{draw(gap)}{item}{draw(gap)}," for item in inner) + draw(gap) + "]"
    keys = draw(st.lists(_KEYS, max_size=2, unique=True))
    return "{ " + ", ".join(f"{key} = {draw(_value(depth + 1))}" for key in keys) + " }"


@st.composite
def _documents(draw: st.DrawFn) -> str:
    text = ""
    for table in draw(st.lists(st.sampled_from(["", "t", "t.u", '"d e"', "z.'#'.y"]), unique=True, max_size=4)):
        text += f"[{table}] # h\n" if table else ""
        for key in draw(st.lists(_KEYS, unique=True, max_size=3)):
            text += f"{draw(st.sampled_from(['', '# c [', '  ']))}\n{key} = {draw(_value())}\n"
    return text


@settings(max_examples=300, deadline=None)
@given(_documents())
def test_each_leaf_has_the_line_where_its_value_can_be_changed(text: str) -> None:
    """Independent check: cut the document after the noted line and before it; the path exists only with the line."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # two spellings of one key met
    _, lines = parse_toml(text)
    rows = text.splitlines()
    for path in leaves(data):
        assert path in lines, path
        assert 1 <= lines[path] <= len(rows)
        key = path[-1]
        if isinstance(key, str):
            spelled = key.replace('"', '\\"')
            assert key in rows[lines[path] - 1] or spelled in rows[lines[path] - 1], (path, rows[lines[path] - 1])
    # Elements of an array never come before their array, nor before the element that precedes them.
    for path, line in lines.items():
        if isinstance(path[-1], int):
            assert line >= lines[path[:-1]] if path[:-1] in lines else True
            if path[-1] > 0:
                assert line >= lines[(*path[:-1], path[-1] - 1)]
    assert set(lines) <= {p for p in leaves(data)}
