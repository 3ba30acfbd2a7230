"""``./dev vm``: builds the box, then runs the tests in a machine inside namespaces of its own.

This process stays outside: only it may reach the distribution's mirror, to build the box. Everything else happens in
``vagrant.inside``, which it starts in new namespaces and which cannot reach out nor leave anything behind:

- network: only a loopback, and the bridge that libvirt makes in it;
- PID: when the first process ends, however it ends, the kernel kills every other (libvirtd, dnsmasq, QEMU);
- mount: ``/run``, ``/etc/libvirt`` and ``/var/lib/libvirt`` become fresh tmpfs, so that a libvirt which the host uses
  is neither seen nor changed, and sockets, PID files and definitions vanish with the namespace.

Exit codes: the tests' own (0 passed, 1 failed); 70 if the machine could not be had, twice in a row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from vagrant.box import CACHE, BuildError, ready_box
from vagrant.machine import say

EXIT_INFRASTRUCTURE = 70
PID_OUTSIDE = "ISOLATOR_VM_PID"  # variable: the pid, outside, of a process that is in the machine's network namespace
RESULTS = CACHE / "vm"  # junit.xml and the logs of the last run


def parser() -> argparse.ArgumentParser:
    """Its options stand in ``dev``, too, which refuses others before it installs anything."""
    made = argparse.ArgumentParser(
        prog="./dev vm", description="Run the tests in a virtual machine with pure cgroup v2 and systemd."
    )
    made.add_argument("--all", action="store_true", help="every test, not only those marked vm")
    made.add_argument("--direct", action="store_true", help="start QEMU without Vagrant and libvirt")
    made.add_argument("--command", metavar="SHELL", help="run this in the copied tree instead of the tests")
    made.add_argument("--reboots", action="store_true", help="only the tests that start the machine anew")
    made.add_argument("--release", metavar="NAME", help="of the distribution, such as trixie (the host's own)")
    made.add_argument("--stay", action="store_true", help="keep the machine afterwards, until ^C, and say how to enter")
    made.add_argument("--memory", type=int, default=2048, metavar="MB", help="of the machine (2048)")
    made.add_argument("--cpus", type=int, default=2, metavar="N", help="of the machine (2)")
    made.add_argument("pytest", nargs="*", metavar="-- PYTEST ARGUMENT", help="passed on to pytest")
    return made


def parse(arguments: list[str]) -> argparse.Namespace:
    return parser().parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])  # a mistake in the arguments shows before minutes are spent
    generation = Path(sys.prefix)
    try:
        box = ready_box((generation / "deps").resolve(), Path(__file__).parents[1], options.release)
    except BuildError as error:
        say(f"the VM's disk could not be built: {error}")
        return EXIT_INFRASTRUCTURE
    RESULTS.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="isolator-vm-"))
    # The shell's pid becomes that of unshare, which enters all of them but the PID namespace itself.
    pid = ["sh", "-c", f'export {PID_OUTSIDE}=$$; exec "$@"', "sh"]
    unshare = [*pid, "unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child=SIGKILL"]
    inside = [sys.executable, "-I", "-m", "vagrant.inside", str(box.folder), str(folder), *sys.argv[1:]]
    child = subprocess.Popen(
        [*unshare, "--mount-proc", "--propagation", "private", "--", *inside],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # ^C is for this process, which ends the other
    )

    def stop(number: int, _frame: object) -> None:
        # unshare blocks SIGTERM; killed outright, it takes the first process inside along, and that one all others.
        child.kill()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        code = child.wait()
    finally:
        child.kill()
        child.wait()
        for kept in (*folder.glob("junit.xml"), *folder.glob("*/*.log")):  # of a second attempt last
            shutil.copy(kept, RESULTS / kept.name)
        shutil.rmtree(folder)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
