"""One virtual machine straight from QEMU, without Vagrant: boots a box, runs a command in it by ssh, is gone.

Theory of operation. The caller has entered network, mount and PID namespaces of its own (``run.py`` makes them): the
machine's network is QEMU's user-mode one with ``restrict=on`` (the guest reaches nothing but the forwarded ssh port)
inside a namespace that has only a loopback, and whatever happens to this process, the kernel ends QEMU with the PID
namespace. The disk is a copy-on-write overlay in a temporary directory: the box itself is never written.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vagrant.box import CMD_LINE, READY, Box
from vagrant.machine import InfrastructureError, Machine

_PORT = 2222
_BOOT_SECONDS = 600.0


@contextmanager
def boot(box: Box, folder: Path, *, cpus: int = 2, memory_mb: int = 2048) -> Iterator[Machine]:
    """A machine with ``box`` as its disk; ``folder`` (temporary, root's own) takes overlay and console log.

    Emulated in software (TCG), which works on any host, also inside another virtual machine.
    Raises InfrastructureError if it is not up within ten minutes.
    """
    overlay, console = folder / "overlay.qcow2", folder / "console.log"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(box.disk), str(overlay)]
    subprocess.run(create, check=True)
    argv = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", str(cpus)),
        *("-m", str(memory_mb), "-device", "virtio-rng-pci", "-serial", "stdio", "-monitor", "none"),
        *("-kernel", str(box.kernel), "-initrd", str(box.initrd), "-append", CMD_LINE),
        *("-drive", f"file={overlay},if=virtio,format=qcow2,cache=unsafe,discard=unmap"),
        *(
            "-netdev",
            f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{_PORT}-:22",
            "-device",
            "virtio-net,netdev=net0",
        ),
    ]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        with process.stdout as stream, console.open("wb") as log:
            _wait_until_ready(stream.fileno(), log.fileno())
            # From here on the console is only kept: QEMU must never wait for a reader.
            with subprocess.Popen(["cat"], stdin=stream, stdout=log) as copier:
                try:
                    yield Machine("127.0.0.1", _PORT, box.key, folder)
                finally:
                    process.kill()
                    copier.wait()
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(stream: int, log: int) -> None:
    deadline = time.monotonic() + _BOOT_SECONDS
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while READY.encode() not in seen:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise InfrastructureError(f"the machine did not boot within {_BOOT_SECONDS:.0f} s: {_last_line(seen)}")
            data = os.read(stream, 65536)
            if not data:
                raise InfrastructureError(f"QEMU ended while the machine was booting: {_last_line(seen)}")
            os.write(log, data)
            seen = (seen + data)[-65536:]
            if b"Kernel panic" in seen:  # it would start anew for ever
                raise InfrastructureError(f"the machine's kernel panicked: {_last_line(seen)}")


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing to its console")
