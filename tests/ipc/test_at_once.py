"""A channel's handlers that wait for nothing: called as their message is read, in the order of what came."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from isolator.ipc.body import by_op
from isolator.ipc.channel import MAX_PACKET, Channel, pair, send_packet
from isolator.ipc.messages import EnsureRun, Environment, GetEnvironment, Running


async def test_handler_that_waits_for_nothing_is_called_in_the_order_of_what_came() -> None:
    served: list[str] = []
    mine, theirs = pair()
    with theirs:

        async def ensured(request: EnsureRun) -> Running:
            served.append(request.name)
            await asyncio.sleep(0)
            return Running(run="r", pid=7)

        def environment(request: GetEnvironment) -> Environment:
            served.append(request.name)
            return Environment(env={request.name: ""})

        channel = Channel(mine, by_op(EnsureRun.on(ensured), GetEnvironment.on_now(environment)))
        names = {"one": GetEnvironment, "two": EnsureRun, "three": GetEnvironment, "four": EnsureRun}
        for number, (name, kind) in enumerate(names.items()):
            send_packet(theirs, json.dumps({"op": kind.op, "id": number, "name": name}).encode())
        channel._readable()
        assert served == ["one"] and len(channel._tasks) == 3
        answers = await asyncio.to_thread(lambda: [json.loads(theirs.recv(MAX_PACKET)) for _ in names])
        assert served == [*names] and sorted(answer["re"] for answer in answers) == [0, 1, 2, 3]
        await asyncio.sleep(0)
        assert not channel._tasks and not channel._to_begin
        send_packet(theirs, json.dumps({"op": "run.environment", "id": 4, "name": "five"}).encode())
        channel._readable()
        assert served[-1] == "five" and json.loads(theirs.recv(MAX_PACKET))["re"] == 4
        channel.close()


async def test_fault_of_a_handler_that_waits_for_nothing_is_told_and_the_channel_goes_on() -> None:
    (mine, theirs), faults = pair(), list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    with theirs:

        def environment(request: GetEnvironment) -> Environment:
            raise ValueError(request.name)

        channel = Channel(mine, by_op(GetEnvironment.on_now(environment)))
        send_packet(theirs, json.dumps({"op": "run.environment", "id": 1, "name": "one"}).encode())
        channel._readable()
        answer = json.loads(theirs.recv(MAX_PACKET))
        assert "ValueError" in json.dumps(answer["error"]) and len(faults) == 1
        assert not channel.closed.is_set()
        channel.close()


async def test_who_waits_for_an_answer_has_it_before_what_came_behind_it_is_served() -> None:
    served: list[str] = []
    mine, theirs = pair()
    with theirs:

        def environment(request: GetEnvironment) -> Environment:
            served.append(request.name)
            return Environment(env={})

        async def ensure() -> None:
            served.append((await channel.ask(EnsureRun(name="one"))).run)

        channel = Channel(mine, by_op(GetEnvironment.on_now(environment)))
        async with asyncio.TaskGroup() as group:
            group.create_task(ensure())
            await asyncio.sleep(0)
            number = json.loads(theirs.recv(MAX_PACKET))["id"]
            send_packet(theirs, json.dumps({"re": number, "ok": Running(run="r", pid=7).to_json()}).encode())
            send_packet(theirs, json.dumps({"op": GetEnvironment.op, "id": 1, "name": "behind"}).encode())
            channel._readable()
        await asyncio.sleep(0)
        assert served == ["r", "behind"]
        channel.close()
