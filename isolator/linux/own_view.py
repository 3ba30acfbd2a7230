"""Files that another process has opened, found again in this process's own view of mounts.

A mount can be cloned in the mount namespace that it is in, and nowhere else (open_tree(2): EINVAL). A service has a
namespace of its own (``ProtectHome=``, ``ProtectSystem=``), so a descriptor that a caller passes belongs to mounts that
are not its own. The same file is looked for under the same name, and taken only if it is the same file.
"""

from __future__ import annotations

import errno
import os
import stat

from isolator.linux.descriptors import owning
from isolator.linux.files import open_nofollow
from isolator.linux.mount import NODEV, NOSUID, RDONLY, clone_tree, set_attributes

_DELETED = " (deleted)"


def in_own_view(fd: int) -> int:
    """An O_PATH descriptor of the file or folder behind ``fd``, in this process's mount namespace.

    Raises OSError: ENOENT where this process sees nothing of that name, ESTALE where it sees another file there (a
    mount that it does not have, or that the caller does not have), EINVAL for what is neither a file nor a folder.
    The caller's rights are not looked at: that it holds the descriptor is the proof of those that opening it took.
    """
    theirs = os.fstat(fd)
    if not (stat.S_ISREG(theirs.st_mode) or stat.S_ISDIR(theirs.st_mode)):
        raise OSError(errno.EINVAL, "is neither a file nor a folder")
    name = os.readlink(f"/proc/self/fd/{fd}")
    if not name.startswith("/") or (name.endswith(_DELETED) and theirs.st_nlink == 0):
        raise OSError(errno.ENOENT, "has no name any more", name)
    own = open_nofollow(name)
    try:
        # Both are open, so neither number can have been given to another file.
        if not os.path.samestat(theirs, os.fstat(own)):
            raise OSError(errno.ESTALE, "is another file to the daemon", name)
    except BaseException:
        os.close(own)
        raise
    return own


def clone_in_own_view(fd: int, *, writable: bool) -> int:
    """A detached clone, nosuid and nodev, of the mount with the file behind ``fd``; submounts do not come along.

    ``writable`` clears read-only on the clone: the view of a service is read-only where the host's is not. Whether the
    caller may write is for its own rights to say. Raises OSError as ``in_own_view`` does; EROFS where the file system
    itself is read-only.
    """
    with owning(in_own_view(fd)) as own:
        tree = clone_tree("", directory=own, recursive=False)
    try:
        attributes = NOSUID | NODEV | (0 if writable else RDONLY)
        set_attributes(tree, attributes, clear=RDONLY if writable else 0, recursive=False)
        if writable and os.fstatvfs(tree).f_flag & os.ST_RDONLY:  # not of this mount any more
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    except BaseException:
        os.close(tree)
        raise
    return tree
