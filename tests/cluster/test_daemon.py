"""A whole daemon with [cluster], on a real server: it joins, holds its plugins, goes on after a reload, and leaves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.cluster.entries import Beat, EventType, Message, Number, Plugin, encode
from tests.support.nats_servers import Server, nats_servers
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """A descriptor of a network namespace with a loopback."""
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"up\n"
        fd = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def _status(d: Daemon) -> dict[str, Any]:
    return d.json("cluster", "status", code=None)


def _held(d: Daemon) -> list[dict[str, Any]]:
    """The shards of all plugins, once this host has them."""
    shards = [shard for plugin in _status(d)["plugins"] for shard in plugin["shards"]]
    return shards if shards and all(shard["host"] == "h1" for shard in shards) else []


def _problem(d: Daemon, kind: str) -> str:
    return next((one["line"] for one in _status(d)["problems"] if one["kind"] == kind), "")


@pytest.mark.wide
def test_daemon_joins_holds_its_plugins_over_a_reload_waits_for_its_log_and_leaves(tmp_path: Path) -> None:
    with _namespace() as network, contextlib.ExitStack() as stack:
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network}"]
        d = stack.enter_context(daemon(host_toml="# none yet", network=network, start=False))
        servers = _join(d, stack, enter, tmp_path)
        secret = d.root / "etc/isolator/cluster.secret"
        d.start()
        wait_for(lambda: _status(d)["member"], what="a member")

        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        held = wait_for(
            lambda: next((s for p in _status(d)["plugins"] for s in p["shards"] if s["host"] == "h1"), None),
            what="held",
        )
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")

        # A reload carries the lease: the same epoch, in a new session, and nothing in between is lost.
        d.cli("reload")
        d.cli("event", "emit", "deploy.completed", event(2), "--wait")
        shown = _status(d)
        assert shown["plugins"][0]["shards"] == [held] and shown["outbox"]["events"] == 0 and not shown["problems"]

        # Without the server events are accepted, and the plugin does not act for long.
        servers[0].kill()
        wait_for(lambda: _problem(d, "unreachable"), what="no answer")
        d.cli("event", "emit", "deploy.completed", event(3))
        assert _status(d)["outbox"]["events"] == 1
        d.cli("cluster", "status", code=1)
        servers[0].start()
        wait_for(lambda: _status(d)["member"] and _status(d)["outbox"]["events"] == 0, what="sent")
        wait_for(lambda: _seen(d) == ["d1", "d2", "d3"], what="delivered")

        # A password that is not its own has its line, and nothing is lost.
        secret.write_text("h1:guess\n")
        d.cli("reload")
        assert "Authorization Violation" in wait_for(lambda: _problem(d, "refused"), what="refused")
        assert any("Authorization Violation" in line for line in d.json("status", code=None)["alarms"])
        d.cli("event", "emit", "deploy.completed", event(4))
        secret.write_bytes((tmp_path / "users/h1.secret").read_bytes())
        d.cli("reload")
        wait_for(lambda: _seen(d) == ["d1", "d2", "d3", "d4"], what="delivered")

        left = d.json("cluster", "leave")
        assert left == {"left_behind": 0} and _problem(d, "left")
        refused = d.cli("event", "emit", "deploy.completed", event(5), code=None)
        assert refused.returncode and "has left its cluster" in refused.stderr
        (d.root / "etc/isolator/host.toml").write_text("# none any more\n")
        d.cli("reload")
        # The host process is exchanged after the supervisor.
        wait_for(lambda: not d.cli("event", "emit", "deploy.completed", event(6), "--wait", code=None).returncode)
        kinds = {record["data"]["kind"] for record in d.records() if record["type"] == "cluster.problem"}
        assert {"unreachable", "refused"} <= kinds


def test_host_whose_settings_were_removed_acts_alone_once_it_has_left(tmp_path: Path) -> None:
    with _member(tmp_path) as (d, _):
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo", activation={"start": "eager"})), "--yes")
        wait_for(lambda: _held(d) and d.json("plugin", "show", "echo")["state"] == "running", what="held")
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")

        # Others may hold the plugin by now: it waits here, over a restart too, as events do.
        toml = d.root / "etc/isolator/host.toml"
        settings = toml.read_text()
        toml.write_text("# none any more\n")
        d.cli("reload")
        assert "isolator cluster leave" in wait_for(lambda: _problem(d, "refused"), what="a way out")
        d.cli("event", "emit", "deploy.completed", event(2))
        assert d.stop() == 0
        d.start()
        line = wait_for(lambda: _problem(d, "refused"), what="a way out")
        assert any(line in alarm for alarm in d.json("status", code=None)["alarms"])
        shown = d.json("plugin", "show", "echo")
        assert (shown["state"], shown["lease"]) == ("stopped", "waits for its lease")
        assert d.cli("cluster", "leave", code=None).returncode

        # With its settings it goes on as if nothing had been.
        toml.write_text(settings)
        d.cli("reload")
        wait_for(lambda: _seen(d) == ["d1", "d2"], what="delivered")

        toml.write_text("# none any more\n")
        d.cli("reload")
        wait_for(lambda: _problem(d, "refused"), what="a way out")
        d.cli("cluster", "leave", "--force")
        d.cli("reload")
        wait_for(lambda: d.cli("cluster", "status", code=None).returncode, what="no cluster")
        wait_for(lambda: not d.cli("event", "emit", "deploy.completed", event(3), "--wait", code=None).returncode)
        assert not d.json("status", code=None)["alarms"]


_GHOST = """
import asyncio, sys, nats

async def main():
    client = await nats.connect("nats://127.0.0.1:4222", user="h2", password=sys.argv[1], inbox_prefix=b"_ISO.h2")
    await client.request("iso.ctl.h2", bytes.fromhex(sys.argv[2]), timeout=5, headers={"Isolator": "1"})
    await client.close()

asyncio.run(main())
"""


@pytest.mark.wide
def test_plugin_whose_hosts_are_gone_is_shown_as_nobodys_and_forgotten_on_command(tmp_path: Path) -> None:
    with _member(tmp_path) as (d, enter):
        refused = d.cli("plugin", "remove", "--yes", "--cluster", "ghost", code=None)
        assert refused.returncode and "is none of the cluster" in refused.stderr

        # Another host has brought a plugin, and is never heard of again.
        schema = '{"type":"object","properties":{"order_id":{"type":"string"}},"required":["order_id"]}'
        entries = (EventType("shop.order", schema), Plugin("ghost", "sha256:1"), Beat(ready=("ghost",)))
        body = encode(Message("h2", "ctl", Number(1, 1), entries))
        password = (tmp_path / "users/h2.secret").read_text().strip().partition(":")[2]
        subprocess.run([*enter, sys.executable, "-c", _GHOST, password, body.hex()], check=True)
        wait_for(lambda: any(one["name"] == "ghost" for one in _status(d)["plugins"]), what="the plugin")
        refused = d.cli("plugin", "remove", "--yes", "--cluster", "ghost", code=None)
        assert refused.returncode and "h2 has it, too" in refused.stderr

        # Its type is known here, over a reload, and events of it are accepted.
        for _ in range(2):
            assert "shop.order" in d.cli("event", "types").stdout
            d.cli("event", "emit", "shop.order", '{"order_id":"7"}')
            refused = d.cli("event", "emit", "shop.order", "{}", code=None)
            assert refused.returncode and "order_id is required" in refused.stderr
            d.cli("reload")
        shown = d.cli("plugin", "show", "ghost", code=None)
        assert shown.returncode and "is not on this host, and is one of the cluster" in shown.stderr

        line = wait_for(lambda: _problem(d, "unheld"), what="nobody's", timeout=seconds(120))
        assert "(h2 had it, and is silent)" in line and any(
            line in one for one in d.json("status", code=None)["alarms"]
        )
        assert line in d.cli("plugin", "show", "ghost", code=None).stderr
        d.cli("plugin", "remove", "--yes", "--cluster", "ghost")
        wait_for(lambda: not _status(d)["plugins"] and not _problem(d, "unheld"), what="forgotten")

        # One that is here says who holds it.
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        wait_for(lambda: _held(d), what="held")
        assert "held by h1" in d.cli("plugin", "show", "echo").stdout
        assert d.json("plugin", "show", "echo")["cluster"]["shards"][0]["host"] == "h1"


@contextlib.contextmanager
def _member(tmp_path: Path) -> Iterator[tuple[Daemon, list[str]]]:
    """Yield a daemon that is host h1 of a cluster of its own, and how to enter the network of both."""
    with _namespace() as network, contextlib.ExitStack() as stack:
        enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network}"]
        d = stack.enter_context(daemon(host_toml="# none yet", network=network, start=False))
        _join(d, stack, enter, tmp_path)
        d.start()
        wait_for(lambda: _status(d)["member"], what="a member")
        yield d, enter


def _join(d: Daemon, stack: contextlib.ExitStack, enter: list[str], tmp_path: Path) -> list[Server]:
    """Have a daemon, which has not begun, be host h1 of a cluster of its own; the servers."""
    d.cli("cluster", "users", "--dir", str(tmp_path / "users"), "h1", "h2")
    users = (tmp_path / "users/users.conf").read_text()
    servers = stack.enter_context(nats_servers(tmp_path / "nats", 1, more=users, first_port=4222, enter=enter))
    made = subprocess.run(
        [*enter, "isolator", "--root", d.root, "cluster", "init", "--server", "127.0.0.1:4222", "--no-tls",
         "--replicas", "1", "--max-bytes", "50000000", "--credentials", tmp_path / "users/admin.secret"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "log made" in made.stdout
    secret = d.root / "etc/isolator/cluster.secret"
    secret.write_bytes((tmp_path / "users/h1.secret").read_bytes())
    secret.chmod(0o600)
    (d.root / "etc/isolator/host.toml").write_text(
        f'[cluster]\nname = "h1"\nservers = ["127.0.0.1:4222"]\ntls = false\ncredentials = "{secret}"\n'
    )
    return servers


def _seen(d: Daemon) -> list[str]:
    """What the plugin was sent, each once, in the order of its first time."""
    return list(dict.fromkeys(d.noted("echo")))
