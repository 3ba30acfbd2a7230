"""The log over real servers: what a host reads and writes while they are stopped and killed, and who is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

from host.cluster import nats as log_of_nats
from host.cluster.access import inbox_of, permissions
from host.cluster.entries import Event
from host.cluster.log import Entered, LogFullError, LogRefusedError, LogUnavailableError
from host.cluster.nats import Access, NatsLog, addresses, make_stream
from host.cluster.node import Node
from host.cluster.snapshots import subject_of
from host.database.store import Store
from isolator.policy.cluster import Cluster
from tests.cluster.hosts import Following
from tests.support.nats_servers import Server, nats_servers
from tests.support.timeouts import seconds


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Three servers with the stream."""
    with nats_servers(tmp_path_factory.mktemp("nats")) as running:
        assert asyncio.run(make_stream(_access(running), 3, 50 << 20))
        yield running


@pytest.fixture
async def log(servers: list[Server]) -> AsyncIterator[NatsLog]:
    made = NatsLog(_access(servers))
    yield made
    await made.close()


def _access(servers: list[Server], **more: Any) -> Access:
    return Access(tuple(server.url for server in servers), **more)


async def _append(log: NatsLog, subject: str, body: bytes) -> None:
    """Append as a host does: until it is taken."""
    async with asyncio.timeout(seconds(60)):
        while True:
            try:
                return await log.append(subject, body)
            except LogUnavailableError:
                await asyncio.sleep(0.1)


async def _after(log: NatsLog, place: int) -> Entered:
    """Read as a host does: until there is something."""
    async with asyncio.timeout(seconds(60)):
        while True:
            try:
                found = await log.after(place)
            except LogUnavailableError:
                await asyncio.sleep(0.1)
                continue
            if found is not None:
                return found
            await log.wait(0.25)


async def test_messages_are_read_in_the_order_of_their_places_and_readers_are_woken(
    log: NatsLog, servers: list[Server]
) -> None:
    start = (await log.facts()).last
    reader = NatsLog(_access(servers[::-1]))
    assert await reader.after(start) is None
    waiting = asyncio.create_task(reader.wait(seconds(600)))
    await _append(log, "iso.ctl.h1", b"one")
    await waiting
    await _append(log, "iso.ev.h1", b"two")
    first = await _after(reader, start)
    second = await _after(reader, first.place)
    assert [(one.subject, one.body) for one in (first, second)] == [("iso.ctl.h1", b"one"), ("iso.ev.h1", b"two")]
    assert first.place < second.place and abs(first.time - second.time) < 60
    facts = await reader.facts()
    assert (facts.first, facts.replicas, facts.wrong, len(facts.servers)) == (1, 3, (), 3)
    await reader.close()


async def test_servers_that_lack_what_the_log_has_are_named(log: NatsLog, servers: list[Server]) -> None:
    async def until(behind: tuple[str, ...]) -> None:
        async with asyncio.timeout(seconds(60)):
            while True:
                with contextlib.suppress(LogUnavailableError):
                    if (await log.facts()).behind == behind:
                        return
                await asyncio.sleep(0.2)

    await until(())
    servers[1].kill()
    try:
        await until((servers[1].name,))
    finally:
        servers[1].start()
    await until(())


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_log_goes_on_by_another_server_when_its_own_is_stopped_or_killed(
    log: NatsLog, servers: list[Server], number: int
) -> None:
    start = (await log.facts()).last
    url = log._client.connected_url.netloc
    mine = next(server for server in servers if server.url.endswith(url))
    if number == signal.SIGKILL:
        mine.kill()
    else:
        mine.signal(number)
    try:
        await _append(log, "iso.ev.h1", b"meanwhile")
        assert (await _after(log, start)).body == b"meanwhile"
        assert log._client.connected_url.netloc != url
    finally:
        if number == signal.SIGKILL:
            mine.start()
        else:
            mine.signal(signal.SIGCONT)


async def test_no_accepted_event_is_lost_or_counted_twice_while_the_streams_leader_is_killed(
    servers: list[Server], tmp_path: Path
) -> None:
    hosts = []
    for name in ("a", "b"):
        database, follower = Store(tmp_path / name), Following()
        log = NatsLog(_access(servers, inbox=inbox_of(name)))
        node = Node(Cluster(name=name, servers=()), log, database, follower, follower)
        await node.start()
        hosts.append((node, database, follower))
    emitted = [f"{number}" for number in range(200)]
    for text in emitted:
        node, database, _ = hosts[int(text) % 2]
        await database.run(lambda db, node=node, text=text: node.emit(db, Event(text)))
        if text == "50":
            leader = await _leader(servers)
            leader.kill()
        if text == "150":
            leader.start()
    async with asyncio.timeout(seconds(120)):
        for _, _, follower in hosts:
            while len(follower.events) < len(emitted):  # noqa: ASYNC110 # the stand-in of a follower wakes nobody
                await asyncio.sleep(0.05)
    orders = [[text for _, text in follower.events] for *_, follower in hosts]
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(emitted)
    for first in (0, 1):
        assert [text for text in orders[0] if int(text) % 2 == first] == emitted[first::2]
    for node, database, _ in hosts:
        assert node.is_member and not {*node.problems.lines} - {"unreadable"}  # other tests' messages are no entries
        await node.close()
        await database.close()


async def _leader(servers: list[Server]) -> Server:
    client = await nats.connect([server.url for server in servers])
    info = json.loads((await client.request("$JS.API.STREAM.INFO.ISO", b"", timeout=seconds(10))).data)
    await client.close()
    return next(server for server in servers if server.name == info["cluster"]["leader"])


async def test_user_of_a_host_writes_under_its_own_name_alone_and_reads_no_answers_of_another(tmp_path: Path) -> None:
    users = [
        f'{{ user: "{name}", password: "pw-{name}", permissions: {json.dumps(permissions(name))} }}'
        for name in ("h1", "h2")
    ]
    users.append('{ user: admin, password: "pw" }')
    with nats_servers(tmp_path, 1, more=f"authorization {{ users: [ {', '.join(users)} ] }}") as servers:
        assert await make_stream(_access(servers, user="admin", password="pw"), 1, 50 << 20)
        mine = _access(servers, user="h1", password="pw-h1", inbox=inbox_of("h1"))
        log = NatsLog(mine)
        await log.append("iso.ev.h1", b"mine")
        for subject in ("iso.ev.h2", "iso.ctl.h2"):
            with pytest.raises(LogRefusedError, match="permissions violation"):
                await log.append(subject, b"forged")
        for verb in ("UPDATE", "DELETE"):
            with pytest.raises(LogRefusedError, match="permissions violation"):
                await log._ask(f"$JS.API.STREAM.{verb}.ISO", b"{}")
        await log.close()
        spy = NatsLog(_access(servers, user="h1", password="pw-h1", inbox=inbox_of("h2")))
        with pytest.raises(LogRefusedError, match="permissions violation for subscription"):
            await spy.after(0)
        await spy.close()
        for wrong in ({"user": "h1", "password": "wrong"}, {}):
            refused = NatsLog(_access(servers, **wrong))
            with pytest.raises(LogRefusedError, match="Authorization Violation"):
                await refused.facts()
            await refused.close()
        reader = NatsLog(mine)
        assert [(await reader.after(0)), await reader.after(1)] == [await reader.after(0), None]
        await reader.close()


async def test_host_answers_what_it_is_asked_and_no_other_hears_the_question_or_the_answer(tmp_path: Path) -> None:
    users = [
        f'{{ user: "{name}", password: "pw-{name}", permissions: {json.dumps(permissions(name))} }}'
        for name in ("h1", "h2", "h3")
    ]
    with nats_servers(tmp_path, 1, more=f"authorization {{ users: [ {', '.join(users)} ] }}") as servers:
        logs = {
            name: NatsLog(_access(servers, user=name, password=f"pw-{name}", inbox=inbox_of(name)))
            for name in ("h1", "h2", "h3")
        }
        for name in ("h1", "h2"):
            logs[name].answer(subject_of(name), lambda asked, name=name: name.encode() + b" has " + asked)  # type: ignore[misc]
        for log in logs.values():  # whoever has asked is connected
            with pytest.raises(LogUnavailableError, match="no other host answers"):
                await log.ask(subject_of("h9"), b"")
        assert await logs["h2"].ask(subject_of("h1"), b"a") == b"h1 has a"
        assert await logs["h3"].ask(subject_of("h2"), b"b") == b"h2 has b"
        with pytest.raises(LogUnavailableError, match="no other host answers"):
            await logs["h2"].ask(subject_of("h3"), b"c")
        logs["h3"].answer(subject_of("h1"), lambda _: b"forged")
        logs["h3"]._drop(logs["h3"]._client)
        async with asyncio.timeout(seconds(30)):
            while "permissions violation" not in logs["h3"]._complaint.lower():
                with contextlib.suppress(LogUnavailableError):
                    await logs["h3"].ask(subject_of("h2"), b"d")
        for _ in range(5):
            assert await logs["h2"].ask(subject_of("h1"), b"e") == b"h1 has e"
        for log in logs.values():
            await log.close()


async def test_servers_without_the_stream_are_no_log(tmp_path: Path) -> None:
    with nats_servers(tmp_path, 1) as servers:
        log = NatsLog(_access(servers))
        assert "isolator cluster init" in (await log.facts()).wrong[0]
        with pytest.raises(LogUnavailableError):
            await log.append("iso.ev.h1", b"x")
        await log.close()


async def test_full_disk_of_the_servers_is_named(tmp_path: Path) -> None:
    with nats_servers(tmp_path, 1, disk="2MB") as servers:
        assert await make_stream(_access(servers), 1, -1)
        log = NatsLog(_access(servers))
        with pytest.raises(LogFullError):
            for _ in range(20):
                await log.append("iso.ev.h1", b"x" * 250_000)
        assert await log.after(0) is not None
        await log.close()


async def test_tls_is_checked_against_the_clusters_own_certificates(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    key, certificate = pair
    with nats_servers(tmp_path, 1, more=f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}') as servers:
        url = addresses([f"localhost:{servers[0].port}"], tls=True)
        trusting = Access(url, tls=ssl.create_default_context(cafile=certificate))
        assert await make_stream(trusting, 1, 50 << 20)
        stranger = NatsLog(Access(url, tls=ssl.create_default_context()))
        with pytest.raises(LogRefusedError, match="certificate"):
            await stranger.facts()
        await stranger.close()
        other_name = NatsLog(Access(addresses([f"127.0.0.1:{servers[0].port}"], tls=True), tls=trusting.tls))
        with pytest.raises(LogRefusedError, match="certificate"):
            await other_name.facts()
        await other_name.close()


async def test_no_password_is_told_to_a_server_that_offers_no_tls_where_tls_is_wanted() -> None:
    told: asyncio.Queue[bytes] = asyncio.Queue()

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"server_id":"x","version":"2.12.0","headers":true,"auth_required":true,"max_payload":1048576}\r\n'
        )
        told.put_nowait(await reader.read())
        writer.close()

    server = await asyncio.start_server(pretend, "127.0.0.1", 0)
    url = addresses([f"localhost:{server.sockets[0].getsockname()[1]}"], tls=True)
    log = NatsLog(Access(url, "h1", "secret", tls=ssl.create_default_context()))
    with pytest.raises(LogRefusedError, match="offers no TLS"):
        await log.facts()
    assert await told.get() == b""
    await log.close()
    server.close()


def test_old_servers_and_other_settings_of_the_stream_are_named() -> None:
    assert log_of_nats._too_old({"n1": "2.10.25", "n2": "2.10.26"}, 3) == [
        "nats-server 2.10.25 (n1) is too old: 3 replicas need 2.10.26"
    ]
    assert not log_of_nats._too_old({"n1": "2.9.10"}, 1)
    assert len(log_of_nats._too_old({"n1": "2.8.4", "n2": ""}, 1)) == 2
    right = {
        "storage": "file", "retention": "limits", "discard": "old", "allow_direct": True, "num_replicas": 3,
        "subjects": ["iso.ctl.*", "iso.ev.*"], "max_msgs": -1,
    }  # fmt: skip
    assert not log_of_nats._wrong(right)
    for key, value, shown in (
        ("storage", "memory", "storage"), ("retention", "workqueue", "retention"), ("discard", "new", "discard"),
        ("allow_direct", False, "allow_direct"), ("num_replicas", 2, "two replicas"), ("subjects", [">"], "subjects"),
        ("max_msgs", 10, "bound of messages"),
    ):  # fmt: skip
        assert shown in " ".join(log_of_nats._wrong({**right, key: value}))
