"""``host.toml`` over a reload: its settings are in force afterwards, for the plugins they concern and no others."""

from __future__ import annotations

from pathlib import Path

from tests.system.daemon import Daemon, daemon, write_plugin
from tests.system.reload.test_reload import STATE, running

BEFORE = """
[roles]
viewer = [65533]
[metrics]
port = 9464
[ceiling]
memory = "1G"
"""
AFTER = """
[roles]
viewer = [65534]
runner = [65534]
[metrics]
port = 9465
[ceiling]
memory = "100M"
[defaults]
tasks = 33
"""


def listens(d: Daemon, port: int) -> bool:
    """Whether somebody in the daemon's network namespace listens on this port of 127.0.0.1."""
    assert d.process is not None
    return f" 0100007F:{port:04X} 00000000:0000 0A " in Path(f"/proc/{d.process.pid}/net/tcp").read_text()


def test_reload_puts_host_toml_in_force(shared_dir: Path) -> None:
    with daemon(host_toml=BEFORE) as d:
        large = {**STATE, "resources": {"memory": "200M"}}
        for name, sandbox in (("large", large), ("small", STATE)):
            d.cli("plugin", "add", str(write_plugin(shared_dir / name, sandbox=sandbox)), "--yes")
            d.cli("plugin", "start", name)
        before = running(d)
        assert listens(d, 9464) and not listens(d, 9465)
        (d.root / "etc/isolator/host.toml").write_text(AFTER)
        print(d.cli("reload").stdout)
        assert listens(d, 9465) and not listens(d, 9464)
        print(d.cli("plugin", "list").stdout)
        print(d.cli("plugin", "show", "large").stdout)
        print(d.cli("plugin", "show", "small").stdout)
        import time

        time.sleep(3)
        print(before, running(d))
        print(d.cli("plugin", "list").stdout)
        print(d.cli("plugin", "show", "large").stdout)
        print(d.cli("plugin", "show", "small").stdout)
        print(d.log.read_text())
        assert 0
