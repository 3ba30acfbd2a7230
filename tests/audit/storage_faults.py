"""Faults of the disk below the trail, each run in a mount namespace of its own: ``python -m … NAME CODE``.

Run by test_storage.py under ``unshare --mount``, so that no mount outlives the process that made it. The service
is the real one under its own user; the disk is a small tmpfs or a small ext4 in a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from isolator.audit import files
from isolator.audit.client import AuditClient
from isolator.audit.seal import load_public
from isolator.audit.verify import verify
from tests.audit.any_record import any_record
from tests.audit.conftest import UID, Daemon
from tests.support.disks import ext4_image, run, shut_down
from tests.support.timeouts import seconds


async def until(condition: Callable[[], bool], client: AuditClient) -> None:
    """Wait for something that changes when the writer answers."""
    async with asyncio.timeout(30):
        while not condition():
            client.record(any_record("event.accepted", filler="tick"))
            await asyncio.sleep(0.05)


async def durable(client: AuditClient) -> None:
    async with asyncio.timeout(30):
        await client.durable()


def complete(daemon: Daemon, count: int) -> None:
    """Every record once, in order, the chain whole, and no gap, since nothing was lost."""
    assert numbers(daemon) == list(range(count))
    assert not daemon.of_type("audit.gap")
    report = verify(files.trail(daemon.paths.audit_log), load_public(daemon.paths.audit_log / "public.pem"))
    assert not report.misfits, report.misfits


def numbers(daemon: Daemon) -> list[int]:
    return [r["data"]["number"] for r in daemon.of_type("event.accepted") if "number" in r["data"]]


@contextlib.contextmanager
def ext4(place: Path, size: int) -> Iterator[Callable[[], None]]:
    """A small ext4 mounted on ``place``; the value mounts it again after it was unmounted."""
    with ext4_image(size) as image:

        def mount() -> None:
            run("mount", "-o", "loop", image, str(place))
            os.chown(place, UID, UID)

        mount()
        try:
            yield mount
        finally:
            run("umount", "-l", str(place))


async def fill_and_free(daemon: Daemon, ballast: Path) -> None:
    """Write until the disk is full, free it, and see that nothing is missing and nothing stands twice."""
    await daemon.start()
    host = await daemon.source("host")
    sent = 0
    while host.blocked is None:
        for _ in range(20):
            host.record(any_record("event.accepted", number=sent, filler="x" * 1000))
            sent += 1
        await asyncio.sleep(0.01)
        assert sent < 15_000, "the disk did not fill up"
    assert "No space left" in host.blocked
    acked = host.acked
    done = numbers_written(daemon)
    assert set(range(acked)) <= done, "something acknowledged is not on the disk"
    # It stays blocked, and keeps what comes meanwhile in bounds.
    for _ in range(500):
        host.record(any_record("event.accepted", number=sent, filler="y" * 1000))
        sent += 1
    await asyncio.sleep(1.5)
    assert host.blocked is not None and host.acked == acked
    ballast.unlink()
    async with asyncio.timeout(30):
        await host.writable()
    await durable(host)
    assert await daemon.stop() == 0
    complete(daemon, sent)


def numbers_written(daemon: Daemon) -> set[int]:
    """Like ``numbers`` while the last line may be unfinished."""
    from isolator.audit.record import parse

    lines = daemon.paths.audit_file.read_bytes().split(b"\n")[:-1]
    records = [parse(line) for line in lines]
    return {r.data["number"] for r in records if r is not None and "number" in r.data}


async def full_tmpfs(daemon: Daemon) -> None:
    log = daemon.paths.audit_log
    run("mount", "-t", "tmpfs", "-o", f"size=4M,uid={UID},gid={UID},mode=750", "none", str(log))
    try:
        (log / "ballast").write_bytes(b"\0" * (3 << 20))
        await fill_and_free(daemon, log / "ballast")
    finally:
        run("umount", "-l", str(log))


async def full_ext4(daemon: Daemon) -> None:
    log = daemon.paths.audit_log
    with ext4(log, 8 << 20):
        free = os.statvfs(log)
        (log / "ballast").write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - (1 << 20)))
        await fill_and_free(daemon, log / "ballast")


async def read_only_at_start(daemon: Daemon) -> None:
    log = daemon.paths.audit_log
    run("mount", "-t", "tmpfs", "-o", f"ro,uid={UID},gid={UID},mode=750", "none", str(log))
    try:
        await daemon.start()
        assert "Read-only" in daemon.hello["blocked"]
        host = await daemon.source("host")
        for number in range(100):
            host.record(any_record("event.accepted", number=number))
        await until(lambda: host.blocked is not None, host)
        run("mount", "-o", "remount,rw", str(log))
        async with asyncio.timeout(30):
            await host.writable()
        await durable(host)
        await daemon.stop()
        complete(daemon, 100)
    finally:
        run("umount", "-l", str(log))


async def disk_dies(daemon: Daemon) -> None:
    """The file system shuts down under the writer: dirty pages are lost, every call fails; then it is mounted again."""
    log = daemon.paths.audit_log
    with ext4(log, 16 << 20) as mount:
        await daemon.start()
        host = await daemon.source("host")
        for number in range(500):
            host.record(any_record("event.accepted", number=number, filler="x" * 200))
        await durable(host)
        shut_down(log)
        acked = host.acked
        for number in range(500, 600):
            host.record(any_record("event.accepted", number=number))
        await until(lambda: host.blocked is not None, host)
        assert host.acked == acked, "something was acknowledged on a dead disk"
        # Not lazily: the writer must have let go of the dead disk.
        run("umount", str(log))
        await asyncio.sleep(1.5)
        assert list(log.iterdir()) == [], "the writer went on in the folder below the mount"
        mount()
        async with asyncio.timeout(30):
            await host.writable()
        await durable(host)
        await daemon.stop()
        complete(daemon, 600)


async def fsync_fails(daemon: Daemon) -> None:
    """Every third fdatasync fails, for a while: nothing of it counts as written, nothing is written twice."""
    await injected(daemon, "fdatasync:error=EIO:when=3+3")


async def write_fails(daemon: Daemon) -> None:
    """Every fifth write fails; the part of a batch that was written before it is cut off."""
    await injected(daemon, "write:error=ENOSPC:when=5+5")


async def slow_disk(daemon: Daemon) -> None:
    """Two seconds for each fdatasync: nobody waits per record, nothing is blocked, acknowledged records are there."""
    host, tracer = await traced(daemon, "fdatasync:delay_enter=2000000")
    try:
        begun, sent = asyncio.get_running_loop().time(), 1
        while asyncio.get_running_loop().time() - begun < 3:
            host.record(any_record("event.accepted", number=sent))
            sent += 1
            assert host.blocked is None
            await asyncio.sleep(0.005)
        assert sent > 100 and 1 <= host.acked < sent, "the disk was not slow"
        assert set(range(host.acked)) <= numbers_written(daemon)
    finally:
        tracer.terminate()
        await tracer.wait()
    await durable(host)
    await daemon.stop()
    complete(daemon, sent)


async def traced(daemon: Daemon, fault: str) -> tuple[AuditClient, asyncio.subprocess.Process]:
    """A writer that has written one record and is now traced, with a fault in some of its system calls."""
    await daemon.start()
    assert daemon.process is not None
    host = await daemon.source("host")
    host.record(any_record("event.accepted", number=0))
    await durable(host)
    pid = str(daemon.process.pid)
    tracer = await asyncio.create_subprocess_exec(
        "strace", "-f", "-qq", "-o", "/dev/null", "-p", pid, "-e", "trace=fdatasync,write", "-e", f"inject={fault}"
    )
    return host, tracer


async def injected(daemon: Daemon, fault: str) -> None:
    host, tracer = await traced(daemon, fault)
    failures, sent, was = 0, 1, None
    end = asyncio.get_running_loop().time() + seconds(20)
    try:
        while sent <= 3000 or failures <= 2:
            for _ in range(50 if sent <= 3000 else 1):
                host.record(any_record("event.accepted", number=sent, filler="z" * 100))
                sent += 1
            await asyncio.sleep(0.05)
            failures += host.blocked is not None and was is None
            was = host.blocked
            assert asyncio.get_running_loop().time() < end, "hardly a fault was injected"
    finally:
        tracer.terminate()
        await tracer.wait()
    await durable(host)
    await daemon.stop()
    complete(daemon, sent)


FAULTS: dict[str, Callable[[Daemon], Awaitable[None]]] = {
    f.__name__: f for f in (full_tmpfs, full_ext4, read_only_at_start, disk_dies, fsync_fails, write_fails, slow_disk)
}


async def main(name: str, code: str) -> None:
    with tempfile.TemporaryDirectory(prefix="isolator-root-") as root:
        Path(root).chmod(0o755)
        daemon = Daemon(Path(root), Path(code))
        try:
            async with asyncio.timeout(seconds(120)):
                await FAULTS[name](daemon)
        finally:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
