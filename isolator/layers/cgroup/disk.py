"""Caps on the bandwidth of disks: ``io.max`` of cgroup v2, ``blkio.throttle`` of v1 on hybrid hosts.

A cap is kept for each block device. A cage reaches two kinds: the loop device that holds its state, through which
everything passes that it writes and that lasts, and the disks of what it only reads (/usr, its own files, what the
policy names). Each gets the whole rate.

On v2 also what the kernel writes back later counts for who wrote it. On v1 it does not: there what is slowed is direct
and synchronous writing (``O_DIRECT``, ``fsync``), and reading; the ledger calls that degraded. A file system without a
block device of its own (overlay, btrfs, ZFS, NFS) has nothing to put a cap on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.errors import ConfinementError
from isolator.layers.base import Control, ControlState, mismatch
from isolator.policy.units import NO_CAP

if TYPE_CHECKING:
    from isolator.layers.cgroup.leaf import Leaf
    from isolator.layers.cgroup.subtree import Hierarchies
    from isolator.policy.model import ResourcePolicy

_V1 = {"blkio.throttle.read_bps_device": "io_read", "blkio.throttle.write_bps_device": "io_write"}
_V2 = {"rbps": "io_read", "wbps": "io_write"}
_REMEDY = 'take io_read and io_write out of the policy; or list "cgroup.io" in may_degrade of host.toml'


def check(found: Hierarchies) -> Control:
    """Whether this host can cap disks, and how well."""

    def control(state: ControlState, reason: str, remedy: str) -> Control:
        return Control("disk bandwidth cap", "cgroup", state, reason, remedy, mandatory=False, part="io")

    # Without one of the others, our own groups there distribute nothing.
    if ("io" in found.v2 or _comes_with_a_scope()) and found.v2 & {"memory", "cpu", "pids"}:
        how = "cgroup v2"
    elif "blkio" in found.v1 and (found.v1["blkio"] / next(iter(_V1))).exists():
        how = "cgroup v1 (hybrid host)"
    else:
        remedy = "use a kernel with CONFIG_BLK_DEV_THROTTLING, or ask the container's operator for the io controller"
        return control("unavailable", "no io controller", remedy)
    if device(os.stat("/usr").st_dev) is None:
        remedy = "none where /usr is on such a file system"
        return control("degraded", f"{how}; /usr has no block device of its own: reading it is not capped", remedy)
    if how != "cgroup v2":
        reason = f"{how}: what is written back later is not slowed, only reads, O_DIRECT and fsync"
        return control("degraded", reason, "boot with cgroup v2 alone: systemd.unified_cgroup_hierarchy=1")
    return control("enforced", how, "")


def _comes_with_a_scope() -> bool:
    """Whether a run gets all controllers with a scope of systemd's; the groups of a login session have no io."""
    root = Path("/sys/fs/cgroup/cgroup.controllers")
    return Path("/run/systemd/system").exists() and root.exists() and "io" in root.read_text().split()


def device(number: int) -> str | None:
    """``MAJOR:MINOR`` of the disk behind a file system's device number; None when there is no block device."""
    major, minor = os.major(number), os.minor(number)
    if major == 0:
        return None
    place = Path(f"/sys/dev/block/{major}:{minor}")
    # A partition has no queue of its own to keep a rate: the kernel wants the disk (ENODEV).
    if (place / "partition").exists():
        return (place.resolve().parent / "dev").read_text().strip()
    return f"{major}:{minor}"


def devices(places: Iterable[int | str]) -> list[str]:
    """The disks behind descriptors and paths, each once."""
    return disks_of(os.stat(place).st_dev for place in places)


def disks_of(numbers: Iterable[int]) -> list[str]:
    """The disks behind device numbers, each once."""
    numbers = dict.fromkeys(numbers)
    return list(dict.fromkeys(name for number in numbers if (name := device(number)) is not None))


def apply(leaf: Leaf, limits: ResourcePolicy, disks: Iterable[str], pid: int) -> None:
    """Write the caps and, on v1, add ``pid`` to the group; raises ConfinementError when they cannot be kept."""
    if not _rates(leaf, limits, ""):
        raise ConfinementError("disk bandwidth cap", "no io controller", _REMEDY)
    for disk in disks:
        for path, value in _rates(leaf, limits, disk):
            try:
                path.write_text(value)
            except OSError as error:
                raise ConfinementError(f"disk bandwidth cap of device {disk}", f"{error.strerror}", _REMEDY) from None
    if leaf.blkio is not None:
        (leaf.blkio / "cgroup.procs").write_text(str(pid))


def confirm(leaf: Leaf, limits: ResourcePolicy, disks: Iterable[str], pid: int) -> None:
    """Read back the caps and, on v1, the member of the group; raises ConfinementError."""
    for disk in disks:
        for path, value in _rates(leaf, limits, disk):
            lines = {line.split()[0]: line for line in path.read_text().splitlines()}
            if not set(value.split()) <= set(lines.get(disk, "").split()):
                raise mismatch("cgroup", str(path), value, lines.get(disk, "nothing"))
    if leaf.blkio is not None and str(pid) not in (leaf.blkio / "cgroup.procs").read_text().split():
        raise mismatch("cgroup", str(leaf.blkio), f"the group of {pid}", "not")


def _rates(leaf: Leaf, limits: ResourcePolicy, disk: str) -> list[tuple[Path, str]]:
    """The files and values of one disk's caps; none where there is no controller."""
    if leaf.blkio is not None:
        files = {leaf.blkio / name: getattr(limits, rate) for name, rate in _V1.items()}
        return [(path, f"{disk} {rate}") for path, rate in files.items() if rate < NO_CAP]
    if (leaf.unified / "io.max").exists():
        rates = {key: getattr(limits, name) for key, name in _V2.items()}
        words = (f"{key}={rate if rate < NO_CAP else 'max'}" for key, rate in rates.items())
        return [(leaf.unified / "io.max", " ".join((disk, *words)))]
    return []
