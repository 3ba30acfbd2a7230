"""Good plugin and its bad neighbours: the scripts of the benchmark ``bad_neighbours``."""

from __future__ import annotations

from dataclasses import dataclass

GRANTED = "hooks.example.com"
ECHO_PORT, TLS_PORT, POUR_PORT, MIRROR_PORT = 7, 8443, 9000, 9001
HOSTILE_ZONE = "hostile.example"
"""Zone whose name server is the attacker's: its answers are as large and as dear as DNS allows."""

GOOD = f"""\
    #!/usr/bin/python3
    import json, os, socket, threading, time
    samples = open(os.environ["PLUGIN_STATE_DIR"] + "/samples", "a", buffering=1)
    def forever(figure, action):
        number = 0
        while True:
            began = time.monotonic()
            try:
                action(number)
                print(figure, began, (time.monotonic() - began) * 1e3, sep="\\t", file=samples)
            except (OSError, ValueError) as error:
                print(figure, began, 1e4, type(error).__name__, sep="\\t", file=samples)
                time.sleep(0.2)
            number += 1
            time.sleep(max(0.0, began + 0.05 - time.monotonic()))
    def resolve(_):
        socket.getaddrinfo("{GRANTED}", {ECHO_PORT}, socket.AF_INET, socket.SOCK_STREAM)
    def connect(_):
        with socket.create_connection((address, {ECHO_PORT}), 10) as link:
            link.sendall(b"x")
            if link.recv(1) != b"x":
                raise OSError
    def call(number):
        request = {{"jsonrpc": "2.0", "id": number, "method": "whoami"}}
        host.write(json.dumps(request).encode() + b"\\n")
        host.flush()
        json.loads(host.readline())["result"]
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(10)
    link.connect(os.environ["PLUGIN_HOST_SOCKET"])
    host = link.makefile("rwb")
    address = socket.gethostbyname("{GRANTED}")
    for figure, action in (("dns", resolve), ("connect", connect), ("host API", call)):
        threading.Thread(target=forever, args=(figure, action), daemon=True).start()
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        reply = {{"jsonrpc": "2.0", "result": {{"status": "ok"}}, "id": request["id"]}}
        connection.sendall(json.dumps(reply).encode() + b"\\n")
        connection.close()
"""
"""Answers events, and notes all the time how long a name, a connection and a call of the host API take it."""

HEAD = """\
    #!/usr/bin/python3
    import json, os, socket, struct, threading, time
    def connect():
        host = socket.socket(socket.AF_UNIX)
        host.connect(os.environ["PLUGIN_HOST_SOCKET"])
        return host
    def drain(sock):
        def read():
            try:
                while sock.recv(65536):
                    pass
            except OSError:
                pass
        threading.Thread(target=read, daemon=True).start()
    def together(count, action):
        def again():
            while True:
                try:
                    action()
                except OSError:
                    time.sleep(0.01)
        for _ in range(count):
            threading.Thread(target=again, daemon=True).start()
        time.sleep(3600)
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    connection, _ = server.accept()
    request = json.loads(connection.recv(4096))
"""
ANSWERED = """\
    answer = {"jsonrpc": "2.0", "result": {"status": "ok"}, "id": request["id"]}
    connection.sendall(json.dumps(answer).encode() + b"\\n")
    connection.close()
"""
_API = """\
    def flood():
        host = connect()
        drain(host)
        while True:
            host.sendall(CHUNK)
    together(4, flood)
"""
_NAMES = """\
    def flood():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.connect(("127.0.0.53", 53))
        number = 0
        while True:
            number += 1
            name = NAME(number)
            question = struct.pack(">HHHHHH", number & 0xFFFF, 0x0100, 1, 0, 0, 0) + name + struct.pack(">HH", 1, 1)
            try:
                sock.send(question)
                sock.recv(4096)
            except BlockingIOError:
                PAUSE
    together(2, flood)
"""


@dataclass(frozen=True)
class BadPlugin:
    """A plugin that is bad from its first event on; ``stream``: over its own stream connection, which stays open."""

    does: str
    script: str
    stream: bool = False
    permissions: tuple[str, ...] = ()


def _api(chunk: str) -> str:
    return HEAD + ANSWERED + f"    CHUNK = {chunk}\n" + _API


def _dns(name: str, pause: str) -> str:
    return HEAD + ANSWERED + _NAMES.replace("NAME(number)", name).replace("PAUSE", pause)


_DIGITS = """b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"s":"' + (b"1" * 299 + b" ") * 860 + b'"}}\\n'"""
_NUMBERS = """b'{"jsonrpc":"2.0","id":1,"method":"x","params":[' + b",".join([b"1.5e-9"] * 30000) + b']}\\n'"""
_STREAM = """\
    hello = json.dumps({"jsonrpc": "2.0", "result": {"protocol": "1"}, "id": request["id"]}).encode() + b"\\n"
    def serve():
        global connection
        try:
            connection.sendall(hello)
            drain(connection)
            while True:
                connection.sendall(CHUNK)
        except OSError:
            connection.close()
            connection, _ = server.accept()
            request = json.loads(connection.recv(65536).split(b"\\n")[0])
    while True:
        serve()
"""
_HELLO = (
    # Cipher suites for as long as a hello may be: there is nothing to refuse before its end.
    "    hello = b'\\x01\\x00\\x3f\\x00\\x03\\x03' + bytes(33) + b'\\x3e\\x00' + bytes(0x3ed7)\n"
    "    records = b''.join(b'\\x16\\x03\\x01\\x00\\x01' + bytes([byte]) for byte in hello)\n"
)
_TLS = f"""\
    address = socket.gethostbyname("{GRANTED}")
    def flood():
        with socket.create_connection((address, {TLS_PORT}), 10) as link:
            link.settimeout(10)
            link.sendall(records)
            link.recv(1)
    together(16, flood)
"""
_DRIBBLE = f"""\
    address = socket.gethostbyname("{GRANTED}")
    def flood():
        with socket.create_connection((address, {TLS_PORT}), 10) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(records), 6):
                link.sendall(records[at : at + 6])
    together(16, flood)
"""
_HOLD = f"""\
    address, held = socket.gethostbyname("{GRANTED}"), []
    while True:
        try:
            held.append(socket.create_connection((address, {POUR_PORT}), 10))
        except OSError:
            time.sleep(0.5)
        time.sleep(0.02)
"""
_POURED = f"""\
    address = socket.gethostbyname("{GRANTED}")
    def flood():
        with socket.create_connection((address, {POUR_PORT}), 10) as link:
            while link.recv(65536):
                pass
    together(48, flood)
"""
_BYTES = f"""\
    address = socket.gethostbyname("{GRANTED}")
    def flood():
        with socket.create_connection((address, {MIRROR_PORT}), 10) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            drain(link)
            while True:
                link.send(b"x")
    together(16, flood)
"""
_TO_ITSELF = """\
    own = socket.create_server(("127.0.0.1", 5000), backlog=16)
    def serve():
        while True:
            drain(own.accept()[0])
    threading.Thread(target=serve, daemon=True).start()
    def flood():
        with socket.create_connection(("127.0.0.1", 5000), 10) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                link.send(b"x")
    together(16, flood)
"""
_REFUSED_NET = """\
    def flood():
        socket.create_connection(("1.2.3.4", 7), 1)
    together(8, flood)
"""
_CALLS = """\
    import ctypes
    libc = ctypes.CDLL(None)
    def flood():
        for _ in range(1000):
            libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)
    together(4, flood)
"""
_LATER = """\
    connection.close()
    answers = 0
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        result = {"status": "retry", "retry_after_ms": 0}
        connection.sendall(json.dumps({"jsonrpc": "2.0", "result": result, "id": request["id"]}).encode() + b"\\n")
        connection.close()
"""
_BURN = """\
    import hashlib
    def flood():
        while True:
            hashlib.pbkdf2_hmac("sha256", b"x", b"x", 100_000)
    together(2, flood)
"""
_LABELS = 'b"".join(b"\\1" + bytes([97 + (number >> shift) % 26]) for shift in range(120)) + b"\\0"'
_HOSTILE_NAME = '(lambda first: bytes([len(first)]) + first)(b"n%d" % number) + b"\\7hostile\\7example\\0"'

BAD = (
    BadPlugin("burns its processor time (for comparison)", HEAD + ANSWERED + "    while True:\n        pass\n"),
    BadPlugin("burns it in two threads (for comparison)", HEAD + ANSWERED + _BURN),
    BadPlugin("sends itself a byte at a time (for comparison)", HEAD + ANSWERED + _TO_ITSELF),
    BadPlugin("sends lines with runs of digits to the host API", _api(_DIGITS)),
    BadPlugin("sends lines of 30 000 numbers to the host API", _api(_NUMBERS)),
    BadPlugin("sends newlines to the host API", _api('b"\\n" * 65536')),
    BadPlugin("sends calls without permission to the host API",
              _api("""b'{"jsonrpc":"2.0","id":1,"method":"kv.set","params":{"key":"k","value":1}}\\n' * 100""")),
    BadPlugin("connects to the host API again and again",
              HEAD + ANSWERED + "    together(4, lambda: connect().close())\n"),
    BadPlugin("sends lines with runs of digits on its stream",
              HEAD + f"    CHUNK = {_DIGITS}\n" + _STREAM, stream=True),
    BadPlugin("sends newlines on its stream", HEAD + '    CHUNK = b"\\n" * 65536\n' + _STREAM, stream=True),
    BadPlugin("prints blank lines",
              HEAD + ANSWERED + '    while True:\n        os.write(1, b"\\n" * 65536)\n'),
    BadPlugin("asks for names of 120 labels", _dns(_LABELS, "pass")),
    BadPlugin("asks a name server whose answers have 64 KiB", _dns(_HOSTILE_NAME, "time.sleep(0.001)")),
    BadPlugin("sends whole hellos in TLS records of one byte", HEAD + ANSWERED + _HELLO + _TLS),
    BadPlugin("sends hellos a record of one byte at a time", HEAD + ANSWERED + _HELLO + _DRIBBLE),
    BadPlugin("reads from 48 connections what pours in", HEAD + ANSWERED + _POURED),
    BadPlugin("sends a byte at a time on 16 connections", HEAD + ANSWERED + _BYTES),
    BadPlugin("holds connections that it does not read", HEAD + ANSWERED + _HOLD),
    BadPlugin("tries connections that are not granted", HEAD + ANSWERED + _REFUSED_NET),
    BadPlugin("makes system calls that are refused", HEAD + ANSWERED + _CALLS),
    BadPlugin("asks for its event again at once", HEAD + _LATER),
    BadPlugin("crashes again and again", HEAD + "    os._exit(1)\n"),
)  # fmt: skip

SERVERS = f"""\
import socket, threading
def serve(port, handle):
    listener = socket.create_server(("0.0.0.0", port), backlog=512)
    def again():
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=quietly, args=(handle, connection), daemon=True).start()
    threading.Thread(target=again, daemon=True).start()
def quietly(handle, connection):
    try:
        with connection:
            handle(connection)
    except OSError:
        pass
def drain(connection):
    while connection.recv(65536):
        pass
def pour(connection):
    while True:
        connection.sendall(bytes(65536))
def mirror(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
serve({TLS_PORT}, drain)
serve({POUR_PORT}, pour)
serve({MIRROR_PORT}, mirror)
print("ready", flush=True)
threading.Event().wait()
"""
"""The attackers' servers: a process of their own, as the far ends of the good plugin are not to wait for them."""

STRANGER = """\
import json, resource, socket, sys, threading, time
path, how = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock
print("ready", flush=True)
if how == "holds":
    held = []
    while True:
        try:
            held.append(connect())
        except OSError:
            time.sleep(0.1)
        if len(held) >= 512:
            time.sleep(3600)
if how == "asks":
    requests = b'{"jsonrpc":"2.0","id":1,"method":"plugin.list","params":{}}\\n' * 64
    def again():
        while True:
            try:
                with connect() as sock:
                    while True:
                        sock.sendall(requests)
                        answered = 0
                        while answered < 64:
                            part = sock.recv(65536)
                            if not part:
                                raise OSError
                            answered += part.count(b"\\n")
            except OSError:
                time.sleep(0.01)
    for _ in range(4):
        threading.Thread(target=again, daemon=True).start()
    time.sleep(3600)
while how == "connects":
    try:
        connect().close()
    except OSError:
        pass
"""
"""A local user without any role, at the control socket."""
STRANGERS = {
    "holds": "holds 512 idle connections to the control socket",
    "asks": "has refused requests answered all the time",
    "connects": "connects to the control socket again and again",
}
