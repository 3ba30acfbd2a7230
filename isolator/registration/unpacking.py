"""Packages of strangers, unpacked by a process that has no right to anything (``isolator/reader/package.py``).

Root opens its own copy of the package and makes what the reader writes, within the bounds of every other copy; of the
package it parses no byte. Whoever breaks the reader is who made the package, and gets nothing but that content.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from isolator.errors import UsageError
from isolator.registration.collecting import PACKAGE, Collected, receive
from isolator.registration.processes import leased, running

_MODULE = "isolator.reader.package"
"""Named, never imported."""
SUFFIX = ".isolator"
"""End of the names of packages in ``plugin_dirs``."""
_SECONDS = 10.0
"""Patience with the manifest of one package."""


def unpack(target: Path, shown: str, uid_range: tuple[int, int]) -> Collected:
    """Replace the package in a folder, alone in it, by its content; raises UsageError for what is no package."""
    package = target / PACKAGE
    with os.fdopen(os.open(package, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
        package.unlink()
        with leased(uid_range) as uid, running(_MODULE, uid, stdin=file) as process:
            return receive(process, target, shown, by="reader")


def manifest_of(fd: int, shown: str, uid_range: tuple[int, int]) -> bytes:
    """The manifest in an open package, for a listing; raises UsageError for a file that has none."""
    with leased(uid_range) as uid, running(_MODULE, uid, "manifest", stdin=fd) as process:
        try:
            text, _ = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            text = b""
    if not text:
        raise UsageError(shown, "is no package with a plugin.json", "pack it again with 'isolator pack'")
    return text
