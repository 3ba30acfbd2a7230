"""The pretend internet of ``pretend_internet``: addresses, a resolver and servers in a network namespace of its own."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.server
import os
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from isolator.linux import netns

WEB, OTHER, THIRD = "93.184.216.34", "1.2.3.4", "5.6.7.8"
WEB6 = "2606:2800:220:1::34"
METADATA, PRIVATE = "169.254.169.254", "10.9.9.9"
INSIDE6 = ("64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "fd00::1")
"""Addresses that must not be reached. Servers answer there: else a refusal would prove nothing."""
HOST, GATEWAY = "45.0.0.2", "45.0.0.1"
HOST6, GATEWAY6, NEIGHBOUR6 = "2a00:1::2", "2a00:1::1", "2a00:1::77"


def run_in(fd: int, *command: str) -> None:
    """Run a command in a network namespace; raises when it fails."""
    netns.in_network(fd, lambda: subprocess.run(command, check=True, capture_output=True, text=True))


class Dns:
    """An authoritative-looking resolver: ``records[name]`` is a list of answers, or a function that makes one."""

    def __init__(self, udp: socket.socket, tcp: socket.socket) -> None:
        self.records: dict[str, list[str] | Callable[[], list[str]]] = {}
        self.ttl = 60
        self.queries: list[str] = []
        self.silent: set[str] = set()
        """Record types that are not answered."""
        self.truncate = False
        self.crafted: Callable[[bytes, bool], list[bytes]] | None = None
        """The datagrams, or the one message over TCP (True), to send for a query instead of an honest reply."""
        self._udp, self._tcp = udp, tcp
        threading.Thread(target=self._serve, daemon=True).start()
        threading.Thread(target=self._serve_tcp, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, peer = self._udp.recvfrom(4096)
                if not wire:  # shut down
                    return
                if self.crafted is not None:
                    for datagram in self.crafted(wire, False):
                        self._udp.sendto(datagram, peer)
                    continue
                reply = self._reply(wire)
                if reply is not None:
                    if self.truncate:
                        message = dns.message.make_response(dns.message.from_wire(wire))
                        message.flags |= dns.flags.TC
                        reply = message.to_wire()
                    self._udp.sendto(reply, peer)

    def _serve_tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._tcp.accept()
                with connection, connection.makefile("rb") as stream:
                    length = struct.unpack("!H", stream.read(2))[0]
                    wire = stream.read(length)
                    reply = self._reply(wire) if self.crafted is None else self.crafted(wire, True)[0]
                    if reply is not None:
                        connection.sendall(struct.pack("!H", len(reply)) + reply)

    def _reply(self, wire: bytes) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        self.queries.append(name)
        if dns.rdatatype.to_text(question.rdtype) in self.silent:
            return None
        reply = dns.message.make_response(query)
        found = self.records.get(name)
        if found is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        else:
            for item in found() if callable(found) else found:
                kind = "AAAA" if ":" in item else "A" if item[0].isdigit() else "CNAME"
                if kind == "CNAME" or kind == dns.rdatatype.to_text(question.rdtype):
                    text = f"{item}." if kind == "CNAME" else item
                    reply.answer.append(dns.rrset.from_text(question.name, self.ttl, "IN", kind, text))
        return reply.to_wire()


class _Http(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/bytes/"):
            return self._many(int(self.path.rpartition("/")[2]))
        body = f"host={self.headers['Host']} from={self.client_address[0]}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _many(self, count: int) -> None:
        """Send that many bytes, none like the one before."""
        self.send_response(200)
        self.send_header("Content-Length", str(count))
        self.end_headers()
        for start in range(0, count, 1 << 20):
            self.wfile.write(pattern(start, min(1 << 20, count - start)))

    def log_message(self, format: str, *args: object) -> None:
        return


def pattern(start: int, count: int) -> bytes:
    """Bytes of ``/bytes/N`` from an offset on, which is a multiple of 32."""
    blocks = (hashlib.sha256(number.to_bytes(8)).digest() for number in range(start // 32, (start + count + 31) // 32))
    return b"".join(blocks)[:count]


class Server(socketserver.ThreadingTCPServer):
    """A threaded server on a socket that was made elsewhere."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, sock: socket.socket, handler: Any, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("0.0.0.0", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.server_address = sock.getsockname()
        self.server_name, self.server_port = "pretend", sock.getsockname()[1]
        self.context = context
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def get_request(self) -> tuple[Any, Any]:
        connection, peer = self.socket.accept()
        if self.context is not None:
            connection = self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    def handle_error(self, request: object, client_address: object) -> None:
        return


class _Echo(socketserver.BaseRequestHandler):
    """Echoes until the end, then sends the number of bytes: shows that half-close works."""

    def handle(self) -> None:
        total = 0
        while data := self.request.recv(65536):
            total += len(data)
            self.request.sendall(data)
        self.request.sendall(f"[{total}]".encode())


class _Banner(socketserver.BaseRequestHandler):
    """Speaks first, like SSH, SMTP and many databases."""

    def handle(self) -> None:
        self.request.sendall(b"220 hello\r\n")
        self.request.sendall(b"got " + self.request.recv(1000))


class _Database(socketserver.BaseRequestHandler):
    """Answers any request."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"row: secret")


class Connects:
    """A company's proxy: CONNECT and nothing else. It resolves names by a table of its own, and asks nobody.

    It sends what a server says first in one piece with its own answer, as proxies may.
    """

    def __init__(self, listener: socket.socket, fd: int) -> None:
        self.requests: list[str] = []
        self.names: dict[str, str] = {}
        self.answer: bytes | None = None
        """Sent in place of a connection."""
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += self.request.recv(1)
                host, _, port = head.split()[1].decode().rpartition(":")
                outer.requests.append(f"{host}:{port}")
                if outer.answer is not None:
                    self.request.sendall(outer.answer)
                    return
                address = (outer.names.get(host, host).strip("[]"), int(port))
                try:
                    server = netns.in_network(fd, lambda: socket.create_connection(address, 5))
                except OSError:
                    self.request.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                    return
                first = server.recv(100) if int(port) == 25 else b""
                self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 Yes\r\nVia: it\r\n\r\n" + first)
                back = threading.Thread(target=_copy, args=(server, self.request), daemon=True)
                back.start()
                _copy(self.request, server)
                back.join()
                server.close()

        self.server = Server(listener, Handler)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


class Internet:
    """The far side of the veth, with its servers."""

    def __init__(self, directory: Path) -> None:
        self.fd = netns.in_new_network(netns.current_network)
        self.directory = directory
        self.servers: list[Any] = []

    def start(self) -> None:
        """Make the servers; the link is up already."""
        self.dns = Dns(self.bound(WEB, 53, socket.SOCK_DGRAM), self.bound(WEB, 53))
        context = _certificate(self.directory)
        for family in ("0.0.0.0", "::"):
            self.servers += [
                Server(self.bound(family, 80), _Http),
                Server(self.bound(family, 443), _Http, context),
                Server(self.bound(family, 7), _Echo),
                Server(self.bound(family, 25), _Banner),
                Server(self.bound(family, 8080), _Http),
                Server(self.bound(family, 853), _Http, context),
            ]
        self.dns.records.update(
            {
                "hooks.example.com": [WEB],
                "other.example.com": [OTHER],
                "six.example.com": [WEB6],
                "both.example.com": [WEB6, WEB],
                "metadata.example.com": [METADATA],
                "private.example.com": [PRIVATE],
                "mixed.example.com": [PRIVATE, WEB],
                "host.example.com": [HOST],
                "loopback.example.com": ["127.0.0.1"],
                "gateway.example.com": [GATEWAY],
                "alias.example.com": ["target.example.net"],
                "target.example.net": [WEB],
                "evilalias.example.com": ["inside.example.net"],
                "inside.example.net": [PRIVATE],
                "dead.example.com": [THIRD],
                "mapped.example.com": [f"::ffff:{METADATA}"],
                "nat64.example.com": ["64:ff9b::a9fe:a9fe"],
                "6to4.example.com": ["2002:a9fe:a9fe::1"],
            }
        )

    def serve_host(self, host_fd: int) -> None:
        """Start the host's own servers, which no cage may reach: a web server, and a database on its loopback."""
        self.servers += [
            Server(self.bound("0.0.0.0", 80, fd=host_fd), _Http),
            Server(self.bound("127.0.0.1", 5432, fd=host_fd), _Database),
        ]

    def bound(
        self, address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM, *, fd: int | None = None
    ) -> socket.socket:
        """A listening or bound socket inside the internet namespace, or that of ``fd``."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in address:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            if kind == socket.SOCK_STREAM:
                sock.listen(256)
            return sock

        return netns.in_network(self.fd if fd is None else fd, make)

    def stop(self) -> None:
        """Close servers and namespace."""
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for sock in (self.dns._udp, self.dns._tcp):
            # A blocked accept or recvfrom does not notice a close, but it does notice a shutdown.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        os.close(self.fd)


def _certificate(directory: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pretend")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("*.example.com")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (directory / "key.pem").chmod(0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "ca.pem", directory / "key.pem")
    return context
