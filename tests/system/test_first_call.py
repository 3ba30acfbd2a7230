"""A plugin whose first act is a call of the host API finds the host's socket, however quick it is."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from isolator.cage.cage import Cage
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for, write_plugin

CALLS = ECHO.replace(
    "import json, os, socket",
    """import json, os, socket
    host = socket.socket(socket.AF_UNIX)
    try:
        host.connect(os.environ["PLUGIN_HOST_SOCKET"])
        found = "connected"
    except OSError as error:
        found = error.strerror
    with open(os.environ["PLUGIN_STATE_DIR"] + "/found", "a") as notes:
        notes.write(found + "\\n")
    host.sendall(b'{"jsonrpc":"2.0","id":1,"method":"whoami"}\\n')
    answer = json.loads(host.makefile().readline())["result"]
    with open(os.environ["PLUGIN_STATE_DIR"] + "/answers", "a") as notes:
        notes.write(answer["run"] + "\\n")""",
)


class SlowDaemon(Daemon):
    """A daemon that hears of each start only when the plugin has made its first call."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", __file__, str(self.root)]


def test_first_call_of_a_plugin_reaches_the_host_in_every_run(shared_dir: Path) -> None:
    with daemon(kind=SlowDaemon) as d:
        package = write_plugin(shared_dir / "quick", CALLS, sandbox={"filesystem": {"state": "4M"}})
        d.cli("plugin", "add", str(package), "--yes")
        runs = []
        for number, command in enumerate(("start", "restart"), 1):
            d.cli("plugin", command, "quick")
            d.cli("event", "emit", "deploy.completed", event(number), "--wait")
            runs.append(d.json("plugin", "show", "quick")["run"])
        wait_for(lambda: len(d.noted("quick", "answers")) == len(runs))
        assert d.noted("quick", "found") == ["connected"] * len(runs)
        assert d.noted("quick", "answers") == runs
        assert not [one for one in d.records() if one["type"] == "plugin.crashed"]


def main() -> None:
    d, start = Daemon(Path(sys.argv[1])), Cage.start

    async def start_and_wait(cage: Cage, stop: asyncio.Event | None = None) -> bool:
        before = len(d.noted("quick", "found"))
        assert await start(cage, stop)
        async with asyncio.timeout(seconds(20)):
            while len(d.noted("quick", "found")) == before:  # noqa: ASYNC110 # the plugin tells nobody
                await asyncio.sleep(0.01)
        return True

    Cage.start = start_and_wait  # type: ignore[method-assign] # this process is the daemon
    from host.cli.main import main as command_line

    sys.argv = ["isolator", "--root", str(d.root), "serve", *sys.argv[2:]]
    sys.exit(command_line())


if __name__ == "__main__":
    main()
