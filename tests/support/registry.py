"""A pretend registry of npm and of Python packages, over TLS in the pretend internet. It can misbehave."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import ssl
import tarfile
import threading
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.internet_servers import WEB, Internet, Server

PORT = 8443
NAME, FILES = f"registry.example.com:{PORT}", f"files.example.com:{PORT}"
HOST_TOML = f"""
[packages]
npm = ["{NAME}/npm"]
pypi = ["{NAME}/simple", "{FILES}"]
ca = "CA"
timeout = "TIMEOUT"
[network]
resolvers = ["{WEB}"]
"""
DRIPPED = 4096
"""Bytes of a slow file, one at a time."""


class Registry:
    """The server: what it has is in ``files``, by path; a number in place of bytes is a size to be sent as zeros."""

    def __init__(self, internet: Internet, directory: Path) -> None:
        self.files: dict[str, bytes | int] = {}
        self.heads: dict[str, tuple[int, dict[str, str]]] = {}
        """Status and headers, by path, in place of those that fit the file."""
        self.slow: set[str] = set()
        self.asked: list[str] = []
        self.closed = threading.Event()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "ca.pem", directory / "key.pem")
        internet.dns.records |= {name.partition(":")[0]: [WEB] for name in (NAME, FILES)}
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                registry.serve(self)

            def log_message(self, format: str, *args: object) -> None:
                return

        internet.servers.append(Server(internet.bound(WEB, PORT), Handler, context))

    def serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = request.path.split("?")[0].replace("%2f", "/").replace("%2F", "/")
        self.asked.append(path)
        found = self.files.get(path)
        size = found if isinstance(found, int) else len(found or b"")
        status, headers = self.heads.get(path, (200 if found is not None else 404, {"Content-Length": str(size)}))
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        kind = "text/html" if path.startswith("/simple/") else "application/json"
        request.send_header("Content-Type", kind)
        request.end_headers()
        if isinstance(found, int):
            for _ in range(found >> 20):
                request.wfile.write(bytes(1 << 20))
        elif path in self.slow:
            for byte in (found or b"")[:DRIPPED]:
                request.wfile.write(bytes([byte]))
                request.wfile.flush()
                if self.closed.wait(0.05):
                    return
        else:
            request.wfile.write(found or b"")
        request.close_connection |= path in self.heads

    def npm(
        self, name: str, version: str, files: Mapping[str, str], *, archive: bytes | None = None, integrity: str = "",
        **fields: Any,
    ) -> str:  # fmt: skip
        """Publish a package of npm; returns its hash as the registry names it. ``fields`` go into package.json."""
        body = {"name": name, "version": version, **fields}
        data = archive if archive is not None else tarball({"package.json": json.dumps(body), **files})
        integrity = integrity or "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        path = f"/npm/{name}/-/{version}.tgz"
        dist = {"tarball": f"https://{NAME}{path}", "integrity": integrity}
        # As registries do: the install script is announced.
        script = {"hasInstallScript": True} if "scripts" in fields else {}
        document = {
            "name": name,
            "dist-tags": {"latest": version},
            "versions": {version: {**body, **script, "dist": dist}},
        }
        self.files[path], self.files[f"/npm/{name}"] = data, json.dumps(document).encode()
        return integrity

    def pypi(
        self, name: str, version: str, files: Mapping[str, str], *, archive: bytes | None = None, sha256: str = "",
        requires: tuple[str, ...] = (), script: str = "", file: str = "",
    ) -> str:  # fmt: skip
        """Publish a wheel; returns its hash. ``script``: MODULE:FUNCTION of its console script."""
        data = archive if archive is not None else wheel(name, version, files, requires, script)
        digest = sha256 or hashlib.sha256(data).hexdigest()
        file = file or f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        link = f'<!DOCTYPE html><html><body><a href="https://{FILES}/{file}#sha256={digest}">{file}</a></body></html>'
        self.files[f"/simple/{name}/"], self.files[f"/{file}"] = link.encode(), data
        return f"sha256-{digest}"


def tarball(files: Mapping[str, str], *, more: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    """A package of npm; ``more`` are entries without content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size, info.mtime, info.mode = len(text.encode()), int(time.time()), 0o755
            archive.addfile(info, io.BytesIO(text.encode()))
        for info in more:
            archive.addfile(info)
    return out.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    """A symbolic link in an archive."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def wheel(
    name: str, version: str, files: Mapping[str, str], requires: tuple[str, ...] = (), script: str = "",
    raw: Mapping[str, str] | None = None,
) -> bytes:  # fmt: skip
    """A wheel; ``raw`` are entries whose names are taken as they are."""
    folder = f"{name.replace('-', '_')}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    content = {
        **files,
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{folder}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **({f"{folder}/entry_points.txt": f"[console_scripts]\n{name} = {script}\n"} if script else {}),
        **(raw or {}),
    }
    record = "".join(f"{path},,\n" for path in [*content, f"{folder}/RECORD"])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, text in {**content, f"{folder}/RECORD": record}.items():
            archive.writestr(path, text)
    return out.getvalue()
