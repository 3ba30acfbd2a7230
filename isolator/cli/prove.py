"""``isolator prove``: attack a cage from inside and show what held."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from isolator.cli.output import here, print_json
from isolator.cli.progress import Progress
from isolator.errors import ConfinementError, UsageError
from isolator.paths import Paths

if TYPE_CHECKING:
    from isolator.layers.base import CageSpec
    from isolator.policy.host import HostConfig
    from isolator.probe.run import Finding, Target
    from isolator.standalone.session import StandaloneSession

_WIDTH = 80
_MARKS = {"held": "held", "through": "GOT THROUGH", "broken": "NO RESULT"}


@click.command(
    epilog="\b\nExamples:\n  sudo isolator prove\n  sudo isolator prove slack-deploy-notifier\n"
    "  sudo isolator prove --policy policies/profiles/strict.toml --json | jq '.findings[] | select(.succeeded)'",
)
@click.argument("plugin", required=False)
@click.option(
    "--policy", "policy_file", metavar="FILE", type=click.Path(path_type=Path), help="Take the grants of FILE."
)
@here
def prove(root: str | None, plugin: str | None, policy_file: Path | None, as_json: bool) -> None:
    """Attack a cage from inside and show what held.

    The cage is built as `isolator run` builds it, or exactly like PLUGIN's: its user, its policy, its files; only its
    state folder is an empty one of the same size. Needs no running daemon and stops nothing. Exits 1 when an attempt
    got through, or could not be made.
    """
    if plugin is not None and policy_file is not None:
        raise click.UsageError("name a plugin or --policy, not both")
    if os.geteuid() != 0:
        raise ConfinementError("isolator prove", "building a cage needs root", "run it with sudo")
    findings = asyncio.run(_prove(Paths.of(root), plugin, policy_file, as_json))
    failed = [finding for finding in findings if finding.outcome != "held"]
    if as_json:
        body = {
            "plugin": plugin,
            "held": len(findings) - len(failed),
            "findings": [finding.to_json() for finding in findings],
        }
        print_json(body)
    else:
        click.echo(f"\n{_verdict(findings)}")
    if failed:
        raise SystemExit(1)


async def _prove(paths: Paths, plugin: str | None, policy_file: Path | None, as_json: bool) -> list[Finding]:
    from isolator.standalone.session import StandaloneSession

    async with StandaloneSession(paths) as session:
        from isolator.policy.parse.trusted import load_host_config
        from isolator.probe.run import attack, attempts_at
        from isolator.standalone.records import Records

        host = load_host_config(paths.host_toml)
        making = plugin_target(session, host, plugin) if plugin else policy_target(session, host, policy_file)
        findings = []
        with contextlib.closing(Records(None, "prove", quiet=True)) as records, making as target:
            table, names = _Table(), attempts_at(target)
            # On a terminal the table itself shows how far it is.
            with Progress("attacking", len(names), quiet=as_json or sys.stdout.isatty()) as progress:
                async for finding in attack(session, target, records, names):
                    findings.append(finding)
                    progress.advance()
                    if not as_json:
                        table.add(finding)
        return findings


@contextlib.contextmanager
def policy_target(session: StandaloneSession, host: HostConfig, policy_file: Path | None) -> Iterator[Target]:
    """A cage as ``isolator run`` makes it."""
    from isolator.policy.meet.single_run import policy_for_run
    from isolator.probe.run import Target
    from isolator.standalone.session import run_spec

    policy = policy_for_run(host, policy_file)
    lease = session.lease(host)

    def spec(run: str, argv: list[str], owned: list[int]) -> CageSpec:
        return run_spec(session.paths, policy, argv, run, lease.uid, owned)

    yield Target(spec, host, inline=policy.syscalls == "strict")


@contextlib.contextmanager
def plugin_target(session: StandaloneSession, host: HostConfig, name: str) -> Iterator[Target]:
    """A cage like a plugin's, with an empty state folder of the same size in place of its own."""
    import secrets

    from isolator.ipc.messages import Environment
    from isolator.probe.run import Target
    from isolator.registration.proposals import Proposals
    from isolator.supervisor.cage_spec import open_state, plugin_spec
    from isolator.volume.volume import Volume

    loaded = Proposals(session.paths, host).load(name)
    if loaded.proposal is None:
        raise UsageError(f"plugin {name}", loaded.error, f"isolator plugin show {name}")
    effective = loaded.proposal.effective
    base = session.paths.lib / f"prove-{secrets.token_hex(5)}"
    session.permit(host)
    state = Volume(base, name, session.runtime.journal)

    def spec(run: str, argv: list[str], owned: list[int]) -> CageSpec:
        folder = open_state(loaded.registration, effective, state)
        if folder >= 0:
            owned.append(folder)
        return plugin_spec(
            loaded.registration, effective, argv, session.paths, run, Environment(), folder, name, owned.append
        )

    try:
        yield Target(spec, host, inline=effective.syscalls == "strict")
    finally:
        state.remove()
        with contextlib.suppress(FileNotFoundError):
            base.rmdir()


class _Table:
    """Findings as they come, under a heading for each layer."""

    def __init__(self) -> None:
        self._width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, 100)
        self._layer = ""

    def add(self, finding: Finding) -> None:
        from isolator.probe.attacks.kit import ATTEMPTS

        # What may take the cage down comes last, each in one of its own.
        layer = f"{finding.layer}, a cage for each" if ATTEMPTS[finding.name].alone else finding.layer
        if layer != self._layer:
            click.echo(f"\n{layer}" if self._layer else layer)
            self._layer = layer
        for line in self._lines(finding):
            click.echo(line)

    def _lines(self, finding: Finding) -> list[str]:
        head = f"  {_MARKS[finding.outcome]:<5} {finding.title}"
        if finding.outcome == "held":
            room = self._width - len(head) - 3
            detail = f" ({finding.detail})" if 0 < len(finding.detail) <= room else ""
            return [(head + detail)[: self._width]]
        return textwrap.wrap(f"{head}: {finding.detail}", self._width, subsequent_indent="      ")


def _verdict(findings: list[Finding]) -> str:
    through = [finding.name for finding in findings if finding.outcome == "through"]
    broken = [finding.name for finding in findings if finding.outcome == "broken"]
    if through:
        return f"NOT CONTAINED: {len(through)} of {len(findings)} attempts got through: {', '.join(through)}."
    if broken:
        some = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        return f"Not proved: {len(broken)} of {len(findings)} attempts gave no result: {some}."
    return f"All {len(findings)} attempts were stopped."
