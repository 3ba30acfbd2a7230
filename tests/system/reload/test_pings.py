"""A ping that a host process has sent and not seen answered when another takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sidecars import raw
from tests.system.daemon import daemon, wait_for, write_plugin
from tests.system.reload.exchanges import exchange
from tests.system.reload.test_reload import STATE, running

PONGS = {
    "oneshot": b'{"jsonrpc":"2.0","id":1,"result":{}}\n',
    "http": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}
"""By mode, how a ping is answered."""


@pytest.mark.parametrize("mode", PONGS)
def test_ping_that_is_unanswered_when_the_host_is_exchanged_is_answered_to_the_next(
    mode: str, shared_dir: Path
) -> None:
    script = raw(
        f"""
connection.recv(4096)
open(state + "/pinged", "w").close()
while not os.path.exists(state + "/answer"):
    time.sleep(0.01)
connection.sendall({PONGS[mode]!r})
open(state + "/answered", "w").close()
connection.close()
""",
        first='state = os.environ["PLUGIN_STATE_DIR"]\n',
    )
    health = {"ping": True, "interval": "0.1s", "timeout": "60s"}
    with daemon() as d:
        plugin = write_plugin(shared_dir / "pinged", script, sandbox=STATE, transport={"mode": mode}, health=health)
        d.cli("plugin", "add", str(plugin), "--yes")
        d.cli("plugin", "start", "pinged")
        state, before = d.state_of("pinged"), running(d)
        wait_for((state / "pinged").exists)
        for _ in range(2):
            exchange(d, "host")
        (state / "answer").touch()
        wait_for((state / "answered").exists, what="it died of a connection that ended before its answer")
        assert running(d) == before
        (state / "answered").unlink()
        wait_for((state / "answered").exists, what="it is not pinged any more")
        assert running(d) == before
        assert not [one for one in d.records() if one["type"] in ("plugin.crashed", "plugin.health")]
