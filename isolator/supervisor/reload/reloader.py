"""The reload itself, up to the exec: the new program is tried, the daemon comes to rest, the main thread executes.

Whatever goes wrong until then, the daemon goes on as before and whoever asked is answered why.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import isolator
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.handover import DaemonState, SubtreeState, descriptors
from isolator.linux.systemd import notify
from isolator.supervisor.reload import formats, trial
from isolator.supervisor.reload.program import ADOPT, Program
from isolator.supervisor.reload.settings import settings_text
from isolator.supervisor.reload.signals import HELD
from isolator.supervisor.rest import REPEATED
from isolator.supervisor.supervisor import Daemon

logger = logging.getLogger(__name__)

REST_SECONDS = 30.0
"""Work that is under way has this long to end."""
_LOOK = 0.005
_TURNS = 4
"""Of the event loop, from a signal that was received to its handler: its byte is seen, read, and the call made."""
_NOTIFIER_SECONDS = 5.0


async def reload(
    daemon: Daemon, program: Program, generation: int, settings: Path, stopping: Callable[[], bool] = lambda: False
) -> None:
    """Hand the daemon over to the program; returns only by raising, when that was not possible.

    ``settings``: its host.toml. What it holds now is tried, and is what the program goes on with. ``stopping``: whether
    the daemon was told to end, by a signal that is not to be lost.
    """
    async with daemon.services.exchanging:
        tried = program.check()
        began, host_toml = time.monotonic(), settings_text(settings)
        try:
            tables = daemon.services.host.tables
            number = await trial.try_out(program, daemon_state(daemon, generation, began), host_toml, tables)
            if number < formats.WITHOUT_CAGES:
                daemon.runtime.launch()
                await daemon.services.broker.needed()
        finally:
            _stay(daemon)
        began = time.monotonic()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            await _come_to_rest(daemon)
            # From here to the exec nothing is awaited.
            if stopping():
                raise UnavailableError("reload", "the daemon stops", "start it again")
            if program.check() != tried:
                raise UnavailableError("reload", "the program was exchanged after its trial", "ask again")
            for service in daemon.services.every:
                if service.channel is not None:
                    service.channel.leave_unread()
            daemon.fences.stand_still()
            state = daemon_state(daemon, generation, began)
            execute(program, state, number, host_toml, again=daemon.reloads.again)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _go_on(daemon)


def execute(program: Program, state: DaemonState, number: int, host_toml: str = "", *, again: bool = False) -> None:
    """Replace this process's image; raises IsolatorError when that fails, and nothing has changed then.

    By the main thread: it counts as the parent of every cage, which ends with it (PR_SET_PDEATHSIG). ``host_toml``:
    the text of that file, as it was tried. ``again``: the new image is to find a SIGHUP that came to this one.
    """
    assert threading.current_thread() is threading.main_thread()
    fd = formats.write(state, number, host_toml)
    crossing = [fd, *descriptors(state)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        if again:
            os.kill(os.getpid(), signal.SIGHUP)  # it waits, over the exec
        _set_inheritable(crossing, inheritable=True)
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        os.execve(program.path, program.with_state(ADOPT, fd), os.environ)
    except OSError as error:
        raise IsolatorError(program.path, f"cannot be executed: {error.strerror}", "install it again") from None
    finally:
        _set_inheritable(crossing, inheritable=False)
        os.close(fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        notify("READY=1")


def _set_inheritable(fds: Iterable[int], *, inheritable: bool) -> None:
    for fd in fds:
        os.set_inheritable(fd, inheritable)


async def _come_to_rest(daemon: Daemon) -> None:
    """Return when nothing is under way, with signals held; raises UnavailableError when that takes too long."""
    busy: list[str] = []
    try:
        async with asyncio.timeout(REST_SECONDS):
            if daemon.runners is not None:
                await daemon.runners.pause()
            daemon.rest.come()
            await daemon.services.drop_console()
            await daemon.runtime.pool.close()
            await _until_idle(daemon, busy)
            if not await asyncio.to_thread(daemon.notifier.pause, _NOTIFIER_SECONDS):
                busy[:] = ["the answer to a denied system call"]
                raise TimeoutError
            await _until_idle(daemon, busy, threads=True)
            while not await _signals_held(daemon):
                await _until_idle(daemon, busy, threads=True)
    except TimeoutError:
        why = f"not at rest after {REST_SECONDS:g} s: {', '.join(busy)}"
        raise UnavailableError("reload", why, "ask again when that has ended") from None


def end_threads() -> None:
    """Have the threads of the event loop end, each once it has nothing to do; later work gets others."""
    loop = asyncio.get_running_loop()
    before: ThreadPoolExecutor | None = vars(loop)["_default_executor"]  # made by the loop when it is used first
    loop.set_default_executor(ThreadPoolExecutor())
    if before is not None:
        before.shutdown(wait=False)  # without it they end only when nobody refers to it: a cycle may, for long


async def _signals_held(daemon: Daemon) -> bool:
    """Let signals wait, once those that came before have been seen to; False: something is under way again, and not.

    An exec would lose one that this process has received and whose handler the event loop has not called yet.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    if not _under_way(daemon, threads=True):
        return True
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return False


async def _until_idle(daemon: Daemon, busy: list[str], *, threads: bool = False) -> None:
    """Wait until nothing is under way; ``busy`` names meanwhile what is. ``threads``: end those of the loop, too.

    What has begun by itself meanwhile (a changed policy is read, folders are looked through) may have made new ones.
    """
    while True:
        if threads:
            end_threads()
        busy[:] = _under_way(daemon, threads=threads)
        if not busy:
            return
        await asyncio.sleep(_LOOK)


def _under_way(daemon: Daemon, *, threads: bool) -> list[str]:
    """Have no request begun any more; returns what is under way."""
    for service in daemon.services.every:
        if service.channel is not None:
            service.channel.hold(REPEATED)
    expected = daemon.table.plugins or daemon.runners is not None  # a cage: then the state has who keeps it
    launcher = daemon.runtime.launcher if expected else daemon.runtime.present_launcher
    return [
        *daemon.table.under_way,
        *(daemon.runners.under_way if daemon.runners is not None else []),
        *(service.unsettled for service in daemon.services.every if service.unsettled),
        *(["the launcher"] if launcher is not None and (launcher.closed.is_set() or launcher.unsettled) else []),
        *(_threads() if threads else ()),
    ]


def _threads() -> list[str]:
    """The names of every thread but the main one, by the kernel's list: some are none of ``threading``'s."""
    named = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    return [named.get(one, "a thread") for one in os.listdir("/proc/self/task") if one != str(os.getpid())]


def _go_on(daemon: Daemon) -> None:
    daemon.notifier.go_on()
    if daemon.runners is not None:
        daemon.runners.go_on()
    for service in daemon.services.every:
        if service.channel is not None:
            service.channel.go_on()
    _stay(daemon)
    daemon.runtime.pool.reopen()
    daemon.rest.go_on()
    daemon.table.expect_starts(others=daemon.runners is not None)
    daemon.fences.go_on()


def _stay(daemon: Daemon) -> None:
    """Close the descriptors that a state of the daemon names and that nothing else needs."""
    for plugin in daemon.table.plugins.values():
        for run in plugin.runs:
            run.stay()


def daemon_state(daemon: Daemon, generation: int, began: float) -> DaemonState:
    """The state of the daemon at this moment; it can be gone on from only while nothing is under way."""
    runtime = daemon.runtime
    subtree, services, launcher = runtime.subtree, daemon.services, runtime.present_launcher
    return DaemonState(
        version=isolator.__version__,
        generation=generation,
        began=began,
        journal=runtime.journal.descriptor,
        launcher=launcher.link if launcher is not None else -1,
        launcher_pid=launcher.pid if launcher is not None else 0,
        subtree=SubtreeState(
            unified=str(subtree.unified),
            v1={name: str(path) for name, path in subtree.v1.items()},
            on_v2=tuple(sorted(subtree.on_v2)),
            blkio=str(subtree.blkio) if subtree.blkio is not None else None,
            cpuset=str(subtree.cpuset) if subtree.cpuset is not None else None,
        ),
        plugins=tuple(plugin.hand_over() for plugin in daemon.table.plugins.values()),
        services=tuple(service.hand_over() for service in services.every if not service.unsettled),
        audit=services.audit.hand_over(),
        tickets=daemon.tickets.hand_over(),
        alarms=daemon.alarms.hand_over(),
        alarm_ends=daemon.alarms.ends,
        control_opens=services.host.door.opens,
        found=tuple(found.entry() for found in daemon.table.discovery.found.values()),
        staged=daemon.table.registrar.hand_over(),
        runners=daemon.runners.hand_over() if daemon.runners is not None else None,
    )
