"""Uids that are lent: their locks are in a folder that is root's, or nobody gets one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from isolator.errors import ConfinementError
from isolator.layers import user
from isolator.layers.user import LOCKS, UidLease

RANGE = (60990, 60999)


def test_folder_of_the_locks_is_in_one_that_only_root_can_write() -> None:
    for folder in Path(LOCKS).parents:
        status = folder.stat()
        assert status.st_uid == 0 and not status.st_mode & 0o022, folder


@pytest.mark.parametrize("kind", ["of a user", "open to all", "a file", "a link"])
def test_folder_that_is_not_root_s_alone_lends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "locks"
    monkeypatch.setattr(user, "LOCKS", str(place))
    if kind == "a file":
        place.touch()
    elif kind == "a link":
        (tmp_path / "other").mkdir(mode=0o700)
        place.symlink_to("other")
    else:
        place.mkdir()
        os.chown(place, 65534 if kind == "of a user" else 0, -1)
        place.chmod(0o777 if kind == "open to all" else 0o700)
    with pytest.raises(ConfinementError, match=f"{place}: is not a folder of root's alone; remove it"):
        UidLease(RANGE)


def test_two_never_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user, "LOCKS", str(tmp_path / "locks"))
    one, two = UidLease(RANGE), UidLease(RANGE)
    assert one.uid != two.uid and stat.S_IMODE((tmp_path / "locks").stat().st_mode) == 0o700
    one.release()
    two.release()
    assert not (tmp_path / "locks").exists()
