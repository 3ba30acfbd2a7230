"""Connections of a plugin over reloads of the whole daemon: a TLS download ends right, an idle websocket goes on."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.linux import netns
from tests.support.internet_servers import WEB, pattern
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, daemon, event, wait_for, write_plugin
from tests.system.reload.exchanges import MODULES
from tests.system.reload.test_reload import running

SIZE, PARTS = 24 << 20, 96
PORT = 8081
HOST_TOML = f'[network]\nresolvers = ["{WEB}"]\n'
SANDBOX = {
    "filesystem": {"state": "4M"},
    "network": {"egress": [{"host": "hooks.example.com", "ports": [443, PORT]}]},
}
CLIENTS = """\
    import hashlib, ssl, threading, time
    state = os.environ["PLUGIN_STATE_DIR"] + "/"
    def note(name, text):
        with open(state + name + ".new", "w") as file:
            file.write(text)
        os.rename(state + name + ".new", state + name)
    def tries(name, client):
        try:
            note(name, client())
        except Exception as error:
            note(name, repr(error))
    def download():
        connection = ssl.create_default_context(cafile="/plugin/ca.pem").wrap_socket(
            socket.create_connection(("hooks.example.com", 443), 30), server_hostname="hooks.example.com")
        connection.sendall(b"GET /bytes/SIZE HTTP/1.1\\r\\nHost: hooks.example.com\\r\\nConnection: close\\r\\n\\r\\n")
        file, digest, count = connection.makefile("rb"), hashlib.sha256(), 0
        while file.readline().strip():
            pass
        note("begun", "yes")
        while count < SIZE and (part := file.read(SIZE // PARTS)):
            digest.update(part)
            count += len(part)
            time.sleep(PAUSE)
        return f"{count} {digest.hexdigest()}"
    def websocket():
        connection = socket.create_connection(("hooks.example.com", PORT), 30)
        connection.settimeout(None)
        connection.sendall(b"GET / HTTP/1.1\\r\\nHost: hooks.example.com:PORT\\r\\nConnection: Upgrade\\r\\n"
                           b"Upgrade: websocket\\r\\nSec-WebSocket-Key: AAAA\\r\\n\\r\\n")
        answer = connection.recv(4096)
        note("upgraded", answer.decode())
        while not os.path.exists(state + "ask"):
            time.sleep(0.05)
        connection.sendall(b"frame")
        return connection.recv(4096).decode()
    for name, client in (("downloaded", download), ("answered", websocket)):
        threading.Thread(target=tries, args=(name, client), daemon=True).start()
"""


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        yield made


@contextlib.contextmanager
def websockets(pretend: PretendInternet) -> Iterator[list[int]]:
    """A server that accepts every upgrade and echoes what comes; how many bytes came on each connection."""
    heard: list[int] = []

    def echo(connection: socket.socket) -> None:
        number = len(heard)
        heard.append(0)
        with connection, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in connection.recv(4096):
                pass
            connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            while part := connection.recv(4096):
                heard[number] += len(part)
                connection.sendall(part)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()

    server = netns.in_network(pretend.internet.fd, lambda: socket.create_server((WEB, PORT)))
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield heard
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.close()


@pytest.mark.parametrize(("length", "reloads"), [(5, 2), pytest.param(60, 8, marks=pytest.mark.wide)])
def test_download_and_idle_websocket_go_on_over_reloads(
    pretend: PretendInternet, shared_dir: Path, length: float, reloads: int
) -> None:
    clients = CLIENTS.replace("SIZE", str(SIZE)).replace("PARTS", str(PARTS)).replace("PAUSE", str(length / PARTS))
    clients = clients.replace("PORT", str(PORT))
    start = '    path = os.environ["PLUGIN_SOCKET"]\n'
    folder = write_plugin(shared_dir / "client", ECHO.replace(start, clients + start), sandbox=SANDBOX)
    shutil.copy(pretend.directory / "ca.pem", folder)
    with websockets(pretend) as heard, daemon(host_toml=HOST_TOML, network=pretend.host_fd) as d:
        d.cli("plugin", "add", str(folder), "--yes")
        d.cli("plugin", "start", "client")
        state = d.state_of("client")
        before, began = running(d), time.monotonic()
        for name in ("begun", "upgraded"):
            wait_for((state / name).exists, what=lambda name=name: f"{name}: {[one.name for one in state.iterdir()]}")
        assert (state / "upgraded").read_text().startswith("HTTP/1.1 101")
        brokers = {d.service_pid(MODULES["broker"])}
        for number in range(reloads):
            d.cli("reload")
            brokers.add(d.service_pid(MODULES["broker"]))
            d.cli("event", "emit", "deploy.completed", event(number), "--wait")
        assert len(brokers) == reloads + 1
        (state / "ask").touch()
        wait_for((state / "answered").exists)
        network = [one for one in d.records() if one["type"].startswith("net.")]
        assert ((state / "answered").read_text(), heard) == ("frame", [5]), [
            (one["type"], one["data"].get("rule"), one["data"].get("why"), one["data"].get("reason")) for one in network
        ]
        wait_for((state / "downloaded").exists, seconds(length + 60))
        assert (state / "downloaded").read_text() == f"{SIZE} {hashlib.sha256(pattern(0, SIZE)).hexdigest()}"
        assert time.monotonic() - began >= length
        assert running(d) == before
        closed = [one["data"] for one in d.records() if one["type"] == "net.closed" and one["data"]["received"] > SIZE]
        assert [one["reason"] for one in closed] == ["closed"]
        d.cli("audit", "verify")
