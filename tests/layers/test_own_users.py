"""Users of plugins: their numbers, and those of their groups."""

from __future__ import annotations

import os
import pwd
import subprocess
import threading
from collections.abc import Iterator

import pytest

from isolator.errors import ConfinementError
from isolator.layers.user import add_user, plugin_gid, remove_user

RANGE = (78001, 78003)


def test_group_has_the_number_of_its_user_and_one_that_a_stranger_has_is_passed_over() -> None:
    """Numbers of the system's own range are nine hundred, fewer than a host may have plugins."""
    user, stranger = f"plugin-numbers-{os.getpid()}", f"stranger-{os.getpid()}"
    subprocess.run(["groupadd", "--gid", str(RANGE[0]), stranger], check=True)
    try:
        uid = add_user(user, RANGE, comment="Isolator test")
        assert (uid, pwd.getpwnam(user).pw_gid) == (RANGE[0] + 1, RANGE[0] + 1)
    finally:
        remove_user(user)
        subprocess.run(["groupdel", stranger], check=True)


def test_users_are_read_once_for_many_plugins_and_at_once_when_they_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = 0
    every = pwd.getpwall

    def counted() -> list[pwd.struct_passwd]:
        nonlocal read
        read += 1
        return every()

    monkeypatch.setattr(pwd, "getpwall", counted)
    monkeypatch.setattr("isolator.layers.user._USERS_SECONDS", 3600.0)  # whatever this machine is busy with
    user, twin = f"plugin-known-{os.getpid()}", f"plugin-twin-{os.getpid()}"
    uid = add_user(user, RANGE, comment="Isolator test")
    try:
        before = read
        gid = pwd.getpwnam(user).pw_gid
        assert [plugin_gid(user, uid) for _ in range(100)] == [gid] * 100 and read - before < 20
        subprocess.run(["useradd", "--system", "--no-create-home", "--non-unique", "--uid", str(uid), twin], check=True)
        try:
            with pytest.raises(ConfinementError, match="not alone"):
                plugin_gid(user, uid)
        finally:
            subprocess.run(["userdel", twin], check=True)
        assert plugin_gid(user, uid) == gid
    finally:
        remove_user(user)
    with pytest.raises(ConfinementError, match="is gone"):
        plugin_gid(user, uid)


def test_users_that_are_being_read_are_whole_for_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    every, found = [pwd.getpwnam("daemon"), pwd.getpwnam("root")], list[int | ConfinementError]()
    one = every[-1]

    def ask() -> None:
        try:
            found.append(plugin_gid(one.pw_name, one.pw_uid))
        except ConfinementError as error:
            found.append(error)

    def slow() -> Iterator[pwd.struct_passwd]:
        monkeypatch.setattr(pwd, "getpwall", lambda: every)
        yield from every[:-1]
        other = threading.Thread(target=ask)
        other.start()
        other.join()
        yield one

    monkeypatch.setattr("isolator.layers.user._known", None)
    monkeypatch.setattr(pwd, "getpwall", slow)
    assert plugin_gid(one.pw_name, one.pw_uid) == one.pw_gid
    assert found == [one.pw_gid]


def test_user_whose_last_process_is_just_ending_is_removed_once_it_has_ended() -> None:
    """One that has been killed counts until its parent has reaped it."""
    user = f"plugin-ending-{os.getpid()}"
    uid = add_user(user, RANGE, comment="Isolator test")
    last = subprocess.Popen(["sleep", "300"], user=uid)
    try:
        last.kill()  # nobody reaps it until the timer does
        reaping = threading.Timer(0.5, last.wait)
        reaping.start()
        remove_user(user)
        reaping.join()
        with pytest.raises(KeyError):
            pwd.getpwnam(user)
    finally:
        last.wait()
        remove_user(user)
