"""A place for attacked cages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.escape.cages import Range
from tests.support.leftovers import new_root


@pytest.fixture(scope="module")
def arena() -> Iterator[Range]:
    """A root directory, which every cage's user can enter, and cages in it to attack."""
    root = new_root("test")
    yield Range(root)
    shutil.rmtree(root)
