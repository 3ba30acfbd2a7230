"""What is made for a run that is given up while a thread makes it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from isolator.ipc import messages
from isolator.layers.network import namespace as network_layer
from isolator.layers.user import UidLease
from isolator.supervisor import preparing
from isolator.supervisor.broker_link import BrokerLink
from isolator.supervisor.preparing import prepare_run
from isolator.supervisor.runners.run import RunnerRun
from isolator.volume.volume import Volume
from tests.support.timeouts import seconds


async def _prepare(monkeypatch: pytest.MonkeyPatch, opened: Callable[[], int]) -> None:
    monkeypatch.setattr(Volume, "open_ready", lambda volume, size: -1)
    monkeypatch.setattr(preparing, "open_state", lambda *_: opened())
    context: Any = SimpleNamespace(paths=SimpleNamespace(state=None), runtime=SimpleNamespace(journal=None))
    monkeypatch.setattr(Volume, "__init__", lambda *_: None)
    registration: Any = SimpleNamespace(name="echo", release=SimpleNamespace(kind="folder"))
    effective: Any = SimpleNamespace(filesystem=SimpleNamespace(state=1 << 20))
    given: Any = SimpleNamespace()
    await prepare_run(context, registration, effective, [], "r1", given)


async def _connect(monkeypatch: pytest.MonkeyPatch, opened: Callable[[], int]) -> None:
    monkeypatch.setattr(network_layer, "connectors", lambda *_, **__: [opened()])
    link = BrokerLink.__new__(BrokerLink)
    attached: Any = SimpleNamespace(policy=SimpleNamespace(listen=("one",)), network=None)
    link._attached = {"r1": attached}
    await link._cage_sockets(messages.CageSockets(run="r1", count=1, version=4))


async def _lease(monkeypatch: pytest.MonkeyPatch, opened: Callable[[], int]) -> None:
    def lock(lease: UidLease, _: object) -> None:
        lease.uid, lease.lock = 0, opened()

    async def nothing(*_: object) -> None:
        pass

    resources, place = SimpleNamespace(tasks=1, memory=1), SimpleNamespace(claim=lambda **_: None)
    monkeypatch.setattr(UidLease, "__init__", lock)
    monkeypatch.setattr(RunnerRun, "_file", nothing)
    monkeypatch.setattr(RunnerRun, "_effective", lambda *_: SimpleNamespace(resources=resources))
    run: Any = RunnerRun.__new__(RunnerRun)
    run._context, run._config = SimpleNamespace(wait_for_trail=False), SimpleNamespace(uid_range=(1, 2))
    await run.serve(None, [], [], place)


@pytest.mark.parametrize("work", [_prepare, _connect, _lease])
async def test_descriptor_that_a_thread_opens_for_a_cancelled_caller_is_closed(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[pytest.MonkeyPatch, Callable[[], int]], Awaitable[None]]
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    reader, writer = os.pipe()

    def opened() -> int:
        begun.set()
        go_on.wait()
        return writer

    caller = asyncio.ensure_future(work(monkeypatch, opened))
    await asyncio.to_thread(begun.wait)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(reader, ended.set)  # the end of the pipe, once nobody can write
    try:
        async with asyncio.timeout(seconds(5)):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(reader)
        os.close(reader)
