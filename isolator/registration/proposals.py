"""Reading side of registration: registered plugins, their proposals and explanations; nothing is changed here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from isolator.base.structs import field, replace, struct_class
from isolator.errors import IsolatorError, NeedsApprovalError, NotFoundError
from isolator.ipc.messages import PendingVersion
from isolator.layers.explain import proposal_json
from isolator.paths import Paths
from isolator.policy.edit import approved
from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import asks_more, meet
from isolator.policy.meet.proposal import Proposal
from isolator.policy.parse.load import check_ceiling, load_plugin_policy, parse_plugin_policy
from isolator.policy.request import MODES, ManifestCore
from isolator.registration import certificates, policy_files
from isolator.registration.reading import ManifestReader
from isolator.registration.signatures import changes, refuse_withdrawn
from isolator.registration.staging import hash_binary
from isolator.registration.store import Registration, Release, Store


@struct_class(frozen=True)
class Loaded:
    """A registration with its manifest and effective policy as of now; ``error`` when one is unusable."""

    registration: Registration
    manifest: dict[str, Any]
    proposal: Proposal | None
    argv: list[str] = field(default_factory=list)
    error: str = ""
    mode: str = MODES[0]
    """``transport.mode`` of the manifest"""
    port: int | None = None
    """``transport.port``"""


class Proposals:
    """The registered plugins of one daemon, and the proposal for each."""

    def __init__(self, paths: Paths, host: HostConfig) -> None:
        self._paths, self._host = paths, host
        self.store = Store(paths.plugins)
        self.reader = ManifestReader(host.uid_range)

    def read_ahead(self) -> None:
        """Read the manifests of every registered version that may soon be needed, together."""
        texts = []
        for name in self.names():
            with contextlib.suppress(IsolatorError, OSError):
                now = self.store.load(name)
                for release in (now.release, *([now.pending] if now.pending else ())):
                    texts.append((self.store.manifest(name, release), name))
        self.reader.read_all(texts)

    def names(self) -> list[str]:
        return self.store.names()

    def load(self, name: str) -> Loaded:
        """Read a registration, its manifest and its policy; a broken one is described, not raised."""
        return self.read(self.store.load(name))

    def read(self, registration: Registration) -> Loaded:
        """As ``load`` for a registration that is (or is about to be) in use."""
        name = registration.name
        manifest: dict[str, Any] = {}
        try:
            release = registration.release
            refuse_withdrawn(name, release.version, release.digest, self._host.trust)
            found = self.reader.read(self.store.manifest(name, release), f"{name}/plugin.json")
            manifest = found.manifest
            proposal = self.granted(found.core, release)
            argv = _argv(registration.release, found.core)
            return Loaded(registration, manifest, proposal, argv, mode=found.core.mode, port=found.core.port)
        except (IsolatorError, OSError, ValueError) as error:
            return Loaded(registration, manifest, None, error=str(error))

    def granted(self, core: ManifestCore, release: Release | None = None) -> Proposal:
        """The proposal for a manifest under its policy file; raises when there is none, or it is of no use.

        Raises DeniedError also for a ``release`` without the certificate that the policy demands.
        """
        proposal = self._meet(core, release)
        if proposal.needs_approval:
            remedy = f"put it back, or isolator plugin approve {core.name}"
            raise NeedsApprovalError(f"policy {self.policy_file(core.name)}", "the file is gone", remedy)
        return proposal

    def explain(self, name: str) -> dict[str, Any]:
        """The proposal of a registered plugin as of now; of the version that waits for approval if there is one."""
        now = self.store.load(name)
        release = now.pending or now.release
        core = self._core(now, release)
        proposal = self._proposed(now, core) if now.pending else self._meet(core)
        shown = proposal_json(proposal, policy_file=str(self.policy_file(name)))
        return {
            **shown,
            "version": release.version,
            "digest": release.digest,
            "differences": list(self._more(now, core, release)) if now.pending else [],
            "changed_binary": self.binary_changed(now),
            "policy_diff": self._difference(now.name, proposal) if now.pending else [],
        }

    def waiting(self, registration: Registration) -> PendingVersion | None:
        """The version that waits for approval, for listings."""
        pending = registration.pending
        if pending is None:
            return None
        try:
            more = self._more(registration, self._core(registration, pending), pending)
        except (IsolatorError, OSError) as error:
            more = (str(error),)
        return PendingVersion(version=pending.version, digest=pending.digest, differences=tuple(more))

    def proposed_policy(self, now: Registration) -> str | None:
        """The policy text that approving the waiting version writes; None: the file stays as it is."""
        assert now.pending is not None
        return self._proposed(now, self._core(now, now.pending)).policy_text

    def policy_text(self, name: str) -> str | None:
        """The policy file as it is."""
        return policy_files.read(self.policy_file(name))

    def policy_file(self, name: str) -> Path:
        """Path of a plugin's policy."""
        return self._paths.policies / f"{name}.toml"

    def propose(self, core: ManifestCore) -> dict[str, Any]:
        """The proposal for a manifest that was found and is not registered."""
        return proposal_json(self._meet(core), policy_file=str(self.policy_file(core.name)))

    def binary_changed(self, now: Registration) -> bool:
        """Whether a binary registered by path is another one than was approved."""
        if now.release.kind != "binary":
            return False
        try:
            return hash_binary(Path(now.release.binary_path)) != now.release.binary_sha256
        except (IsolatorError, OSError):
            return False

    def _difference(self, name: str, proposal: Proposal) -> list[str]:
        """The lines that approving changes in an operator's own policy file, each after ``+`` or ``-``."""
        import difflib

        before = self.policy_text(name)
        if before is None or proposal.policy_text is None or proposal.needs_approval:
            return []
        lines = difflib.unified_diff(before.splitlines(), proposal.policy_text.splitlines(), lineterm="", n=0)
        return [line for line in list(lines)[2:] if line[0] in "+-"]

    def _core(self, registration: Registration, release: Release) -> ManifestCore:
        text = self.store.manifest(registration.name, release)
        return self.reader.read(text, f"{registration.name}/plugin.json").core

    def _more(self, registration: Registration, core: ManifestCore, release: Release) -> tuple[str, ...]:
        now = registration.release
        try:
            before = self._core(registration, now)
        except (IsolatorError, OSError) as error:
            return (f"all of it: the version in use cannot be read ({error})",)
        origin = changes(release.signer, release.version, now.signer, now.version)
        return (*origin, *asks_more(before, core, self._host))

    def _meet(self, core: ManifestCore, release: Release | None = None) -> Proposal:
        try:
            grant = load_plugin_policy(self.policy_file(core.name), self._host)
        except NotFoundError:
            return meet(core, None, self._host)
        if grant.certified and release is not None:
            certificates.require(self._paths, core.name, release.version, release.digest, self._host.trust)
        return meet(core, grant, self._host)

    def _proposed(self, now: Registration, core: ManifestCore) -> Proposal:
        """The proposal that approving a version which asks for more puts in force.

        To approve is to grant. A policy file that nobody has edited since it was written here is written anew. An
        operator's own gains the lines that this version asks for beyond the one in use, and no other: what the operator
        has withheld from that one stays withheld.
        """
        text = self.policy_text(now.name)
        if text is None or (now.policy_sha256 and policy_files.digest(text) == now.policy_sha256):
            return meet(core, None, self._host)
        as_it_is = self._meet(core)
        try:
            withheld = {(line.field, line.requested) for line in self._meet(self._core(now, now.release)).pending}
        except (IsolatorError, OSError):
            return as_it_is  # nobody can say what is new
        lines = [line for line in as_it_is.pending if line.add and (line.field, line.requested) not in withheld]
        if not lines:
            return as_it_is
        edited = approved(text, lines)
        policy = parse_plugin_policy(edited.encode(), source=str(self.policy_file(now.name)))
        check_ceiling(policy, self._host)
        return replace(meet(core, policy, self._host), policy_text=edited)


def _argv(release: Release, core: ManifestCore) -> list[str]:
    if release.kind == "binary":
        return [f"/run/isolator/bin/{Path(release.binary_path).name}", *core.args]
    return [f"/plugin/{core.binary.removeprefix('./')}", *core.args]
