"""A call of a tool: to an MCP server over pipes, and to the same one in its cage through ``isolator mcp serve``.

What lies between is the editor's side, the control socket, the host with its checks, two records of the trail, and the
server's standard streams.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from bench.delivery_subjects import HOST_TOML
from bench.frame import Contender, Report, interleave
from tests.support.mcp_servers import server
from tests.system.daemon import daemon, wait_for, write_plugin

NAME = "called"


class Session:
    """An MCP server at two pipes, opened as a session of 2025-11-25."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        opening = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}}
        self.ask("initialize", opening)

    def ask(self, method: str, params: object) -> object:
        """Send a request; returns its result."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n")
        stdin.flush()
        return json.loads(stdout.readline())["result"]

    def call(self) -> None:
        """Call the tool once."""
        assert self.ask("tools/call", {"name": "echo", "arguments": {"text": "x" * 100}})

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(rounds: int) -> Report:
    """Call the tool ``rounds`` times each way, in turns."""
    with daemon(host_toml=HOST_TOML) as running, tempfile.TemporaryDirectory(prefix="isolator-bench-") as work:
        folder = write_plugin(Path(work) / NAME, server(), hooks=[], transport={"mode": "mcp"})
        Path(work).chmod(0o755)
        running.cli("plugin", "add", str(folder), "--yes")
        for kind, value in (("tool", "echo"), ("caller", "0")):
            running.cli("plugin", "grant", NAME, kind, value)
        wait_for(lambda: running.json("plugin", "show", NAME)["effective"].get("callers"))
        running.cli("mcp", "approve", NAME, "--yes")
        command = [str(shutil.which("isolator")), "--root", str(running.root), "mcp", "serve", NAME]
        direct, caged = Session("/usr/bin/python3", str(folder / "main")), Session(*command)
        try:
            contenders = [
                Contender("the server over pipes", "nothing", direct.call),
                Contender("isolator mcp serve", "cage, approval, grants, audit", caged.call),
            ]
            series = interleave(contenders, rounds, warmup=20)
        finally:
            direct.close()
            caged.close()
    added = sorted(after - before for before, after in zip(series[0].samples, series[1].samples, strict=True))
    notes = (f"added by a call, round by round: p50 {statistics.median(added):.2f} ms (to reach: 1 ms)",)
    return Report("mcp", "Calling a tool of an MCP server", series, baselines=(series[0].name,), notes=notes)
