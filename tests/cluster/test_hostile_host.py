"""A hostile host on the servers: whatever its user may send, no other host's name, reading or time is taken by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import nats
import pytest

from host.cluster.access import inbox_of, permissions
from host.cluster.clock import Clock, Handle
from host.cluster.entries import Beat, Message, Number, decode, encode
from host.cluster.log import QUESTION, Entered, LogUnavailableError
from host.cluster.nats import Access, NatsLog, make_stream
from host.cluster.snapshots import subject_of
from tests.support.nats_servers import Server, nats_servers
from tests.support.timeouts import seconds

HOSTS = ("h1", "h2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the stream, and a user for each host."""
    users = [{"user": name, "password": name, "permissions": permissions(name)} for name in HOSTS]
    users.append({"user": "admin", "password": "admin"})
    more = f"authorization {{ users: {json.dumps(users)} }}"
    with nats_servers(tmp_path_factory.mktemp("nats"), 1, more=more) as running:
        assert asyncio.run(make_stream(Access((running[0].url,), "admin", "admin"), 1, 50 << 20))
        yield running[0]


@pytest.fixture
async def log(server: Server) -> AsyncIterator[NatsLog]:
    """The log as the honest host h1 has it."""
    made = NatsLog(Access((server.url,), "h1", "h1", inbox=inbox_of("h1")))
    yield made
    await made.close()


@pytest.fixture
async def hostile(server: Server) -> AsyncIterator[Any]:
    """A client with the credentials of h2."""

    async def refused(_: Exception) -> None:
        pass

    client = await nats.connect(server.url, user="h2", password="h2", inbox_prefix=inbox_of("h2"), error_cb=refused)
    yield client
    await client.close()


async def _all_after(log: NatsLog, place: int) -> list[Entered]:
    found: list[Entered] = []
    while (entered := await log.after(found[-1].place if found else place)) is not None:
        found.append(entered)
    return found


def _forged(number: int) -> bytes:
    """An entry that would count, if h1 had written it."""
    return encode(Message("h1", "ctl", Number(number, 1), (Beat(),)))


@pytest.mark.parametrize("more", [{}, {"no_hdr": True}, {"batch": 1}, {"batch": 1, "no_hdr": True}])
async def test_message_that_the_servers_are_made_to_answer_to_a_hosts_subject_is_none_of_its_own(
    log: NatsLog, hostile: Any, more: dict[str, Any]
) -> None:
    start = (await log.facts()).last
    await hostile.request("iso.ev.h2", _forged(1), headers={"Isolator": "1"}, timeout=seconds(10))
    wish = json.dumps({"seq": start + 1, "next_by_subj": "iso.>", **more}).encode()
    for question in (wish, b"{"):
        await hostile.publish("$JS.API.DIRECT.GET.ISO", question, reply="iso.ctl.h1")
    await hostile.publish("$JS.API.STREAM.INFO.ISO", b"", reply="iso.ctl.h1")
    await hostile.publish("iso.ev.h2", b"", reply="iso.ctl.h1")
    await hostile.flush()
    await log.append("iso.ctl.h1", _forged(2))
    found = [entered for entered in await _all_after(log, start) if entered.subject == "iso.ctl.h1"]
    assert len(found) > 2 and [entered.body for entered in found if entered.body] == [_forged(2)]
    with pytest.raises(ValueError, match="Invalid JSON"):
        decode("iso.ctl.h1", b"")


async def test_host_may_not_answer_to_what_it_has_sent_itself(log: NatsLog, hostile: Any) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    await hostile.subscribe("iso.tick", cb=heard.put)
    start = (await log.facts()).last
    for subject in ("iso.ctl.h1", "$JS.API.STREAM.DELETE.ISO"):
        await hostile.publish("iso.tick", b"", reply=subject)
        assert (await heard.get()).reply == subject
        await hostile.publish(subject, _forged(1))
    await hostile.flush()
    assert await _all_after(log, start) == [] and not (await log.facts()).wrong


async def test_host_that_is_asked_answers_to_no_subject_of_entries(log: NatsLog, hostile: Any) -> None:
    asked = asyncio.Event()

    def answer(question: bytes) -> bytes:
        asked.set()
        return question

    log.answer(subject_of("h1"), answer)
    start = (await log.facts()).last
    for reply in ("iso.ctl.h1", "iso.ev.h1", f"iso.ctl.{'0' * 32}", inbox_of("h1") + ".answer.x"):
        await hostile.publish(subject_of("h1"), _forged(1), reply=reply)
    await hostile.publish(subject_of("h1"), b"", reply=f"{inbox_of('h2')}.answer.{'0' * 32}")
    await asyncio.wait_for(asked.wait(), seconds(30))
    await log.append("iso.ev.h1", b"the next")
    assert [entered.body for entered in await _all_after(log, start)] == [b"the next"]


@pytest.mark.parametrize(
    "headers",
    [
        b"NATS/1.0\r\nStatus: 503\r\n\r\n", b"NATS/1.0\r\nStatus: 404\r\n\r\n", b"NATS/1.0 503\r\n\r\n",
        b"NATS/1.0 404 Message Not Found\r\n\r\n", b"NATS/1.0 100 Idle Heartbeat\r\n\r\n",
        b"NATS/1.0\r\nIsolator: 1\r\nNats-Sequence: 999\r\nNats-Subject: iso.ctl.h1\r\n\r\n",
        b"NATS/1.0\r\nIsolator: 1\r\nNats-Stream: ISO\r\nNats-Subject: iso.ctl.h1\r\nNats-Sequence: 9\r\n"
        b"Nats-Time-Stamp: x\r\n\r\n",
        b"NATS/1.0\r\n\xff\xfe: \xff\r\n\r\n", b"NATS/1.0 \xff\xff\r\n\r\n", b"NATS/1.0 5\r\n: \r\n\r\n\r\n",
        b"NATS/1.0\r\nIsolator: 1" + b"x" * 60_000 + b"\r\n\r\n",
    ],
)  # fmt: skip
async def test_no_header_of_a_message_is_taken_for_the_servers(log: NatsLog, hostile: Any, headers: bytes) -> None:
    start, connection = (await log.facts()).last, log._client
    for subject in (b"iso.ev.h2", b"iso.tick", b"iso.ask"):
        size = len(headers), len(headers) + 1
        await hostile._send_command(b"HPUB %s %d %d\r\n%sx\r\n" % (subject, *size, headers))
    await hostile._flush_pending()
    with contextlib.suppress(nats.errors.Error):  # a server may refuse it
        await hostile.flush()
    await log.append("iso.ev.h1", b"the next")
    found = await _all_after(log, start)
    bodies = {entered.subject: entered.body for entered in found}
    assert bodies["iso.ev.h1"] == b"the next" and not bodies.get("iso.ev.h2"), found
    assert [entered.place for entered in found] == [*range(start + 1, start + 1 + len(found))]
    assert log._client is connection and connection.is_connected


class _Held(Clock):
    """A clock whose calls are made when the test says so."""

    def __init__(self) -> None:
        self.held: list[Callable[[], object]] = []

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Handle:
        self.held.append(callback)
        return super().call_later(3600, lambda: None)


async def test_flood_of_questions_and_wakings_takes_a_bounded_part_of_a_hosts_time(
    server: Server, hostile: Any
) -> None:
    clock, taken = _Held(), []

    def answer(question: bytes) -> None:
        taken.append(len(question))

    log = NatsLog(Access((server.url,), "h1", "h1", inbox=inbox_of("h1")), clock)
    log.answer(subject_of("h1"), answer)
    await log.facts()
    for most in (50, 100):
        for _ in range(2000):
            await hostile.publish(subject_of("h1"), b"q", reply=f"{inbox_of('h2')}.answer.{'0' * 32}")
            await hostile.publish("iso.tick", b"x" * 1000)
        await hostile.flush()
        await log.append("iso.ev.h1", b"meanwhile")  # its answer comes behind all that the server has for this host
        async with asyncio.timeout(seconds(30)):
            while len(clock.held) < 2:  # noqa: ASYNC110 # nobody is woken by a callback that is held
                await asyncio.sleep(0.01)
        assert len(taken) == most
        again, clock.held = clock.held, []
        for callback in again:
            callback()
        await asyncio.gather(*log._tasks)
        await log._client.flush()  # the server knows of it
    await hostile.publish(subject_of("h1"), b"q" * (QUESTION + 1), reply=f"{inbox_of('h2')}.answer.{'0' * 32}")
    await hostile.publish(subject_of("h1"), b"last", reply=f"{inbox_of('h2')}.answer.{'0' * 32}")
    async with asyncio.timeout(seconds(30)):
        while taken[-1] != 4:  # noqa: ASYNC110 # as above
            await asyncio.sleep(0.01)
    assert len(taken) == 101
    await log.close()


async def test_answer_that_never_comes_leaves_nothing_behind(log: NatsLog, hostile: Any) -> None:
    await hostile.subscribe(subject_of("h2"))
    await hostile.flush()
    await log.facts()
    before = len(log._client._subs)
    with pytest.raises(LogUnavailableError):
        await log.ask(subject_of("h2"), b"")
    assert len(log._client._subs) == before
