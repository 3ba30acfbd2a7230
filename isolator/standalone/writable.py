"""Folders of the host that the command of ``isolator run`` may change: the files that it makes there are the caller's.

The folder is shown through an idmapped mount in which the caller and the cage's user change places, and so do their
groups; all others are themselves, but for root, whom nobody in a cage is or becomes. So a file of the caller's is the
cage's own, a colleague's is the cage's to change where the group or everybody may, and root's is nobody's.
"""

from __future__ import annotations

import os
import pwd
import stat

from isolator.errors import ConfinementError
from isolator.layers.base import Bind
from isolator.linux.files import open_nofollow
from isolator.linux.namespaces import exchange, new_user_namespace


def writable_folder(path: str, uid: int, owned: list[int]) -> Bind:
    """The bind of a folder that the cage of ``uid`` may change; ``owned`` gets its descriptors.

    Raises ConfinementError when it is no folder, or root's.
    """
    try:
        folder = open_nofollow(path, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        remedy = "name a folder by its real path, without symbolic links"
        raise ConfinementError(f"--write {path}", error.strerror or "", remedy) from None
    owned.append(folder)
    whose_uid, whose_gid = _caller(path, os.fstat(folder))
    try:
        ids = new_user_namespace(exchange(whose_uid, uid), exchange(whose_gid, uid))
    except OSError as error:
        remedy = "allow user namespaces to root: sysctl user.max_user_namespaces"
        raise ConfinementError(f"--write {path}", f"{error.strerror} ({error.filename})", remedy) from None
    owned.append(ids)
    return Bind(path, folder, writable=True, ids=ids)


def _caller(path: str, folder: os.stat_result) -> tuple[int, int]:
    """Uid and gid of who called sudo, else of the folder's owner; never root's."""
    uid, gid = (int(text) if (text := os.environ.get(name, "")).isdigit() else 0 for name in ("SUDO_UID", "SUDO_GID"))
    if not uid:
        uid, gid = folder.st_uid, folder.st_gid
    if not gid:
        try:
            gid = pwd.getpwuid(uid).pw_gid
        except KeyError:
            gid = 0
    others = stat.S_IWOTH | (stat.S_IWGRP if folder.st_gid == gid else 0)
    if not uid or (folder.st_uid == 0 and not folder.st_mode & others):
        remedy = "give the folder to a user: chown USER: DIR"
        raise ConfinementError(f"--write {path}", "it is root's, and nothing in a cage acts as root", remedy)
    return uid, gid or uid
