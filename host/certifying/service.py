"""The certifying host: ``python3 -I -m host.certifying.service``, as ``host.service``, with two parts of its own."""

from __future__ import annotations

from functools import partial

from host import service
from host.authoring.certify.stage import Stage
from host.certifying.other_side import SilentApi
from host.certifying.taps import TappedLink
from host.composition.introduction import HostParts
from isolator.paths import Paths


def parts(paths: Paths) -> HostParts:
    """The parts that play what is on the stage."""
    stage = Stage(paths.root)
    return HostParts(partial(TappedLink, stage=stage), partial(SilentApi, stage=stage))


def main() -> None:
    service.main(parts)


if __name__ == "__main__":
    main()
