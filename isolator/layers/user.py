"""A system user of its own for each plugin, and no supplementary groups.

Users are made at registration with the distribution's own tool, from the reserved range in ``host.toml``
(the system range holds only some 900). ``isolator run`` and probes use a free uid of the same range
without a passwd entry: a lock file on the machine keeps two of them apart.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import time
from typing import TYPE_CHECKING

from isolator.base.structs import field, struct_class
from isolator.errors import ConfinementError, IsolatorError
from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.plan import Plan, Section
from isolator.linux.lock import lock_file

if TYPE_CHECKING:
    from collections.abc import Set

    from isolator.policy.model import EffectivePolicy

LOCKS = "/run/isolator-uids"
"""Lock files, one for each uid in use without a passwd entry; the same for every instance on the machine. Not below
``/run/lock``, where any user may make a folder of that name first."""

_USERADD = (
    "useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
    "--shell", "/usr/sbin/nologin",
)  # fmt: skip
_PASSWD = "/etc/passwd"
_USERS_SECONDS = 0.5
_LOCKED_EXITS = {1, 10}  # useradd(8), userdel(8): "can't update" the password or the group file, also when it is locked
_BUSY = 8  # userdel(8): a process of the user's is there, perhaps one that has been killed and is not reaped yet
_TAKEN = 4  # useradd(8): the uid; also when no gid is free


class UserSection(Section, kind="user"):
    """The ids of the cage's processes."""

    uid: int
    gid: int

    def enter(self, fds: dict[str, int]) -> None:
        os.setgroups([])
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)


class User(Layer):
    """Real, effective, saved and file-system ids are the plugin's own; no other group."""

    name = "user"

    @classmethod
    def check(cls) -> list[Control]:
        if os.geteuid() != 0:
            return [Control("own user", cls.name, "unavailable", "not running as root", "run it with sudo")]
        return [Control("own user", cls.name, "enforced", "one system user per plugin")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return "Runs as a system user of its own, in no other group and with no way to become another user."

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        self.adopt(spec, Kept())
        plan.add(UserSection(spec.uid, spec.gid))

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        self._uid, self._gid = spec.uid, spec.gid

    def confirm(self, process: Process) -> None:
        status = process.status
        for key, wanted in (("Uid", self._uid), ("Gid", self._gid)):
            if set(status[key].split()) != {str(wanted)}:
                raise mismatch(self.name, key, wanted, status[key])
        if status["Groups"].split():
            raise mismatch(self.name, "Groups", "none", status["Groups"])


def user_name(plugin: str, instance: str) -> str:
    """``plugin-NAME``, with the instance for a root other than ``/``; shortened with a hash beyond 32 characters."""
    name = f"plugin-{plugin}-{instance}" if instance else f"plugin-{plugin}"
    if len(name) <= 32:
        return name
    import hashlib

    return f"{name[:25]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def add_user(name: str, uid_range: tuple[int, int], *, comment: str) -> int:
    """Make a system user with a free uid of the range; returns the uid. Raises when there is one of that name."""
    refuse_existing(name)
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    for uid in range(uid_range[0], uid_range[1] + 1):
        if uid in taken or os.path.exists(f"{LOCKS}/{uid}"):
            continue
        # Another daemon may have taken the same number since the users were read: useradd decides, under its lock.
        # Its group gets the same number: of those that a system keeps for itself there are nine hundred.
        numbers = ("--uid", f"{uid}", "-K", f"SYS_GID_MIN={uid}", "-K", f"SYS_GID_MAX={uid}")
        if _account_tool([*_USERADD, *numbers, "--comment", comment, name], name, accepted=_TAKEN) == 0:
            return uid
    raise _range_full(uid_range)


def refuse_existing(name: str) -> None:
    """Raise ConfinementError when there is a user of that name: another program made it, for another purpose."""
    with contextlib.suppress(KeyError):
        uid = pwd.getpwnam(name).pw_uid
        why = f"exists already (uid {uid})"
        raise ConfinementError(f"system user {name}", why, f"userdel {name}, if nobody needs it")


def plugin_gid(name: str, uid: int) -> int:
    """The group of a plugin's user; raises ConfinementError when there is no such user, or it is another one."""
    users = _users()
    ids = users.ids.get(name)
    if ids is None:
        remedy = f"make it again: useradd --system --no-create-home --shell /usr/sbin/nologin --uid {uid} {name}"
        raise ConfinementError(f"system user {name}", "is gone", remedy)
    if ids[0] != uid or users.names[uid] != [name]:
        why = f"is not alone with uid {uid} any more"
        raise ConfinementError(f"system user {name}", why, f"see 'getent passwd {name} {uid}'")
    return ids[1]


@struct_class(frozen=True)
class _Users:
    """The host's users: all are read to find that one is alone with its uid, and hundreds of starts want that at once.

    They are read anew when the file has changed, and after a moment in any case: users may come from elsewhere.
    """

    file: tuple[int, int, int, int]
    """Device, inode, size and time of change of ``_PASSWD``."""
    read: float
    """Monotonic time."""
    ids: dict[str, tuple[int, int]] = field(default_factory=dict)
    """uid and gid by name."""
    names: dict[int, list[str]] = field(default_factory=dict)


_known: _Users | None = None


def _users() -> _Users:
    global _known
    try:
        info = os.stat(_PASSWD)
        file = (info.st_dev, info.st_ino, info.st_size, info.st_ctime_ns)
    except OSError:
        file = (0, 0, 0, 0)
    now = time.monotonic()
    known = _known
    if known is None or known.file != file or now - known.read > _USERS_SECONDS:
        known = _Users(file, now)
        for one in pwd.getpwall():
            known.ids.setdefault(one.pw_name, (one.pw_uid, one.pw_gid))
            known.names.setdefault(one.pw_uid, []).append(one.pw_name)
        _known = known  # whole: other threads ask meanwhile
    return known


def add_service_user(name: str, *, comment: str) -> tuple[int, int]:
    """Make (or find) the system user of one of the daemon's own processes; returns (uid, gid)."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        _account_tool([*_USERADD, "--comment", comment, name], name)
        entry = pwd.getpwnam(name)
    return entry.pw_uid, entry.pw_gid


def add_group(name: str) -> int:
    """Make (or find) a system group; returns its gid."""
    import grp

    with contextlib.suppress(KeyError):
        return grp.getgrnam(name).gr_gid
    _account_tool(["groupadd", "--system", name], name)
    return grp.getgrnam(name).gr_gid


def remove_group(name: str) -> None:
    """Remove a system group; no error when there is none."""
    import grp

    with contextlib.suppress(KeyError):
        grp.getgrnam(name)
        _account_tool(["groupdel", name], name)


def remove_user(name: str) -> None:
    """Remove a system user and its group; no error when there is none."""
    with contextlib.suppress(KeyError):
        pwd.getpwnam(name)
        _account_tool(["userdel", name], name, again=_LOCKED_EXITS | {_BUSY})


def _account_tool(command: list[str], user: str, *, accepted: int = 0, again: Set[int] = _LOCKED_EXITS) -> int:
    """Run a tool, anew for up to 3 s while it ends with one of the codes ``again``; returns 0 or ``accepted``.

    Raises IsolatorError for any other exit code.
    """
    import subprocess

    # Another tool may hold the lock of /etc/passwd for a moment; there is no event to wait for.
    for wait in (0.1, 0.2, 0.4, 0.8, 1.6, 0.0):
        result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if result.returncode in (0, accepted):
            return result.returncode
        if result.returncode not in again or not wait:
            break
        time.sleep(wait)
    raise IsolatorError(f"system user {user}", result.stderr.strip() or f"{command[0]} failed", "see /etc/passwd")


class UidLease:
    """A free uid without a passwd entry, held until ``release``."""

    def __init__(self, uid_range: tuple[int, int]) -> None:
        _make_locks()
        taken = {entry.pw_uid for entry in pwd.getpwall()}
        for uid in range(uid_range[1], uid_range[0] - 1, -1):  # from the top: plugins' users come from the bottom
            if uid not in taken and self._lock(uid):
                self.uid = uid
                return
        raise _range_full(uid_range)

    @classmethod
    def adopt(cls, uid: int, lock: int) -> UidLease:
        """The lease that this process had before its exec; ``lock``: the descriptor that holds it."""
        lease = cls.__new__(cls)
        lease.uid, lease.lock = uid, lock
        return lease

    def _lock(self, uid: int) -> bool:
        try:
            fd = lock_file(f"{LOCKS}/{uid}")
        except FileNotFoundError:
            _make_locks()  # another release removed the empty folder
            return self._lock(uid)
        self.lock = -1 if fd is None else fd
        return fd is not None

    def release(self) -> None:
        """Give the uid back."""
        if self.lock >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{LOCKS}/{self.uid}")
            os.close(self.lock)
            self.lock = -1
            with contextlib.suppress(OSError):
                os.rmdir(LOCKS)


def _make_locks() -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(LOCKS, 0o700)
    with contextlib.suppress(FileNotFoundError):
        status = os.lstat(LOCKS)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
            raise ConfinementError(LOCKS, "is not a folder of root's alone", "remove it")


def _range_full(uid_range: tuple[int, int]) -> ConfinementError:
    return ConfinementError(
        "own user", f"no free uid in {uid_range[0]}-{uid_range[1]}", "widen uid_range in host.toml or remove plugins"
    )
