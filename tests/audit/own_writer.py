"""A writer in this process, and the host's sender of records to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from isolator.audit.client import AuditClient
from isolator.audit.log import Limits
from isolator.audit.writer import Writer
from isolator.ipc import channel as ipc
from isolator.paths import Paths


@asynccontextmanager
async def written(root: Path) -> AsyncIterator[tuple[Writer, AuditClient]]:
    paths = Paths.of(root)
    paths.audit_log.mkdir(parents=True)
    paths.audit_lib.mkdir(parents=True, mode=0o700)
    writer = Writer(paths, Limits())
    await writer.open()
    mine, theirs = ipc.pair()
    writer.attach("host", theirs)
    client = AuditClient(mine)
    try:
        async with asyncio.timeout(20):
            yield writer, client
    finally:
        client.close()
        await writer.stop()
