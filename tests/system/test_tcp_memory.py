"""A plugin that hoards TCP's memory, which no cap counts, is ended, on record as its own doing; nobody else is."""

from __future__ import annotations

import sys
from pathlib import Path

from isolator.cage.tcp_memory import CAUSE
from tests.support.sidecars import oneshot
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

HOARD = """
import socket
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
server.bind(("127.0.0.1", 80))
server.listen(1000)
for _ in range(300):
    with socket.create_connection(("127.0.0.1", 80)) as client:
        client.setblocking(False)
        try:
            while True:
                client.send(bytes(1 << 16))
        except BlockingIOError:
            pass
time.sleep(1000)
"""


class MuchInUse(Daemon):
    """A daemon to which the host's pool looks used: to use it up would end what runs beside this test."""

    def command(self) -> list[str]:
        program = (
            "from host.cli.main import main; from isolator.cage import tcp_memory; import sys;"
            "tcp_memory.is_much_in_use = lambda: True; sys.exit(main())"
        )
        return [sys.executable, "-I", "-c", program, "--root", str(self.root), "serve"]


def test_plugin_that_hoards_tcp_memory_is_ended(tmp_path: Path) -> None:
    with daemon(kind=MuchInUse) as d:
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        d.cli("event", "emit", "deploy.completed", event(0), "--wait")
        run = d.json("plugin", "show", "echo")["run"]
        d.cli("plugin", "add", str(write_plugin(tmp_path / "hoarder", oneshot(HOARD))), "--yes")
        d.cli("event", "emit", "deploy.completed", event(1))
        crashes = wait_for(lambda: [r for r in d.records() if r["type"] == "plugin.crashed"])
        ended = {(r["plugin"], r["data"]["cause"], r["data"]["origin"]) for r in crashes}
        assert ended == {("hoarder", CAUSE, "plugin")}
        assert run is not None and d.json("plugin", "show", "echo")["run"] == run
