"""A daemon whose supervisor is a double; see ``supervisor_double``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.host.fake_supervisor import Daemon


@pytest.fixture
async def daemon(shared_dir: Path) -> AsyncIterator[Daemon]:
    """A running host without plugins."""
    double = Daemon(shared_dir)
    await double.start()
    yield double
    await double.stop()
