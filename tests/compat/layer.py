"""Debian packages for tests, without a change of the host: installed into overlays of /usr, /etc and /var.

apt and dpkg do their usual work (users, alternatives, settings), but in a mount namespace whose three folders are
overlays and whose /run is empty: what they write lands in a folder of the development environment, no service is
started, and none is there when the host boots again. Who enters a ``Layer`` sees the host with these packages.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

USER, UID, HOME = "author", 64711, "/var/lib/author"
"""An ordinary user that exists in the layer alone: sandboxes for users are run by it."""

STORE = Path("/opt/isolator-dev/compat")
_KEPT = {"archives", "plugins"}
_FOLDERS = ("usr", "etc", "var")
_DOWNLOAD_PATIENCE = 3600.0  # seconds: gigabytes over somebody's line

_INSTALL = """
set -eu
layer=$1 archives=$2 user=$3 uid=$4 home=$5
shift 5
resolver=$(cat /etc/resolv.conf)
for folder in usr etc var; do
    mkdir -p "$layer/$folder" "$layer.work/$folder"
    mount -t overlay overlay -o "lowerdir=/$folder,upperdir=$layer/$folder,workdir=$layer.work/$folder" "/$folder"
done
mount -t tmpfs none /run
mount -t proc proc /proc
mkdir -p /run/lock
if [ -L /etc/resolv.conf ]; then
    real=$(readlink -m /etc/resolv.conf)
    mkdir -p "${real%/*}"
    printf '%s\\n' "$resolver" >"$real"
fi
printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d
chmod 0755 /usr/sbin/policy-rc.d
useradd --uid "$uid" --create-home --home-dir "$home" --shell /bin/bash "$user"
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
apt-get -qq update || :
apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold \\
    -o Dpkg::Options::=--force-unsafe-io -o Dir::Cache::archives="$archives" -o APT::Keep-Downloaded-Packages=true \\
    install -y --no-install-recommends "$@"
"""

_ENTER = """
set -eu
for folder in usr etc var; do
    mount -t overlay overlay -o "lowerdir=$1/$folder:/$folder" "/$folder"
done
ip link set lo up
echo ready
exec cat
"""
"""Ends with its standard input."""


class LayerError(Exception):
    """The packages cannot be installed; the text says why."""


@dataclass(frozen=True)
class Layer:
    """A living mount and network namespace with the packages in it."""

    pid: int

    def inside(self, *command: str, network: str = "") -> list[str]:
        """The command that runs ``command`` there; ``network``: a namespace's file, else the layer's own."""
        net = f"--net={network or f'/proc/{self.pid}/ns/net'}"
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", net, "--", *command]


@contextlib.contextmanager
def layer(packages: Iterable[str]) -> Iterator[Layer]:
    """Enter the layer of these packages, which is made if there is none; raises LayerError."""
    folder, held = _made(sorted(set(packages)))
    holder = subprocess.Popen(
        ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", _ENTER, "sh", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
    try:
        if holder.stdout.readline() != "ready\n":
            raise LayerError(f"cannot be entered: {holder.stderr.read().strip()}")
        yield Layer(holder.pid)
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()
        holder.stderr.close()
        os.close(held)


def prepare(packages: Iterable[str]) -> None:
    """Make the layer of these packages, which takes minutes, if there is none; raises LayerError."""
    os.close(_made(sorted(set(packages)))[1])


def _made(packages: list[str]) -> tuple[Path, int]:
    """The folder of the layer, made if there is none, and a lock that keeps it."""
    system = platform.freedesktop_os_release()
    name = hashlib.sha256("\n".join([_INSTALL, *packages, str(system)]).encode()).hexdigest()[:12]
    (STORE / "archives/partial").mkdir(parents=True, exist_ok=True)
    folder = STORE / name
    with (STORE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, _hold(folder)
        for old in STORE.iterdir():  # each is gigabytes
            if old.is_dir() and old.name not in _KEPT:
                _remove_unused(old)
        new = STORE / "new"
        try:
            done = subprocess.run(
                ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
                 "sh", "-c", _INSTALL, "sh", str(new), str(STORE / "archives"), USER, str(UID), HOME, *packages],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DOWNLOAD_PATIENCE, check=False,
            )  # fmt: skip
            if done.returncode:
                raise LayerError("\n".join(done.stderr.splitlines()[-5:]))
            new.rename(folder)
        finally:
            for left in (new, Path(f"{new}.work")):
                shutil.rmtree(left, ignore_errors=True)
        return folder, _hold(folder)


def _hold(folder: Path) -> int:
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def _remove_unused(folder: Path) -> None:
    """Remove a layer that nobody holds."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)
