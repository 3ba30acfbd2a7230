"""``plugin add`` says the size of a folder and what its first event would find."""

from __future__ import annotations

import json
from pathlib import Path

from tests.system.daemon import daemon, write_plugin

FOREIGN = "vendor/_x.cpython-399-x86_64-linux-gnu.so"


def test_plugin_add_says_the_size_and_what_the_first_event_would_find(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "heavy")
    (folder / "vendor").mkdir()
    (folder / FOREIGN).write_bytes(Path("/usr/bin/true").read_bytes())
    with daemon() as d:
        added = d.cli("plugin", "add", str(folder), "--yes")
        assert "4 files and folders, " in added.stdout
        assert f"isolator: warning: {FOREIGN} is built for Python 3.99, and this host's is 3." in added.stderr
        manifest = json.loads((folder / "plugin.json").read_text())
        (folder / "plugin.json").write_text(json.dumps(manifest | {"version": "2.0.0"}))
        updated = d.json("plugin", "update", "heavy", str(folder), "--yes")
        assert any(FOREIGN in warning for warning in updated["warnings"])
