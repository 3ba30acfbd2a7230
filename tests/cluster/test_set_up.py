"""The set-up of docs/cluster.md, as it stands there: users, certificates, three servers, the log."""

from __future__ import annotations

import contextlib
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.docs.blocks import shown_in
from tests.support.nats_servers import nats_server
from tests.support.timeouts import seconds

NAMES = ("nats-1", "nats-2", "nats-3")
_MACHINES = """
ip link set lo up
(cat /etc/hosts; for number in 1 2 3; do echo "127.0.0.$number nats-$number"; done) > {folder}/hosts
mount --bind {folder}/hosts /etc/hosts
echo ready
exec cat
"""


@contextlib.contextmanager
def _machines(folder: Path) -> Iterator[list[str]]:
    """What takes a command to where the servers' names are known and each has an address; nothing else is there."""
    holder = subprocess.Popen(
        ["unshare", "-n", "-m", "--propagation", "private", "sh", "-ec", _MACHINES.format(folder=folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"ready\n"
        yield ["nsenter", "-t", str(holder.pid), "-n", "-m"]
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def _here(text: str, folder: Path, number: int = 0) -> str:
    """The text with the paths of this test, and for one of the servers."""
    text = textwrap.dedent(text).replace("/root/nats", f"{folder}/nats")
    if number:
        for key in ("server_name: ", 'advertise: "', "/etc/nats/"):
            text = text.replace(f"{key}nats-1", f"{key}nats-{number}")
        text = text.replace("0.0.0.0", f"127.0.0.{number}").replace("/var/lib/nats", f"{folder}/nats-{number}/store")
        text = text.replace("/etc/nats", f"{folder}/nats-{number}")
    return text


def test_servers_of_the_page_find_each_other_by_name_and_have_the_log_made(tmp_path: Path) -> None:
    users, certificates, configuration, log = (block.body for block in shown_in(__file__))
    with _machines(tmp_path) as enter, contextlib.ExitStack() as stack:

        def run(commands: str) -> str:
            done = subprocess.run(
                [*enter, "sh", "-ec", _here(commands, tmp_path)], capture_output=True, text=True, check=False,
                timeout=seconds(60),
            )  # fmt: skip
            assert done.returncode == 0, (done.stdout, done.stderr)
            return done.stdout

        run(users)
        run(certificates)
        logs = [tmp_path / name / "log" for name in NAMES]
        for number, name in enumerate(NAMES, 1):
            etc = tmp_path / name
            etc.mkdir()
            for file in ("users.conf", "ca.pem", f"{name}.pem", f"{name}.key"):
                (etc / file).write_bytes((tmp_path / "nats" / file).read_bytes())
            (etc / "server.conf").write_text(_here(configuration, tmp_path, number))
            server = subprocess.Popen([*enter, nats_server(), "-c", etc / "server.conf", "-l", etc / "log"])
            stack.callback(server.wait)
            stack.callback(server.kill)
        assert "3 copies on nats-server" in run(log)
        assert "is there already" in run(log)
        told = [line for one in logs for line in one.read_text().splitlines() if "handshake error" in line]
        assert not told, told[:3]
