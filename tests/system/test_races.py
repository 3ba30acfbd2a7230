"""A plugin that exchanges what is in its folders as fast as it can, while root starts, stops, updates and removes it.

The bait is a folder of the host that no cage sees. Links to it, FIFOs, hard links and folders take each other's place
under every name that root has a use for, in the state folder, the socket folder and /tmp; the host API's folder is
tried as well. If root followed one of the links only once, the bait would tell (inotify); if it opened a FIFO it would
hang. That the exchanges are quick enough to catch somebody who follows paths is shown first, by doing so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.linux.inotify import IN_CREATE, IN_DELETE, IN_MODIFY, IN_MOVED_TO, Inotify
from isolator.supervisor.socket_watch import SocketWatch
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

NAME = "racer"
ALL_EVENTS = 0xFFF
SCRIPT = """\
    #!/usr/bin/python3
    import itertools, json, os, signal, socket, time
    BAIT, STATE, OWN = "@BAIT@", os.environ["PLUGIN_STATE_DIR"], os.path.dirname(os.environ["PLUGIN_SOCKET"])
    NAMES = ("state", "image", "size", "mnt", "lost+found", "plugin.json", "data")

    def one(kind, place):
        if kind == "link":
            os.symlink(BAIT, place)
        elif kind == "link-to-file":
            os.symlink(BAIT + "/file", place)
        elif kind == "fifo":
            os.mkfifo(place)
        elif kind == "folder":
            os.mkdir(place)
        elif kind == "hard-link":
            os.link(os.path.dirname(place) + "/plain", place)

    def clear(place):
        try:
            os.unlink(place)
        except OSError:
            try:
                os.rmdir(place)
            except OSError:
                pass

    def exchange(folder, names):
        open(folder + "/plain", "w").close()
        for kind in itertools.cycle(("link", "folder", "link-to-file", "fifo", "hard-link")):
            for name in names:
                place = folder + "/" + name
                try:
                    one(kind, folder + "/next")
                    clear(place)
                    os.rename(folder + "/next", place)
                except OSError:
                    clear(folder + "/next")

    def exchange_socket():
        path = OWN + "/plugin.sock"
        while True:
            os.symlink(BAIT + "/socket", OWN + "/evil")
            os.rename(OWN + "/evil", path)
            os.link(OWN + "/real", OWN + "/next")
            os.rename(OWN + "/next", path)

    def try_host_folder():
        while True:
            for attempt in (
                lambda: os.symlink(BAIT, "/run/isolator/host/evil"),
                lambda: os.unlink("/run/isolator/host/host.sock"),
                lambda: os.rename("/run/isolator/host/host.sock", "/run/isolator/host/other"),
                lambda: os.rename("/run/isolator/host", "/run/isolator/other"),
                lambda: os.chmod("/run/isolator/host", 0o777),
                lambda: os.chmod("/run/isolator/host/host.sock", 0o777),
                lambda: open("/run/isolator/host/file", "w"),
            ):
                try:
                    attempt()
                except OSError:
                    continue
                open(STATE + "/host-folder-changed", "w").close()
            time.sleep(0.01)

    def flood():
        while True:
            open(OWN + "/flood", "w").close()
            os.unlink(OWN + "/flood")

    server = socket.socket(socket.AF_UNIX)
    server.bind(OWN + "/real")
    server.listen(16)
    os.link(OWN + "/real", OWN + "/plugin.sock")
    for work in (
        lambda: exchange(STATE, NAMES), lambda: exchange("/tmp", NAMES), exchange_socket, try_host_folder, @MORE@
    ):
        if os.fork() == 0:
            work()
    while True:
        connection, _ = server.accept()
        try:
            request = json.loads(connection.recv(4096))
            reply = {"jsonrpc": "2.0", "id": request["id"], "result": {"status": "ok"}}
            connection.sendall(json.dumps(reply).encode() + b"\\n")
        except (OSError, ValueError):
            pass
        connection.close()
"""
HOST_TOML = '[restart]\nbackoff_min = "0.1s"\ncrashes = 1000\n[audit]\nsnapshot_interval = "1s"\n'


class Bait:
    """A folder of the host with a file and a socket, and an eye on all of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        (folder / "file").write_text("the host's")
        (folder / "file").chmod(0o666)
        self.folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o666)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._eye = Inotify()
        self._eye.watch(str(folder), ALL_EVENTS)

    def taken(self) -> bool:
        """Whether somebody came here since the last look."""
        events = self._eye.read()
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listener.accept()[0].close()
                events.append(None)  # type: ignore[arg-type]
        return bool(events)

    def close(self) -> None:
        self._listener.close()
        self._eye.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[tuple[Daemon, Bait, Path]]:
    with daemon(host_toml=HOST_TOML) as d:
        bait = Bait(d.root / "bait")
        (d.root / "etc/isolator/policies").mkdir(parents=True, exist_ok=True)
        (d.root / f"etc/isolator/policies/{NAME}.toml").write_text(
            '[grant]\nhooks = ["deploy.*"]\negress = []\n[limits]\ncpu = "200%"\n[filesystem]\nstate = "4M"\n'
        )
        yield d, bait, tmp_path
        bait.close()


def _plugin(d: Daemon, place: Path, more: str = "", **manifest: object) -> Path:
    script = SCRIPT.replace("@BAIT@", str(d.root / "bait")).replace("@MORE@", more)
    sandbox = {"resources": {"cpu": "200%"}, "network": {"egress": []}}
    return write_plugin(place / NAME, script, sandbox=sandbox, **manifest)


def _follow(folder: Path) -> None:
    """What a daemon does that trusts names: look at what is there, and use it."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.is_dir():
                os.listdir(path)
            elif path.is_file():
                path.read_bytes()
            elif path.is_socket():
                with socket.socket(socket.AF_UNIX) as one:
                    one.settimeout(1)
                    one.connect(str(path))


def test_root_follows_nothing(scene: tuple[Daemon, Bait, Path]) -> None:
    d, bait, tmp_path = scene
    d.cli("plugin", "add", str(_plugin(d, tmp_path / "one")), "--yes")
    second = _plugin(d, tmp_path / "two", version="2.0.0")
    d.cli("event", "emit", "deploy.completed", event(0))
    pid = wait_for(lambda: d.json("plugin", "show", NAME)["pid"], what=d.log.read_text)
    inside = Path(f"/proc/{pid}/root")
    state = d.state_of(NAME)
    for folder in (state, inside / "tmp", inside / "run/isolator/plugin"):
        wait_for(lambda folder=folder: _follow(folder) or bait.taken(), what=f"nobody is caught in {folder}")

    for number in range(2):
        d.cli("event", "emit", "deploy.completed", event(number))
        d.cli("plugin", "stop", NAME)
        d.cli("plugin", "start", NAME)
        d.cli("plugin", "restart", NAME)
        d.cli("plugin", "update", NAME, str(second), "--yes")
        d.cli("plugin", "rollback", NAME)
        wait_for(lambda: d.json("plugin", "show", NAME)["state"] == "running")
        for question in ("show", "explain", "denials"):
            d.cli("plugin", question, NAME)
    snapshots = sum(r["type"] == "resources" for r in d.records())
    wait_for(lambda: sum(r["type"] == "resources" for r in d.records()) > snapshots)
    assert not (state / "host-folder-changed").exists()
    assert not bait.taken(), "root followed a link of the plugin's"
    d.kill()
    d.start()
    d.cli("plugin", "start", NAME)
    d.cli("plugin", "remove", NAME, "--yes")
    assert not bait.taken(), "root followed a link of the plugin's while it cleared or removed"
    assert sorted(path.name for path in bait.folder.iterdir()) == ["file", "socket"]
    assert (bait.folder / "file").read_text() == "the host's" and bait.folder.stat().st_uid == 0


def test_a_flood_of_names_does_not_busy_the_supervisor(scene: tuple[Daemon, Bait, Path]) -> None:
    """The supervisor looks for the socket in a folder that the plugin can change as often as it likes."""
    d, _, tmp_path = scene
    d.cli("plugin", "add", str(_plugin(d, tmp_path, "flood, flood, flood")), "--yes")
    d.cli("event", "emit", "deploy.completed", event(0))
    pid = wait_for(lambda: d.json("plugin", "show", NAME)["pid"], what=d.log.read_text)
    eye = Inotify()
    eye.watch(f"/proc/{pid}/root/run/isolator/plugin", IN_CREATE | IN_MOVED_TO | IN_DELETE | IN_MODIFY)
    assert d.process is not None
    before, seen = _ticks(d.process.pid), 0
    while seen < 150_000:
        seen += len(eye.read())
    spent = (_ticks(d.process.pid) - before) / os.sysconf("SC_CLK_TCK")
    eye.close()
    assert spent < seconds(0.15), f"{seen} changes cost the supervisor {spent} s of processor time"


def _ticks(pid: int) -> int:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


async def test_all_starting_plugins_share_one_watch(tmp_path: Path) -> None:
    """Root may have 128 inotify instances, and more plugins than that may start at once."""
    watch = SocketWatch()
    told: list[int] = []
    both = asyncio.Event()
    folders = []

    def look(number: int) -> None:
        told.append(number)
        if len(told) == 2:
            both.set()

    for number in range(200):
        (tmp_path / str(number)).mkdir()
        folders.append(os.open(tmp_path / str(number), os.O_PATH | os.O_DIRECTORY))
        watch.add(folders[-1], lambda number=number: look(number))
    last = watch.add(folders[0], lambda: look(0))
    watch.remove(last)
    for number in (0, 150, 199):
        (tmp_path / str(number) / "plugin.sock").touch()
    async with asyncio.timeout(seconds(10)):
        await both.wait()
    assert sorted(told) == [150, 199]
    watch.close()
    for folder in folders:
        os.close(folder)
