"""Filters on payloads: what they mean, that they are bounded, and that a grant's are in force and explained."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.errors import UsageError
from isolator.policy.filters import DEPTH, PARTS, parse_filter, passes, phrase, read_filter
from isolator.policy.meet.effective import meet, policy_alone
from tests.policy.samples import DEFAULT, manifest, policy

SHOP = {"project_id": "shop", "branch": "main-2", "duration_ms": 5, "is_primary": True, "nested": {"a": "b"}}


@pytest.mark.parametrize(
    ("value", "shown", "holds"),
    [
        ({"exact": {"project_id": "shop"}}, 'project_id is "shop"', True),
        ({"exact": {"project_id": "sho"}}, 'project_id is "sho"', False),
        ({"exact": {"project_id": "shop", "branch": "x"}}, 'branch is "x" and project_id is "shop"', False),
        ({"exact": {"missing": ""}}, 'missing is ""', False),
        ({"exact": {"duration_ms": "5"}}, 'duration_ms is "5"', True),
        ({"exact": {"is_primary": "true"}}, 'is_primary is "true"', True),
        ({"prefix": {"branch": "main"}}, 'branch begins with "main"', True),
        ({"prefix": {"nested": ""}}, 'nested begins with ""', False),
        ({"suffix": {"branch": "-2"}}, 'branch ends with "-2"', True),
        ({"not": {"prefix": {"branch": "main"}}}, 'not (branch begins with "main")', False),
        ({"not": {"exact": {"missing": "x"}}}, 'not (missing is "x")', True),
        (
            {"any": [{"exact": {"project_id": "a"}}, {"suffix": {"branch": "2"}}]},
            '(project_id is "a" or branch ends with "2")',
            True,
        ),
        (
            {"all": [{"exact": {"project_id": "a"}}, {"suffix": {"branch": "2"}}]},
            '(project_id is "a" and branch ends with "2")',
            False,
        ),
    ],
)
def test_filter_means_what_it_is_shown_as(value: dict[str, Any], shown: str, holds: bool) -> None:
    text = parse_filter(value)
    assert (phrase(text), passes((text,), SHOP)) == (shown, holds)
    assert read_filter(text) == text
    assert not passes((text, parse_filter({"exact": {"project_id": "other"}})), SHOP), "all of several have to hold"


def _deep(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"exact": {"a": "b"}}
    for _ in range(depth):
        value = {"not": value}
    return value


@pytest.mark.parametrize(
    "value",
    [
        *(None, 5, "x", [], {}, {"exact": {}}, {"exact": {"a": 5}}, {"exact": {"": "x"}}, {"exact": {"a": "x" * 257}}),
        *({"exact": {"a": "b"}, "not": {}}, {"sql": "a = 'b'"}, {"any": []}, {"any": {}}, {"not": [{}]}),
        *({"exact": {"a": "\u202e"}}, _deep(DEPTH), {"any": [{"exact": {"a": "b"}}] * (PARTS + 1)}),
    ],
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_filter(value)


def test_depth_of_a_text_that_somebody_calls_a_filter_is_bounded() -> None:
    for text in ('{"not":' * 100_000, "[" * 100_000, '{"not":' * 50_000 + "{}" + "}" * 50_000):
        with pytest.raises(ValueError, match=r"."):
            read_filter(text)


_FILTERS = st.recursive(
    st.builds(
        lambda kind, field, text: {kind: {field: text}},
        st.sampled_from(["exact", "prefix", "suffix"]), st.sampled_from("abc"), st.sampled_from(["", "x", "xy", "1"]),
    ),
    lambda inner: st.builds(lambda one: {"not": one}, inner)
    | st.builds(lambda one: {"all": one}, st.lists(inner, min_size=1, max_size=3))
    | st.builds(lambda one: {"any": one}, st.lists(inner, min_size=1, max_size=3)),
    max_leaves=6,
)  # fmt: skip
_PAYLOADS = st.dictionaries(st.sampled_from("abc"), st.sampled_from(["", "x", "xy", 1, True, None, ["x"]]))


@given(granted=st.lists(_FILTERS, max_size=3), more=_FILTERS, payload=_PAYLOADS)
def test_one_filter_more_never_lets_anything_more_through(
    granted: list[dict[str, Any]], more: dict[str, Any], payload: dict[str, Any]
) -> None:
    texts = []
    for value in (*granted, more):
        try:
            texts.append(parse_filter(value))
        except ValueError:
            return  # deeper than is allowed
    assert not passes(tuple(texts), payload) or passes(tuple(texts[:-1]), payload)


GRANT = """\
[grant]
hooks = ["*"]
filters = [
  {exact = {project_id = "shop"}},
  {not = {any = [{prefix = {branch = "wip/"}}, {suffix = {branch = "-draft"}}]}},
]
"""


def test_filters_of_a_grant_are_in_the_effective_policy_and_explained_with_their_lines() -> None:
    found = meet(manifest(), policy(GRANT), DEFAULT)
    assert [json.loads(text) for text in found.effective.filters] == [
        {"exact": {"project_id": "shop"}},
        {"not": {"any": [{"prefix": {"branch": "wip/"}}, {"suffix": {"branch": "-draft"}}]}},
    ]
    lines = [line for line in found.lines if line.field == "filters"]
    assert [(line.effective, line.verdict, line.source.rpartition(":")[2]) for line in lines] == [
        ('only project_id is "shop"', "granted", "4"),
        ('only not ((branch begins with "wip/" or branch ends with "-draft"))', "granted", "5"),
    ]
    assert [line.effective for line in policy_alone(policy(GRANT), DEFAULT, "p").lines if line.field == "filters"]
    without = policy(GRANT.partition("filters")[0])
    assert meet(manifest(), without, DEFAULT).effective.digest() != found.effective.digest()


def test_wrong_filter_in_a_policy_names_its_line() -> None:
    with pytest.raises(UsageError, match=r':3: .*filters.*"exactly" is none of exact'):
        policy('[grant]\nhooks = ["*"]\nfilters = [{exactly = {project_id = "shop"}}]\n')
