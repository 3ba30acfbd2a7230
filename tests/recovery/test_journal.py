"""The journal as a killed daemon leaves it."""

from __future__ import annotations

import json
from pathlib import Path

from isolator.paths import Paths
from isolator.recovery import daemon
from isolator.recovery.journal import boot_id, read_entries


def test_journal_of_a_version_that_wrote_leaf_for_every_group_is_read_by_name(tmp_path: Path) -> None:
    kinds = {
        "service.broker": "service",
        "_spare.0a1b2c": "spare",
        "slack.0a1b2c3d4e": "cage",
        "service.0a1b2c": "cage",
    }
    lines = [
        json.dumps({"name": name, "kind": "leaf", "folders": [str(tmp_path / name)], "boot": boot_id()})
        for name in kinds
    ]
    entries = read_entries("\n".join(lines).encode())
    found = daemon.find(Paths.of(tmp_path), entries)
    assert {left.name: left.kind for left in found} == kinds
