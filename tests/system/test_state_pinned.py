"""A private copy of the host's mounts, which any user may have, keeps no plugin from its state."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, daemon, event, write_plugin


def stop(d: Daemon) -> None:
    assert d.stop() == 0


@pytest.mark.parametrize("end", [stop, Daemon.kill])
def test_plugin_starts_again_while_a_user_holds_a_copy_of_the_mounts(
    tmp_path: Path, end: Callable[[Daemon], None]
) -> None:
    sandbox = {"filesystem": {"state": "1M"}}
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo", sandbox=sandbox)), "--yes")
        d.cli("event", "emit", "deploy.completed", event(0), "--wait")
        copy = subprocess.Popen(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-Urm", "sh", "-c",
             "echo ready; exec sleep 600"],
            stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        try:
            assert copy.stdout is not None and copy.stdout.readline() == b"ready\n"
            assert str(d.root) in Path(f"/proc/{copy.pid}/mountinfo").read_text(), "it holds nothing: nothing is shown"
            end(d)
            d.start()
            d.cli("event", "emit", "deploy.completed", event(1), "--wait")
            assert d.noted("echo") == ["d0", "d1"]
        finally:
            copy.kill()
            copy.wait()
            copy.stdout.close()
