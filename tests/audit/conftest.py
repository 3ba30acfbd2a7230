"""A real audit process under a user of its own, reached over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator.audit.client import AuditClient
from isolator.ipc import channel as ipc
from isolator.ipc.messages import AuditHello, Leave, StatePart
from isolator.ipc.succession import Passage
from isolator.paths import Paths

CODE = Path(__file__).resolve().parents[2]
# Without privileges; no such user exists, and none is needed.
UID = 64017
_RUN = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1));"
    "runpy.run_module('isolator.audit.service', run_name='__main__')"
)


class Daemon:
    """The supervisor's side of the audit process: directories, channel, sources."""

    def __init__(self, root: Path, code: Path, *, uid: int = UID) -> None:
        self.paths = Paths.of(root)
        self.uid = uid
        self._code = code
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: ipc.Channel | None = None
        for directory, mode in ((self.paths.audit_log, 0o750), (self.paths.audit_lib, 0o700)):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)
            os.chown(directory, uid, uid)

    async def start(self, *, metrics: dict[str, Any] | None = None, **audit: Any) -> None:
        self.config = {"audit": audit, "metrics": metrics or {}}
        self.process, self.channel = self._spawn()
        self.hello = (
            await self.channel.call("hello", root=str(self.paths.root), config=self.config, timeout=20)
        ).fields

    def _spawn(self) -> tuple[subprocess.Popen[bytes], ipc.Channel]:
        ours, theirs = ipc.pair()
        with theirs:
            command = [sys.executable, "-I", "-c", _RUN, str(self._code), "--channel-fd", str(theirs.fileno())]
            process = subprocess.Popen(
                ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--no-new-privs",
                 "--bounding-set=-all", "--inh-caps=-all", "--", *command],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return process, ipc.Channel(ours, name="audit")

    async def renew(self) -> None:
        """Put another process in the place of this one, as the supervisor does; it goes on with everything."""
        assert self.process is not None and self.channel is not None
        process, channel = self._spawn()
        await channel.call("alive", timeout=20)
        passage = Passage(channel)
        op, handler = StatePart.on_fds(passage.part)
        self.channel.handle(op, handler)
        left = await self.channel.ask(Leave(), timeout=20)
        assert left.parts == passage.parts > 0, left
        await channel.ask(AuditHello(root=str(self.paths.root), config=self.config, parts=left.parts), timeout=20)
        assert await self.stop() == 0
        self.process, self.channel = process, channel

    async def source(self, name: str, client: AuditClient | None = None) -> AuditClient:
        assert self.channel is not None
        ours, theirs = ipc.pair()
        with theirs:
            await self.channel.call("source", name=name, fds=[theirs.fileno()], timeout=20)
        if client is None:
            return AuditClient(ours)
        client.reconnect(ours)
        return client

    async def flush(self) -> None:
        assert self.channel is not None
        await self.channel.call("flush", timeout=30)

    async def stop(self) -> int:
        assert self.channel is not None and self.process is not None
        self.channel.close()
        return await self.wait()

    async def kill(self) -> None:
        assert self.channel is not None and self.process is not None
        self.process.kill()
        await self.wait()
        self.channel.close()

    async def wait(self) -> int:
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, 30)

    def records(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.paths.audit_log.glob("audit*.jsonl"), key=lambda p: (p.name == "audit.jsonl", p.name)):
            found += [json.loads(line) for line in path.read_text("ascii").splitlines()]
        return found

    def of_type(self, *types: str) -> list[dict[str, Any]]:
        return [r for r in self.records() if r["type"] in types]


@pytest.fixture(scope="session")
def code() -> Path:
    """The packages, compiled, where an unprivileged user can read them."""
    return CODE


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="isolator-root-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def daemon(root: Path, code: Path) -> AsyncIterator[Daemon]:
    running = Daemon(root, code)
    try:
        yield running
    finally:
        if running.channel is not None:
            running.channel.close()
        if running.process is not None and running.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(10)
            running.process.kill()
            running.process.wait()
