"""Environments: the config of a plugin on its way to a run of it, by the supervisor."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from host.plugins.registry import Registry
from host.plugins.secrets import ConfigStore
from isolator.audit.client import AuditClient
from isolator.audit.schema import SecretInjected
from isolator.ipc.body import WithFds
from isolator.ipc.channel import MAX_PACKET
from isolator.ipc.messages import Environment, GetEnvironment
from isolator.linux.memfd import make_sealed


@dataclass(frozen=True)
class Environments:
    """The config of each plugin as its runs get it; what has secrets in it is on record when it is handed out."""

    config: ConfigStore
    registry: Registry
    audit: AuditClient

    def answer(self, request: GetEnvironment) -> WithFds[Environment]:
        """Answer the supervisor, which starts a run."""
        found = self._of(request.name)
        files = _apart(found)
        self._record(request.name, found)
        if files is None:
            return WithFds(found, [])
        return WithFds(replace(found, files={}, apart=True), [make_sealed(files)])

    def along(self, name: str) -> Environment | None:
        """The config of a plugin, for a message that has more to tell; None if it is too long for that."""
        found = self._of(name)
        if _apart(found) is not None:
            return None
        self._record(name, found)
        return found

    def _of(self, name: str) -> Environment:
        plugin = self.registry.get(name)
        manifest, digest = (plugin.manifest, plugin.digest) if plugin is not None else (None, "")
        return self.config.environment(name, manifest, digest)

    def _record(self, name: str, handed_out: Environment) -> None:
        if handed_out.secrets:
            self.audit.record(SecretInjected(names=list(handed_out.secrets)), plugin=name)


def _apart(environment: Environment) -> bytes | None:
    """The files, if they do not fit into a message; the variables have their half of it."""
    encoded = json.dumps(environment.files).encode()
    return encoded if len(encoded) > MAX_PACKET // 4 else None
