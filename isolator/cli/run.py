"""``isolator run``: one command in one cage, without a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isolator.errors import ConfinementError, IsolatorError
from isolator.paths import Paths

if TYPE_CHECKING:
    from isolator.cage.cage import Cage
    from isolator.cage.processes import CageExit
    from isolator.policy.host import HostConfig
    from isolator.policy.meet.single_run import Net
    from isolator.policy.model import EffectivePolicy


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="\b\nExample: an agent's tools, on a project folder:\n"
    '  isolator run --write "$PWD" --cwd "$PWD" -- sh -c "$TOOL_CALL"\n'
    "\b\nExample: a build:\n"
    '  isolator run --write "$PWD" --cwd "$PWD" --tasks 256 --cpu 200% -- make -j2\n'
    "\b\nExample: an MCP server, with its token in a file:\n"
    "  isolator run --read /opt/weather --env-file weather.env \\\n"
    "    --egress api.example.com:443 -- python3 /opt/weather/server.py",
)
@click.option(
    "--policy", "policy_file", metavar="FILE", type=click.Path(path_type=Path), help="Take the grants of FILE."
)
@click.option("--memory", metavar="SIZE", help="Memory cap, e.g. 64M (default 256M).")
@click.option("--cpu", metavar="SHARE", help="Share of one core, e.g. 25% (the default) or 200%.")
@click.option("--tasks", metavar="N", type=int, help="Processes and threads at once (default 64).")
@click.option("--egress", metavar="HOST:PORT", multiple=True, help="Let it reach HOST:PORT; may be repeated.")
@click.option("--read", metavar="PATH", multiple=True, help="Show PATH read-only at the same place; may be repeated.")
@click.option("--write", metavar="DIR", multiple=True, help="Let it change DIR, at the same place; may be repeated.")
@click.option(
    "--net", type=click.Choice(["none", "names", "public"]), help="No network; what --egress names; any public address."
)
@click.option(
    "--env", metavar="NAME[=VALUE]", multiple=True, help="Set a variable, or let this one through; may be repeated."
)
@click.option(
    "--env-file", metavar="FILE", multiple=True, type=click.Path(path_type=Path), help="Set those of FILE, one a line."
)
@click.option("--cwd", metavar="DIR", default="/", help="Start in DIR, which --read or --write shows (default /).")
@click.option("--tmp", metavar="SIZE", help="Size of /tmp, in memory (default 32M).")
@click.option("--nofile", metavar="N", type=int, help="Open files at once (default 1024).")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal of its own, joined to this one.")
@click.option("--audit", metavar="FILE", type=click.Path(path_type=Path), help="Append its records to FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print how it ended as JSON on stderr.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run(
    root: str | None,
    policy_file: Path | None,
    memory: str | None,
    cpu: str | None,
    tasks: int | None,
    egress: tuple[str, ...],
    read: tuple[str, ...],
    write: tuple[str, ...],
    net: Net | None,
    env: tuple[str, ...],
    env_file: tuple[Path, ...],
    cwd: str,
    tmp: str | None,
    nofile: int | None,
    tty: bool,
    audit: Path | None,
    as_json: bool,
    command: tuple[str, ...],
) -> None:
    """Run one COMMAND in a cage, with this terminal's input and output.

    It gets a free uid, no network unless --egress or --net, /usr read-only and 32 MiB of /tmp; the current folder is
    not visible unless named with --read or --write; what it makes there with --write belongs to the caller. Exits with
    the command's code (128 + signal if killed), or 125 if the cage could not be built.
    """
    if not command:
        raise click.UsageError("no command; write it after '--', e.g. isolator run -- id")
    try:
        if os.geteuid() != 0:
            raise ConfinementError("isolator run", "building a cage needs root", "run it with sudo")
        paths = Paths.of(root)
        folders = tuple("/" + os.path.abspath(path).lstrip("/") for path in write)

        def load() -> tuple[HostConfig, EffectivePolicy]:
            from isolator.policy.meet.single_run import policy_for_run
            from isolator.policy.parse.load import load_host_config

            host = load_host_config(paths.host_toml)
            return host, policy_for_run(
                host, policy_file, memory=memory, cpu=cpu, tasks=tasks, nofile=nofile, tmp=tmp, net=net, egress=egress,
                read=[os.path.abspath(path) for path in read], write=folders, note=_note,
            )  # fmt: skip

        from isolator.standalone.variables import variables

        place = Place(list(command), variables(env, env_file), os.path.abspath(cwd), folders, tty)
        end = asyncio.run(_run(paths, load, place, audit))
    except IsolatorError as error:
        click.echo(f"isolator: {error}", err=True)
        raise SystemExit(2 if error.exit_code == 2 else 125) from None
    if as_json:
        click.echo(json.dumps(_summary(end)), err=True)
    elif end.cause not in ("exit", "signal"):
        click.echo(f"isolator: {command[0]} was ended: {end.cause}", err=True)
    raise SystemExit(end.returncode)


@dataclass(frozen=True)
class Place:
    """The command and its surroundings: variables besides the usual ones, folders, terminal."""

    command: list[str]
    env: dict[str, str]
    cwd: str
    write: tuple[str, ...]
    tty: bool


def _note(text: str) -> None:
    click.echo(f"isolator: note: {text}", err=True)


def _summary(end: CageExit) -> dict[str, Any]:
    return {
        "exit_code": end.exit_code,
        "signal": end.signal,
        "cause": end.cause,
        "seconds": round(end.uptime, 4),
        "oom_kills": end.events.oom_kills,
        "task_denials": end.events.task_denials,
    }


async def _run(
    paths: Paths, load: Callable[[], tuple[HostConfig, EffectivePolicy]], place: Place, audit: Path | None
) -> CageExit:
    from isolator.linux.descriptors import close_all
    from isolator.standalone.session import StandaloneSession, run_spec
    from isolator.standalone.terminal import CageTerminal, streams_restored

    # The launcher starts on the other core while the policy's modules load here.
    async with StandaloneSession(paths) as session:
        host, policy = load()
        from isolator.audit.schema import CageStopped
        from isolator.cage.cage import Stdio
        from isolator.standalone.records import Records

        run_id = secrets.token_hex(5)
        with contextlib.ExitStack() as stack:
            stack.enter_context(streams_restored())
            records = Records(audit, run_id)
            stack.callback(records.close)
            lease = session.lease(host)
            owned: list[int] = []
            stack.callback(close_all, owned)
            terminal = CageTerminal(lease.uid) if place.tty else None
            if terminal is not None:
                stack.callback(terminal.close)
            spec = run_spec(
                paths, policy, place.command, run_id, lease.uid, owned,
                env=place.env, cwd=place.cwd, write=place.write, terminal=terminal,
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
                for missed in early:
                    _forward(loop, cage, missed)
                end = await cage.wait()
                records.record(CageStopped(**_summary(end)))
            if terminal is not None:
                await terminal.finish()
            return end


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
