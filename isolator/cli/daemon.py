"""The daemon in the foreground: what ``isolator serve`` does once its line is read, by click or without it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.errors import IsolatorError
from isolator.ipc.tasks import Tasks
from isolator.linux import daemon_log
from isolator.linux.coredump import leave_memory_out, let_children_start_no_handler
from isolator.linux.descriptors import allow_many_files
from isolator.linux.garbage import spare_the_collector
from isolator.linux.systemd import notify
from isolator.paths import Paths

if TYPE_CHECKING:
    from isolator.ipc.handover import DaemonState

_logger = logging.getLogger(__name__)
_EXTENSION_SECONDS = 120


def run_daemon(
    root: str | None,
    config: str | None = None,
    certifying: bool = False,
    adopt: int | None = None,
    check_handover: int | None = None,
) -> None:
    """Serve until a signal; raises IsolatorError. ``adopt``: the descriptor of a state to go on from."""
    from isolator.supervisor.zygote import Zygotes

    paths = Paths.of(root)
    daemon_log.set_up()
    os.umask(0o022)
    leave_memory_out()
    let_children_start_no_handler()
    allow_many_files()
    zygotes = Zygotes()
    if adopt is None and check_handover is None:
        zygotes.begin()  # it imports what it needs while this process does
    from isolator.supervisor.reload import settings
    from isolator.supervisor.reload.program import Program
    from isolator.supervisor.reload.signals import HELD
    from isolator.supervisor.services import CERTIFYING_HOST, HOST_MODULE
    from isolator.supervisor.supervisor import running_daemon

    if check_handover is not None:
        from isolator.supervisor.reload.trial import check_handover as check

        print(check(paths, config, check_handover))
        return
    before: DaemonState | None = None
    host_file, host_toml = Path(config) if config else paths.host_toml, None
    if adopt is not None:
        from isolator.supervisor.reload.adopt import take_over

        before, host_toml = take_over(adopt)
    program = Program.of_this_process()
    host_config = settings.settings_of(host_toml, host_file)
    host_module = CERTIFYING_HOST if certifying else HOST_MODULE

    async def main() -> None:
        stopping, exchange, hang_up = asyncio.Event(), asyncio.Event(), _HangUp()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        loop.add_signal_handler(signal.SIGUSR1, exchange.set)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup(1) keeps it so
            # Unlike SIG_IGN, a handler is not inherited by what is started.
            loop.add_signal_handler(signal.SIGHUP, stopping.set if _has_terminal() else hang_up)
        if before is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)  # before any child is started, which inherits the mask
            notify("WATCHDOG=1")
        extending, watchdog = Tasks(), Tasks()
        extending.keep("extension of the start", _extend_timeout)
        async with running_daemon(
            paths, host_config, exchange, zygotes, progress=_notify_progress, before=before, host_module=host_module
        ) as daemon:  # fmt: skip

            async def perform(generation: int) -> None:
                from isolator.supervisor.reload.reloader import reload

                await reload(daemon, program, generation, host_file, stopping.is_set)

            try:
                daemon.reloads.perform = perform
                settings.note_change(host_toml, host_file)
                if before is None:
                    print("isolator: ready", flush=True)
                notify("READY=1\nSTATUS=")
                loop.call_soon(spare_the_collector)
                extending.cancel()
                watchdog.keep("watchdog", _watchdog)
                hang_up.allow(daemon.reloads.ask_for_one_more)
                await stopping.wait()
                watchdog.cancel()
            finally:
                notify("STOPPING=1")
                extending.keep("extension of the stop", _extend_timeout)
        extending.cancel()

    asyncio.run(main())


def _has_terminal() -> bool:
    """Whether one of the standard streams is a terminal, whose end (SIGHUP) is then the daemon's."""
    return any(map(os.isatty, range(3)))


class _HangUp:
    """Handler of SIGHUP: a reload. One that comes before the daemon is up, or during another, is done then."""

    def __init__(self) -> None:
        self._reload: Callable[[], object] | None = None
        self._asked = False

    def __call__(self) -> None:
        if self._reload is None:
            self._asked = True
            return
        try:
            self._reload()
        except IsolatorError as error:
            _logger.warning("SIGHUP: %s", error)

    def allow(self, reload: Callable[[], object]) -> None:
        """From now on ``reload`` begins one."""
        self._reload = reload
        if self._asked:
            self()


def _notify_progress(step: str) -> None:
    """Tell systemd which step of the start begins; each has the time of a whole start (TimeoutStartSec=)."""
    notify(f"EXTEND_TIMEOUT_USEC={_EXTENSION_SECONDS * 1_000_000}\nSTATUS={step}")


async def _extend_timeout() -> None:
    """Extend the time for the start or the stop while the event loop turns: its waits have deadlines of their own."""
    while True:
        notify(f"EXTEND_TIMEOUT_USEC={_EXTENSION_SECONDS * 1_000_000}")
        await asyncio.sleep(_EXTENSION_SECONDS / 6)


async def _watchdog() -> None:
    """Feed systemd's watchdog from the event loop: a loop that hangs is a daemon that hangs."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    if not interval:
        await asyncio.Event().wait()
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
