"""Standard streams: closed ones, and their state after a run."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
from pathlib import Path

import pytest

import host
from tests.support.cage_fixture import COMMAND, isolator
from tests.support.timeouts import seconds

ENTRY_POINTS = (
    "host/cli/main.py", "host/service.py", "isolator/audit/service.py", "isolator/broker/service.py",
    "isolator/launcher/server.py",
)  # fmt: skip


IS_NULL = """n=0
for fd in 0 1 2; do n=$((n * 2)); [ "$(stat -Lc %t:%T /proc/$$/fd/$fd)" = 1:3 ] && n=$((n + 1)); done
exit $n"""
"""Exits with one bit for each standard stream that is /dev/null: 4 for input, 2 for output, 1 for errors."""


@pytest.mark.parametrize(
    ("closed", "null"), [("<&-", 4), (">&-", 2), ("2>&-", 1), ("<&- >&-", 6), ("<&- >&- 2>&-", 7), ("", 0)]
)
def test_a_closed_stream_is_dev_null_in_the_cage(shared_dir: Path, closed: str, null: int) -> None:
    """Whoever starts it may have closed them (cron, daemons); no descriptor of root's may take their place."""
    log = shared_dir / "log"
    log.touch()
    done = subprocess.run(
        ["bash", "-c", f'exec <{log} >{log} 2>&1; exec "$@" {closed}', "bash",
         *COMMAND, "--root", str(shared_dir), "run", "--", "bash", "-c", IS_NULL],
        check=False, timeout=seconds(60),
    )  # fmt: skip
    assert done.returncode == null, log.read_text()


def test_the_daemon_serves_with_its_streams_closed(shared_dir: Path) -> None:
    """Its channels and its control socket must not end up among the standard streams of what it starts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"{shared_dir}/notify")
        ready.settimeout(seconds(30))
        daemon = subprocess.Popen(
            ["unshare", "-n", "bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash",
             *COMMAND, "--root", str(shared_dir), "serve"],
            env={**os.environ, "NOTIFY_SOCKET": f"{shared_dir}/notify"},
        )  # fmt: skip
        try:
            while not (state := ready.recv(4096)).startswith(b"READY=1"):
                assert state.startswith(b"EXTEND_TIMEOUT_USEC="), state
            streams = {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in range(3)}
            listed = isolator(shared_dir, "plugin", "list")
        finally:
            daemon.terminate()
            code = daemon.wait(seconds(40))
            isolator(shared_dir, "uninstall", "--purge", "--yes")  # its users
    assert (streams, listed.returncode, code) == ({"/dev/null"}, 0, 0), listed.stderr


@pytest.mark.parametrize("path", ENTRY_POINTS)
def test_every_entry_point_begins_with_its_standard_streams(path: str) -> None:
    tree = ast.parse((Path(host.__file__).parents[1] / path).read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    first = next(node for node in main.body[1:] if isinstance(node, ast.Expr | ast.Assign))
    assert ast.unparse(first) == "open_standard_streams()"
