"""A running virtual machine, reached by ssh, whoever started it."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SSH_FAILED = 255  # ssh's own exit code for "no connection"; the guest's commands here never use it
_REBOOT_SECONDS = 600.0


def say(text: str) -> None:
    """One line of progress."""
    print(f"isolator dev: {text}", file=sys.stderr, flush=True)


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
        return subprocess.run([*self.ssh_command(), command], stdin=stdin, stdout=stdout, check=False).returncode

    def ssh_command(self, connect_seconds: int = 60) -> list[str]:
        """What reaches the guest from inside these namespaces; a command may follow."""
        # Each machine is new, so its host key is unknown by nature; the network holds nobody else.
        options = (
            *("StrictHostKeyChecking=no", f"UserKnownHostsFile={self.folder}/known_hosts", "LogLevel=ERROR"),
            *("IdentitiesOnly=yes", "BatchMode=yes", f"ConnectTimeout={connect_seconds}", "ServerAliveInterval=60"),
        )
        words = [word for option in options for word in ("-o", option)]
        return ["ssh", "-F", "/dev/null", "-i", str(self.key), "-p", str(self.port), *words, f"vagrant@{self.host}"]

    def reboot(self, how: str) -> None:
        """Run the shell command ``how``, which starts the machine anew, and wait until another boot answers.

        Raises InfrastructureError.
        """
        before = self._boot_id(60)
        if not before:
            raise InfrastructureError("the machine did not answer before it was to be started anew")
        # It goes down in the middle of this connection, so its exit code says nothing. Without the short keep-alive
        # a machine that is cut off would be waited for until TCP gives up.
        subprocess.run(
            [*self.ssh_command(), "-o", "ServerAliveInterval=5", how],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        deadline = time.monotonic() + _REBOOT_SECONDS
        while (found := self._boot_id(10)) in ("", before):
            if time.monotonic() > deadline:
                state = "never went down" if found else "did not come back"
                raise InfrastructureError(f"the machine {state} within {_REBOOT_SECONDS:.0f} s of '{how}'")
            time.sleep(1)  # there is no event for "somebody listens now"

    def _boot_id(self, connect_seconds: int) -> str:
        """The kernel's name for this boot; empty when nobody answers."""
        done = subprocess.run(
            [*self.ssh_command(connect_seconds), "cat /proc/sys/kernel/random/boot_id"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else ""

    def send_tree(self, tree: Path, target: str) -> None:
        """Copy a folder into the guest, owned by ``vagrant``. Raises InfrastructureError."""
        pack = subprocess.Popen(["tar", "-C", tree, "--exclude=__pycache__", "-cf", "-", "."], stdout=subprocess.PIPE)
        assert pack.stdout is not None
        with pack.stdout as stream:
            code = self.ssh(f"mkdir -p {target} && tar -C {target} --no-same-owner -xf -", stdin=stream.fileno())
        # 1: a folder has changed. Files of a generation never do, but tests that run from it leave bytecode there.
        if pack.wait() not in (0, 1) or code != 0:
            raise InfrastructureError(f"copying the tree into the machine failed (tar {pack.returncode}, ssh {code})")

    def fetch(self, source: str, target: Path) -> bool:
        """Copy one file of the guest to this host; False if it is not there."""
        with target.open("wb") as file:
            code = self.ssh(f"sudo cat {source} 2>/dev/null", stdout=file.fileno())
        if code != 0:
            target.unlink()
        return code == 0
