"""Sealed files in memory: those of others are read only if they cannot change or block."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolator.linux.memfd import make_sealed, read_sealed


def test_sealed_file_is_read_whole_and_cannot_be_changed() -> None:
    fd = make_sealed(b"x" * 300_000)
    try:
        assert read_sealed(fd, 300_000) == b"x" * 300_000
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"y", 0)
        with pytest.raises(ValueError, match="300000 bytes; at most 299999"):
            read_sealed(fd, 299_999)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "file", "unsealed"])
def test_file_that_may_change_or_block_is_refused(tmp_path: Path, kind: str) -> None:
    others: list[int] = []
    if kind == "pipe":
        fd, other = os.pipe()
        others.append(other)
    elif kind == "file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    else:
        fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    try:
        with pytest.raises((OSError, ValueError)):
            read_sealed(fd, 100)
    finally:
        for one in (fd, *others):
            os.close(one)
