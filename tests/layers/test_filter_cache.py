"""The cache of compiled filters: what is damaged is made again, and no start fails by it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from isolator.layers.seccomp import layer

DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "another byte": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(layer, "_compiled", {})
    made: list[bytes] = []

    def make() -> bytes:
        made.append(b"program!")
        return b"program!"

    def get() -> bytes:
        layer._compiled.clear()
        return layer._kept("test", "source", tmp_path, make)

    assert get() == get() == b"program!" and len(made) == 1
    (path,) = tmp_path.iterdir()
    DAMAGE[kind](path)
    assert get() == b"program!" and len(made) == 2
    if kind != "a folder":
        assert get() == b"program!" and len(made) == 2, "it was not stored again"
    assert not list(tmp_path.glob("tmp*")), "an unfinished file stays"
