"""A private copy of the host's mounts, which any user may have, holds no plugin's state."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.system.daemon import daemon, event, write_plugin


def test_plugin_starts_again_while_a_user_holds_a_copy_of_the_mounts(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "echo")
    with daemon() as d:
        d.cli("plugin", "add", str(folder), "--yes")
        d.cli("event", "emit", "deploy.completed", event(0), "--wait")
        copy = subprocess.Popen(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-Urm", "sh", "-c",
             "echo ready; exec sleep 600"],
            stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        try:
            assert copy.stdout is not None and copy.stdout.readline() == b"ready\n"
            assert str(d.root) not in Path(f"/proc/{copy.pid}/mountinfo").read_text()
            d.stop()
            d.start()
            d.cli("event", "emit", "deploy.completed", event(1), "--wait")
            assert (d.state("echo") / "seen").read_text().split() == ["d0", "d1"]
        finally:
            copy.kill()
            copy.wait()


def test_what_the_host_mounts_later_appears_to_the_daemon(tmp_path: Path) -> None:
    """A plugin is added from a disk that was mounted while the daemon ran, below a shared mount as systemd's are."""
    shared = tmp_path / "media"
    shared.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", shared], check=True)
    try:
        subprocess.run(["mount", "--make-shared", shared], check=True)
        (shared / "disk").mkdir()
        with daemon() as d:
            subprocess.run(["mount", "-t", "tmpfs", "none", shared / "disk"], check=True)
            d.cli("plugin", "add", str(write_plugin(shared / "disk/echo")), "--yes")
            d.cli("event", "emit", "deploy.completed", event(0), "--wait")
    finally:
        subprocess.run(["umount", "-R", shared], check=True)
