"""A pretend internet: a network namespace with a resolver, a webhook, a metadata service and an attacker's collector.

Two processes take part. The demo sits in a network namespace of its own (`unshare -n`) that has nothing but
`lo`; this module's `Internet` starts `python internet.py serve DIR` in a second one and joins the two with a
veth pair. The server writes one JSON line to its standard output for everything that reaches it, so "nothing
arrived" is an observation made on the far side.

The addresses are public ones, so that the default policy is what is tested, without exceptions. No packet can
leave: neither namespace has any other interface, and `Internet` refuses to start where there is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from pyroute2 import IPRoute

HOST = "44.128.0.2"
GATEWAY = "44.128.0.1"
RESOLVER = "44.128.1.53"
WEBHOOK = "44.128.1.10"
COLLECTOR = "44.128.1.66"
OUTSIDE_RESOLVER = "8.8.8.8"
METADATA = "169.254.169.254"

NAMES = {
    "hooks.slack.com": WEBHOOK,
    "collector.example.net": COLLECTOR,
    "loot-0123456789abcdef.collector.example.net": COLLECTOR,
    "loot.collector.example.net": COLLECTOR,
}


@dataclass(frozen=True)
class Contact:
    """Something that reached the pretend internet: ``kind`` is dns, webhook, metadata, resolver or collector."""

    kind: str
    what: str
    body: dict[str, Any]


# ------------------------------------------------------------------------------------ the far side


def contact(kind: str, what: str, **body: Any) -> None:
    """Report one contact; one write, so that lines of several threads never mix."""
    os.write(1, json.dumps({"kind": kind, "what": what, "body": body}).encode() + b"\n")


def answer(packet: bytes, kind: str, transport: str) -> bytes:
    query = dns.message.from_wire(packet)
    reply = dns.message.make_response(query, recursion_available=True)
    question = query.question[0]
    name = question.name.to_text(omit_final_dot=True).lower()
    contact(kind, f"{name} {dns.rdatatype.to_text(question.rdtype)} {transport}", name=name)
    if name not in NAMES:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    elif question.rdtype == dns.rdatatype.A:
        reply.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", NAMES[name]))
    return reply.to_wire()


class Server4(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def dns_servers(address: str, kind: str) -> list[socketserver.BaseServer]:
    class Udp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            packet, sock = self.request
            sock.sendto(answer(packet, kind, "udp"), self.client_address)

    class Tcp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            packet = self.rfile.read(int.from_bytes(self.rfile.read(2), "big"))
            if packet:
                reply = answer(packet, kind, "tcp")
                self.wfile.write(len(reply).to_bytes(2, "big") + reply)

    return [socketserver.ThreadingUDPServer((address, 53), Udp), Server4((address, 53), Tcp)]


def webhook_server(directory: Path) -> socketserver.BaseServer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "webhook.pem", directory / "webhook.key")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            contact("webhook", f"POST {self.headers['Host']}", path=self.path, message=body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: Any) -> None:
            """Contacts are reported already."""

    server = ThreadingHTTPServer((WEBHOOK, 443), Handler)
    # The handshake is left to the first read, in the connection's own thread.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


def metadata_server() -> socketserver.BaseServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            contact("settle" if self.path.startswith("/settle/") else "metadata", f"GET {self.path}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"AccessKeyId": "pretend", "SecretAccessKey": "pretend"}\n')

        def log_message(self, format: str, *args: Any) -> None:
            """Contacts are reported already."""

    return ThreadingHTTPServer((METADATA, 80), Handler)


def banner_server(address: str, port: int, report: Callable[[str], None]) -> socketserver.BaseServer:
    """A TCP service that speaks first, as a database does; reports every connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            report(f"connection from {self.client_address[0]}")
            with contextlib.suppress(OSError):
                self.request.sendall(b"pretend service ready\n")

    return Server4((address, port), Handler)


def configure(interface: str, address: str, extra: list[str], gateway: str | None) -> None:
    with IPRoute() as routes:
        loopback = routes.link_lookup(ifname="lo")[0]
        link = routes.link_lookup(ifname=interface)[0]
        routes.link("set", index=loopback, state="up")
        for further in extra:
            routes.addr("add", index=loopback, address=further, prefixlen=32)
        routes.addr("add", index=link, address=address, prefixlen=24)
        routes.link("set", index=link, state="up")
        if gateway:
            routes.route("add", dst="default", gateway=gateway)


def serve(directory: Path) -> None:
    """The far side's whole life: wait for the cable, serve, end when standard input is closed."""
    sys.stdin.readline()
    configure("inside", GATEWAY, [RESOLVER, WEBHOOK, COLLECTOR, OUTSIDE_RESOLVER, METADATA], None)
    servers = [
        *dns_servers(RESOLVER, "dns"),
        *dns_servers(OUTSIDE_RESOLVER, "resolver"),
        webhook_server(directory),
        metadata_server(),
        banner_server(COLLECTOR, 443, lambda who: contact("collector", who)),
    ]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    contact("ready", "listening")
    sys.stdin.read()


# ------------------------------------------------------------------------------------ the near side


class Internet:
    """The pretend internet as its user sees it: a context manager that must be entered inside `unshare -n`.

    `contacts` grows as things arrive there; `ca` is the PEM file of the authority that vouches for the webhook.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca = directory / "ca.pem"
        self.contacts: list[Contact] = []
        self._news = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._pages = 0

    def __enter__(self) -> Internet:
        with IPRoute() as routes:
            others = [link.get_attr("IFLA_IFNAME") for link in routes.get_links()]
            others = [name for name in others if name != "lo" and not name.startswith(("tunl", "sit", "ip6", "gre"))]
        if others:
            raise RuntimeError(
                f"not an empty network namespace: it has {', '.join(sorted(others))}; run under 'unshare -n'"
            )
        from certificates import issue  # not on the far side, which is isolated (-I) and has this one file

        issue(self.directory, "hooks.slack.com")
        command = ["unshare", "-n", sys.executable, "-I", __file__, "serve", str(self.directory)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            self._connect()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _connect(self) -> None:
        process = self._process
        assert process and process.stdin and process.stdout
        # `unshare` execs the server in place, so the pid is the server's, once the namespace has changed.
        own = Path("/proc/self/ns/net").stat().st_ino
        theirs = Path(f"/proc/{process.pid}/ns/net")
        end = time.monotonic() + 10
        while theirs.stat().st_ino == own:
            if time.monotonic() > end or process.poll() is not None:
                raise RuntimeError("the pretend internet got no network namespace; is 'unshare' (util-linux) there?")
            os.sched_yield()
        with IPRoute() as routes:
            peer = {"ifname": "inside", "net_ns_pid": process.pid}
            routes.link("add", ifname="uplink", kind="veth", peer=peer)
        configure("uplink", HOST, [], GATEWAY)
        print("connected", file=process.stdin, flush=True)
        threading.Thread(target=self._listen, daemon=True).start()
        self.wait(lambda contacts: any(contact.kind == "ready" for contact in contacts), "the pretend internet", 15)

    def _listen(self) -> None:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            with self._news:
                self.contacts.append(Contact(**json.loads(line)))
                self._news.notify_all()

    def wait(self, enough: Callable[[list[Contact]], bool], what: str, seconds: float) -> None:
        """Wait until ``enough(contacts)``; TimeoutError names ``what`` did not arrive."""
        with self._news:
            if not self._news.wait_for(lambda: enough(self.contacts), seconds):
                raise TimeoutError(f"{what}: nothing after {seconds:g} s")

    def settle(self) -> None:
        """Wait until ``contacts`` has everything that has reached the far side: ask for a page and wait for it.

        The far side reports in the order of what reaches it, so whatever came before is told before.
        """
        self._pages += 1
        page = f"GET /settle/{self._pages}"
        exchange((METADATA, 80), f"{page} HTTP/1.0\r\n\r\n".encode())
        self.wait(lambda contacts: any(contact.what == page for contact in contacts), "the far side", 10)

    def of(self, kind: str) -> list[Contact]:
        """What has arrived of one kind so far."""
        with self._news:
            return [contact for contact in self.contacts if contact.kind == kind]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (process := self._process) is None:
            return
        assert process.stdin
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None


def exchange(address: tuple[str, int], message: bytes, kind: socket.SocketKind = socket.SOCK_STREAM) -> bytes:
    """One question and one answer, from the demo's own side: proves that a target is really there."""
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(5)
        sock.connect(address)
        sock.sendall(message)
        return sock.recv(4096)


if __name__ == "__main__":
    if sys.argv[1:2] != ["serve"]:
        sys.exit("usage: internet.py serve DIR")
    serve(Path(sys.argv[2]))
