"""The supervisor's questions to the host while one process takes another's place."""

from __future__ import annotations

import asyncio
import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.errors import UnavailableError
from isolator.ipc.body import WithFds
from isolator.ipc.messages import DrainRun, Environment, GetEnvironment, GetStderrTail, StderrTail
from isolator.supervisor import alive, host_link
from isolator.supervisor.host_link import HostLink

ANSWERS = {
    DrainRun: None,
    GetEnvironment: Environment(env={}, files={}, apart=False),
    GetStderrTail: StderrTail(stderr=("last words",)),
}


class End:
    """A channel to a process, which answers or refuses."""

    def __init__(self, *, answers: bool) -> None:
        self.answers, self.closed = answers, asyncio.Event()

    async def ask_fds(self, request: Any, *, timeout: float) -> Any:
        if not self.answers:
            raise UnavailableError("host", "was broken off", "ask again")
        return WithFds(ANSWERS[type(request)], [])


class Exchanged:
    """A host process that leaves, and another that takes its place when ``done`` is set."""

    def __init__(self, *, answers: bool) -> None:
        self.channel, self.running, self.done = End(answers=answers), True, asyncio.Event()

    async def present(self) -> End:
        await self.done.wait()
        self.channel = End(answers=True)
        return self.channel


def asked(process: Exchanged, question: str) -> asyncio.Future[Any]:
    link = HostLink.__new__(HostLink)
    link.process = cast(Any, process)
    asking: Any = {
        "drain": lambda: link.drain("echo", "run", "stopped"),
        "stderr": lambda: link.stderr_tail("echo", "run"),
        "environment": lambda: link.environment("echo"),
    }[question]()
    return asyncio.ensure_future(asking)


QUESTIONS = pytest.mark.parametrize("question", ["drain", "stderr", "environment"])


@QUESTIONS
async def test_process_that_leaves_is_asked_as_long_as_it_answers(question: str) -> None:
    """It waits for commands of callers, which may wait for this: to wait for its end would be in vain."""
    process = Exchanged(answers=True)
    await asyncio.wait_for(asked(process, question), 60)
    assert not process.done.is_set()


@QUESTIONS
async def test_successor_is_asked_again_and_the_exchange_counts_for_no_patience(
    monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    """Else a crash then would be on record without its last words, and a run stopped without being drained."""
    for name in ("_STDERR_TAIL_SECONDS", "DRAIN_SECONDS", "_ENVIRONMENT_SECONDS"):
        monkeypatch.setattr(host_link, name, 0.01)
    process = Exchanged(answers=False)
    asking = asked(process, question)
    await asyncio.wait({asking}, timeout=0.2)
    assert not asking.done(), "it was given up"
    process.done.set()
    found = await asking
    if question == "stderr":
        assert found == ("last words",)


async def test_successor_knows_plugins_as_they_were_and_those_that_were_added_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the other one had of a plugin that its successor does not know would be closed: requests in flight, too."""
    said: list[Any] = []

    async def hello(link: HostLink, channel: Any, entries: Any, *_: Any, parts: int) -> None:
        said.append((channel, entries, parts))

    monkeypatch.setattr(HostLink, "_hello", hello)
    monkeypatch.setattr(HostLink, "_settings", dict)
    link = HostLink.__new__(HostLink)
    link._alarms = cast(Any, SimpleNamespace(lines=()))
    entries: list[Any] = [SimpleNamespace(name="kept", version="1"), SimpleNamespace(name="removed", version="1")]
    introduce = link.succeed(lambda: list(entries))
    entries[:] = [SimpleNamespace(name="kept", version="2"), SimpleNamespace(name="added", version="1")]
    await introduce(cast(Any, "channel"), 3)
    ((channel, told, parts),) = said
    assert (channel, parts) == ("channel", 3)
    assert [(one.name, one.version) for one in told] == [("kept", "1"), ("removed", "1"), ("added", "1")]


async def test_new_host_knows_plugins_as_they_are_when_its_hello_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was told before, it may not have heard."""
    said: list[Any] = []

    async def hello(link: HostLink, channel: Any, entries: Any, *_: Any, listener: int) -> None:
        said.extend(entries)

    monkeypatch.setattr(HostLink, "_hello", hello)
    monkeypatch.setattr(HostLink, "_settings", dict)
    link = HostLink.__new__(HostLink)
    link._alarms = cast(Any, SimpleNamespace(lines=()))
    link.door = cast(Any, SimpleNamespace(listen=socket.socket))
    link.process = cast(Any, SimpleNamespace(first_answer=lambda work: alive.answered(work, os.getpid(), "host")))
    entries: list[Any] = ["before"]
    saying = asyncio.ensure_future(link.hello(cast(Any, "channel"), lambda: entries))
    await asyncio.sleep(0)
    assert not said
    entries = ["after"]
    await saying
    assert said == ["after"]
