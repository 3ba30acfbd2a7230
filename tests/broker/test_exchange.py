"""The broker's process is exchanged: no connection is cut, none is counted twice, and none is let out unjudged."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter

from tests.broker.conftest import MakeCage, listed
from tests.support.internet_servers import pattern
from tests.support.pretend_internet import BrokerProcess
from tests.support.timeouts import seconds

SIZE = 24 << 20
DOWNLOAD = f"""
import hashlib
connection = ssl.create_default_context(cafile=CA).wrap_socket(
    tcp('hooks.example.com', 443, 30), server_hostname='hooks.example.com')
connection.sendall(b'GET /bytes/{SIZE} HTTP/1.1\\r\\nHost: hooks.example.com\\r\\nConnection: close\\r\\n\\r\\n')
file, digest, count = connection.makefile('rb'), hashlib.sha256(), 0
while file.readline().strip():
    pass
while count < {SIZE} and (part := file.read(1 << 18)):
    digest.update(part)
    count += len(part)
    time.sleep(0.05)
print(count, digest.hexdigest())
"""
"""Slower than the server: bytes wait in the broker all the time."""
QUIET = """
s = tcp('hooks.example.com', 7, 30)
for n in range(12):
    s.sendall(b'x')
    assert s.recv(1) == b'x'
    time.sleep(0.4)
s.shutdown(socket.SHUT_WR)
print(s.recv(100).decode())
"""
REQUESTS = """
import http.client
c = http.client.HTTPConnection('hooks.example.com', 80, timeout=30)
for n in range(12):
    c.request('GET', '/')
    assert c.getresponse().read().startswith(b'host=hooks.example.com')
    time.sleep(0.4)
try:
    c.request('GET', '/', headers={'Host': 'other.example.com'})
    print(c.getresponse().read())
except OSError as e:
    print(name_of(e))
except http.client.HTTPException as e:
    print(type(e).__name__)
"""
"""One connection; its last request names another host."""
HALVES = """
inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
tls = ssl.create_default_context(cafile=CA).wrap_bio(inside, outside, server_hostname='NAME')
try:
    tls.do_handshake()
except ssl.SSLWantReadError:
    pass
hello = outside.read()
s = tcp('hooks.example.com', 443, 30)
for part in (hello[:20], hello[20:60], hello[60:]):
    s.sendall(part)
    time.sleep(1.5)
try:
    inside.write(s.recv(65536))
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            s.sendall(outside.read())
            inside.write(s.recv(65536))
    print(tls.version())
except OSError as e:
    print(name_of(e))
"""
"""A greeting in three pieces, so that its connection is not decided for seconds."""
ANSWERED = """
inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
context = ssl.create_default_context(cafile=CA)
context.maximum_version = ssl.TLSVersion.TLSv1_2
tls = context.wrap_bio(inside, outside, server_hostname='hooks.example.com')
s = tcp('hooks.example.com', 443, 30)
paused = 0
while True:
    try:
        tls.do_handshake()
        break
    except ssl.SSLWantReadError:
        if part := outside.read():
            s.sendall(part)
        inside.write(s.recv(65536))
        time.sleep(0 if paused else 4)
        paused = 1
print(tls.version())
"""
"""The server's hello is there, and lets everything pass; the client says nothing for seconds, then more records."""
AGAIN = """
for n in range(40):
    with tcp('hooks.example.com', 7, 30) as s:
        s.sendall(b'y')
        assert s.recv(1) == b'y'
    time.sleep(0.1)
print('all')
"""


async def test_connections_go_on_while_the_broker_is_exchanged(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:7,80,443", connects_per_second=200))
    scripts = (DOWNLOAD, QUIET, REQUESTS, HALVES.replace("NAME", "hooks.example.com"),
               HALVES.replace("NAME", "other.example.com"), AGAIN, ANSWERED)  # fmt: skip
    clients = [asyncio.create_task(cage.client(script, timeout=60)) for script in scripts]
    for port in (7, 80, 443):
        await broker.wait_for("net.connect", port=port, verdict="allowed")
    for _ in range(3):
        await broker.renew()
        await asyncio.sleep(0.3)
    download, quiet, requests, halves, wrong, again, answered = await asyncio.gather(*clients)
    assert download == f"{SIZE} {hashlib.sha256(pattern(0, SIZE)).hexdigest()}"
    assert quiet == "[12]"
    assert requests in ("ECONNRESET", "RemoteDisconnected")
    assert (halves, wrong, again, answered) == ("TLSv1.3", "ECONNRESET", "all", "TLSv1.2")
    await broker.quiet()
    connects = Counter(r["data"]["flow"] for r in broker.records if r["type"] == "net.connect")
    assert set(connects.values()) == {1}
    closed = Counter(r["data"]["flow"] for r in broker.records if r["type"] == "net.closed")
    assert closed == connects, "each connection has one end on record"
    assert len(connects) == 45
    rules = {r["data"]["rule"] for r in broker.records if r["type"] == "net.denied"}
    assert rules == {"sni-mismatch", "host-mismatch"}
    (whole,) = [r["data"] for r in broker.records if r["type"] == "net.closed" and r["data"]["received"] > SIZE]
    assert whole["reason"] == "closed"


async def test_connections_open_are_counted_once_over_an_exchange(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:7", connects_open=4))
    client = asyncio.create_task(cage.client(
        """
held = [tcp('hooks.example.com', 7) for n in range(3)]
for s in held:
    s.sendall(b'x')
    assert s.recv(1) == b'x'
time.sleep(5)
fourth = tcp('hooks.example.com', 7, 5)
fourth.sendall(b'z')
print(fourth.recv(1), attempt(lambda: tcp('hooks.example.com', 7).recv(1)))
""",
        timeout=40,
    ))  # fmt: skip
    async with asyncio.timeout(seconds(20)):
        # The list of records wakes nobody.
        while sum(r["type"] == "net.connect" for r in broker.records) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await broker.renew()
    await broker.renew()
    assert await client in ("b'z' ECONNRESET", "b'z' ECONNREFUSED")
