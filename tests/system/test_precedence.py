"""The services go before the plugins on a contended processor, and no cage goes before anybody."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from isolator.layers.cgroup.leaf import IDLE
from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.linux.priority import FIRST
from tests.support.cage_fixture import leaves
from tests.support.processes import children
from tests.system.daemon import ECHO, Daemon, alive, daemon, event, wait_for, write_plugin

SERVICES = ("audit", "broker", "host")


class Urgent(Daemon):
    """A daemon that its operator starts with a nice value of -12."""

    def command(self) -> list[str]:
        return ["nice", "-n", "-12", *super().command()]


def nice(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def of_session(pid: int) -> int:
    """The nice value of a process's autogroup, which is what counts beside other sessions; its own without any."""
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])
    except FileNotFoundError:
        return nice(pid)


def of_services(d: Daemon) -> list[int]:
    assert d.process is not None
    return [nice(d.process.pid), *(nice(d.service_pid(f"{name}.service")) for name in SERVICES)]


def of_cages(d: Daemon, plugin: str) -> set[int]:
    """The nice values of a plugin's processes, of the launcher, and of what a plugin could become."""
    pid = d.json("plugin", "show", plugin)["pid"]
    found = {nice(pid), nice(d.service_pid("isolator.launcher.server"))}
    found |= {nice(child) for child in children(pid)}
    for spare in (spare for group in leaves(d.root) for spare in group.glob("_spare.*")):
        with contextlib.suppress(OSError):  # it is somebody's cage by now
            found |= {nice(int(one)) for one in (spare / "cgroup.procs").read_text().split()}
    return found


@pytest.mark.parametrize("kind", [Daemon, Urgent])
def test_services_go_before_plugins_and_still_do_after_a_reload(shared_dir: Path, kind: type[Daemon]) -> None:
    by_groups = "cpu" in find_hierarchies().v2  # there the services' groups have a greater weight
    first = {Daemon: 0 if by_groups else FIRST, Urgent: -12}[kind]
    services = [first, *[0 if by_groups and kind is Daemon else first] * 3]
    with daemon(kind=kind) as d:
        for name in ("one", "two"):
            plugin = write_plugin(shared_dir / name, sandbox={"filesystem": {"state": "4M"}})
            d.cli("plugin", "add", str(plugin), "--yes")
        d.cli("plugin", "start", "one")
        assert of_services(d) == services
        assert [of_session(d.service_pid(f"{name}.service")) for name in SERVICES] == services[1:]
        assert of_cages(d, "one") == {0}
        before = [d.service_pid(f"{name}.service") for name in SERVICES]
        d.cli("reload")
        wait_for(lambda: not any(map(alive, before)), what="a service was not exchanged")
        wait_for(lambda: all(one["up"] for one in d.json("status")["services"]))
        d.cli("plugin", "start", "two")
        assert of_services(d) == services
        assert of_cages(d, "one") == of_cages(d, "two") == {0}


COMPUTES_WHILE_ASKED = """\
    #!/usr/bin/python3
    import json, os, socket, threading
    asked = threading.Event()
    def compute():
        while True:
            asked.wait()
    threading.Thread(target=compute, daemon=True).start()
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        asked.clear() if asked.is_set() else asked.set()
        reply = {"jsonrpc": "2.0", "result": {"status": "ok"}, "id": request["id"]}
        connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
"""


def in_background(d: Daemon) -> dict[str, bool]:
    """Of each plugin that runs, whether the others go before it."""
    files = [file for group in leaves(d.root) for file in group.glob(f"*/{IDLE}")]
    return {
        name: file.read_text().strip() == "1"
        for file in files
        if (name := file.parent.name.partition(".")[0]) in ("computes", "waits")
    }


def test_a_plugin_that_computes_goes_behind_the_others_until_it_rests(shared_dir: Path) -> None:
    with daemon() as d:
        for name, script, hook in (
            ("computes", COMPUTES_WHILE_ASKED, "deploy.completed"),
            ("waits", ECHO, "deploy.failed"),
        ):
            d.cli("plugin", "add", str(write_plugin(shared_dir / name, script, hooks=[hook])), "--yes")
            d.cli("plugin", "start", name)
        d.cli("event", "emit", "deploy.completed", event(1), "--wait")
        wait_for(lambda: in_background(d) == {"computes": True, "waits": False}, what="it computes in the foreground")
        d.cli("reload")
        assert in_background(d)["computes"]
        d.cli("event", "emit", "deploy.completed", event(2), "--wait")
        wait_for(lambda: not in_background(d)["computes"], what="it rests, and stays behind")
