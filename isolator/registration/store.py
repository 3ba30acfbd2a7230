"""The root-owned store of plugins: a daemon runs nothing but its copies of approved versions.

A folder is copied to ``plugins/NAME/DIGEST/``, where DIGEST is the SHA-256 over its names, modes and contents;
previous digests stay for rollback. ``plugin.state`` beside the digests says which one is in use. A binary that is
registered by path stays where it is and is pinned by its SHA-256, checked on an opened descriptor at every start.

A daemon may be killed at any instant. One rename makes a change real: of ``plugin.state`` for an addition or a new
version, of ``plugin.state`` to ``plugin.removed`` for a removal. Before anything else outside the digests is touched
(a user, a policy file), ``plugin.intent`` names it; ``Registrar.recover`` undoes intents and finishes removals. Folders
of digests that nothing refers to are just deleted.

A new version that is started and watched is on trial: ``plugin.trial`` keeps the one it replaced until it is judged, so
that a daemon which was killed meanwhile can judge again (the supervisor's ``updates.py``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from isolator.base.typed import read
from isolator.errors import IsolatorError, NotFoundError
from isolator.linux.descriptors import owning
from isolator.linux.durable import replace_file
from isolator.linux.files import read_plain, remove_tree
from isolator.registration.durable import sync_folder, sync_tree
from isolator.registration.staging import MANIFEST, NAME, PREFIX, Kind, Source, Staged

KEPT = 5
"""Earlier versions that stay for rollback."""
_STATE, _INTENT, _REMOVED, _TRIAL = "plugin.state", "plugin.intent", "plugin.removed", "plugin.trial"
_MARKERS = (_INTENT, _REMOVED)
_MOST = 4 << 20
"""Bytes of a file here; two policies and a few names are far less."""
_MODE = 0o750
_DIGEST = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)

T = TypeVar("T")
N = TypeVar("N", "Registration", "Intent")


@dataclass(frozen=True)
class Release:
    """One version of a plugin as the store has it."""

    digest: str
    """Of the folder's content, or of the synthesised manifest and the pinned binary."""
    version: str
    kind: Kind = "folder"
    binary_path: str = ""
    """For ``binary``: where it stays."""
    binary_sha256: str = ""
    signer: str = ""
    """The publisher of ``[trust]`` whose signature was good when it was added."""

    def __post_init__(self) -> None:
        """Raise ValueError for a digest that is none: it names a folder."""
        if not self.digest.isalnum():
            raise ValueError("a digest that is none")

    @property
    def signed_by(self) -> dict[str, str]:
        """The field ``signer`` of the records of its starts, if it has one."""
        return {"signer": self.signer} if self.signer else {}


@dataclass(frozen=True)
class Registration:
    """One registered plugin, as ``plugin.state`` keeps it."""

    name: str
    user: str
    uid: int
    release: Release
    """The version in use."""
    previous: tuple[Release, ...] = ()
    """Newest first, at most ``KEPT``."""
    pending: Release | None = None
    """A newer version that asks for more than this one and waits for approval."""
    source: Source = field(default_factory=Source)
    """Origin of the newest version."""
    enabled: bool = True
    policy_sha256: str = ""
    """Of the policy file as it was written for this plugin; while the file has it, no operator has edited it."""
    serial: int = 0
    """Number of changes; tells an interrupted change that took effect from one that did not."""

    @property
    def version(self) -> str:
        return self.release.version

    @property
    def digest(self) -> str:
        return self.release.digest

    @property
    def kept(self) -> tuple[Release, ...]:
        """Every version whose files must stay."""
        return (self.release, *self.previous, *([self.pending] if self.pending else []))


@dataclass(frozen=True)
class Intent:
    """A change outside the store's digests that is about to be made."""

    name: str
    serial: int
    """Of the registration that completes the change; 1 for a plugin that is new."""
    user: str = ""
    """The system user that is made for a new one."""
    policy_before: str | None = None
    """The policy file's text, to be put back; None: there was no file."""
    policy_sha256: str = ""
    """Of the text that is written; empty: the file is not touched."""


@dataclass(frozen=True)
class Trial:
    """A version that is watched at its start: the registration that comes back if it fails, and who wanted it."""

    before: Registration
    policy: str | None
    """The policy file as it was."""
    reason: str
    record: str
    who: str | None = None
    old_policy_sha256: str | None = None

    @property
    def serial(self) -> int:
        """Serial of the registration that is on trial; with any other the trial is over, or never began."""
        return self.before.serial + 1


class Store:
    """The store of one daemon."""

    def __init__(self, base: Path) -> None:
        self.base = base
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.base.glob(f"*/{_STATE}"))

    def load(self, name: str) -> Registration:
        """Read one registration; raises NotFoundError when there is none of that name."""
        if not NAME.match(name):
            raise NotFoundError(f"plugin {name!r}", "no such plugin", "see 'isolator plugin list'")
        try:
            registration = self._read(self.base / name / _STATE, Registration)
        except FileNotFoundError:
            raise NotFoundError(f"plugin {name}", "no such plugin", "see 'isolator plugin list'") from None
        if registration.name != name:
            why = f"cannot be read: it is that of {ascii(registration.name)[:80]}"
            raise IsolatorError(str(self.base / name / _STATE), why, "restore it, or delete the folder")
        return registration

    def save(self, registration: Registration) -> None:
        """Replace the registration atomically and durably; it is true from here on."""
        self._write(registration.name, _STATE, asdict(registration))

    def begin(self, intent: Intent) -> None:
        """Write down a change before its first step."""
        self._write(intent.name, _INTENT, asdict(intent))

    def end(self, name: str) -> None:
        """Forget the intent: the change is complete, or undone."""
        (self.base / name / _INTENT).unlink(missing_ok=True)

    def intents(self) -> list[Intent]:
        """Changes that were begun and not ended, by name."""
        return list(self._readable(_INTENT, Intent))

    def begin_trial(self, trial: Trial) -> None:
        """Put the version of the next registration on trial."""
        self._write(trial.before.name, _TRIAL, asdict(trial))

    def end_trial(self, name: str) -> None:
        """Record that the version was judged."""
        (self.base / name / _TRIAL).unlink(missing_ok=True)

    def trial(self, name: str) -> Trial | None:
        """The trial of the version in use, if it has not been judged."""
        try:
            trial = self._read(self.base / name / _TRIAL, Trial)
        except (FileNotFoundError, IsolatorError):
            return None  # one that cannot be read is no reason not to start: the version in use stays in use
        return trial if self.load(name).serial == trial.serial else None

    def mark_removed(self, name: str) -> None:
        """End a plugin's existence; its remains are only to be deleted."""
        folder = self.base / name
        (folder / _STATE).rename(folder / _REMOVED)
        sync_folder(folder)

    def removed(self) -> list[Registration]:
        """Plugins whose removal was begun and not ended."""
        left = self._readable(_REMOVED, Registration)
        return [registration for registration in left if not (self.base / registration.name / _STATE).exists()]

    def folder(self, name: str, release: Release) -> Path:
        """Folder of a version's files."""
        return self.base / name / release.digest

    def manifest(self, name: str, release: Release) -> bytes:
        """The text of its plugin.json."""
        return (self.folder(name, release) / MANIFEST).read_bytes()

    def keep(self, staged: Staged) -> None:
        """Move a staged copy to its place under its digest; a second copy of the same digest is dropped.

        On disk before anything refers to it: after a power cut there is never a registration of empty files.
        """
        place = self.base / staged.name / staged.digest
        self._folder_of(staged.name)
        if place.exists():
            remove_tree(staged.folder)
            return
        sync_tree(staged.folder)
        staged.folder.rename(place)
        sync_folder(place.parent)

    def open_to(self, name: str, release: Release, gid: int) -> None:
        """Let a plugin's group, and nobody else, enter the folder of a version and the one above it."""
        folder = self.folder(name, release)
        for place in (folder, folder.parent):
            with owning(os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
                info = os.fstat(fd)
                if (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) != (0, gid, _MODE):
                    os.fchown(fd, 0, gid)
                    os.fchmod(fd, _MODE)

    def prune(self, name: str, kept: Iterable[Release]) -> None:
        """Delete the files of every version that is not to be kept."""
        digests = {release.digest for release in kept}
        for folder in (self.base / name).iterdir():
            if folder.is_dir() and folder.name not in digests:
                self._trash(folder)

    def prune_all(self) -> None:
        """Delete the remains of a killed daemon: staged copies, and digests that no registration refers to.

        For a daemon that starts; while one runs, staged copies may still be wanted. Files and folders that no daemon
        makes here (``lost+found``, a backup) stay.
        """
        for leftover in self.base.glob(f"{PREFIX}*"):
            if _is_folder(leftover):
                remove_tree(leftover)
        for name in self.names():
            with contextlib.suppress(IsolatorError):
                trial = self.trial(name)
                if trial is None:
                    self.end_trial(name)
                self.prune(name, (*self.load(name).kept, *(trial.before.kept if trial else ())))
        for marker in (_STATE, _TRIAL, *_MARKERS):
            for unfinished in self.base.glob(f"*/.{marker}"):
                if not unfinished.is_dir():
                    unfinished.unlink()
        for folder in self.base.iterdir():
            own = _is_folder(folder) and NAME.match(folder.name)
            if own and _is_forgotten(folder):
                remove_tree(folder)
            elif not own or not any((folder / file).exists() for file in (_STATE, *_MARKERS)):
                logger.warning("%s is nothing of the daemon's; it is left alone", ascii(str(folder))[1:-1])

    def delete(self, name: str) -> None:
        """Delete every file of a plugin; the marks that say so last."""
        folder = self.base / name
        if not folder.exists():
            return
        (folder / _STATE).unlink(missing_ok=True)
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                remove_tree(entry)
            elif entry.name not in _MARKERS:
                entry.unlink()
        for marker in _MARKERS:
            (folder / marker).unlink(missing_ok=True)
        folder.rmdir()

    def _trash(self, folder: Path) -> None:
        # Renamed first: a digest that is there is a whole one, also when this is interrupted.
        trash = self.base / f"{PREFIX}{os.urandom(8).hex()}"
        folder.rename(trash)
        remove_tree(trash)

    def _folder_of(self, name: str) -> Path:
        folder = self.base / name
        folder.mkdir(mode=_MODE, exist_ok=True)
        folder.chmod(_MODE)
        return folder

    def _readable(self, file: str, kind: type[N]) -> Iterator[N]:
        """Every plugin's file of that name that can be read; the others are named in the log and stay as they are."""
        for path in sorted(self.base.glob(f"*/{file}")):
            try:
                found = self._read(path, kind)
                if found.name != path.parent.name:
                    raise IsolatorError(str(path), "cannot be read: it is that of another plugin", "delete it")
                yield found
            except (IsolatorError, FileNotFoundError) as error:
                logger.error("%s", error)

    def _read(self, path: Path, kind: type[T]) -> T:
        """One file of JSON; raises FileNotFoundError, and IsolatorError with one line that names it."""
        try:
            return read(kind, json.loads(read_plain(path, most=_MOST)))
        except FileNotFoundError:
            raise
        except OSError as error:
            why = error.strerror or "the disk fails"
        except RecursionError:
            why = "it is nested too deeply"
        except ValueError as error:
            why = ascii(str(error))[1:-1][:200] or type(error).__name__
        raise IsolatorError(str(path), f"cannot be read: {why}", "restore it, or delete the folder")

    def _write(self, name: str, file: str, content: dict[str, Any]) -> None:
        folder = self._folder_of(name)
        replace_file(folder / file, json.dumps(_as_before(content), indent=1).encode(), temporary=folder / f".{file}")


def _as_before(content: Any) -> Any:
    """Leave out the fields that came later and are not set, so that an earlier version can read the rest."""
    if isinstance(content, dict):
        return {key: _as_before(value) for key, value in content.items() if (key, value) != ("signer", "")}
    return [_as_before(value) for value in content] if isinstance(content, (list, tuple)) else content


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def readable(base: Path) -> Iterator[Registration]:
    """The registrations of a store that can be read; none where there is no store."""
    if base.is_dir():
        store = Store(base)
        for name in store.names():
            with contextlib.suppress(IsolatorError):
                yield store.load(name)


def _is_forgotten(folder: Path) -> bool:
    """Whether a plugin's folder holds nothing but versions that no registration names."""
    return all(_is_folder(entry) and _DIGEST.fullmatch(entry.name) for entry in folder.iterdir())
