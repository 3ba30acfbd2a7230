"""Registration: from a stranger's folder to a plugin that an operator has agreed to, and from one version to the next.

``stage`` copies and reads, makes nothing that lasts, and returns the proposal for an operator. Then ``add`` makes the
user, writes the policy file that was shown and puts the files in their place; ``hold`` keeps a newer version that
asks for more until it is approved; ``use`` makes a version the one in use, and ``put_back`` the one before. ``remove``
forgets everything. Which versions may run when is the supervisor's to know (``updates.py``).

Killed at any instant, a daemon finds on its next start either the old or the new state: ``recover`` undoes what was
begun before its one decisive rename, and finishes what was begun after it (see ``store.py``).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolator.errors import ConfinementError, NotFoundError, UsageError
from isolator.layers.explain import proposal_json
from isolator.layers.user import add_user, plugin_gid, refuse_existing, remove_user, user_name
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.meet.proposal import Proposal
from isolator.policy.request import ManifestCore
from isolator.registration import policy_files, staging
from isolator.registration.collecting import Offer
from isolator.registration.inspecting import inspect_folder
from isolator.registration.proposals import Proposals
from isolator.registration.signatures import publisher_of
from isolator.registration.staging import Source, Staged, check_staged, hash_binary
from isolator.registration.store import KEPT, Intent, Registration, Release

if TYPE_CHECKING:
    from isolator.ipc.handover import StagedState

logger = logging.getLogger(__name__)

_MAX_STAGED = 64


@dataclass(frozen=True)
class Candidate:
    """A staged plugin and the proposal that an operator is shown."""

    staged: Staged
    core: ManifestCore
    proposal: Proposal
    source: Source
    release: Release
    more: tuple[str, ...] = ()
    """Requests beyond those of the version in use, one phrase each."""
    by: str | None = None
    """Caller who handed it over, by the kernel's word; None: the daemon itself read it."""
    faults: tuple[str, ...] = ()
    """Faults of its files that show before they run, a sentence each."""
    update: bool = False
    """It is a newer version of a registered plugin."""


class Registrar(Proposals):
    """The registered plugins of one daemon and the staged ones: the changes of both."""

    def __init__(self, paths: Paths, host: HostConfig) -> None:
        super().__init__(paths, host)
        self._staged: dict[str, Candidate] = {}
        self._lock = threading.Lock()
        """Of ``_staged`` and of the machine's list of users: commands for different plugins run in threads."""

    def recover(self, forget_state: Callable[[str], None]) -> list[str]:
        """Undo or finish the changes of a killed daemon; returns one line for each. Nothing may run yet.

        ``forget_state`` deletes the stored state of a plugin of that name.
        """
        done = []
        for intent in self.store.intents():
            try:
                took_effect = self.store.load(intent.name).serial >= intent.serial
            except NotFoundError:
                took_effect = False
            if took_effect:
                self.store.end(intent.name)
                continue
            self._undo(intent)
            done.append(f"undid a change of plugin {intent.name}")
        done += [
            f"finished the removal of plugin {registration.name}"
            for registration in self.store.removed()
            if self.finish_removal(registration.name, forget_state)
        ]
        self.store.prune_all()
        policy_files.clear(self._paths.policies)
        return done

    # --- staged plugins --------------------------------------------------------------------------------------

    def stage(self, source: Source, offer: Offer, *, update: str | None = None, by: str | None = None) -> Candidate:
        """Copy and read what the caller ``by`` offers; takes over ``offer``.

        ``update`` names the registered plugin of which it is a newer version.
        """
        with contextlib.closing(offer):
            registration = self.store.load(update) if update is not None else None
            if registration is not None and source == Source():
                source = registration.source
            return self._take(staging.stage(self._paths.plugins, source, self.reader, offer), source, registration, by)

    def stage_again(self, now: Registration) -> Candidate:
        """Stage a binary that is registered by path and has changed; its files stay those of the store."""
        folder = self.store.folder(now.name, now.release)
        staged = staging.stage_again(self._paths.plugins, folder, now.name, now.source)
        return self._take(staged, now.source, now, None)

    def _take(self, staged: Staged, source: Source, registration: Registration | None, by: str | None) -> Candidate:
        try:
            candidate = self._candidate(staged, source, registration, by)
            core, shown = candidate.core, source.path or str(Path(source.binary).parent)
            read = (*(core.sandbox.read or ()), *candidate.proposal.effective.filesystem.read)
            check_staged(staged, core.binary, shown, read=read)
            candidate = replace(candidate, faults=inspect_folder(staged.folder, self._host.uid_range))
        except BaseException:
            staging.discard(staged)
            raise
        with self._lock:
            self._staged[staged.token] = candidate
            expired = list(self._staged)[:-_MAX_STAGED]
        for token in expired:
            self.discard(token)
        return candidate

    def _candidate(
        self, staged: Staged, source: Source, registration: Registration | None, by: str | None
    ) -> Candidate:
        """Things made of a copy by reading it; its files are not looked at."""
        shown = source.path or source.binary
        core = self.reader.read(staged.manifest, f"{shown}/plugin.json").core
        if registration is not None and core.name != registration.name:
            remedy = "add that as a plugin of its own: isolator plugin add"
            raise UsageError(f"plugin update {registration.name}", f"{shown} holds {core.name}", remedy)
        signer = publisher_of(core.name, core.version, staged.digest, staged.signatures, self._host.trust)
        release = Release(staged.digest, core.version, staged.kind, staged.binary_path, staged.binary_sha256, signer)
        more = self._more(registration, core, release) if registration is not None else ()
        as_it_is = self._meet(core, release)
        proposal = self._proposed(registration, core) if more and registration else as_it_is
        return Candidate(staged, core, proposal, source, release, more, by, update=registration is not None)

    def hand_over(self) -> tuple[StagedState, ...]:
        """Everything staged, before an exec of this process."""
        from isolator.registration import carried

        return tuple(map(carried.hand_over, list(self._staged.values())))  # without the lock: useradd may have it

    def adopt(self, before: Iterable[StagedState]) -> None:
        """Keep what was staged before the exec, as long as it would still be shown as it was."""
        from isolator.registration import carried

        for one in before:
            staged = None
            try:
                staged, source = carried.staged_of(one)
                registration = self.store.load(staged.name) if one.update else None
                candidate = replace(self._candidate(staged, source, registration, one.by), faults=one.faults)
                if carried.shown(candidate) != one.shown:
                    raise UsageError(f"plugin {staged.name}", "its policy or the host's ceiling has changed")
                self._staged[staged.token] = candidate
            except Exception as error:  # whatever it was, the daemon goes on without
                logger.warning("what was staged has expired: %s", error)
                if staged is not None:
                    staging.discard(staged)

    def candidate(self, token: str) -> Candidate:
        """A staged plugin; raises NotFoundError when it was discarded meanwhile."""
        candidate = self._staged.get(token)
        if candidate is None:
            raise NotFoundError("what was staged", "has expired", "run the command again")
        return candidate

    def discard(self, token: str) -> None:
        """Forget a staged plugin."""
        with self._lock:
            candidate = self._staged.pop(token, None)
        if candidate is not None:
            staging.discard(candidate.staged)

    def shown(self, candidate: Candidate) -> dict[str, Any]:
        """The proposal of a staged plugin as JSON (docs/internals.md)."""
        return proposal_json(candidate.proposal, policy_file=str(self.policy_file(candidate.staged.name)))

    # --- changes of registrations ----------------------------------------------------------------------

    def add(self, token: str) -> Registration:
        """Register a staged plugin under a name that is free."""
        candidate = self.candidate(token)
        name = candidate.staged.name
        try:
            if name in self.names():
                raise UsageError(f"plugin {name}", "is already registered", f"isolator plugin update {name} DIR")
            self._still_as_shown(candidate)
            user = user_name(name, self._paths.instance)
            refuse_existing(user)  # before anything that would be undone: a stranger's user must not go with it
            text = candidate.proposal.policy_text
            intent = Intent(name, 1, user=user, policy_sha256=policy_files.digest(text))
            self.store.begin(intent)
            try:
                self.store.keep(candidate.staged)
                if text is not None:
                    policy_files.write(self.policy_file(name), text)
                with self._lock:
                    uid = add_user(user, self._host.uid_range, comment=f"Isolator plugin {name}")
                self.store.open_to(name, candidate.release, plugin_gid(user, uid))
                registration = Registration(
                    name, user, uid, candidate.release, source=candidate.source, serial=1,
                    policy_sha256=intent.policy_sha256,
                )  # fmt: skip
                self.store.save(registration)
            except BaseException:
                self._undo(intent)
                raise
            self.store.end(name)
            return registration
        finally:
            self.discard(token)

    def hold(self, token: str) -> Registration:
        """Keep a staged newer version until it is approved."""
        candidate = self.candidate(token)
        now = self.store.load(candidate.staged.name)
        try:
            self.store.keep(candidate.staged)
            self._open_to_user(now, candidate.release)
            return self._save(replace(now, pending=candidate.release, source=candidate.source))
        finally:
            self.discard(token)

    def accept(self, token: str) -> tuple[Release, Source]:
        """Put the files of a staged newer version in their place; ``use`` makes it the one in use."""
        candidate = self.candidate(token)
        try:
            self.store.keep(candidate.staged)
            self._open_to_user(self.store.load(candidate.staged.name), candidate.release)
            return candidate.release, candidate.source
        finally:
            self.discard(token)

    def use(
        self, now: Registration, release: Release, *, source: Source | None = None, policy_text: str | None = None
    ) -> Registration:
        """Make ``release`` the version in use, with ``policy_text`` as its policy file unless None."""
        previous = tuple(r for r in (now.release, *now.previous) if r.digest != release.digest)[:KEPT]
        after = replace(now, release=release, previous=previous, pending=None, source=source or now.source)
        return self._change(now, after, policy_text)

    def decline(self, now: Registration) -> Registration:
        """Keep the waiting version no longer."""
        return self._save(replace(now, pending=None))

    def earlier(self, now: Registration, to: str | None = None) -> Release:
        """The version to go back to: the one before, or the newest kept one with the version or digest ``to``.

        Raises NotFoundError or UsageError when there is none, or it cannot be used.
        """
        if not now.previous:
            raise NotFoundError(f"plugin {now.name}", "there is no earlier version to go back to")
        release = now.previous[0]
        if to:
            found = [r for r in now.previous if r.version == to or r.digest.startswith(to)]
            if not found:
                kept = ", ".join(f"{r.version} ({r.digest[:12]})" for r in now.previous)
                raise NotFoundError(f"plugin {now.name} {to}", "is not kept", f"there are {kept}")
            release = found[0]
        if release.kind == "binary" and hash_binary(Path(release.binary_path)) != release.binary_sha256:
            why = f"{release.binary_path} is not the earlier file: a binary stays where it is"
            remedy = f"put the earlier file there, then isolator plugin approve {now.name}"
            raise UsageError(f"plugin {now.name}", why, remedy)
        return release

    def roll_back(self, now: Registration, release: Release) -> Registration:
        """Make an earlier version the one in use; the present one becomes the one before."""
        others = tuple(r for r in now.previous if r != release)
        return self._save(replace(now, release=release, previous=(now.release, *others)))

    def put_back(self, before: Registration, now: Registration, policy_text: str | None) -> Registration:
        """Undo ``use`` or ``roll_back``: the version that failed is not kept. ``policy_text``: the file as it was."""
        after = replace(before, pending=None if before.pending == now.release else before.pending)
        return self._change(now, after, policy_text)

    def grant(self, now: Registration) -> Registration:
        """Write the policy file of a plugin that has none any more, as ``explain`` showed it."""
        proposal = self._meet(self._core(now, now.release))
        return self._change(now, now, proposal.policy_text)

    def set_enabled(self, name: str, *, enabled: bool) -> Registration:
        """Enable or disable a plugin."""
        return self._save(replace(self.store.load(name), enabled=enabled))

    def prune(self, now: Registration) -> None:
        """Delete versions that nothing refers to any more."""
        self.store.prune(now.name, now.kept)

    def remove(self, registration: Registration, forget_state: Callable[[str], None]) -> None:
        """Remove state, policy, user and files; its processes must have ended."""
        self.store.mark_removed(registration.name)
        forget_state(registration.name)
        self._forget(registration)

    def finish_removal(self, name: str, forget_state: Callable[[str], None]) -> bool:
        """Complete an interrupted removal of a plugin; False when there is none."""
        left = [registration for registration in self.store.removed() if registration.name == name]
        for registration in left:
            forget_state(name)
            self._forget(registration)
        return bool(left)

    def _open_to_user(self, now: Registration, release: Release) -> None:
        # Without its user a plugin does not start, and says so then; its files stay root's alone.
        with contextlib.suppress(ConfinementError):
            self.store.open_to(now.name, release, plugin_gid(now.user, now.uid))

    def _still_as_shown(self, candidate: Candidate) -> None:
        proposal = self._meet(candidate.core)
        shown = candidate.proposal
        if (proposal.needs_approval, proposal.effective) != (shown.needs_approval, shown.effective):
            why = "has changed since it was shown"
            remedy = "look at it again: repeat the command"
            raise UsageError(f"policy {self.policy_file(candidate.core.name)}", why, remedy)

    def _save(self, after: Registration) -> Registration:
        after = replace(after, serial=after.serial + 1)
        self.store.save(after)
        return after

    def _change(self, now: Registration, after: Registration, policy_text: str | None) -> Registration:
        after = replace(after, serial=now.serial + 1)
        if policy_text is None:
            self.store.save(after)
            return after
        before = self.policy_text(now.name)
        edited = before is not None and policy_files.digest(before) != now.policy_sha256
        after = replace(after, policy_sha256=policy_files.mark(policy_text, edited=edited))
        written = policy_files.digest(policy_text)
        intent = Intent(now.name, after.serial, policy_before=before, policy_sha256=written)
        self.store.begin(intent)
        try:
            policy_files.write(self.policy_file(now.name), policy_text)
            self.store.save(after)
        except BaseException:
            self._undo(intent)
            raise
        self.store.end(now.name)
        return after

    def _undo(self, intent: Intent) -> None:
        text = self.policy_text(intent.name)
        if intent.policy_sha256 and text is not None and policy_files.digest(text) == intent.policy_sha256:
            if intent.policy_before is None:
                self.policy_file(intent.name).unlink()
            else:
                policy_files.write(self.policy_file(intent.name), intent.policy_before)
        if intent.serial == 1:
            remove_user(intent.user)
            self.store.delete(intent.name)
        else:
            self.store.end(intent.name)

    def _forget(self, registration: Registration) -> None:
        self.policy_file(registration.name).unlink(missing_ok=True)
        remove_user(registration.user)
        self.store.delete(registration.name)
