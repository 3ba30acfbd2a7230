"""Copies of a plugin's state while its cage ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from isolator.backup import freezer
from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.paths import Paths


def test_cage_that_ends_as_it_is_to_be_frozen_is_no_failure(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group is open by then, and each call answers that there is no such device."""
    own = find_hierarchies().unified
    assert own is not None
    group = own / f"isolator-test-{os.getpid()}"
    group.mkdir()
    start_thawer, copies = freezer._start_thawer, list[str]()

    def after_its_end(*arguments: Any) -> int:
        pid = start_thawer(*arguments)
        group.rmdir()
        return pid

    monkeypatch.setattr(freezer, "_cages", lambda *_: [group] if group.exists() else [])
    monkeypatch.setattr(freezer, "_start_thawer", after_its_end)
    try:
        freezer.copy_state(Paths.of(shared_dir), "echo", os.getpid(), lambda: copies.append("made"))
        assert copies == ["made"]
    finally:
        if group.exists():
            group.rmdir()
