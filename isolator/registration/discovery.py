"""Discovery of plugins in the folders that ``host.toml`` lists as ``plugin_dirs``: shown, never run before approval.

Each folder in one of them that holds a ``plugin.json``, and each package ``*.isolator``, is an entry: *pending* when
its manifest can be read, else *rejected* with the reason. Nothing but the manifest is read, and nothing is believed:
approving copies it into the store like any other registration, so it does not matter who can write here. An entry goes
when its folder or package goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from isolator.base.structs import field, struct_class
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.messages import FoundEntry, PluginState
from isolator.ipc.tasks import Tasks
from isolator.linux.descriptors import owning
from isolator.linux.files import openat2
from isolator.linux.folder_watch import FolderWatch
from isolator.policy.request import MAX_BYTES, ManifestCore
from isolator.registration.reading import ManifestReader, ReadManifest
from isolator.registration.staging import MANIFEST, NAME
from isolator.registration.unpacking import SUFFIX, manifest_of

logger = logging.getLogger(__name__)

MAX_ENTRIES = 256
"""Entries that are read in one folder: whoever can write there must not keep the daemon busy with more."""
_packed: dict[tuple[int, ...], bytes | UsageError] = {}
"""Content of each package that was looked at, by the file's identity: a reader is a process."""


@struct_class(frozen=True)
class Found:
    """One folder with a manifest. ``name`` is the manifest's, or one to show it by when it has none of its own."""

    name: str
    folder: str
    error: str = ""
    version: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    core: ManifestCore | None = None

    def entry(self) -> FoundEntry:
        """As the host and the command line see it."""
        return FoundEntry(
            name=self.name,
            version=self.version,
            digest="",
            state=PluginState.REJECTED if self.error else PluginState.PENDING,
            error=self.error,
            found=self.folder,
            manifest=self.manifest or None,
        )


def scan(folders: Iterable[str], registered: Mapping[str, str], reader: ManifestReader) -> list[Found]:
    """Every entry, each under a name of its own. ``registered``: the names in use, each with its folder.

    A name belongs to the first manifest that has it; a folder without one of its own never takes one away.
    """
    sources = {source for source in registered.values() if source}
    texts: dict[str, bytes] = {}
    errors: dict[str, IsolatorError] = {}
    for folder in folders:
        for place, child in _candidates(folder):
            try:
                if place not in sources:
                    text = _manifest_of(child, place, reader.uid_range)
                    if text is not None:
                        texts[place] = text
            except IsolatorError as error:
                errors[place] = error
            finally:
                os.close(child)
    answers = reader.read_all([(text, f"{place}/{MANIFEST}") for place, text in texts.items()])
    read: dict[str, ReadManifest] = {}
    for place, answer in zip(texts, answers, strict=True):
        if isinstance(answer, ReadManifest):
            read[place] = answer
        else:
            errors[place] = answer
    taken, found = dict(registered), []
    for place, one in read.items():
        if one.core.name in taken:
            errors[place] = _taken(place, one.core.name, taken[one.core.name])
        else:
            taken[one.core.name] = place
            found.append(Found(one.core.name, place, version=one.core.version, manifest=one.manifest, core=one.core))
    for place, refusal in errors.items():
        name = _placeholder(place, taken)
        taken[name] = place
        found.append(Found(name, place, error=str(refusal)))
    return found


def _taken(place: str, name: str, other: str) -> UsageError:
    return UsageError(
        f"{place}/{MANIFEST}", f'the name "{name}" is taken' + (f" by {other}" if other else ""), "choose another name"
    )


def _placeholder(place: str, taken: Mapping[str, str]) -> str:
    """A name to show a folder by that has none of its own: the folder's, or one that its path alone decides."""
    name, text = os.path.basename(place), os.fsencode(place)
    while not NAME.match(name) or name in taken:
        text = hashlib.sha256(text).hexdigest().encode()
        name = f"found-{text[:8].decode()}"
    return name


class Discovery:
    """The entries of one daemon, kept up to date; ``report`` is called with the new, changed and removed ones."""

    def __init__(
        self,
        folders: tuple[str, ...],
        reader: ManifestReader,
        registered: Callable[[], Mapping[str, str]],
        report: Callable[[dict[str, Found], list[str]], None],
    ) -> None:
        self.found: dict[str, Found] = {}
        self._folders, self._reader = folders, reader
        self._registered, self._report = registered, report
        self._watch: FolderWatch | None = None
        self._again = asyncio.Event()
        self._tasks = Tasks()
        self._known: dict[str, FoundEntry] = {}
        self.scanning = False
        """Folders are being read."""

    async def start(self, known: Iterable[FoundEntry] = ()) -> None:
        """Scan for the first time, and again after every change. ``known``: entries that were reported before."""
        self._known = {entry.name: entry for entry in known}
        if not self._folders and not self._known:
            return
        for folder in self._folders:
            if not Path(folder).is_dir():
                logger.warning("plugin_dirs: %s is not a folder (yet)", folder)
        self._watch = FolderWatch(lambda _: self._again.set())
        await self._scan()
        self._tasks.keep("discovery", self._keep)

    def rescan(self) -> None:
        """Scan again: the registrations have changed."""
        self._again.set()

    def close(self) -> None:
        self._tasks.cancel()
        if self._watch is not None:
            self._watch.close()

    async def _keep(self) -> None:
        while True:
            await self._again.wait()
            self._again.clear()
            try:
                await self._scan()
            except BaseException:
                self._again.set()  # not seen yet
                raise

    async def _scan(self) -> None:
        self.scanning = True
        try:
            await self._scan_once()
        finally:
            self.scanning = False

    async def _scan_once(self) -> None:
        assert self._watch is not None
        # Watched before they are read: a change meanwhile causes another scan.
        self._watch.set(await asyncio.to_thread(_watched, self._folders))
        before = self._registered()
        entries = await asyncio.to_thread(scan, self._folders, before, self._reader)
        known = self._registered()
        if known != before:
            # What was registered while the folders were being read is not to be found any more.
            self._again.set()
        now = {entry.name: entry for entry in entries if entry.name not in known}
        earlier, self._known = self._known, {}
        changed = {
            name: entry
            for name, entry in now.items()
            if self.found.get(name) != entry and earlier.get(name) != entry.entry()
        }
        removed = [name for name in (*self.found, *earlier) if name not in now and name not in known]
        self.found = now
        self._report(changed, removed)


def _candidates(folder: str) -> Iterable[tuple[str, int]]:
    """(path, descriptor) of each folder and package in ``folder``, but for links. The caller closes the descriptors."""
    try:
        base = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    with owning(base):
        real = os.path.realpath(folder)
        for name in sorted(os.listdir(base))[:MAX_ENTRIES]:
            if name.startswith("."):
                continue
            kind = 0 if name.endswith(SUFFIX) else os.O_DIRECTORY
            with contextlib.suppress(OSError):
                child = openat2(base, name, os.O_RDONLY | os.O_NONBLOCK | kind)
                yield os.path.join(real, name), child


def _manifest_of(child: int, place: str, uid_range: tuple[int, int]) -> bytes | None:
    """The manifest in a folder or a package; None for a folder without one. Raises UsageError."""
    info = os.fstat(child)
    if stat.S_ISDIR(info.st_mode):
        return _manifest(child, f"{place}/{MANIFEST}")
    if not stat.S_ISREG(info.st_mode):
        raise UsageError(place, "is no package", "remove it")
    now = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    if now not in _packed:
        while len(_packed) >= 4 * MAX_ENTRIES:
            _packed.pop(next(iter(_packed)), None)
        try:
            _packed[now] = manifest_of(child, place, uid_range)
        except UsageError as error:
            _packed[now] = error
    found = _packed[now]
    if isinstance(found, UsageError):
        raise UsageError(place, found.why, found.remedy)
    return found


def _manifest(child: int, shown: str) -> bytes | None:
    try:
        # O_NONBLOCK: whoever may write here may put a FIFO there.
        fd = openat2(child, MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = "a symbolic link" if error.errno == errno.ELOOP else error.strerror or "cannot be opened"
        raise UsageError(shown, why, "put the file itself there") from None
    with owning(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(shown, "not a regular file", "put a JSON file there")
        data = bytearray()
        while len(data) <= MAX_BYTES and (chunk := os.read(fd, MAX_BYTES)):
            data += chunk
        return bytes(data)


def _watched(folders: Iterable[str]) -> list[str]:
    """The folders to watch: each, the folders in it, and in place of one that is missing what is above it."""
    watched = []
    for folder in folders:
        place = Path(os.path.realpath(folder))
        while not place.is_dir() and place != place.parent:
            place = place.parent
        watched.append(str(place))
        if place == Path(os.path.realpath(folder)):
            for path, child in _candidates(folder):
                if stat.S_ISDIR(os.fstat(child).st_mode):
                    watched.append(path)
                os.close(child)
    return watched
