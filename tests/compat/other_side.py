"""The other side of plugins: one server for all their names, which answers as a row says and keeps what it received."""

from __future__ import annotations

import gzip
import ssl
from http.server import BaseHTTPRequestHandler
from socketserver import StreamRequestHandler
from typing import Any

from tests.compat.program import Plugin
from tests.support.internet_servers import Server
from tests.support.pretend_internet import PretendInternet

HTTPS, SMTPS = 8443, 8465


class OtherSide:
    """``plugin`` is the one that is served; ``log`` has what came."""

    def __init__(self, pretend: PretendInternet) -> None:
        self.plugin: Plugin | None = None
        self.log = ""
        self.turned_away = 0
        side = self

        class Http(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                side.request(self)

            do_PUT = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        class Mail(StreamRequestHandler):
            def handle(self) -> None:
                side.mail(self)

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pretend.directory / "ca.pem", pretend.directory / "key.pem")
        for port, handler in ((HTTPS, Http), (SMTPS, Mail)):
            pretend.internet.servers.append(Server(pretend.internet.bound("0.0.0.0", port), handler, context))

    def serve(self, plugin: Plugin) -> None:
        """Play the other side of this plugin."""
        self.plugin, self.log, self.turned_away = plugin, "", 0

    def request(self, handler: BaseHTTPRequestHandler) -> None:
        """Keep one request, and answer it."""
        assert self.plugin is not None
        body = _body(handler)
        if handler.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.log += f"{handler.requestline}\n{handler.headers}\n{body.decode(errors='replace')}\n"
        if self.plugin.fails_once and not self.turned_away:
            self.turned_away += 1
            handler.send_response(503)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        answer = self.plugin.answer.encode()
        handler.send_response(200)
        for name, value in {"Content-Type": "application/json", **self.plugin.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)

    def mail(self, handler: StreamRequestHandler) -> None:
        """Hold a conversation of SMTP, and keep all lines."""
        handler.wfile.write(b"220 mail.example.com ESMTP\r\n")
        inside = False
        for line in handler.rfile:
            self.log += line.decode(errors="replace")
            if inside:
                if line != b".\r\n":
                    continue
                inside = False
                handler.wfile.write(b"250 kept\r\n")
                continue
            verb = line[:4].upper()
            inside = verb == b"DATA"
            handler.wfile.write({b"DATA": b"354 go on\r\n", b"QUIT": b"221 bye\r\n"}.get(verb, b"250 fine\r\n"))
            if verb == b"QUIT":
                return


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """The body of a request, whose length comes before it or with each chunk."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body
