"""A reader of packages in the hands of whoever made the package: it tries what ``broken.py`` does, and tells of it."""

from __future__ import annotations

from collections.abc import Callable

from isolator.errors import UsageError
from isolator.ipc.folder_stream import FolderWriter
from isolator.reader import package
from tests.reader.broken import ATTEMPTS


def _attack(read: Callable[[int], bytes], writer: FolderWriter) -> None:
    done = []
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            done.append(name)
        except (OSError, MemoryError, ValueError):
            pass
    raise UsageError("", f"succeeded with {done}")


if __name__ == "__main__":
    package.read_package = _attack
    package.main()
