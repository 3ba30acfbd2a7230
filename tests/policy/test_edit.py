"""Edits of policy files: one value more or less, everything else byte for byte."""

from __future__ import annotations

import pytest

from isolator.errors import UsageError
from isolator.policy.edit import approved, granted, revoked
from isolator.policy.meet.proposal import Line
from isolator.policy.parse.load import parse_plugin_policy

FILE = """# mine
[grant]
hooks  = ["deploy.*"]   # all of them
egress = [
  "a.example.com:443",  # the first
  "b.example.com:443",
]

[limits]
memory = "64M"  # small
"""


def test_value_joins_a_list_of_one_line_and_comments_stay() -> None:
    after = granted(FILE, "hook", "project.created", in_force=[])
    assert after == FILE.replace('["deploy.*"]', '["deploy.*", "project.created"]')
    assert revoked(after, "hook", "project.created", in_force=[]) == FILE


def test_value_joins_a_list_of_several_lines_in_a_line_of_its_own() -> None:
    after = granted(FILE, "egress", "c.example.com:443", in_force=[])
    assert after == FILE.replace('  "b.example.com:443",\n', '  "b.example.com:443",\n  "c.example.com:443",\n')
    assert parse_plugin_policy(after.encode(), source="x").egress is not None


def test_byte_order_mark_stays() -> None:
    marked = f"\ufeff{FILE}"
    after = granted(marked, "hook", "project.created", in_force=[])
    assert after == f"\ufeff{granted(FILE, 'hook', 'project.created', in_force=[])}"
    assert revoked(after, "hook", "project.created", in_force=[]) == marked
    line = Line(
        "hooks", "project.created", None, "no", "pending", "x", section="grant", add='hooks = ["project.created"]'
    )
    assert approved(marked, [line]) == after
    assert parse_plugin_policy(after.encode(), source="x").hooks is not None


def test_value_that_stands_there_changes_nothing() -> None:
    assert granted(FILE, "egress", "b.example.com:443", in_force=[]) == FILE


def test_new_list_holds_what_is_in_force_too() -> None:
    after = granted(FILE, "permission", "read:b", in_force=["read:a"])
    assert parse_plugin_policy(after.encode(), source="x").permissions == ("read:a", "read:b")
    after = revoked(FILE, "permission", "read:a", in_force=["read:a", "read:b"])
    assert parse_plugin_policy(after.encode(), source="x").permissions == ("read:b",)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "[limits]\nmemory = '64M'\n"])
def test_file_without_a_grant_gets_one(text: str) -> None:
    after = granted(text, "hook", "deploy.*", in_force=[])
    assert after.startswith(text.rstrip("\n"))
    assert parse_plugin_policy(after.encode(), source="x").hooks == ("deploy.*",)


@pytest.mark.parametrize(
    ("text", "kind", "value", "says"),
    [
        (FILE, "hook", "project.created", "is not in the file's list; the file lists deploy.*"),
        (FILE, "permission", "read:x", "is not granted"),
        ("[grant]\nhooks = []\n", "hook", "x.y", "is not in the file's list, which is empty$"),
        ("[grant\n", "hook", "x.y", "see 'isolator policy check'"),
        ("grant = 1\n", "hook", "x.y", "grant is no table"),
    ],
)
def test_what_cannot_be_revoked_is_an_error(text: str, kind: str, value: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        revoked(text, kind, value, in_force=[])
