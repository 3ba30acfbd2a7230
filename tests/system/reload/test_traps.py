"""Traps of an exec in place that end cages, each taken on purpose, and an image that hangs after the exec."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from isolator.launcher import client
from tests.support.cage_fixture import cage
from tests.support.timeouts import seconds
from tests.system.daemon import alive, daemon, event, wait_for, write_plugin
from tests.system.reload.faulty import FaultyDaemon
from tests.system.reload.test_adoption_faults import cages
from tests.system.reload.test_reload import STATE, running

WATCHDOG_SECONDS = 2.0


@contextlib.contextmanager
def with_sidecar(folder: Path) -> Iterator[FaultyDaemon]:
    """A daemon with one sidecar, that has been reloaded once."""
    with daemon(kind=FaultyDaemon, host_toml='[restart]\nbackoff_min = "0.1s"\n') as made:
        d = cast(FaultyDaemon, made)
        d.cli("plugin", "add", str(write_plugin(folder / "echo", sandbox=STATE)), "--yes")
        d.cli("plugin", "start", "echo")
        d.cli("reload")
        yield d


def killed_by_the_exec(d: FaultyDaemon, word: str) -> None:
    """Reload with a trap: the sidecar is killed, which the new image finds, and it is started again."""
    (before,) = cages(d).values()
    d.at_exec(word)
    d.cli("reload")
    again = wait_for(lambda: (now := running(d)) and now["echo"][0] not in before and now, what=d.log.read_text)
    assert not any(map(alive, before))
    (crashed,) = [one["data"] for one in d.records() if one["type"] == "plugin.crashed"]
    assert crashed["signal"] == signal.SIGKILL
    d.cli("event", "emit", "deploy.completed", event(1), "--wait")
    d.cli("reload")
    assert running(d) == again


def test_exec_by_another_thread_than_the_main_one_ends_every_cage(shared_dir: Path) -> None:
    """The end of the main thread is the death of every cage's parent: that is why no other thread executes."""
    with with_sidecar(shared_dir) as d:
        killed_by_the_exec(d, "another thread")


def test_cage_whose_launcher_has_lost_its_link_is_killed(shared_dir: Path) -> None:
    """Why the link crosses the exec: the launcher takes its end for that of the supervisor."""
    with with_sidecar(shared_dir) as d:
        killed_by_the_exec(d, "unlink launcher")


async def test_cage_of_a_launcher_that_another_thread_forked_ends_with_that_thread(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the main thread forks it: by the exec every other thread has ended."""
    start, found, over = client._start, list[Any](), threading.Event()

    def fork() -> None:
        found.append(start())
        over.wait()

    thread = threading.Thread(target=fork)

    def start_in_thread() -> Any:
        thread.start()
        return wait_for(lambda: found and found[0])

    monkeypatch.setattr(client, "_start", start_in_thread)
    try:
        async with cage(shared_dir, ["sleep", "1000"]) as one:
            assert alive(one.cage.pid)
            over.set()
            await asyncio.to_thread(thread.join)
            assert (await one.cage.wait()).signal == signal.SIGKILL
    finally:
        over.set()
        thread.join()


class Manager:
    """The other end of the notifications, read to the end of the test: who sends them waits for that."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._heard: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while message := self._socket.recv(4096).decode():
            self._heard.put(message)

    def wait_for(self, word: str) -> None:
        """Wait for a notification; raises ``queue.Empty`` when there is none for as long as a watchdog waits."""
        while word not in self._heard.get(timeout=seconds(30)).splitlines():
            pass

    def wait_for_silence(self) -> None:
        """Wait until there is none for as long as a watchdog waits."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._heard.get(timeout=WATCHDOG_SECONDS)

    def __enter__(self) -> Manager:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize("step", ["read", pytest.param("launchers", marks=pytest.mark.wide), "kept"])
def test_image_that_hangs_is_ended_by_the_watchdog_and_the_next_start_clears_everything(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """This test is the service manager: it ends a service that is silent for too long (systemd.service(5))."""
    with Manager(shared_dir / "notify") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", str(shared_dir / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_SECONDS * 1e6)))
        with with_sidecar(shared_dir) as d:
            assert d.process is not None
            born, ours = [pid for pids in cages(d).values() for pid in pids], d.process.pid
            assert born
            manager.wait_for("WATCHDOG=1")
            d.hang_at(step)
            os.kill(ours, signal.SIGHUP)
            manager.wait_for("RELOADING=1")
            wait_for((d.root / "hangs").exists, seconds(60), "the new image")
            manager.wait_for_silence()
            os.kill(ours, signal.SIGABRT)
            assert d.process.wait(seconds(40)) == -signal.SIGABRT
            wait_for(lambda: not any(map(alive, born)), what="a process outlived its supervisor")
            d.kill()
            d.start()
            assert "cleared what an earlier daemon left: cage echo" in d.log.read_text()
            d.cli("event", "emit", "deploy.completed", event(1), "--wait")
            d.cli("reload")
            d.cli("audit", "verify")
            assert d.stop() == 0
            assert d.json("gc", "--dry-run") == []
