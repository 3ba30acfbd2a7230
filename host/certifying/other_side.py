"""The host API of a certification, which may be down for a while."""

from __future__ import annotations

import asyncio
from typing import Any

from host.authoring.certify.stage import DOWN_SECONDS, Stage
from host.host_api.api import HostApi

_BEAT = 0.05


class SilentApi(HostApi):
    """Host API that answers nothing while it is down on the stage."""

    def __init__(self, *parts: Any, stage: Stage) -> None:
        super().__init__(*parts)
        self._stage = stage

    async def call(self, name: str, run: str | None, method: str, params: Any) -> dict[str, Any]:
        for _ in range(round(DOWN_SECONDS / _BEAT)):
            if self._stage.scene().play != "down":
                break
            await asyncio.sleep(_BEAT)
        return await super().call(name, run, method, params)
