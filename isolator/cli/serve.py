"""``isolator serve``: the daemon in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

import click

from isolator.ipc.tasks import Tasks
from isolator.linux import daemon_log
from isolator.linux.coredump import leave_memory_out, let_children_start_no_handler
from isolator.linux.descriptors import allow_many_files
from isolator.paths import Paths

_EXTENSION_SECONDS = 120


@click.command(epilog="\b\nExamples:\n  isolator serve\n  isolator --root /tmp/try serve")
@click.option("--config", metavar="FILE", help="Read FILE instead of /etc/isolator/host.toml.")
@click.pass_obj
def serve(root: str | None, config: str | None) -> None:
    """Run the daemon in the foreground.

    Prints 'isolator: ready' on stdout when it accepts commands (and tells systemd). SIGTERM or ^C stops it and
    every plugin cleanly, and so does the end of the terminal that it was started from. Without a terminal, SIGHUP is
    ignored.
    """
    from isolator.policy.parse.load import load_host_config
    from isolator.supervisor.supervisor import running_daemon

    paths = Paths.of(root)
    host_config = load_host_config(Path(config) if config else paths.host_toml)

    async def main() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup(1) keeps it so
            loop.add_signal_handler(signal.SIGHUP, stopping.set if _has_terminal() else _ignore)
        extending, watchdog = Tasks(), Tasks()
        extending.keep("extension of the start", _extend_timeout)
        async with running_daemon(paths, host_config, progress=_notify_progress):
            try:
                click.echo("isolator: ready")
                _notify("READY=1\nSTATUS=")
                extending.cancel()
                watchdog.keep("watchdog", _watchdog)
                await stopping.wait()
                watchdog.cancel()
            finally:
                _notify("STOPPING=1")
                extending.keep("extension of the stop", _extend_timeout)
        extending.cancel()

    daemon_log.set_up()
    os.umask(0o022)
    leave_memory_out()
    let_children_start_no_handler()
    allow_many_files()
    asyncio.run(main())


def _has_terminal() -> bool:
    """Whether one of the standard streams is a terminal, whose end (SIGHUP) is then the daemon's."""
    return any(map(os.isatty, range(3)))


def _ignore() -> None:
    """Do nothing: unlike SIG_IGN, a handler is not inherited by what is started."""


def _notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); nothing when it did not start us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(state.encode())


def _notify_progress(step: str) -> None:
    """Tell systemd which step of the start begins; each has the time of a whole start (TimeoutStartSec=)."""
    _notify(f"EXTEND_TIMEOUT_USEC={_EXTENSION_SECONDS * 1_000_000}\nSTATUS={step}")


async def _extend_timeout() -> None:
    """Extend the time for the start or the stop while the event loop turns: its waits have deadlines of their own."""
    while True:
        _notify(f"EXTEND_TIMEOUT_USEC={_EXTENSION_SECONDS * 1_000_000}")
        await asyncio.sleep(_EXTENSION_SECONDS / 6)


async def _watchdog() -> None:
    """Feed systemd's watchdog from the event loop: a loop that hangs is a daemon that hangs."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    if not interval:
        await asyncio.Event().wait()
    while True:
        _notify("WATCHDOG=1")
        await asyncio.sleep(interval)
