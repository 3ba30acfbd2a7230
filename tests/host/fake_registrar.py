"""Registration in the fake supervisor: plugins are staged, committed, removed, enabled, explained."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolator.ipc.channel import Message
from isolator.layers.explain import proposal_json
from isolator.policy.meet.effective import meet
from isolator.policy.request import parse_manifest_core

if TYPE_CHECKING:
    from tests.host.fake_supervisor import Daemon


class FakeRegistrar:
    """Fake of the registrar; approves everything and checks nothing."""

    def __init__(self, daemon: Daemon) -> None:
        self.staged: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._daemon = daemon
        self._sources: dict[str, Path] = {}

    def handlers(self) -> dict[str, Callable[[Message], Awaitable[Message | dict[str, Any]]]]:
        """Return the handlers by op."""
        return {
            "plugin.stage": self._stage,
            "plugin.commit": self._commit,
            "plugin.update": self._commit,
            "plugin.discard": self._discard,
            "plugin.remove": self._remove,
            "plugin.enable": self._enable,
            "plugin.disable": self._disable,
            "policy.explain": self._explain,
        }

    async def _stage(self, message: Message) -> Message:
        fields = message.fields
        if fields.get("update"):
            fields = {"path": str(self._sources[fields["update"]]), **fields}
        if fields.get("path"):
            text = (Path(fields["path"]) / "plugin.json").read_bytes()
        else:
            text = json.dumps(
                {
                    "name": fields["name"],
                    "version": "0.0.0+sha256.0123456789ab",
                    "api_version": "1",
                    "binary": "./" + Path(fields["binary"]).name,
                    "hooks": fields["hooks"],
                }
            ).encode()
        core = parse_manifest_core(text)
        token = f"token{len(self.staged)}"
        self.staged[token] = (fields, text)
        file = os.memfd_create("plugin.json", os.MFD_CLOEXEC)
        os.write(file, text)
        proposal = proposal_json(meet(core, None, self._daemon.config), policy_file=f"/etc/{core.name}.toml")
        answer = {
            "token": token,
            "name": core.name,
            "digest": "1" * 64,
            "synthesised": core.synthesised,
            "proposal": proposal,
            "registered": core.name in self._daemon.sidecars,
            "differences": [],
            "unchanged": False,
        }
        return Message(answer, [file])

    async def _commit(self, message: Message) -> dict[str, Any]:
        fields, text = self.staged.pop(message.fields["token"])
        manifest = json.loads(text)
        sidecar = self._daemon.sidecars.get(manifest["name"]) or self._daemon.make(manifest)
        sidecar.manifest = manifest
        source = Path(fields["path"]) / manifest["binary"] if fields.get("path") else Path(fields["binary"])
        self._sources[sidecar.name] = source.parent
        target = sidecar.folder / manifest["binary"]
        shutil.copy(source, target)
        target.chmod(0o755)
        return {"plugin": self._daemon.entry(sidecar)}

    async def _discard(self, message: Message) -> dict[str, Any]:
        self.staged.pop(message.fields["token"], None)
        self._daemon.wake()
        return {}

    async def _remove(self, message: Message) -> dict[str, Any]:
        sidecar = self._daemon.find(message)
        await self._daemon.stop_sidecar(sidecar)
        del self._daemon.sidecars[sidecar.name]
        shutil.rmtree(sidecar.folder)
        return {}

    async def _enable(self, message: Message) -> dict[str, Any]:
        return await self._set_state(message, "stopped")

    async def _disable(self, message: Message) -> dict[str, Any]:
        return await self._set_state(message, "disabled")

    async def _set_state(self, message: Message, state: str) -> dict[str, Any]:
        sidecar = self._daemon.find(message)
        await self._daemon.stop_sidecar(sidecar)
        sidecar.state = state
        self._daemon.changed(sidecar)
        return {"plugin": self._daemon.entry(sidecar)}

    async def _explain(self, message: Message) -> dict[str, Any]:
        core = parse_manifest_core(json.dumps(self._daemon.find(message).manifest).encode())
        return {"proposal": proposal_json(meet(core, None, self._daemon.config), policy_file="x.toml")}
