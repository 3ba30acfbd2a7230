"""placeholder"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from vagrant.box import Box
from vagrant.machine import InfrastructureError, Machine


def boot(box: Box, folder: Path, *, cpus: int, memory_mb: int) -> AbstractContextManager[Machine]:
    raise InfrastructureError("not there yet: use --direct")
