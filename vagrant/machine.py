"""A running virtual machine, reached by ssh, whoever started it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

SSH_FAILED = 255  # ssh's own exit code for "no connection"; the guest's commands here never use it


class InfrastructureError(Exception):
    """The machine did not boot or did not answer: says nothing about the tests. The message is one line."""


@dataclass(frozen=True)
class Machine:
    """Address and key of a machine whose user ``vagrant`` may sudo; ``folder`` (temporary) takes ssh's notes."""

    host: str
    port: int
    key: Path
    folder: Path

    def ssh(self, command: str, *, stdin: int | None = subprocess.DEVNULL, stdout: int | None = None) -> int:
        """Run a shell command in the guest; its exit code, or SSH_FAILED."""
        # Each machine is new, so its host key is unknown by nature; the network holds nobody else.
        options = (
            *("StrictHostKeyChecking=no", f"UserKnownHostsFile={self.folder}/known_hosts", "LogLevel=ERROR"),
            *("IdentitiesOnly=yes", "BatchMode=yes", "ConnectTimeout=60", "ServerAliveInterval=30"),
        )
        words = [word for option in options for word in ("-o", option)]
        argv = ["ssh", "-F", "/dev/null", "-i", str(self.key), "-p", str(self.port), *words, f"vagrant@{self.host}"]
        return subprocess.run([*argv, command], stdin=stdin, stdout=stdout, check=False).returncode

    def send_tree(self, tree: Path, target: str) -> None:
        """Copy a folder into the guest, owned by ``vagrant``. Raises InfrastructureError."""
        pack = subprocess.Popen(["tar", "-C", tree, "--exclude=__pycache__", "-cf", "-", "."], stdout=subprocess.PIPE)
        assert pack.stdout is not None
        with pack.stdout as stream:
            code = self.ssh(f"mkdir -p {target} && tar -C {target} --no-same-owner -xf -", stdin=stream.fileno())
        if pack.wait() != 0 or code != 0:
            raise InfrastructureError(f"copying the tree into the machine failed (tar {pack.returncode}, ssh {code})")

    def fetch(self, source: str, target: Path) -> bool:
        """Copy one file of the guest to this host; False if it is not there."""
        with target.open("wb") as file:
            code = self.ssh(f"sudo cat {source} 2>/dev/null", stdout=file.fileno())
        if code != 0:
            target.unlink()
        return code == 0
