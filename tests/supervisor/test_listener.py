"""Listening sockets at a path: their mode from the first instant, and what becomes of the process that makes them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.supervisor import listener
from tests.support.descriptors import open_descriptors, opened_since


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_socket_is_root_s_alone_until_it_has_its_owner(
    tmp_path: Path, open_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    chown = os.chown

    def noting(path: Path, uid: int, gid: int) -> None:
        seen.append(stat.S_IMODE(os.lstat(path).st_mode))
        chown(path, uid, gid)

    monkeypatch.setattr(listener.os, "chown", noting)
    with listener.listen(tmp_path / "socket", mode=0o666, owner=65534, backlog=1):
        status = os.lstat(tmp_path / "socket")
        assert (seen, stat.S_IMODE(status.st_mode), status.st_uid) == ([0o600], 0o666, 65534)


def test_umask_of_the_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads make files meanwhile, with whatever umask the process has then."""
    changed: list[int] = []
    monkeypatch.setattr(listener.os, "umask", lambda mask: changed.append(mask) or 0o022)
    listener.listen(tmp_path / "socket", mode=0o600, owner=0, backlog=1).close()
    assert changed == []


def test_descriptor_is_closed_when_nothing_can_be_bound(tmp_path: Path) -> None:
    before = open_descriptors()
    (tmp_path / "socket").mkdir()
    with pytest.raises(OSError):
        listener.listen(tmp_path / "socket", mode=0o600, owner=0, backlog=1)
    assert not opened_since(before)
