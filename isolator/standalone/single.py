"""One cage for one command: what ``isolator run`` does once its launcher runs and asyncio is there.

Whatever takes long and needs no thought of this process, the network of the cage, begins first (the parked process has
begun before that: ``beginning``); meanwhile the policy is read here. After each group of modules the event loop has a
turn, so that it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolator.base.structs import replace
from isolator.ipc.tasks import Tasks
from isolator.linux.descriptors import close_all
from isolator.standalone.session import StandaloneSession
from isolator.standalone.streams import SILENT_ENDS, StreamsRestored
from isolator.standalone.variables import variables

if TYPE_CHECKING:
    from isolator.cage.cage import Cage
    from isolator.cage.processes import CageExit
    from isolator.ipc.messages import Origin
    from isolator.policy.host import HostConfig
    from isolator.policy.model import EffectivePolicy
    from isolator.standalone.beginning import Beginning
    from isolator.standalone.options import RunOptions
    from isolator.standalone.terminal import CageTerminal


def run_once(options: RunOptions, beginning: Beginning) -> int:
    """Run the command; returns the exit code. Raises IsolatorError."""
    env = variables(options.env, map(Path, options.env_file))
    end = asyncio.run(_run(options, env, beginning))
    if options.json:
        print(json.dumps(_summary(end)), file=sys.stderr)
    elif end.cause not in SILENT_ENDS:
        print(f"isolator: {options.command[0]} was ended: {end.cause}", file=sys.stderr)
    return end.returncode


def _note(text: str) -> None:
    print(f"isolator: note: {text}", file=sys.stderr)


def _summary(end: CageExit) -> dict[str, Any]:
    return {
        "exit_code": end.exit_code,
        "signal": end.signal,
        "cause": end.cause,
        "seconds": round(end.uptime, 4),
        "oom_kills": end.events.oom_kills,
        "task_denials": end.events.task_denials,
    }


def _policy(options: RunOptions, host: HostConfig) -> EffectivePolicy:
    from isolator.policy.meet.single_run import policy_for_run

    return policy_for_run(
        host, None if options.policy is None else Path(options.policy),
        memory=options.memory, cpu=options.cpu, tasks=options.tasks, nofile=options.nofile, tmp=options.tmp,
        net=options.net, egress=options.egress, read=[os.path.abspath(path) for path in options.read],
        write=_folders(options), note=_note,
    )  # fmt: skip


def _folders(options: RunOptions) -> tuple[str, ...]:
    return tuple("/" + os.path.abspath(path).lstrip("/") for path in options.write)


async def _run(options: RunOptions, env: dict[str, str], beginning: Beginning) -> CageExit:
    paths = beginning.paths
    async with StandaloneSession(paths, beginning) as session:
        await asyncio.sleep(0)
        from isolator.policy.parse.trusted import load_host_config

        host = load_host_config(paths.host_toml)
        policy = _policy(options, host)
        await asyncio.sleep(0)
        from isolator.cage.cage import Stdio
        from isolator.standalone.records import Records
        from isolator.standalone.session import run_spec

        await asyncio.sleep(0)
        run_id = os.urandom(5).hex()
        with contextlib.ExitStack() as stack:
            stack.enter_context(StreamsRestored())
            tasks = Tasks()
            stack.callback(tasks.cancel)
            records = Records(None if options.audit is None else Path(options.audit), run_id)
            stack.callback(records.close)
            lease = session.lease(host)
            owned: list[int] = []
            stack.callback(close_all, owned)
            terminal = _terminal(lease.uid) if options.tty else None
            if terminal is not None:
                stack.callback(terminal.close)
            spec = run_spec(
                paths, policy, list(options.command), run_id, lease.uid, owned,
                env=env, cwd=os.path.abspath(options.cwd or "/"), write=_folders(options), terminal=terminal,
            )  # fmt: skip
            # From before the command runs: one that arrives early is kept for it, and does not end us instead.
            early: list[int] = []
            loop = asyncio.get_running_loop()
            for number in _FORWARDED:
                loop.add_signal_handler(number, early.append, number)
            stdio = Stdio(0, 1, 2) if terminal is None else Stdio(*[terminal.stream] * 3)
            async with session.cage(spec, host, stdio, records) as cage:
                for number in _FORWARDED:
                    loop.add_signal_handler(number, _forward, loop, cage, number)
                if terminal is not None:
                    loop.add_signal_handler(signal.SIGWINCH, terminal.resize)
                    terminal.join()
                gc.freeze()  # what was imported is no garbage
                gc.enable()
                for missed in early:
                    _forward(loop, cage, missed)
                command = _Command(cage)
                tasks.keep("memory of TCP", lambda: _look_at_memory(command))
                end = await cage.wait()
                if command.ended_for:
                    end = replace(end, cause=command.ended_for)
                if records.keeps_all:
                    from isolator.audit.schema import CageStopped

                    records.record(CageStopped(**_summary(end)))
            if terminal is not None:
                await terminal.finish()
                if end.cause not in SILENT_ENDS:
                    terminal.end_line()
            return end


class _Command:
    """The command in its cage, for who ends it."""

    def __init__(self, cage: Cage) -> None:
        self.cage, self.ended_for = cage, ""

    def terminate(self, cause: str, _: Origin) -> None:
        """End it at once, for that cause."""
        self.ended_for = cause
        self.cage.kill()


async def _look_at_memory(command: _Command) -> None:
    await asyncio.sleep(1.0)  # most commands have ended by then, and do not wait for the modules
    from isolator.cage.tcp_memory import keep_tcp_memory

    await keep_tcp_memory(lambda: [command])


def _terminal(uid: int) -> CageTerminal:
    from isolator.cage.terminal import new_terminal
    from isolator.linux.descriptors import FdSet
    from isolator.standalone.terminal import CageTerminal

    with FdSet() as owned:
        mount, master, stream = new_terminal(uid, owned)
        owned.release_all()
        return CageTerminal(master, mount, stream)


def _forward(loop: asyncio.AbstractEventLoop, cage: Cage, number: int) -> None:
    """Pass a signal on to the cage's foreground process group; a stop stops this process too."""
    cage.signal(number)
    if number == signal.SIGTSTP:
        loop.remove_signal_handler(number)  # the kernel's own stop: it knows whether somebody is there to go on
        os.kill(os.getpid(), number)
        loop.add_signal_handler(number, _forward, loop, cage, number)
        cage.signal(signal.SIGCONT)


_FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT,
)  # fmt: skip
"""The cage has a session of its own, so a terminal's signals do not reach it by themselves."""
