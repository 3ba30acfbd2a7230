"""What the zygote forks is what an exec would have made: no privilege, and nothing of root's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import prctl
import pytest

from isolator.errors import UnavailableError
from isolator.linux import unprivileged
from isolator.linux.child import Child, ended
from isolator.linux.unprivileged import drop_privileges, service_command
from isolator.supervisor import alive
from isolator.supervisor.service import ServiceSpec
from isolator.supervisor.zygote import Zygote, Zygotes
from tests.support.timeouts import seconds

UID, GID = 64998, 64997
SPEC = ServiceSpec("shown", "tests.supervisor.forked", UID, GID)


def report(sock: socket.socket) -> dict[str, Any]:
    sock.settimeout(seconds(30))
    with sock.makefile("rb") as lines:
        return json.loads(lines.readline())


async def forked(zygote: Zygote, spec: ServiceSpec = SPEC) -> tuple[Child, dict[str, Any]]:
    """A forked service, which has ended, and what it was."""
    mine, theirs = socket.socketpair()
    child = await zygote.fork(spec, {"report": theirs.fileno()})
    theirs.close()
    with mine:
        shown = report(mine)
    async with asyncio.timeout(seconds(30)):
        await ended(child)
    return child, shown


def executed() -> dict[str, Any]:
    mine, theirs = socket.socketpair()
    process = subprocess.Popen(
        service_command(SPEC.module, UID, GID, {"report": theirs.fileno()}), pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL, cwd="/", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
        start_new_session=True, umask=0o027,
    )  # fmt: skip
    theirs.close()
    with mine:
        shown = report(mine)
    process.wait()
    return shown


async def test_forked_service_is_what_an_executed_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    async with Zygotes().ready() as zygote:
        child, one = await forked(zygote)
        _, other = await forked(zygote)
    assert (child.returncode, one["parent"]) == (3, os.getpid())
    assert one["number"] != other["number"]  # nobody can foretell what another one draws
    exec_made = executed()
    for shown in (one, exec_made):  # a number of its own, which differs from process to process
        own = shown["command"].pop()
        assert shown["arguments"].pop() == own
        assert [fd for fd in shown["descriptors"] if fd > 2] == [int(own)]
    assert one["command"] == exec_made["command"]
    assert one["arguments"][1:] == exec_made["arguments"][1:]
    for name in ("status", "input", "environment", "folder", "leads a session", "flags", "path", "limits", "dumps"):
        assert one[name] == exec_made[name], name


async def test_service_goes_as_far_forward_on_the_processor_as_its_daemon() -> None:
    async with Zygotes().ready() as zygote:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, before - 3)
        try:
            _, shown = await forked(zygote)
        finally:
            os.setpriority(os.PRIO_PROCESS, 0, before)
    assert shown["nice"] == before - 3


async def test_nothing_of_this_process_is_in_a_service() -> None:
    secret = os.urandom(16).hex()
    os.environ["SECRET"] = secret
    held = os.open("/etc/shadow", os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        async with Zygotes().ready() as zygote:
            memory = Path(f"/proc/{zygote.process.pid}/maps").read_text()
            _, shown = await forked(zygote)
    finally:
        os.close(held)
        del os.environ["SECRET"]
    assert "SECRET" not in shown["environment"] and len(shown["descriptors"]) == 4
    # Another layout and other hashes than root's own: a service that was taken over does not know them.
    assert shown["library"] in memory and shown["library"] not in Path("/proc/self/maps").read_text()
    assert shown["hash"] != hash("isolator")


@pytest.mark.parametrize("kept", ["set", "setgroups", "setresgid", "setresuid", "no_new_privs"])
def test_privilege_that_stays_is_noticed(kept: str) -> None:
    def keep() -> None:
        def nothing(*_: Any) -> None: ...

        os.setgroups([5])
        if kept == "set":
            unprivileged.drop_bounding_set = nothing  # type: ignore[assignment]
        elif kept == "no_new_privs":
            prctl.set_no_new_privs = nothing
        else:
            setattr(os, kept, nothing)

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            keep()
            drop_privileges(UID, GID)
        except PermissionError as error:
            code = 7 if "kept privileges" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


async def test_service_that_would_be_root_is_none() -> None:
    mine, theirs = socket.socketpair()
    async with Zygotes().ready() as zygote:
        with theirs:
            child = await zygote.fork(ServiceSpec("shown", SPEC.module, 0, 0), {"report": theirs.fileno()})
        await ended(child)
    with mine:
        assert (child.returncode, mine.recv(1)) == (1, b"")


async def test_zygote_is_one_for_all_who_need_it_and_ends_with_the_last() -> None:
    zygotes = Zygotes()
    zygotes.begin()

    async def use() -> tuple[int, int]:
        async with zygotes.ready() as zygote:
            child, _ = await forked(zygote)
            return zygote.process.pid, child.pid

    used = await asyncio.gather(use(), use())
    assert len({zygote for zygote, _ in used}) == 1 and len({child for _, child in used}) == 2
    with pytest.raises(ProcessLookupError):
        os.kill(used[0][0], 0)
    assert (await use())[0] != used[0][0]


async def test_zygote_that_was_killed_is_an_error_and_the_next_one_serves() -> None:
    zygotes = Zygotes()
    mine, theirs = socket.socketpair()
    with mine, theirs:
        with pytest.raises(UnavailableError, match="zygote: "):
            async with zygotes.ready() as zygote:
                os.kill(zygote.process.pid, signal.SIGKILL)
                await ended(zygote.process)
                await zygote.fork(SPEC, {"report": theirs.fileno()})
        async with zygotes.ready() as zygote:
            await forked(zygote)


async def test_zygote_that_hangs_holds_nobody_up_but_those_who_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop goes on meanwhile, and what it would have answered late is taken for nothing else."""
    monkeypatch.setattr(alive, "TICK", seconds(0.02))
    zygotes, turns = Zygotes(), 0
    mine, theirs = socket.socketpair()
    with mine, theirs:
        async with zygotes.ready() as zygote:
            os.kill(zygote.process.pid, signal.SIGSTOP)
            orders = [asyncio.create_task(zygote.fork(SPEC, {"report": theirs.fileno()})) for _ in range(2)]
            while not all(order.done() for order in orders):
                await asyncio.sleep(0)
                turns += 1
            for order in orders:
                with pytest.raises(UnavailableError, match="zygote: "):
                    await order
            assert turns > 100
            await ended(zygote.process)
        async with zygotes.ready() as zygote:
            await forked(zygote)
