"""The catalogue fits the tree: a mutation whose line has moved on would prove nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS, Mutation

TREE = Path(__file__).parents[2]


def test_every_mutation_has_a_name_of_its_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_changes_one_place_and_names_tests_that_exist(mutation: Mutation) -> None:
    text = (TREE / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    ast.parse(text.replace(mutation.old, mutation.new))
    assert mutation.tests
    for named in mutation.tests:
        file, _, test = named.partition("::")
        path = TREE / "tests" / file
        assert path.exists(), file
        assert not test or f"def {test.partition('[')[0]}(" in path.read_text(), named
