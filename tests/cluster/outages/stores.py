"""Older copies of stores: what a backup, a snapshot of a disk, or a machine that was cloned puts in their place."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from isolator.paths import Paths
from tests.cluster.outages.site import Host, Site
from tests.support.nats_servers import Server
from tests.support.processes import family
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for


class Copies:
    """Copies of stores whose processes are not there, in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._newest: dict[str, Path] = {}

    def exchange(self, name: str, paths: Sequence[Path]) -> bool:
        """Put the copy in the place of what is there, which becomes the next copy; False: there was none yet."""
        before = self._newest.get(name)
        self._count += 1
        folder = self._newest[name] = self._folder / str(self._count)
        folder.mkdir(parents=True)
        for path in filter(Path.exists, paths):
            _copy(path, folder / path.name)
        if before is None:
            return False
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if (before / path.name).exists():
                _copy(before / path.name, path)
        shutil.rmtree(before)
        return True


def _copy(source: Path, to: Path) -> None:
    subprocess.run(["cp", "-a", "--", source, to], check=True)


def database_of(host: Host) -> list[Path]:
    """The files of a host's database."""
    path = Paths.of(host.daemon.root).host_database
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]


def kill_whole(host: Host) -> None:
    """Kill a daemon; returns when none of its processes is there any more."""
    assert host.daemon.process is not None
    with contextlib.ExitStack() as stack:
        fds = []
        for pid in family(host.daemon.process.pid)[1:]:
            with contextlib.suppress(ProcessLookupError):
                fds.append(fd := os.pidfd_open(pid))
                stack.callback(os.close, fd)
        host.daemon.kill()
        for fd in fds:
            assert select.select([fd], [], [], seconds(30))[0], "a process of a daemon that was killed goes on"


@contextlib.contextmanager
def older_database(site: Site, host: Host, copies: Copies) -> Iterator[None]:
    """Have a host begin with an older copy of its database, once there is one.

    What it has accepted is in the log by then: what only the lost database had is lost, whatever anybody does.
    """
    with site.emits_nothing(host):
        wait_for(host.has_sent_all, seconds(90), f"{host.name} keeps events back")
        kill_whole(host)
    copies.exchange(host.name, database_of(host))
    try:
        yield
    finally:
        host.daemon.start(seconds(90))


@contextlib.contextmanager
def older_store(site: Site, server: Server, copies: Copies) -> Iterator[None]:
    """Have a server begin with an older copy of its store, once there is one, while the others have all that it had."""
    wait_for(site.replicas_are_current, seconds(90), "a server does not catch up")
    server.kill()
    copies.exchange(server.name, [server.store])
    try:
        yield
    finally:
        server.start()
