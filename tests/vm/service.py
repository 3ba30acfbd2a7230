"""The installed service, used as an operator does, and where these tests may run at all.

They install the real service, flush the host's nftables, set its clock, fill its disk and start it anew: only in a
machine that is thrown away afterwards.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from isolator.errors import IsolatorError
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, wait_for, write_plugin

_DISPOSABLE = Path("/etc/systemd/system/isolator-vm-ready.service")  # the box of ./dev vm, and nothing else, has it
_PURE_V2 = Path("/sys/fs/cgroup/cgroup.controllers")

needs_machine = pytest.mark.skipif(
    not (_DISPOSABLE.exists() and Path("/run/systemd/system").exists() and _PURE_V2.exists()),
    reason="needs systemd as PID 1 and pure cgroup v2: sudo ./dev vm",
)


def slow_plugin(folder: Path, *arguments: Any, **manifest: Any) -> Path:
    """As ``write_plugin``; a machine that is emulated beside others may take more than the usual ten seconds."""
    return write_plugin(folder, *arguments, restart={"start_timeout": "2m"}, **manifest)


class Service:
    """``isolator.service``."""

    def cli(self, *words: str, code: int | None = 0) -> str:
        """Run one command of the installed program; ``code`` is the exit code it must have (None: any)."""
        result = subprocess.run(
            ["/usr/local/bin/isolator", *words], capture_output=True, text=True, check=False, timeout=seconds(20),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if code is not None:
            assert result.returncode == code, (words, result.returncode, result.stdout, result.stderr)
        return result.stdout

    def json(self, *words: str) -> Any:
        """The same with ``--json``, parsed."""
        return json.loads(self.cli(*words, "--json"))

    def property(self, name: str) -> str:
        """One property of the unit."""
        command = ["systemctl", "show", "--value", "-p", name, "isolator.service"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def pid(self) -> int:
        """The supervisor's; 0 when there is none."""
        return int(self.property("MainPID"))

    def seen(self, plugin: str = "echo") -> list[str]:
        """What the plugin has written; its state is mounted in the service's own mount namespace."""
        path = Path(f"/proc/{self.pid()}/root/var/lib/isolator/state/{plugin}/mnt/state/seen")
        try:
            return path.read_text().split()
        except OSError:  # nothing yet, or the daemon has just gone
            return []

    def emit(self, name: str, **payload: Any) -> bool:
        """Whether the daemon accepted the event."""
        try:
            with Client(timeout=seconds(3)) as client:
                client.call("event.emit", name="deploy.completed", payload=EVENT | {"deployment_id": name} | payload)
        except (IsolatorError, OSError):
            return False
        return True

    def wait_active(self, besides: int = 0) -> None:
        """Until it is active, as another process than ``besides``."""
        wait_for(
            lambda: self.property("ActiveState") == "active" and self.pid() not in (0, besides),
            seconds(30),
            "not active again",
        )

    def processes(self) -> set[int]:
        """Every process of the unit's group and of all groups below it."""
        group = Path("/sys/fs/cgroup/system.slice/isolator.service")
        return {int(pid) for file in group.rglob("cgroup.procs") for pid in file.read_text().split()}

    def journal(self) -> str:
        """The end of what it told systemd, to show when a test fails."""
        words = ["journalctl", "-u", "isolator", "--no-pager", "-n", "80"]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout
