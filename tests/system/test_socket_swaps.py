"""A plugin replaces its socket by something else while the host connects: root follows none of it.

The socket's folder is the one place that both a plugin and root touch. What stands there is opened without following
anything, looked at through the descriptor, and connected to through the same descriptor; or that is lent to the host,
which connects by itself until the plugin has done anything to the name.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.supervisor.cage_spec import SOCKET
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

KINDS = ("link", "broken-link", "link-to-folder", "fifo", "folder", "file", "own-other-file", "host-api")
"""What is put in the socket's place; each has to be refused."""
HONEST = ("hard-link", "renamed", "device")
"""What is the plugin's own socket all the same, or what it cannot make at all; the event arrives."""

SCRIPT = """\
    #!/usr/bin/python3
    import json, os, socket, stat, struct, threading, time
    path = os.environ["PLUGIN_SOCKET"]
    folder, state = os.path.dirname(path), os.environ["PLUGIN_STATE_DIR"]
    TRAP = "@TRAP@"
    def listen(place):
        server = socket.socket(socket.AF_UNIX)
        server.bind(place)
        server.listen(8)
        return server
    def make(kind, place):
        if kind == "link":
            os.symlink(TRAP, place)
        elif kind == "broken-link":
            os.symlink("/nowhere", place)
        elif kind == "link-to-folder":
            os.symlink("/etc", place)
        elif kind == "fifo":
            os.mkfifo(place)
        elif kind == "folder":
            os.mkdir(place)
        elif kind in ("file", "own-other-file"):
            open(place, "w").write("not a socket")
        elif kind == "host-api":
            os.symlink("/run/isolator/host/host.sock", place)
        elif kind == "hard-link":
            os.link(folder + "/real", place)
        elif kind == "renamed":
            os.rename(folder + "/real", place)
        elif kind == "device":
            try:
                os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 3))
                say("made a device")
            except OSError as error:
                say("no device")
            os.link(folder + "/real", place)
    def say(line):
        with open(state + "/seen", "a") as seen:
            seen.write(line + "\\n")
    def swap(kind):
        if os.path.exists(folder + "/real"):
            os.unlink(folder + "/real")  # a hard link: renaming onto it would do nothing
        os.rename(path, folder + "/real")
        make(kind, path)
        say("swapped-" + kind)
        if kind in ("hard-link", "renamed", "device"):
            return
        while not os.path.exists(state + "/put-back"):
            time.sleep(0.02)
        os.unlink(state + "/put-back")
        os.rename(path, folder + "/gone-" + kind) if kind != "folder" else os.rmdir(path)
        os.rename(folder + "/real", path)
    def race():
        os.symlink(TRAP, folder + "/evil")
        os.link(path, folder + "/real")
        end = time.monotonic() + 3
        turns = 0
        while time.monotonic() < end:
            turns += 1
            os.rename(folder + "/evil", path)
            os.symlink(TRAP, folder + "/evil")
            os.link(folder + "/real", folder + "/next")
            os.rename(folder + "/next", path)
        say("raced-%d" % (turns > 100))
    def answer(connection):
        request = json.loads(connection.recv(4096))
        number = request["params"]["deployment_id"]
        if number.startswith("swap-"):
            swapping = threading.Thread(target=swap, args=(number[5:],))
        elif number == "race":
            swapping = threading.Thread(target=race)
        else:
            swapping = None
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        say(f"{number} by {uid}")
        connection.sendall(json.dumps(
            {"jsonrpc": "2.0", "id": request["id"], "result": {"status": "ok"}}).encode() + b"\\n")
        connection.close()
        if swapping:
            swapping.start()
    server = listen(path)
    while True:
        try:
            answer(server.accept()[0])
        except (OSError, ValueError):
            pass
"""

HOST_TOML = '[restart]\nbackoff_min = "0.1s"\ncrashes = 100\n'


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[tuple[Daemon, socket.socket]]:
    """A daemon with the plugin, and a socket of somebody else that it must never be led to."""
    with daemon(host_toml=HOST_TOML) as d:
        trap = socket.socket(socket.AF_UNIX)
        with trap:
            trap.bind(str(d.root / "trap"))
            (d.root / "trap").chmod(0o666)
            trap.listen(64)
            folder = write_plugin(tmp_path / "swapper", SCRIPT.replace("@TRAP@", str(d.root / "trap")))
            d.cli("plugin", "add", str(folder), "--yes")
            yield d, trap


def _seen(d: Daemon) -> list[str]:
    return [line.partition(" by ")[0] for line in d.noted("swapper")]


def _until_the_host_connects_by_itself(d: Daemon) -> None:
    host = os.stat(f"/proc/{d.service_pid('host.service')}").st_uid

    def connects() -> bool:
        _emit(d, f"direct-{len(_seen(d))}")
        last = d.noted("swapper")[-1:]
        return bool(last) and last[0].startswith("direct-") and last[0].endswith(f" by {host}")

    wait_for(connects, what=lambda: f"it always asks: {d.noted('swapper')}")


def _emit(d: Daemon, name: str) -> None:
    payload = json.loads(event(0)) | {"deployment_id": name}
    d.cli("event", "emit", "deploy.completed", json.dumps(payload))


def _refusals(d: Daemon) -> int:
    return sum(r["type"] == "fs.denied" and r["plugin"] == "swapper" for r in d.records())


def _trapped(trap: socket.socket) -> bool:
    return bool(select.select([trap], [], [], 0)[0])


def test_what_is_not_the_socket_is_refused(scene: tuple[Daemon, socket.socket]) -> None:
    d, trap = scene
    for kind in KINDS:
        _until_the_host_connects_by_itself(d)
        before = _refusals(d)
        _emit(d, f"swap-{kind}")
        wait_for(lambda kind=kind: f"swapped-{kind}" in _seen(d), what=lambda kind=kind: f"{kind}: {_seen(d)}")
        _emit(d, f"after-{kind}")
        wait_for(
            lambda before=before: _refusals(d) > before,
            what=lambda kind=kind: f"{kind} was not refused: {d.log.read_text()}",
        )
        d.cli("plugin", "list")  # the daemon hangs in nothing
        (d.state_of("swapper") / "put-back").touch()  # and no event is lost
        wait_for(
            lambda kind=kind: f"after-{kind}" in _seen(d),
            timeout=seconds(60),
            what=lambda kind=kind: f"{kind}: event lost {_seen(d)}",
        )
    assert not _trapped(trap)
    assert d.json("plugin", "show", "swapper")["state"] == "running"


def test_what_is_its_own_socket_is_used(scene: tuple[Daemon, socket.socket]) -> None:
    d, trap = scene
    for kind in HONEST:
        _until_the_host_connects_by_itself(d)
        _emit(d, f"swap-{kind}")
        wait_for(lambda kind=kind: f"swapped-{kind}" in _seen(d))
        _emit(d, f"after-{kind}")
        wait_for(lambda kind=kind: f"after-{kind}" in _seen(d), what=lambda kind=kind: f"{kind}: {_seen(d)}")
    assert "no device" in _seen(d) and "made a device" not in _seen(d)
    assert not _trapped(trap)


def test_socket_of_another_owner_is_refused(scene: tuple[Daemon, socket.socket]) -> None:
    """The plugin cannot make one; whoever can might have lent it to lead events elsewhere."""
    d, _ = scene
    _until_the_host_connects_by_itself(d)
    pid = d.json("plugin", "show", "swapper")["pid"]
    folder = os.open(f"/proc/{pid}/root/run/isolator/plugin", os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(f"/proc/self/fd/{folder}/other")
            other.listen(8)
            os.rename(SOCKET, "own", src_dir_fd=folder, dst_dir_fd=folder)
            os.rename("other", SOCKET, src_dir_fd=folder, dst_dir_fd=folder)
            _emit(d, "after-other")
            wait_for(lambda: _refusals(d), what=lambda: f"it was not refused: {d.log.read_text()}")
            assert not _trapped(other) and "after-other" not in _seen(d)
            os.rename("own", SOCKET, src_dir_fd=folder, dst_dir_fd=folder)
        wait_for(lambda: "after-other" in _seen(d), timeout=seconds(60), what=lambda: f"the event is lost: {_seen(d)}")
    finally:
        os.close(folder)


def test_a_race_between_the_look_and_the_connect(scene: tuple[Daemon, socket.socket]) -> None:
    """Thousands of swaps of the socket against a link to somebody else's: not once is the link followed."""
    d, trap = scene
    _until_the_host_connects_by_itself(d)
    _emit(d, "race")
    for number in range(15):
        _emit(d, f"n{number}")
    wait_for(lambda: any(line.startswith("raced-") for line in _seen(d)), what="no race")
    assert "raced-1" in _seen(d)
    wait_for(
        lambda: {f"n{number}" for number in range(15)} <= set(_seen(d)), timeout=seconds(60), what=lambda: _seen(d)
    )
    assert not _trapped(trap)
    d.cli("audit", "verify")
