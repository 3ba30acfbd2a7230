"""The socket file that the supervisor lends: the host asks no more until the plugin does anything to its name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from host.delivery import lent_socket
from host.delivery.lent_socket import LentSocketFile
from host.delivery.oneshot import OneshotDelivery
from host.delivery.sidecar import SidecarLink
from isolator.errors import UnavailableError
from isolator.ipc.body import Message
from isolator.ipc.fence import LOST, Fence
from isolator.linux.boottime import boottime

ABSENT: Any = None


class Supervisor:
    """Lends the file with the socket's name, and connects to it, as often as it is asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[asyncio.Future[Message]] = []
        self.connected = 0

    def lend(self, name: str, run: str) -> asyncio.Future[Message]:
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    def answer(self, **more: Any) -> int:
        """Answer the last request; returns the descriptor, which is the receiver's."""
        fd = os.open(self.path, os.O_PATH | os.O_NOFOLLOW)
        fields = {"changed_ns": os.fstat(fd).st_ctime_ns, **more}
        self.answers[-1].set_result(Message(fields, [fd]))
        return fd

    async def ensure(self, name: str) -> str:
        return "run"

    async def connect(self, name: str, run: str) -> int:
        self.connected += 1
        return self.made().detach()

    def connect_soon(self, name: str, run: str) -> asyncio.Future[int]:
        return asyncio.ensure_future(self.connect(name, run))

    def made(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        return sock


def listening(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)
    return server


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[SimpleNamespace]:
    path = tmp_path / "plugin.sock"
    with listening(path) as server:
        yield SimpleNamespace(path=path, server=server, supervisor=Supervisor(path))


async def lent(plugin: SimpleNamespace) -> tuple[LentSocketFile, int]:
    file = LentSocketFile("x", plugin.supervisor)
    file.ask("run")
    fd = plugin.supervisor.answer()
    await asyncio.sleep(0)
    assert file.leads_to("run")
    return file, fd


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


async def test_each_connection_reaches_the_plugin_and_nothing_is_asked(plugin: SimpleNamespace) -> None:
    file, fd = await lent(plugin)
    for _ in range(5):
        connection = file.connect("run")
        assert connection is not None and not connection.getblocking()
        end, _ = plugin.server.accept()
        connection.send(b"event")
        assert end.recv(9) == b"event"
        connection.close(), end.close()
    assert len(plugin.supervisor.answers) == 1
    file.drop()
    assert not is_open(fd)


def _renamed(path: Path) -> None:
    path.rename(path.with_name("other"))


def _replaced(path: Path) -> None:
    listening(path.with_name("next")).close()
    path.with_name("next").rename(path)


def _link_in_its_place(path: Path) -> None:
    _renamed(path)
    path.symlink_to("/etc")


def _shut(path: Path) -> None:
    path.chmod(0)


def _linked(path: Path) -> None:
    path.with_name("second").hardlink_to(path)


@pytest.mark.parametrize("change", [Path.unlink, _renamed, _replaced, _link_in_its_place, _shut, _linked])
async def test_supervisor_is_asked_once_the_name_may_stand_for_something_else(
    plugin: SimpleNamespace, change: Callable[[Path], None]
) -> None:
    file, fd = await lent(plugin)
    await asyncio.sleep(0.02)  # the kernel's clock for files goes on in steps of 10 ms at most
    change(plugin.path)
    assert file.connect("run") is None
    assert not file.leads_to("run") and not is_open(fd)
    plugin.server.setblocking(False)
    with pytest.raises(BlockingIOError):
        plugin.server.accept()


async def test_full_backlog_is_waited_for_by_the_supervisor(plugin: SimpleNamespace) -> None:
    file, _ = await lent(plugin)
    made = []
    while (connection := file.connect("run")) is not None:
        made.append(connection)
    assert made and file.leads_to("run"), "it is the same socket"
    for connection in made:
        plugin.server.accept()[0].close()
        connection.close()
    again = file.connect("run")
    assert again is not None
    again.close()
    file.drop()


async def test_listener_that_is_closed_ends_the_use_of_its_file(plugin: SimpleNamespace) -> None:
    file, fd = await lent(plugin)
    plugin.server.close()
    assert file.connect("run") is None
    assert not is_open(fd)


@pytest.mark.parametrize("meanwhile", ["the run has ended", "another run is asked for"])
async def test_answer_for_another_run_is_closed(
    plugin: SimpleNamespace, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lent_socket, "ASK_AGAIN", 0.0)
    file = LentSocketFile("x", plugin.supervisor)
    file.ask("run")
    late = plugin.supervisor.answers[-1]
    if meanwhile == "the run has ended":
        file.drop()
    else:
        file.ask("next")
    plugin.supervisor.answers = [late]
    fd = plugin.supervisor.answer()
    await asyncio.sleep(0)
    assert not is_open(fd)
    assert not file.leads_to("run") and not file.leads_to("next") and file.connect("next") is None


async def test_answer_that_makes_no_sense_is_closed(plugin: SimpleNamespace) -> None:
    file = LentSocketFile("x", plugin.supervisor)
    file.ask("run")
    fd = plugin.supervisor.answer(changed_ns="x")
    await asyncio.sleep(0)
    assert not is_open(fd) and not file.leads_to("run")


async def test_supervisor_that_lends_nothing_is_asked_once_a_second(plugin: SimpleNamespace) -> None:
    file = LentSocketFile("x", plugin.supervisor)
    for _ in range(100):
        file.ask("run")
        if not plugin.supervisor.answers[-1].done():
            plugin.supervisor.answers[-1].set_exception(UnavailableError("x", "is being replaced"))
        await asyncio.sleep(0)
    assert len(plugin.supervisor.answers) == 1
    file._ask_at = 0.0
    file.ask("run")
    assert len(plugin.supervisor.answers) == 2


@pytest.mark.parametrize("lasting", [False, True])
async def test_file_is_asked_for_where_connections_follow(plugin: SimpleNamespace, lasting: bool) -> None:
    supervisor = plugin.supervisor
    link = SidecarLink("x", cast("Any", supervisor), ABSENT, Fence())
    sock, run = await link.connect(lasting=lasting)
    sock.close()
    assert (run, supervisor.connected, len(supervisor.answers)) == ("run", 1, 0 if lasting else 1)
    if not lasting:
        fd = supervisor.answer()
        await asyncio.sleep(0)
        assert link.connects_at_once
        sock, run = await link.connect()
        sock.close()
        assert (run, supervisor.connected) == ("run", 1)
        link.forget_run()
        assert not link.connects_at_once and not is_open(fd)


async def reach(link: SidecarLink, plugin: SimpleNamespace) -> None:
    """Connect once, and have the file of the plugin's socket lent with the answer."""
    (await link.connect())[0].close()
    plugin.server.accept()[0].close()
    plugin.supervisor.answer()
    await asyncio.sleep(0)


async def test_connection_for_an_event_that_is_being_synced_is_made_and_kept(plugin: SimpleNamespace) -> None:
    link = SidecarLink("x", cast("Any", plugin.supervisor), ABSENT, Fence())
    oneshot = OneshotDelivery(link, ABSENT, ABSENT)
    await reach(link, plugin)
    for _ in range(3):
        assert oneshot.prepare()
        await asyncio.sleep(0)
    plugin.server.setblocking(False)
    end, _ = plugin.server.accept()
    with pytest.raises(BlockingIOError):
        plugin.server.accept()
    assert plugin.supervisor.connected == 1
    sock, run = await oneshot._connection()
    sock.send(b"event")
    assert (end.recv(9), run) == (b"event", "run")
    sock.close(), end.close()
    link.forget_run()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_connection_for_the_only_delivery_of_an_event_is_not_made_while_that_is_synced(
    plugin: SimpleNamespace,
) -> None:
    link = SidecarLink("x", cast("Any", plugin.supervisor), ABSENT, Fence())
    oneshot = OneshotDelivery(link, ABSENT, ABSENT)
    await reach(link, plugin)
    assert oneshot.prepare(alone=True), "it is sent at once, and so its attempt is counted with the event"
    await asyncio.sleep(0)
    plugin.server.setblocking(False)
    with pytest.raises(BlockingIOError):
        plugin.server.accept()
    with no_descriptor_left():
        assert link.connect_at_once() is None, "the supervisor is asked, and the delivery waits: it is no attempt"
    made = link.connect_at_once()
    assert made is not None
    sock, _ = made
    end, _ = plugin.server.accept()
    sock.send(b"event")
    assert end.recv(9) == b"event"
    sock.close(), end.close()
    link.forget_run()


@pytest.mark.parametrize("why", ["it is paused", "the deadline has passed", "the run has ended"])
async def test_no_connection_is_made_for_an_event_that_may_not_be_sent(plugin: SimpleNamespace, why: str) -> None:
    link = SidecarLink("x", cast("Any", plugin.supervisor), ABSENT, Fence(boottime() + 600))
    oneshot = OneshotDelivery(link, ABSENT, ABSENT)
    await reach(link, plugin)
    assert oneshot.prepare()
    if why == "it is paused":
        link.paused = True
    elif why == "the deadline has passed":
        link.fence.move(LOST)
    else:
        link.forget_run()
    await asyncio.sleep(0)
    plugin.server.setblocking(False)
    with pytest.raises(BlockingIOError):
        plugin.server.accept()
    link.forget_run()
