"""Users of plugins: their numbers, and those of their groups."""

from __future__ import annotations

import os
import pwd
import subprocess

from isolator.layers.user import add_user, remove_user

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
