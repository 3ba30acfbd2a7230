"""Registration: from a stranger's folder to a plugin that an operator has agreed to.

``stage`` copies and reads, makes nothing that lasts; ``commit`` makes the user, writes the policy file that was
shown, and puts the files in their place; ``discard`` forgets. What was staged and not committed is gone after a
restart. Also builds the in-memory plugin of each registration, with its effective policy as of now.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isolator.errors import DeniedError, IsolatorError, NotFoundError, UsageError
from isolator.layers.user import add_user, remove_user, user_name
from isolator.paths import Paths
from isolator.policy.effective import Proposal, meet
from isolator.policy.explain import proposal_json
from isolator.policy.hostconfig import HostConfig
from isolator.policy.load import load_plugin_policy
from isolator.policy.request import ManifestCore, parse_manifest_core
from isolator.program import check_descriptor, check_program
from isolator.store import Registration, Staged, Store, hash_descriptor, open_binary

_MAX_STAGED = 32


@dataclass(frozen=True)
class Loaded:
    """A registration with everything that its files and policies say now; ``error`` when they are unusable."""

    registration: Registration
    manifest: dict[str, Any]
    core: ManifestCore | None
    proposal: Proposal | None
    argv: list[str]
    error: str = ""


class Registrar:
    """The registered plugins of one daemon and the staged ones."""

    def __init__(self, paths: Paths, host: HostConfig) -> None:
        self._paths, self._host = paths, host
        self._store = Store(paths.plugins)
        self._staged: dict[str, tuple[Staged, Proposal]] = {}

    def forget_staged(self) -> None:
        """Remove what an earlier daemon of this root had staged."""
        self._store.clear_staged()

    def names(self) -> list[str]:
        """Every registered name."""
        return self._store.names()

    def load(self, name: str) -> Loaded:
        """Read a registration, its manifest and its policy; what is broken is told, not raised."""
        registration = self._store.load(name)
        try:
            text = self._store.manifest(registration)
            core = self._core(text, registration.kind == "binary", f"{name}/plugin.json")
            proposal = self._meet(core)
            if proposal.needs_approval:
                raise DeniedError(
                    str(self._policy_file(name)), "the policy file is gone", f"isolator plugin update {name}"
                )
            argv = self._argv(registration, core)
            return Loaded(registration, json.loads(text), core, proposal, argv)
        except (IsolatorError, OSError, ValueError) as error:
            return Loaded(registration, {}, None, None, [], str(error))

    def stage(
        self, *, path: str | None, name: str | None, binary: str | None, hooks: list[str], files: str | None
    ) -> tuple[Staged, dict[str, Any]]:
        """Copy and read a plugin; returns it with the proposal (see docs/internals.md) that the operator is shown."""
        if path is not None:
            staged = self._store.stage_folder(Path(path))
        elif name and binary:
            staged = self._store.stage_binary(name, Path(binary), hooks, Path(files) if files else None)
        else:
            raise UsageError("plugin add", "name a folder, or give --name, --binary and --hooks", "see --help")
        try:
            core = self._core(staged.manifest, staged.kind == "binary", f"{path or binary}/plugin.json")
            self._check_binary(staged, core, path or str(Path(str(binary)).parent))
            proposal = self._meet(core)
        except BaseException:
            self._store.discard(staged)
            raise
        while len(self._staged) >= _MAX_STAGED:
            self.discard(next(iter(self._staged)))
        self._staged[staged.token] = (staged, proposal)
        return staged, proposal_json(proposal, policy_file=str(self._policy_file(staged.name)))

    def discard(self, token: str) -> None:
        """Forget a staged plugin."""
        entry = self._staged.pop(token, None)
        if entry is not None:
            self._store.discard(entry[0])

    def staged_name(self, token: str) -> str:
        """The name of a staged plugin; raises NotFoundError when it was discarded meanwhile."""
        if token not in self._staged:
            raise NotFoundError("registration", "it has expired", "run 'isolator plugin add' again")
        return self._staged[token][0].name

    def commit(self, token: str) -> Registration:
        """Register a staged plugin, or make it the new version of the registered one of its name."""
        name = self.staged_name(token)
        staged, proposal = self._staged[token]
        policy_file = self._policy_file(name)
        wrote_policy = False
        user = user_name(name, self._paths.instance)
        old = self._store.load(name) if name in self.names() else None
        try:
            if proposal.policy_text is not None:
                _write_policy(policy_file, proposal.policy_text)
                wrote_policy = True
            uid = add_user(user, self._host.uid_range, comment=f"Isolator plugin {name}")
            self._store.commit(staged)
            core = parse_manifest_core(staged.manifest)
            registration = Registration(
                name=name, version=core.version, digest=staged.digest, user=user, uid=uid, kind=staged.kind,
                binary_path=staged.binary_path, binary_sha256=staged.binary_sha256,
                previous=_previous(old, staged.digest), approved_effective=proposal.effective.digest(),
            )  # fmt: skip
            self._store.save(registration)
        except BaseException:
            if wrote_policy:
                policy_file.unlink(missing_ok=True)
            if old is None:
                self._store.remove(name)
                remove_user(user)
            raise
        finally:
            self._staged.pop(token, None)
            self._store.discard(staged)
        return registration

    def set_enabled(self, name: str, *, enabled: bool) -> Registration:
        """Enable or disable a plugin."""
        registration = replace(self._store.load(name), enabled=enabled)
        self._store.save(registration)
        return registration

    def rollback(self, name: str) -> Registration:
        """Make the digest before the present one the one in use; the present one becomes the one before."""
        now = self._store.load(name)
        if not now.previous:
            raise NotFoundError(f"plugin {name}", "there is no earlier version to go back to", "")
        digest = now.previous[0]
        text = (self._paths.plugins / name / digest / "plugin.json").read_bytes()
        core = parse_manifest_core(text)
        registration = replace(
            now, digest=digest, version=core.version, previous=(now.digest, *now.previous[1:]),
        )  # fmt: skip
        self._store.save(registration)
        return registration

    def approve_binary(self, name: str) -> Registration:
        """Pin a path binary's present content."""
        now = self._store.load(name)
        if now.kind != "binary":
            raise UsageError(f"plugin {name}", "nothing waits for approval", "")
        fd = open_binary(Path(now.binary_path))
        try:
            registration = replace(now, binary_sha256=hash_descriptor(fd))
        finally:
            os.close(fd)
        self._store.save(registration)
        return registration

    def remove(self, name: str) -> None:
        """Remove files, policy and user; its processes and mounts must be gone."""
        registration = self._store.load(name)
        remove_user(registration.user)
        self._policy_file(name).unlink(missing_ok=True)
        self._store.remove(name)

    def explain(self, name: str) -> dict[str, Any]:
        """The proposal of a registered plugin as of now."""
        loaded = self.load(name)
        if loaded.proposal is None:
            raise UsageError(f"plugin {name}", loaded.error, "correct it")
        return proposal_json(loaded.proposal, policy_file=str(self._policy_file(name)))

    def _policy_file(self, name: str) -> Path:
        return self._paths.policies / f"{name}.toml"

    def _core(self, text: bytes, synthesised: bool, shown: str) -> ManifestCore:
        return parse_manifest_core(text, name=shown)

    def _meet(self, core: ManifestCore) -> Proposal:
        try:
            grant = load_plugin_policy(self._policy_file(core.name), self._host)
        except NotFoundError:
            return meet(core, None, self._host)
        return meet(core, grant, self._host)

    def _argv(self, registration: Registration, core: ManifestCore) -> list[str]:
        if registration.kind == "binary":
            return [f"/run/isolator/bin/{Path(registration.binary_path).name}", *core.args]
        return [f"/plugin/{core.binary.removeprefix('./')}", *core.args]

    def _check_binary(self, staged: Staged, core: ManifestCore, shown: str) -> None:
        if staged.kind == "binary":
            fd = open_binary(Path(staged.binary_path))
            try:
                check_descriptor(fd, shown=staged.binary_path)
            finally:
                os.close(fd)
        else:
            check_program(staged.folder, core.binary, shown=f"{shown}/{core.binary.removeprefix('./')}")


def _previous(old: Registration | None, digest: str) -> tuple[str, ...]:
    if old is None:
        return ()
    return tuple(d for d in (old.digest, *old.previous) if d != digest)[:5]


def _write_policy(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    with os.fdopen(fd, "w") as out:
        out.write(text)
        os.fchmod(out.fileno(), 0o644)
        out.flush()
        os.fsync(out.fileno())
    temporary.rename(path)
