"""The text of the systemd unit."""

from __future__ import annotations

import re
from pathlib import Path

from isolator.cli.unit import unit
from isolator.paths import Paths


def test_module_of_each_group_of_devices_is_loaded_before_it_is_allowed(tmp_path: Path) -> None:
    """systemd looks for a group's number when the unit starts, and allows nothing for one that is not there yet."""
    text = unit(tmp_path / "isolator", Paths.of(None))
    allowed = re.findall(r"^DeviceAllow=(?:block|char)-(\S+)", text, re.MULTILINE)
    assert allowed
    for key in ("Wants", "After"):
        named = {word for line in re.findall(rf"^{key}=(.*)$", text, re.MULTILINE) for word in line.split()}
        assert {f"modprobe@{name}.service" for name in allowed} <= named
