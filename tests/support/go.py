"""Go's cache of compiled packages: one for all tests, or the standard library is compiled again in each."""

from __future__ import annotations

import os
from pathlib import Path


def go_cache(folder: Path) -> str:
    """The cache that ``./dev test`` keeps (``GOCACHE``); run otherwise, one in ``folder``."""
    return os.environ.get("GOCACHE") or str(folder / "cache")
