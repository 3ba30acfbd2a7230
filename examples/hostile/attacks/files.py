"""Attacks on files: the host's, another plugin's, and anything outside the plugin's own state."""

from __future__ import annotations

import os
from pathlib import Path

from .outcome import Known, Outcome, each


def read(path: str) -> str:
    with Path(path).open("rb", buffering=0) as file:
        content = file.read(4096) or b""
    if not content:
        raise OSError(f"{path} is empty")
    return f"read {len(content)} bytes"


def read_shadow(known: Known) -> Outcome:
    """The password hashes of the host."""
    return each([known.get("path", "/etc/shadow")], read)


def read_secret(known: Known) -> Outcome:
    """Another plugin's secret: its environment, its state, and the store and the key it came from."""
    paths = [str(path) for path in known.get("paths", [])]
    if pid := known.get("pid"):
        paths += [f"/proc/{pid}/environ", f"/proc/{pid}/root/etc/passwd"]
    # From inside, another plugin's process could only be one of these; pid 1 and ourselves are not secrets.
    own = {os.getpid(), 1}
    paths += [f"/proc/{name}/environ" for name in os.listdir("/proc") if name.isdecimal() and int(name) not in own][:16]
    return each(paths, read)


def write_outside(known: Known) -> Outcome:
    """A new file in every place that is not the plugin's own, and the kernel's own settings."""
    places = ["/", "/etc", "/usr/bin", str(Path(__file__).parent), "/var/tmp", "/run", "/proc/1"]
    places += [str(place) for place in known.get("places", [])]

    def plant(place: str) -> str:
        path = Path(place, f"hostile-{os.getpid()}")
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        path.unlink()
        return "wrote and removed a file"

    def setting(path: str) -> str:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))  # opened for writing is enough: nothing is changed
        return "opened for writing"

    first = each(places, plant)
    second = each(["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"], setting)
    return Outcome(first.succeeded or second.succeeded, f"{first.detail}; {second.detail}", f"{len(places) + 2} tried")
