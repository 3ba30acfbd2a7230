"""A place for attacked cages."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.escape.cages import Range


@pytest.fixture(scope="module")
def arena() -> Iterator[Range]:
    """A root directory, which every cage's user can enter, and cages in it to attack."""
    root = Path(tempfile.mkdtemp(prefix="isolator-test-", dir="/tmp"))
    root.chmod(0o755)
    yield Range(root)
    shutil.rmtree(root)
