"""The set-up of docs/cluster.md, as it stands there: users, certificates, three servers, the log."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.docs.blocks import shown_in
from tests.support.nats_servers import nats_server
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for

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
    users, certificates, configuration, log, one_more = (block.body for block in shown_in(__file__))
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
        logs, servers = [tmp_path / name / "log" for name in NAMES], []
        for number, name in enumerate(NAMES, 1):
            etc = tmp_path / name
            etc.mkdir()
            for file in ("users.conf", "ca.pem", f"{name}.pem", f"{name}.key"):
                (etc / file).write_bytes((tmp_path / "nats" / file).read_bytes())
            (etc / "server.conf").write_text(_here(configuration, tmp_path, number))
            server = subprocess.Popen([*enter, nats_server(), "-c", etc / "server.conf", "-l", etc / "log"])
            servers.append(server)
            stack.callback(server.wait)
            stack.callback(server.kill)
        assert "3 copies on nats-server" in run(log)
        assert "is there already" in run(log)
        told = [line for one in logs for line in one.read_text().splitlines() if "handshake error" in line]
        assert not told, told[:3]

        assert not _is_known(enter, tmp_path, "host-4", "host-1")
        run(one_more)
        for name, server in zip(NAMES, servers, strict=True):
            (tmp_path / name / "users.conf").write_bytes((tmp_path / "nats/users.conf").read_bytes())
            run(f"{nats_server()} --signal reload={server.pid}")
        wait_for(lambda: _is_known(enter, tmp_path, "host-4"), what="a user of the fourth host")
        for name in ("host-1", "host-2", "host-3"):
            assert _is_known(enter, tmp_path, name)


_LOOKS = """
import asyncio, ssl, sys, nats

async def main(secret, ca):
    user, _, password = open(secret).read().strip().partition(":")
    for number in (1, 2, 3):
        client = await nats.connect(
            f"tls://nats-{number}:4222", user=user, password=password, inbox_prefix=f"_ISO.{user}".encode(),
            tls=ssl.create_default_context(cafile=ca), allow_reconnect=False,
        )
        await client.request("$JS.API.STREAM.INFO.ISO", b"", timeout=5)
        await client.close()

asyncio.run(main(*sys.argv[1:]))
"""


def _is_known(enter: list[str], folder: Path, host: str, secret_of: str = "") -> bool:
    """Whether every server takes a host's file for its user's, and lets it look at the log."""
    secret = folder / f"nats/{secret_of or host}.secret"
    if secret_of:
        text = secret.read_text().replace(secret_of, host, 1)
        (secret := folder / "guess").write_text(text)
    done = subprocess.run(
        [*enter, sys.executable, "-c", _LOOKS, secret, folder / "nats/ca.pem"], capture_output=True, check=False,
        timeout=seconds(60),
    )  # fmt: skip
    return done.returncode == 0
