"""Real servers on the pretend internet, each an ordinary user's process in namespaces of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.compat.layer import UID, Layer
from tests.compat.program import Service
from tests.compat.sandboxes import ENVIRONMENT, WAIT, as_user
from tests.support.pretend_internet import PretendInternet


@contextlib.contextmanager
def served(service: Service, pretend: PretendInternet, installed: Layer, shown: Path) -> Iterator[None]:
    """The server, as an ordinary user in namespaces of its own: it ends with them."""
    begin = f"{WAIT}\nmkdir work\ncd work\ncp ../shown/ca.pem ../shown/key.pem ."
    ready = f"up {service.port} || {{ cat log >&2; exit 1; }}\necho ready\nwait\n"
    script = f"{begin}\n{service.server}\n{ready}"
    command = installed.inside(
        "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
        f'exec 3<"$1" 4<"$2" && mount -t tmpfs -o mode=1777 none /tmp && cp -r {shown} /tmp/shown && cd /tmp && '
        f'cat <&3 >shown/ca.pem && install -o {UID} -m 0600 /dev/stdin shown/key.pem <&4 && shift 2 && exec "$@"', "sh",
        str(pretend.directory / "ca.pem"), str(pretend.directory / "key.pem"), *as_user(), "env", "-i", *ENVIRONMENT,
        "bash", "-euo", "pipefail", "-c", script,
        network=f"/proc/{os.getpid()}/fd/{pretend.internet.fd}",
    )  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
