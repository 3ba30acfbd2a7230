"""Restore a backup: all of it is checked and stands ready beside its places before anything changes."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from isolator.backup import archive, swap
from isolator.backup.archive import Entry, Manifest, copy_sparse, open_plain
from isolator.backup.left_out import mount_points
from isolator.errors import ConfinementError, IsolatorError, UsageError
from isolator.layers.user import add_service_user, add_user, plugin_gid, remove_user, user_name
from isolator.linux import loop, mount
from isolator.linux.descriptors import owning
from isolator.linux.files import openat2
from isolator.paths import Paths
from isolator.policy.parse.trusted import load_host_config
from isolator.recovery import daemon as recovery
from isolator.recovery.journal import Journal
from isolator.registration.durable import sync_tree
from isolator.registration.store import Registration, Store, readable
from isolator.volume.ext4 import TOOLS, Ext4Image

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


@dataclass(frozen=True)
class Restored:
    """A backup that was restored."""

    id: str
    taken: str
    machine: str
    plugins: tuple[str, ...]
    moved: tuple[str, ...]
    """Plugins whose user has another uid than in the backup."""
    binaries: tuple[str, ...]
    """Programs that plugins have by path, and that are not there."""
    replaced: str
    """Where the data of before are kept; empty: there were none."""


def restore(paths: Paths, place: Path, passphrase: str, *, replace_data: bool = False) -> Restored:
    """Restore the backup ``place``; raises IsolatorError, and nothing has changed then.

    ``replace_data``: plugins, trail or database that are there are put aside; without it they are a reason to refuse.
    """
    place = place.resolve()
    for folder in (paths.etc, paths.lib, paths.log):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Journal(paths.journal)) as journal:  # refused while a daemon runs here
        recovery.clear(paths, journal)
        swap.finish(paths)
        manifest, keys = archive.read(place, passphrase)
        present = {plugin.name: plugin for plugin in readable(paths.plugins)}
        trail = any(paths.audit_log.glob("audit*.jsonl"))
        if not replace_data and (present or os.path.lexists(paths.host_database) or trail):
            why = "there are plugins, a queue or a trail already"
            raise UsageError(f"restore below {paths.root}", why, "--replace puts them aside, and keeps them")
        return _Restoring(paths, place, manifest, present).run(keys)


class _Restoring:
    """One restore; ``run`` does it."""

    def __init__(self, paths: Paths, place: Path, manifest: Manifest, present: Mapping[str, Registration]) -> None:
        self._paths, self._place, self._manifest, self._present = paths, place, manifest, present
        self._etc, self._lib, self._log = swap.staged_folders(paths)
        self._areas = {
            "etc": self._etc, "plugins": self._lib / "plugins", "state": self._lib / "state",
            "host": self._lib / "host", "trail": self._log / "audit",
        }  # fmt: skip

    def run(self, keys: Mapping[str, bytes]) -> Restored:
        paths, made = self._paths, list[str]()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        try:
            self._stage(keys)
            store = Store(self._areas["plugins"])
            plugins = [store.load(name) for name in store.names()]
            config = load_host_config(self._etc / "host.toml")
            self._check_users(plugins)
            moved = tuple(
                plugin.name for plugin in plugins if self._own(store, plugin, config.uid_range, made) != plugin.uid
            )
            self._give_services()
            for folder in (self._etc, self._lib, self._log):
                sync_tree(folder)
        except BaseException as error:
            for user in made:
                remove_user(user)
            for folder in (self._etc, self._lib, self._log):
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                why = f"{error.filename or ''} {error.strerror}".strip()
                raise IsolatorError("restore", why, "mend that") from None
            raise
        kept = {user_name(plugin.name, paths.instance) for plugin in plugins}
        dropped = [plugin.user for plugin in self._present.values() if plugin.user not in kept]
        note = {name: getattr(self._manifest, name) for name in ("id", "taken", "machine", "version")}
        swap.decide(paths, stamp, dropped, note)
        swap.finish(paths)
        replaced = paths.lib / f"{swap.REPLACED}{stamp}"
        programs = {plugin.release.binary_path for plugin in plugins if plugin.release.kind == "binary"}
        return Restored(
            self._manifest.id, self._manifest.taken, self._manifest.machine, tuple(plugin.name for plugin in plugins),
            moved, tuple(sorted(path for path in programs if not Path(path).exists())),
            str(replaced) if replaced.exists() else "",
        )  # fmt: skip

    # --- what stands ready -----------------------------------------------------------------------------------

    def _stage(self, keys: Mapping[str, bytes]) -> None:
        for folder in (self._etc, self._lib, self._log):
            folder.mkdir(mode=0o700)
        for folder in (*self._areas.values(), self._lib / "audit"):
            folder.mkdir(mode=0o700, exist_ok=True)
        (self._etc / "policies").mkdir(mode=0o755)  # with those of before they would be more than were backed up
        with _folders(self._areas) as areas:
            for number, entry in enumerate(self._manifest.entries):
                try:
                    self._one(areas[entry.area], entry, self._place / archive.DATA / str(number))
                except OSError as error:
                    why = f"cannot be restored: {error.strerror}"
                    raise IsolatorError(f"{entry.area}/{entry.path}", why, "use another backup, or mend that") from None
        for name, content in keys.items():
            archive.check_name(name)
            area, _, file = name.partition("/")
            if area not in ("host", "audit") or "/" in file or not file:
                why = f"is damaged: a key named {ascii(name)[:80]}"
                raise IsolatorError(str(self._place), why, "use another backup")
            fd = os.open(self._lib / area / file, _NEW | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as out:
                out.write(content)
        self._check_mounts()

    def _check_mounts(self) -> None:
        """Refuse what could not be renamed: once that is decided upon, it has to succeed."""
        for staged in (self._etc, self._lib, self._log):
            mounted = mount_points(staged.parent.resolve())
            for new in sorted(staged.iterdir()):
                place = staged.parent.resolve() / new.name
                if place in mounted:
                    why = "is a mount point of its own, so its content cannot be exchanged in one step"
                    remedy = "unmount it, restore, and move what was restored onto that disk"
                    raise IsolatorError(str(staged.parent / new.name), why, remedy)

    def _one(self, area: int, entry: Entry, blob: Path) -> None:
        """Make one entry below the folder ``area``, beyond which no name leads."""
        above, _, name = entry.path.rpartition("/")
        with owning(openat2(area, above or ".", _FOLDER)) as parent:
            if entry.kind == "folder":
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, entry.mode & 0o777, dir_fd=parent)
            elif entry.kind == "link":
                os.symlink(entry.goal, name, dir_fd=parent)
            else:
                with owning(openat2(parent, name, _NEW, mode=0o600)) as target:
                    with owning(open_plain(blob)) as source:
                        found = copy_sparse(source, target)
                    if found != (entry.size, entry.sha256):
                        raise IsolatorError(str(blob), "is damaged: it is not what was backed up", "use another backup")
                    os.fchmod(target, entry.mode & 0o777)

    # --- users and owners ------------------------------------------------------------------------------------

    def _check_users(self, plugins: list[Registration]) -> None:
        """Refuse before the first user is made when one of a plugin's name is somebody else's."""
        for plugin in plugins:
            name = user_name(plugin.name, self._paths.instance)
            with contextlib.suppress(KeyError):
                uid = pwd.getpwnam(name).pw_uid
                now = self._present.get(plugin.name)
                if (name, uid) != (plugin.user, plugin.uid) and (now is None or (now.user, now.uid) != (name, uid)):
                    why = f"exists already (uid {uid}), and is not that of the plugin"
                    raise IsolatorError(f"system user {name}", why, f"userdel {name}, if nobody needs it")

    def _own(self, store: Store, plugin: Registration, uid_range: tuple[int, int], made: list[str]) -> int:
        """Give a plugin's files the user that it has here, which is made if there is none; returns the uid."""
        name = user_name(plugin.name, self._paths.instance)
        try:
            uid = pwd.getpwnam(name).pw_uid
        except KeyError:
            made.append(name)
            (self._lib / swap.USERS).write_text("\n".join(made))
            comment = f"Isolator plugin {plugin.name}"
            try:
                uid = add_user(name, (plugin.uid, plugin.uid), comment=comment)
            except ConfinementError:  # somebody else has that uid here
                uid = add_user(name, uid_range, comment=comment)
        gid = plugin_gid(name, uid)
        if (name, uid) != (plugin.user, plugin.uid):
            trial = store.trial(plugin.name)
            store.save(replace(plugin, user=name, uid=uid))
            if trial is not None:
                store.begin_trial(replace(trial, before=replace(trial.before, user=name, uid=uid)))
        for release in plugin.kept:
            store.open_to(plugin.name, release, gid)
        image = self._areas["state"] / plugin.name / "image"
        if uid != plugin.uid and image.exists():
            _change_owner(image, plugin.name, plugin.uid, uid, gid)
        return uid

    def _give_services(self) -> None:
        """Give the services' files to the users that they have here."""
        users = {
            service: add_service_user(self._paths.named(f"isolator-{service}"), comment=f"Isolator {service}")
            for service in ("audit", "net", "host")
        }
        audit, host = users["audit"], users["host"]
        for folder, (uid, gid) in (
            (self._lib / "host", host), (self._lib / "audit", audit), (self._log / "audit", (audit[0], host[1])),
        ):  # fmt: skip
            for path in (*folder.iterdir(), folder):
                os.chown(path, uid, gid, follow_symlinks=False)
        (self._log / "audit").chmod(0o2755)


@contextlib.contextmanager
def _folders(places: Mapping[str, Path]) -> Iterator[dict[str, int]]:
    with contextlib.ExitStack() as stack:
        opened: dict[str, int] = {}
        for name, place in places.items():
            opened[name] = os.open(place, _FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, opened[name])
        yield opened


def _change_owner(image: Path, name: str, old: int, uid: int, gid: int) -> None:
    """Give every file of a plugin's state to its user of here. The mount is attached nowhere; no link is followed."""
    Ext4Image(image, name).check()
    with owning(os.open(image, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)) as backing:
        device, path = loop.attach(backing)
    try:
        fd = mount.new_filesystem("ext4", {"source": path}, attributes=mount.NOSUID | mount.NODEV | mount.NOEXEC)
    finally:
        os.close(device)
    try:
        command = ["chown", "-hPR", f"--from={old}", f"{uid}:{gid}", f"/proc/self/fd/{fd}/."]
        result = subprocess.run(
            command, pass_fds=[fd], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            errors="replace", env={"PATH": TOOLS, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    finally:
        os.close(fd)
    if result.returncode != 0:
        why = (result.stderr.strip().splitlines() or ["chown failed"])[-1]
        raise IsolatorError(f"state of {name}", f"could not be given to uid {uid}: {why}", "look at its image")
