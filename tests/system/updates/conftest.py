"""One daemon for the tests of a file, and a plugin's name for each test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from tests.system.daemon import Daemon, daemon


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon() as d:
        yield d


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def name(running: Daemon, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of the test's own; the plugin is removed in the end."""
    made = f"u-{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
    yield made
    running.cli("plugin", "remove", made, "--yes", code=None)
