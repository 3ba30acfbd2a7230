"""Packages of strangers, unpacked by a process that has no right to anything (``isolator/reader/package.py``).

Root opens its own copy of the package and makes what the reader writes, within the bounds of every other copy; of the
package it parses no byte. Whoever breaks the reader is who made the package, and gets nothing but that content.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from isolator.errors import UsageError
from isolator.layers.user import UidLease
from isolator.linux.unprivileged import service_command
from isolator.registration.collecting import PACKAGE, Collected, receive

_MODULE = "isolator.reader.package"
"""Named, never imported."""
SUFFIX = ".isolator"
"""End of the names of packages in ``plugin_dirs``."""
_SECONDS = 10.0
"""Patience with the manifest of one package."""


def unpack(target: Path, shown: str, uid_range: tuple[int, int]) -> Collected:
    """Replace the package in a folder, alone in it, by its content; raises UsageError for what is no package."""
    package = target / PACKAGE
    fd = os.open(package, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        package.unlink()
        lease = UidLease(uid_range)
        try:
            return receive(_reader(fd, lease.uid), target, shown, by="reader")
        finally:
            lease.release()
    finally:
        os.close(fd)


def manifest_of(fd: int, shown: str, uid_range: tuple[int, int]) -> bytes:
    """The manifest in an open package, for a listing; raises UsageError for a file that has none."""
    lease = UidLease(uid_range)
    try:
        process = _reader(fd, lease.uid, "manifest")
        try:
            text, _ = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            text = b""
        finally:
            process.kill()
            process.wait()
    finally:
        lease.release()
    if not text:
        raise UsageError(shown, "is no package with a plugin.json", "pack it again with 'isolator pack'")
    return text


def _reader(fd: int, uid: int, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*service_command(_MODULE, uid, uid, {}), *arguments], stdin=fd, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
    )  # fmt: skip
