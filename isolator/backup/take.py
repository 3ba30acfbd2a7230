"""Take a backup: everything that a daemon keeps, as it was at one moment."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import platform
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import isolator
from isolator.audit import files as trail_files
from isolator.audit.recover import HEAD_NAME
from isolator.audit.seal import PUBLIC_NAME
from isolator.backup import archive
from isolator.backup.archive import Entry, Manifest, copy_sparse, open_plain
from isolator.backup.freezer import copy_state
from isolator.backup.left_out import left_out
from isolator.backup.swap import REPLACED, finish
from isolator.errors import IsolatorError, UsageError, translated
from isolator.linux.descriptors import owning
from isolator.linux.files import read_plain
from isolator.paths import Paths
from isolator.recovery import daemon as recovery
from isolator.recovery.journal import Journal, read_unlocked
from isolator.registration.durable import sync_folder, sync_tree
from isolator.registration.store import Store

Snapshot = Callable[[str], str]
"""Has the host copy its database at the moment of the record with this id; returns the copy's name."""

_MOST = 4 << 20
"""Bytes of a policy, a registration or a key file."""
_PATIENCE = 60.0
_OWN_FILES = ("host.db", "snapshot-")


@dataclass(frozen=True)
class Taken:
    """A backup that was made."""

    id: str
    place: Path
    taken: str
    plugins: int
    bytes: int
    live: bool
    left_out: tuple[str, ...]
    """Lines about what is not in it, or would stand in a restore's way."""


def take(paths: Paths, place: Path, passphrase: str, snapshot: Snapshot) -> Taken:
    """Make the backup ``place``, which must not exist; ``snapshot`` is called only while a daemon runs.

    Raises IsolatorError; then there is nothing at ``place``.
    """
    archive.check_passphrase(passphrase)
    place = place.absolute()
    place = place.parent.resolve() / place.name
    _check_place(place)
    with _unfinished(place) as folder, contextlib.ExitStack() as held:
        live = read_unlocked(paths.journal) is None
        if not live:
            journal = Journal(paths.journal)  # a daemon that starts meanwhile is refused
            held.callback(journal.close)
            recovery.clear(paths, journal)
            finish(paths)
        try:
            making = _Making(paths, folder, live)
            making.fill(snapshot)
            text = making.manifest.encode()
            _write(folder / archive.MANIFEST, text)
            _write(folder / archive.KEYS, archive.seal(passphrase, making.keys, text))
            sync_tree(folder)
            os.rename(folder, place)
            sync_folder(place.parent)
        except OSError as error:
            why = f"{error.filename or 'a file'}: {error.strerror}"
            raise IsolatorError(f"backup {place}", why, "mend that, or name another folder") from None
    size = sum(entry.size for entry in making.manifest.entries)
    return Taken(making.manifest.id, place, making.manifest.taken, len(making.names), size, live, left_out(paths))


def _check_place(place: Path) -> None:
    """Refuse a place that exists, or where somebody else could exchange what root writes."""
    if os.path.lexists(place):
        raise UsageError(str(place), "is there already", "name a folder that is new: each backup has its own")
    for part in (place.parent, *place.parent.parents):
        with translated(OSError, UsageError, str(part), "", "make it first"):
            found = part.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise UsageError(str(part), "is no folder", "name a folder that is new")
        if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            why = f"{part} can be written by somebody other than root, who could exchange the backup"
            raise UsageError(str(place), why, "choose a folder of root's, such as /var/backups")


@contextlib.contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """A folder beside ``place`` that is removed unless it was renamed; one that a killed command left is replaced."""
    folder = place.with_name(f".{place.name}.unfinished")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    with owning(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
        if os.fstat(fd).st_uid != 0:
            raise UsageError(str(folder), "is somebody else's", "name another folder")
        with translated(BlockingIOError, IsolatorError, str(place), "another command is making it", "wait for it"):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            os.fchmod(fd, 0o700)
            yield folder
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)


class _Making:
    """A backup that is being made in ``folder``."""

    def __init__(self, paths: Paths, folder: Path, live: bool) -> None:
        self.names: list[str] = []
        self.keys: dict[str, bytes] = {}
        self._paths, self._folder = paths, folder
        self._data = folder / archive.DATA
        self._data.mkdir(mode=0o700)
        self.manifest = Manifest(secrets.token_hex(8), _now(), isolator.__version__, platform.node(), live)

    def fill(self, snapshot: Snapshot) -> None:
        paths, live = self._paths, self.manifest.live
        if live:
            database, settled = self._moment(snapshot)
        else:
            database, settled = paths.host_database, _settled(paths)
        self._trail()
        self._keep_keys()
        host = _owner(paths.host_lib)
        if os.path.lexists(database):
            self._file("host", "host.db", database, owner=host)
            if live:
                database.unlink()
        log = paths.host_database.with_name("host.db-wal")
        if not live and os.path.lexists(log):
            self._file("host", "host.db-wal", log, owner=host)
        self._store(settled)
        daemon = _supervisor(paths) if live else None
        for name in self.names:
            self._state(name, daemon)

    # --- the moment ------------------------------------------------------------------------------------------

    def _moment(self, snapshot: Snapshot) -> tuple[Path, dict[str, bytes]]:
        """Have the host copy its database while no plugin and no policy is changed; returns the copy, and those."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            before = _settled(self._paths)
            if not any(name.endswith("/plugin.intent") for name in before):
                self.manifest.id, self.manifest.taken = secrets.token_hex(8), _now()
                name = f"snapshot-{self.manifest.id}.db"
                if snapshot(self.manifest.id) != name:  # whoever has the host process may name anything
                    raise IsolatorError("backup", "the host process named another file than its copy", "see its log")
                if before == _settled(self._paths):
                    return self._paths.host_lib / name, before
            time.sleep(0.2)
        raise IsolatorError("backup", "plugins or policies are being changed all the time", "run it again later")

    def _trail(self) -> None:
        """Copy the trail, up to the record of this backup if a daemon writes on."""
        log, owner = self._paths.audit_log, _owner(self._paths.audit_log)
        if not log.is_dir():
            return
        with contextlib.ExitStack() as opened:
            found = _open_trail(log, owner, opened)
            if self.manifest.live:
                found = self._cut(found)
            for name, fd, size in found:
                self._blob("trail", name, fd, 0o640, size)
        public = log / PUBLIC_NAME
        if os.path.lexists(public):
            self._file("trail", PUBLIC_NAME, public, owner=owner)

    def _cut(self, found: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        mark = f'"id":"{self.manifest.id}"'.encode()
        for at in reversed(range(len(found))):
            _, fd, size = found[at]
            if not size:
                continue
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as text:
                place = text.rfind(mark)
                if place < 0:
                    continue
                begin, end = text.rfind(b"\n", 0, place) + 1, text.find(b"\n", place)
                line = text[begin:end]
            seq = trail_files.seq_of(line)
            if seq is None or end < 0:
                break
            head = json.dumps({"seq": seq, "hash": trail_files.hash_of(line)})
            self.keys[f"audit/{HEAD_NAME}"] = head.encode()
            return [*found[:at], (trail_files.LIVE, fd, end + 1)]
        raise IsolatorError("audit trail", "the record of this backup is not in it", "see 'isolator audit verify'")

    # --- what is copied --------------------------------------------------------------------------------------

    def _keep_keys(self) -> None:
        """Read the files beside the database and the trail: keys, for the seal."""
        for area, folder in (("host", self._paths.host_lib), ("audit", self._paths.audit_lib)):
            if not folder.is_dir():
                continue
            owner = _owner(folder)
            for path in sorted(folder.iterdir()):
                if path.name.startswith((".", *_OWN_FILES)) or (not path.is_symlink() and path.is_dir()):
                    continue
                with os.fdopen(open_plain(path, owner=owner), "rb") as file:
                    content = file.read(_MOST + 1)
                if len(content) > _MOST:
                    raise IsolatorError(str(path), f"is larger than {_MOST >> 20} MiB, for a key", "find out why")
                self.keys.setdefault(f"{area}/{path.name}", content)

    def _store(self, settled: dict[str, bytes]) -> None:
        """Add settings, policies and registrations as they were read, and the files of every version that is kept."""
        paths, folders = self._paths, set[str]()
        places = {"etc": paths.etc, "plugins": paths.plugins}
        for name, content in settled.items():
            area, _, path = name.partition("/")
            for parent in reversed(Path(path).parents):
                if str(parent) != "." and f"{area}/{parent}" not in folders:
                    folders.add(f"{area}/{parent}")
                    self._add(Entry(area, str(parent), "folder", _mode(places[area] / parent)))
            with owning(os.memfd_create("content", os.MFD_CLOEXEC)) as fd:
                os.write(fd, content)
                self._blob(area, path, fd, _mode(places[area] / path))
        store = Store(paths.plugins) if paths.plugins.is_dir() else None
        self.names = [] if store is None else [n for n in store.names() if f"plugins/{n}/plugin.state" in settled]
        for name in self.names:
            assert store is not None
            trial = store.trial(name)
            kept = (*store.load(name).kept, *(trial.before.kept if trial else ()))
            for digest in dict.fromkeys(release.digest for release in kept):
                with contextlib.suppress(FileNotFoundError):  # then its registration is another by now
                    self._tree("plugins", f"{name}/{digest}", paths.plugins / name / digest)
        now = _settled(paths)
        if any(now.get(name) != content for name, content in settled.items() if name.startswith("plugins/")):
            raise IsolatorError("backup", "a plugin was changed meanwhile", "run the command again")

    def _state(self, name: str, daemon: int | None) -> None:
        folder = self._paths.state / name
        if not os.path.lexists(folder / "image"):
            return
        self._add(Entry("state", name, "folder", 0o700))
        if os.path.lexists(folder / "size"):
            self._file("state", f"{name}/size", folder / "size", owner=0)
        at = len(self.manifest.entries)

        def copy() -> None:
            del self.manifest.entries[at:]
            self._file("state", f"{name}/image", folder / "image", owner=0)

        copy_state(self._paths, name, daemon, copy)

    def _tree(self, area: str, name: str, folder: Path) -> None:
        self._add(Entry(area, name, "folder", stat.S_IMODE(folder.lstat().st_mode)))
        with os.scandir(folder) as found:
            inside = sorted(found, key=lambda entry: entry.name)
        for entry in inside:
            path = f"{name}/{entry.name}"
            if entry.is_symlink():
                self._add(Entry(area, path, "link", goal=os.readlink(entry.path)))
            elif entry.is_dir(follow_symlinks=False):
                self._tree(area, path, Path(entry.path))
            else:
                self._file(area, path, Path(entry.path))

    def _file(self, area: str, name: str, path: Path, *, owner: int | None = None) -> None:
        with owning(open_plain(path, owner=owner)) as fd:
            self._blob(area, name, fd, stat.S_IMODE(os.fstat(fd).st_mode))

    def _blob(self, area: str, name: str, source: int, mode: int, size: int | None = None) -> None:
        number = self._data / str(len(self.manifest.entries))
        with (
            owning(
                os.open(number, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            ) as target,
            translated(OSError, IsolatorError, f"backup of {area}/{name}", "", "is the disk full?"),
        ):
            size, digest = copy_sparse(source, target, size)
        self._add(Entry(area, name, "file", mode, size, digest))

    def _add(self, entry: Entry) -> None:
        self.manifest.entries.append(entry)


def _settled(paths: Paths) -> dict[str, bytes]:
    """Content of the settings, the policies and the registrations, by area and name."""
    found: dict[str, bytes] = {}
    for path in sorted(paths.etc.rglob("*")):
        name = path.relative_to(paths.etc)
        if not path.is_dir() and not name.parts[0].startswith((".", REPLACED)):
            found[f"etc/{name}"] = _content(path)
    for path in sorted(paths.plugins.glob("*/plugin.*")):
        found[f"plugins/{path.relative_to(paths.plugins)}"] = _content(path)
    return found


def _content(path: Path) -> bytes:
    try:
        return read_plain(path.resolve(), most=_MOST)  # in /etc an operator's link counts for what it leads to
    except FileNotFoundError:
        return b""  # removed just now: the next look finds another number of them
    except OSError as error:
        raise IsolatorError(str(path), error.strerror or "cannot be read", "mend or remove it") from None


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:  # it was there a moment ago
        return 0o600


def _open_trail(log: Path, owner: int, opened: contextlib.ExitStack) -> list[tuple[str, int, int]]:
    """Open every file of a trail at once: (name, descriptor, size), oldest first."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
            before = trail_files.trail(log)
            found = []
            for path in before:
                fd = open_plain(path, owner=owner)
                stack.callback(os.close, fd)
                found.append((path.name, fd, os.fstat(fd).st_size))
            same = not found or os.path.samestat(os.fstat(found[-1][1]), before[-1].lstat())
            if same and trail_files.trail(log) == before:  # or it was rotated meanwhile
                opened.push(stack.pop_all())
                return found


def _supervisor(paths: Paths) -> int:
    """Pid of the daemon that runs, by the kernel's word."""
    import socket

    from isolator.linux.peer import peer_ids

    with socket.socket(socket.AF_UNIX) as connection:
        with translated(OSError, IsolatorError, str(paths.ticket_socket), "", "does the daemon run?"):
            connection.connect(str(paths.ticket_socket))
        pid, uid, _ = peer_ids(connection)
    if uid != 0:
        raise IsolatorError(str(paths.ticket_socket), f"uid {uid} listens there, not the daemon", "find out who")
    return pid


def _owner(folder: Path) -> int:
    return folder.stat().st_uid if folder.is_dir() else 0


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
