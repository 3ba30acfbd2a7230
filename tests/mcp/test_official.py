"""The official SDK as the client, and a server of others as it is; both are downloaded, so these are wide."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from host.client.client import Client
from tests.support.mcp_servers import server
from tests.support.timeouts import seconds
from tests.system.daemon import alive, daemon, wait_for, write_plugin

pytestmark = pytest.mark.wide

CYCLES = 1000

SERVER = """\
#!/usr/bin/python3
import os, sys
sys.path.insert(0, "/plugin/lib")
from mcp_server_time import main
main()
"""
CLIENT = """
import asyncio, json, sys
from mcp import Client, StdioServerParameters
async def main():
    server = StdioServerParameters(command=sys.argv[2], args=sys.argv[3:])
    async with Client(server, mode=sys.argv[1]) as client:
        tools = await client.list_tools()
        result = await client.call_tool("get_current_time", {"timezone": "Asia/Tokyo"})
        failed = await client.call_tool("get_current_time", {"timezone": "Nowhere"})
        print(json.dumps([client.protocol_version, [tool.name for tool in tools.tools],
                          result.content[0].text, failed.is_error]))
asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28", "auto"])
def test_official_client_uses_a_server_as_it_is(tmp_path_factory: pytest.TempPathFactory, mode: str) -> None:
    place = tmp_path_factory.mktemp("official")
    place.chmod(0o755)
    folder = write_plugin(place / "time", SERVER, hooks=[], transport={"mode": "mcp"},
                          sandbox={"network": {"egress": []}})  # fmt: skip
    subprocess.run(
        ["/usr/bin/python3", "-m", "pip", "install", "-q", "--target", str(folder / "lib"), "mcp", "mcp-server-time"],
        check=True, timeout=seconds(300),
    )  # fmt: skip
    with daemon() as d:
        d.cli("plugin", "add", str(folder), "--yes")
        policy = d.root / "etc/isolator/policies/time.toml"
        granted = '[grant]\ntools = ["get_*"]\ncallers = [0]\n'
        policy.write_text(policy.read_text().replace("[grant]\n", granted, 1))
        wait_for(lambda: d.json("plugin", "show", "time")["effective"].get("callers"))
        d.cli("mcp", "approve", "time", "--yes")
        command = [str(shutil.which("isolator")), "--root", str(d.root), "mcp", "serve", "time"]
        ran = subprocess.run(
            ["/usr/bin/python3", "-c", CLIENT, mode, *command], capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(folder / "lib"), "PATH": "/usr/bin:/bin"}, timeout=seconds(120), cwd="/",
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        version, tools, text, failed = json.loads(ran.stdout)
        assert version == ("2025-11-25" if mode == "legacy" else "2026-07-28")
        assert tools == ["get_current_time"] and failed is True
        assert json.loads(text)["timezone"] == "Asia/Tokyo"


@pytest.mark.timeout(seconds(1200))
def test_nothing_is_left_after_a_thousand_openings(tmp_path: Path) -> None:
    with daemon() as d:
        folder = write_plugin(tmp_path / "cycle", server(), hooks=[], transport={"mode": "mcp"})
        d.cli("plugin", "add", str(folder), "--yes")
        with Client(d.root) as client:
            for _ in range(CYCLES):
                client.call("plugin.start", name="cycle")
                client.call("plugin.stop", name="cycle")
        started = [one["data"] for one in d.records() if one["type"] == "plugin.started"]
        assert len(started) == CYCLES
        assert not any(Path(one["cgroup"]).exists() for one in started)
        assert not any(alive(one["pid"]) for one in started[-100:])
