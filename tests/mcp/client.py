"""A client of ``isolator mcp serve``: lines over pipes, as an editor starts it."""

from __future__ import annotations

import json
import select
import subprocess
import time
from typing import Any

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon

META = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}


class Client:
    """One process; use it with ``with``. ``uid``: the user that it runs as."""

    def __init__(self, daemon: Daemon, name: str, *, uid: int = 0) -> None:
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        self.process = subprocess.Popen(
            [*user, "isolator", "--root", str(daemon.root), "mcp", "serve", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        self._number = 0
        self._buffer = b""
        self.notes: list[dict[str, Any]] = []
        self.answers: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(seconds(20))
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def write(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        self.process.stdin.flush()

    def begin(self, method: str, **params: Any) -> int:
        self._number += 1
        self.write(id=self._number, method=method, params=params)
        return self._number

    def read(self) -> dict[str, Any]:
        """The next message, whatever it is."""
        assert self.process.stdout is not None
        end = time.monotonic() + seconds(60)
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            assert ready, "no message in time"
            data = self.process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
            assert data, "it has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def end(self, number: int) -> dict[str, Any]:
        """The answer to a request; others that come before it are kept, and so are notifications."""
        while number not in self.answers:
            message = self.read()
            if isinstance(message.get("id"), int):
                self.answers[message["id"]] = message
            else:
                self.notes.append(message)
        return self.answers.pop(number)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        return self.end(self.begin(method, **params))

    def initialize(self) -> dict[str, Any]:
        answer = self.ask("initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo={"name": "t"})
        self.write(method="notifications/initialized")
        return answer

    def tools(self) -> list[str]:
        answer = self.ask("tools/list")
        assert "result" in answer, answer
        return [tool["name"] for tool in answer["result"]["tools"]]

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        return self.ask("tools/call", name=tool, arguments=arguments)


def text(answer: dict[str, Any]) -> str:
    """The text of a result."""
    return str(answer["result"]["content"][0]["text"])
