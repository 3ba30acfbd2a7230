"""Run Python code without any privilege: as a program of its own, or as what a process of root's becomes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from isolator.linux.capability import clear_sets, drop_bounding_set, last_capability


def service_command(module: str, uid: int, gid: int, descriptors: Mapping[str, int]) -> list[str]:
    """The command line that runs a module without any privilege, telling it the descriptors that it inherits."""
    return [
        "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all",
        "--bounding-set=-all", "--no-new-privs", "--", *module_command(module, descriptors),
    ]  # fmt: skip


def module_command(module: str, descriptors: Mapping[str, int]) -> list[str]:
    """The same with the rights of the caller."""
    arguments = [word for name, fd in descriptors.items() for word in (f"--{name}-fd", str(fd))]
    return [sys.executable, "-I", "-m", module, *arguments]


def inherited() -> dict[str, int]:
    """The descriptors that the command line of this process names, as ``module_command`` has written it."""
    words = sys.argv[1:]
    return {name[2:].removesuffix("-fd"): int(fd) for name, fd in zip(words[::2], words[1::2], strict=False)}


def drop_privileges(uid: int, gid: int) -> None:
    """Become a user without groups, capabilities and any way to gain privileges, for good. For one with one thread.

    What the kernel then says is compared with what was wanted; raises OSError, PermissionError for a difference.
    """
    import prctl

    drop_bounding_set(last_capability())
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    clear_sets()
    prctl.set_no_new_privs(True)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {name: set(status[name].split()) for name in ("Uid", "Gid", "Groups", "NoNewPrivs")}
    wanted = {"Uid": {str(uid)}, "Gid": {str(gid)}, "Groups": set(), "NoNewPrivs": {"1"}}
    left = [name for name in status if name.startswith("Cap") and int(status[name], 16)]
    if found != wanted or left or uid == 0:
        raise PermissionError(f"a service kept privileges: {found}, {' '.join(left) or 'no capability'}")
