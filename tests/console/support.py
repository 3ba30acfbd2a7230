"""The console as a browser, as a program, and as somebody who has no business there."""

from __future__ import annotations

import base64
import grp
import hashlib
import hmac
import http.client
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from isolator.linux import netns
from isolator.paths import Paths
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon

PORT = 8090
VIEWER, EMITTER, STRANGER, CALLER = 61100, 61101, 61102, 61103
KEYS = (hashlib.sha256(b"the key of now").digest(), hashlib.sha256(b"the key before").digest())


@dataclass
class Answer:
    """One answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Console:
    """The console of one daemon."""

    def __init__(self, daemon: Daemon, network: int) -> None:
        self.daemon, self.network = daemon, network
        self.path = Paths.of(daemon.root).console_socket

    def connect(self, port: int = PORT) -> socket.socket:
        """A connection to the port."""
        return netns.in_network(self.network, lambda: socket.create_connection(("127.0.0.1", port), seconds(20)))

    def at_port(
        self, path: str, *, method: str = "GET", host: str = f"127.0.0.1:{PORT}", body: bytes | None = None,
        port: int = PORT, **headers: str,
    ) -> Answer:  # fmt: skip
        """One request at the port; headers with underscores for hyphens."""
        return _exchange(self.connect(port), method, path, {"Host": host, **_named(headers)}, body)

    def at_socket(self, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        """One request of root's at the Unix socket."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(seconds(20))
        sock.connect(os.fspath(self.path))
        return _exchange(sock, method, path, {"Host": "localhost", **_named(headers)}, body)

    def as_user(self, uid: int, path: str, *arguments: str, member: bool = True) -> tuple[int, str]:
        """Status and body of curl's request at the Unix socket by another user; status 0: it could not connect."""
        group = grp.getgrnam(Paths.of(self.daemon.root).named("isolator")).gr_gid
        groups = [f"--groups={group}"] if member else ["--clear-groups"]
        done = subprocess.run(
            ["setpriv", f"--reuid={uid}", f"--regid={uid}", *groups, "curl", "-sS", "-w", "\n%{http_code}",
             "--max-time", str(seconds(20)), "--unix-socket", str(self.path), *arguments, f"http://localhost{path}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        body, _, status = done.stdout.rpartition("\n")
        return int(status or 0), body or done.stderr

    def url(self) -> str:
        """A URL with a fresh token."""
        found: str = self.at_socket("/v1/token", method="POST", body=b"").json["url"]
        return found

    def enter(self) -> tuple[str, str]:
        """Host name and cookie of a browser that was let in."""
        host, _, rest = self.url().removeprefix("http://").partition("/")
        answer = self.at_port(f"/{rest}", host=host)
        assert answer.status == 303, (answer.status, answer.text)
        return host, answer.headers["set-cookie"].partition(";")[0]

    def signed(
        self, body: bytes, *, number: str = "msg_1", key: bytes = KEYS[0], at: int | None = None
    ) -> dict[str, str]:
        """The headers of a signed request."""
        stamp = str(int(time.time()) if at is None else at)
        digest = hmac.digest(key, f"{number}.{stamp}.".encode() + body, "sha256")
        signature = f"v1,{base64.b64encode(digest).decode()}"
        return {"webhook_id": number, "webhook_timestamp": stamp, "webhook_signature": signature}


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def _exchange(
    sock: socket.socket, method: str, path: str, headers: dict[str, str], body: bytes | None
) -> Answer:  # fmt: skip
    connection = http.client.HTTPConnection("localhost")
    connection.sock = sock
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        found = connection.getresponse()
        return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
    finally:
        connection.close()
