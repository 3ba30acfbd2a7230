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
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from isolator.errors import IsolatorError, NotFoundError
from isolator.registration.durable import replace_file, sync_folder, sync_tree
from isolator.registration.staging import MANIFEST, NAME, PREFIX, Source, Staged

KEPT = 5
"""Earlier versions that stay for rollback."""
_STATE, _INTENT, _REMOVED, _TRIAL = "plugin.state", "plugin.intent", "plugin.removed", "plugin.trial"
_MARKERS = (_INTENT, _REMOVED)


@dataclass(frozen=True)
class Release:
    """One version of a plugin as the store has it."""

    digest: str
    """Of the folder's content, or of the synthesised manifest and the pinned binary."""
    version: str
    kind: Literal["folder", "binary"] = "folder"
    binary_path: str = ""
    """For ``binary``: where it stays."""
    binary_sha256: str = ""


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
        """Of the registration that is on trial; with any other the trial is over, or never began."""
        return self.before.serial + 1


class Store:
    """The store of one daemon."""

    def __init__(self, base: Path) -> None:
        self.base = base
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)

    def names(self) -> list[str]:
        """Every registered name."""
        return sorted(path.parent.name for path in self.base.glob(f"*/{_STATE}"))

    def load(self, name: str) -> Registration:
        """Read one registration; raises NotFoundError when there is none of that name."""
        if not NAME.match(name):
            raise NotFoundError(f"plugin {name!r}", "no such plugin", "see 'isolator plugin list'")
        try:
            return _registration(json.loads((self.base / name / _STATE).read_bytes()))
        except FileNotFoundError:
            raise NotFoundError(f"plugin {name}", "no such plugin", "see 'isolator plugin list'") from None
        except (ValueError, KeyError, TypeError) as error:
            raise IsolatorError(
                str(self.base / name / _STATE), f"cannot be read: {error}", "restore it, or delete the folder"
            ) from None

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
        return [Intent(**json.loads(path.read_bytes())) for path in sorted(self.base.glob(f"*/{_INTENT}"))]

    def begin_trial(self, trial: Trial) -> None:
        """Put the version of the next registration on trial."""
        self._write(trial.before.name, _TRIAL, asdict(trial))

    def end_trial(self, name: str) -> None:
        """Record that the version was judged."""
        (self.base / name / _TRIAL).unlink(missing_ok=True)

    def trial(self, name: str) -> Trial | None:
        """The trial of the version in use, if it has not been judged."""
        try:
            data = json.loads((self.base / name / _TRIAL).read_bytes())
            trial = Trial(**{**data, "before": _registration(data["before"])})
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # one that cannot be read is no reason not to start: the version in use stays in use
        return trial if self.load(name).serial == trial.serial else None

    def mark_removed(self, name: str) -> None:
        """End a plugin's existence; its remains are only to be deleted."""
        folder = self.base / name
        (folder / _STATE).rename(folder / _REMOVED)
        sync_folder(folder)

    def removed(self) -> list[Registration]:
        """Plugins whose removal was begun and not ended."""
        return [
            _registration(json.loads(path.read_bytes()))
            for path in sorted(self.base.glob(f"*/{_REMOVED}"))
            if not (path.parent / _STATE).exists()
        ]

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
            shutil.rmtree(staged.folder)
            return
        sync_tree(staged.folder)
        staged.folder.rename(place)
        sync_folder(place.parent)

    def prune(self, name: str, kept: Iterable[Release]) -> None:
        """Delete the files of every version that is not to be kept."""
        digests = {release.digest for release in kept}
        for folder in (self.base / name).iterdir():
            if folder.is_dir() and folder.name not in digests:
                self._trash(folder)

    def prune_all(self) -> None:
        """Delete the remains of a killed daemon: staged copies, and digests that no registration refers to.

        For a daemon that starts; while one runs, staged copies may still be wanted.
        """
        for leftover in self.base.glob(f"{PREFIX}*"):
            shutil.rmtree(leftover)
        for name in self.names():
            with contextlib.suppress(IsolatorError):
                trial = self.trial(name)
                if trial is None:
                    self.end_trial(name)
                self.prune(name, (*self.load(name).kept, *(trial.before.kept if trial else ())))
        for unfinished in self.base.glob("*/.plugin.*"):
            unfinished.unlink()
        for folder in self.base.iterdir():
            if not (folder / _STATE).exists() and not any((folder / marker).exists() for marker in _MARKERS):
                shutil.rmtree(folder)

    def delete(self, name: str) -> None:
        """Delete every file of a plugin; the marks that say so last."""
        folder = self.base / name
        if not folder.exists():
            return
        (folder / _STATE).unlink(missing_ok=True)
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in _MARKERS:
                entry.unlink()
        for marker in _MARKERS:
            (folder / marker).unlink(missing_ok=True)
        folder.rmdir()

    def _trash(self, folder: Path) -> None:
        # Renamed first: a digest that is there is a whole one, also when this is interrupted.
        trash = self.base / f"{PREFIX}{secrets.token_hex(8)}"
        folder.rename(trash)
        shutil.rmtree(trash)

    def _folder_of(self, name: str) -> Path:
        folder = self.base / name
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        return folder

    def _write(self, name: str, file: str, content: dict[str, Any]) -> None:
        folder = self._folder_of(name)
        replace_file(folder / file, json.dumps(content, indent=1).encode(), temporary=folder / f".{file}")


def _registration(data: dict[str, Any]) -> Registration:
    return Registration(
        **{
            **data,
            "release": Release(**data["release"]),
            "previous": tuple(Release(**release) for release in data["previous"]),
            "pending": Release(**data["pending"]) if data["pending"] else None,
            "source": Source(**{**data["source"], "hooks": tuple(data["source"]["hooks"])}),
        }
    )
