"""A local user without a role who connects to the control socket without end, beside users who have one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, wait_for

STRANGER, VIEWER = 64009, 64010
FLOOD = """
import socket, sys
print("ready", flush=True)
for _ in range(1_000_000):
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(sys.argv[1])
        except PermissionError:
            print("shut out", flush=True)
            break
        except OSError:
            pass
"""
ASK = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect(sys.argv[1])
    except PermissionError:
        sys.exit("EACCES")
    sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"status","params":{}}\\n')
    print(sock.makefile().readline())
"""


@pytest.fixture
def d() -> Iterator[Daemon]:
    with daemon(host_toml=f"[roles]\nviewer = [{VIEWER}]\n") as made:
        yield made


def _as(d: Daemon, uid: int, program: str) -> subprocess.CompletedProcess[str]:
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-I", "-c", program]
    control = d.root / "run/isolator/control.sock"
    return subprocess.run(
        [*words, str(control)], cwd="/", capture_output=True, text=True, check=False, timeout=seconds(120)
    )


def flood_as(d: Daemon, uid: int) -> list[str]:
    """Connect as a user without a role until the kernel refuses it; returns what the program has printed."""
    return _as(d, uid, FLOOD).stdout.split("\n")


def test_flood_of_connections_meets_the_kernel_and_nobody_else_does(d: Daemon) -> None:
    refused = json.loads(_as(d, STRANGER, ASK).stdout)
    assert refused["error"]["data"]["code"] == "denied"  # as a rule a stranger is told so
    assert flood_as(d, STRANGER)[:2] == ["ready", "shut out"]
    assert "EACCES" in _as(d, STRANGER, ASK).stderr
    assert "result" in json.loads(_as(d, VIEWER, ASK).stdout)
    d.cli("plugin", "list")
    record = json.loads(wait_for(lambda: d.cli("audit", "query", "--type", "control.shut", "--json").stdout))
    assert (record["data"]["uid"], record["data"]["seconds"]) == (STRANGER, 60)
    assert d.cli("reload").returncode == 0
    assert "EACCES" in _as(d, STRANGER, ASK).stderr, "a reload has opened the door"
    assert "result" in json.loads(_as(d, VIEWER, ASK).stdout)
    d.kill()
    d.start()
    assert json.loads(_as(d, STRANGER, ASK).stdout)["error"]["data"]["code"] == "denied"  # a new supervisor opens it
