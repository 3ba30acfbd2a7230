"""Run a Python module without any privilege."""

from __future__ import annotations

import sys
from collections.abc import Mapping


def service_command(module: str, uid: int, gid: int, descriptors: Mapping[str, int]) -> list[str]:
    """The command line that runs a module without any privilege, telling it the descriptors that it inherits."""
    arguments = [word for name, fd in descriptors.items() for word in (f"--{name}-fd", str(fd))]
    return [
        "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all",
        "--bounding-set=-all", "--no-new-privs", "--", sys.executable, "-I", "-m", module, *arguments,
    ]  # fmt: skip
