"""Registration in the fake supervisor: plugins are staged, committed, removed, enabled, explained."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.errors import IsolatorError
from isolator.ipc import messages
from isolator.ipc.body import Handler, WithFds, by_op
from isolator.layers.explain import proposal_json
from isolator.policy.meet.effective import meet
from isolator.reader.manifest import parse_manifest_core

if TYPE_CHECKING:
    from tests.host.fake_supervisor import Daemon


class FakeRegistrar:
    """Fake of the registrar; approves everything and checks nothing."""

    def __init__(self, daemon: Daemon) -> None:
        self.staged: dict[str, tuple[messages.StagePlugin, bytes]] = {}
        self.refuses = False
        """Whether no version is taken over."""
        self._daemon = daemon
        self._sources: dict[str, Path] = {}

    def handlers(self) -> dict[str, Handler]:
        """By operation."""
        return by_op(
            messages.StagePlugin.on(self._stage),
            messages.CommitPlugin.on(self._commit),
            messages.UpdatePlugin.on(self._update),
            messages.DiscardPlugin.on(self._discard),
            messages.RemovePlugin.on(self._remove),
            messages.EnablePlugin.on(self._enable),
            messages.DisablePlugin.on(self._disable),
            messages.ExplainPolicy.on(self._explain),
        )

    async def _stage(self, request: messages.StagePlugin) -> WithFds[messages.Staged]:
        if request.update and not request.path:
            request = replace(request, path=str(self._sources[request.update]))
        if request.path:
            text = (Path(request.path) / "plugin.json").read_bytes()
        else:
            text = json.dumps(
                {
                    "name": request.name,
                    "version": "0.0.0+sha256.0123456789ab",
                    "api_version": "1",
                    "binary": "./" + Path(request.binary).name,
                    "hooks": request.hooks,
                }
            ).encode()
        core = parse_manifest_core(text)
        token = f"token{len(self.staged)}"
        self.staged[token] = (request, text)
        file = os.memfd_create("plugin.json", os.MFD_CLOEXEC)
        os.write(file, text)
        proposal = proposal_json(meet(core, None, self._daemon.config), policy_file=f"/etc/{core.name}.toml")
        answer = messages.Staged(
            token=token,
            name=core.name,
            digest="1" * 64,
            synthesised=core.synthesised,
            proposal=proposal,
            registered=core.name in self._daemon.sidecars,
            differences=(),
            unchanged=False,
        )
        return WithFds(answer, [file])

    async def _commit(self, request: messages.CommitPlugin) -> messages.OnePlugin:
        return messages.OnePlugin(plugin=self._take_over(request.token))

    async def _update(self, request: messages.UpdatePlugin) -> messages.UpdatedPlugin:
        return messages.UpdatedPlugin(plugin=self._take_over(request.token))

    def _take_over(self, token: str) -> messages.PluginEntry:
        if self.refuses:
            raise IsolatorError("the plugin", "does not come up")
        staged, text = self.staged.pop(token)
        manifest = json.loads(text)
        sidecar = self._daemon.sidecars.get(manifest["name"]) or self._daemon.make(manifest)
        sidecar.manifest = manifest
        source = Path(staged.path) / manifest["binary"] if staged.path else Path(staged.binary)
        self._sources[sidecar.name] = source.parent
        target = sidecar.folder / manifest["binary"]
        shutil.copy(source, target)
        target.chmod(0o755)
        return self._daemon.entry(sidecar)

    async def _discard(self, request: messages.DiscardPlugin) -> None:
        self.staged.pop(request.token, None)
        self._daemon.wake()

    async def _remove(self, request: messages.RemovePlugin) -> None:
        sidecar = self._daemon.find(request.name)
        await self._daemon.stop_sidecar(sidecar)
        del self._daemon.sidecars[sidecar.name]
        shutil.rmtree(sidecar.folder)
        assert self._daemon.channel is not None
        self._daemon.channel.tell(messages.PluginChanged(removed=sidecar.name))

    async def _enable(self, request: messages.EnablePlugin) -> messages.OnePlugin:
        return await self._set_state(request.name, "stopped")

    async def _disable(self, request: messages.DisablePlugin) -> messages.OnePlugin:
        return await self._set_state(request.name, "disabled")

    async def _set_state(self, name: str, state: str) -> messages.OnePlugin:
        sidecar = self._daemon.find(name)
        await self._daemon.stop_sidecar(sidecar)
        sidecar.state = state
        self._daemon.changed(sidecar)
        return messages.OnePlugin(plugin=self._daemon.entry(sidecar))

    async def _explain(self, request: messages.ExplainPolicy) -> messages.Proposal:
        core = parse_manifest_core(json.dumps(self._daemon.find(request.name).manifest).encode())
        return messages.Proposal(proposal=proposal_json(meet(core, None, self._daemon.config), policy_file="x.toml"))
