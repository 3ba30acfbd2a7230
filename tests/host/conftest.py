"""Fixture: a host whose supervisor is a fake; see ``fake_supervisor``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.host.fake_supervisor import Daemon


@pytest.fixture
async def daemon(shared_dir: Path) -> AsyncIterator[Daemon]:
    """A running host without plugins."""
    fake = Daemon(shared_dir)
    await fake.start()
    yield fake
    await fake.stop()
