"""The certifying host: ``python3 -I -m host.certifying.service``, as ``host.service``, with two parts of its own."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from host import service
from host.authoring.certify.stage import DOWN_SECONDS, Stage
from host.certifying.taps import TappedLink
from host.composition.introduction import HostParts
from host.host_api.api import HostApi
from isolator.paths import Paths

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


def parts(paths: Paths) -> HostParts:
    """The parts that play what is on the stage."""
    stage = Stage(paths.root)
    return HostParts(partial(TappedLink, stage=stage), partial(SilentApi, stage=stage))


def main() -> None:
    service.main(parts)


if __name__ == "__main__":
    main()
