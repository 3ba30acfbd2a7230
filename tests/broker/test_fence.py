"""The broker relays no byte of a plugin past its deadline, and goes on with every connection when that is moved on.

The plugin writes the time all the while; a witness behind the broker reads it. What was written past the deadline and
reached the witness, the broker has relayed past it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from isolator.ipc.fence import LOST
from isolator.ipc.messages import FencePlugin
from isolator.linux.boottime import boottime
from isolator.policy.model import ListenRule
from tests.broker.conftest import MakeCage, listed
from tests.broker.test_inbound import until_listening
from tests.support.internet_servers import run_in
from tests.support.pretend_internet import BrokerProcess, CageNet, PretendInternet, run_client
from tests.support.timeouts import seconds
from tests.support.witness import PORT, Witness, of_day

POLICY = listed(f"hooks.example.com:{PORT}", "other.example.com:7", connects_per_second=200)
COUNT = 25
WRITER = f"""
import os
def passed():
    if not os.path.exists('DEADLINE'):
        return False
    with open('DEADLINE') as file:
        return time.time() > float(file.read() or 'inf')
with tcp('hooks.example.com', {PORT}, 30) as s:
    late = 0
    while late < {COUNT}:
        late += passed()
        s.sendall(b'%r\\n' % time.time())
        time.sleep(0.01)
    print(late)
"""
NEWCOMER = f"""
with tcp('hooks.example.com', {PORT}, 30) as s:
    s.sendall(b'%r\\n' % time.time())
    s.shutdown(socket.SHUT_WR)
    print('connected')
    s.recv(1)
"""
LOOKUP = """
while True:
    try:
        with tcp('other.example.com', 7, 5) as s:
            s.sendall(b'x')
            if s.recv(1):
                print('answered')
                break
    except OSError:
        time.sleep(0.05)
"""
SERVE = """
server = socket.create_server(('127.0.0.1', 3000))
s = server.accept()[0]
print(time.clock_gettime(time.CLOCK_BOOTTIME))
s.sendall(b'!')
"""
ASK = """
import pathlib
with tcp('127.0.0.1', 8080, 60) as s:
    pathlib.Path('CONNECTED').touch()
    print(s.recv(1))
"""


@pytest.fixture(scope="module")
def witness(pretend: PretendInternet) -> Iterator[Witness]:
    yield Witness(pretend.internet)


async def until(condition: Callable[[], object], why: str) -> None:
    """Wait for something that happens in another thread or process."""
    end = asyncio.get_running_loop().time() + seconds(30)
    while not condition():
        assert asyncio.get_running_loop().time() < end, why
        await asyncio.sleep(0.02)


async def fence(broker: BrokerProcess, until: float | None) -> None:
    """Set the deadline; the broker has it when this returns."""
    broker.fences = {"tester": until} if until is not None else {}
    await broker.channel.ask(FencePlugin(plugin="tester", until=until), timeout=seconds(10))


async def write_past_a_deadline(cage: CageNet, broker: BrokerProcess, witness: Witness) -> float:
    """Have the plugin write until its deadline is well behind; returns that."""
    witness.stamps.clear()
    file = broker.pretend.directory / "deadline"
    file.unlink(missing_ok=True)
    writer = asyncio.create_task(cage.client(WRITER.replace("DEADLINE", str(file)), timeout=seconds(60)))
    await until(lambda: witness.stamps, "nothing comes through at all")
    deadline = boottime() + 0.2
    await fence(broker, deadline)
    file.write_text(repr(of_day(deadline)))
    assert await writer == str(COUNT), "it has written as often past its deadline, and is told nothing"
    return deadline


async def test_broker_relays_nothing_past_the_deadline_and_everything_when_it_is_moved(
    cages: MakeCage, broker: BrokerProcess, witness: Witness, pretend: PretendInternet
) -> None:
    cage = await cages(POLICY)
    deadline = await write_past_a_deadline(cage, broker, witness)
    newcomer, lookup = (asyncio.create_task(cage.client(code, timeout=seconds(60))) for code in (NEWCOMER, LOOKUP))
    await broker.renew()
    queries = [query for query in pretend.internet.dns.queries if "other" in query]
    assert witness.after(deadline) == []
    assert queries == [], "a name is a message, too"
    assert not newcomer.done()
    assert [r for r in broker.records if r["type"] in ("net.closed", "net.denied")] == [], "nobody is blamed"

    await fence(broker, boottime() + seconds(600))
    assert await newcomer == "connected"
    assert await lookup == "answered"
    await until(lambda: len(witness.after(deadline)) >= COUNT + 1, "bytes were lost")
    assert sorted(witness.stamps) == sorted(set(witness.stamps)), "bytes were doubled"
    await fence(broker, None)


async def test_witness_sees_bytes_past_the_deadline_of_a_broker_without_the_check(
    pretend: PretendInternet, witness: Witness
) -> None:
    broker = await BrokerProcess.start(pretend, off=["fence"])
    try:
        cage = await CageNet.attach(broker, POLICY)
        try:
            deadline = await write_past_a_deadline(cage, broker, witness)
            await until(lambda: len(witness.after(deadline)) >= COUNT, "the attack is no attack")
        finally:
            await cage.detach()
    finally:
        await broker.stop()


async def test_connections_from_outside_wait_past_the_deadline(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    run_in(pretend.host_fd, "ip", "link", "set", "lo", "up")
    cage = await cages(listed("hooks.example.com:443", listen=(ListenRule(port=8080, cage_port=3000),)))
    await fence(broker, LOST)
    connected = pretend.directory / "connected"
    connected.unlink(missing_ok=True)
    pretend.directory.chmod(0o777)
    server = asyncio.create_task(cage.client(SERVE, timeout=seconds(60)))
    await until_listening(cage, 3000)
    code = ASK.replace("CONNECTED", str(connected))
    client = asyncio.create_task(run_client(pretend, pretend.host_fd, "host-resolv.conf", code, seconds(60)))
    await until(connected.exists, "the port does not listen")
    opened = boottime()
    await fence(broker, opened + seconds(600))
    assert await client == "b'!'"
    assert float(await server) >= opened
