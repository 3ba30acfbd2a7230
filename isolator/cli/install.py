"""``isolator install`` and ``uninstall``: users, folders, default policies, the systemd unit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from isolator.errors import IsolatorError
from isolator.paths import Paths

UNIT = Path("/etc/systemd/system/isolator.service")


@click.command(epilog="\b\nExample:\n  sudo isolator install")
@click.option("--start/--no-start", default=True, help="Enable and start the service (default: yes).")
@click.pass_obj
def install(root: str | None, start: bool) -> None:
    """Install the systemd service: unit, folders, a commented host.toml."""
    _need_root("install")
    paths = Paths.of(root)
    paths.policies.mkdir(parents=True, exist_ok=True)
    example = Path(__file__).parents[2] / "policies" / "host.toml"
    if not paths.host_toml.exists() and example.exists():
        shutil.copyfile(example, paths.host_toml)
        paths.host_toml.chmod(0o644)
        click.echo(f"wrote {paths.host_toml}")
    if not Path("/run/systemd/system").exists():
        raise IsolatorError("systemd", "it does not run this host", f"start the daemon yourself: {sys.argv[0]} serve")
    program = Path(sys.argv[0]).resolve()
    UNIT.write_text(_UNIT.format(program=program, root=f" --root {paths.root}" if paths.instance else ""))
    click.echo(f"wrote {UNIT}")
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    if start:
        subprocess.run(["systemctl", "enable", "--now", UNIT.name], check=True)
        click.echo("isolator.service is enabled and running")


@click.command(epilog="\b\nExamples:\n  sudo isolator uninstall\n  sudo isolator uninstall --purge --yes")
@click.option("--purge", is_flag=True, help="Also delete plugins, state, config, queue, trail and their users.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def uninstall(root: str | None, purge: bool, yes: bool) -> None:
    """Remove the service; with --purge everything that this root holds."""
    _need_root("uninstall")
    paths = Paths.of(root)
    if purge and not yes:
        click.confirm(f"Delete every plugin, its state and the audit trail below {paths.root}?", abort=True)
    if not paths.instance and UNIT.exists():
        subprocess.run(["systemctl", "disable", "--now", UNIT.name], check=False)
        UNIT.unlink()
        subprocess.run(["systemctl", "daemon-reload"], check=False)
        click.echo(f"removed {UNIT}")
    if purge:
        _purge(paths)


def _purge(paths: Paths) -> None:
    from isolator import abandoned, recovery
    from isolator.journal import Journal
    from isolator.layers.user import remove_user
    from isolator.store import Store

    journal = Journal(paths.journal)  # refused while a daemon runs here
    try:
        recovery.clear(paths, journal)
        abandoned.clear(paths)
        recovery.remove_subtree(paths)
    finally:
        journal.close()
    users = [paths.named(f"isolator-{name}") for name in ("audit", "net", "host")]
    if paths.plugins.exists():
        store = Store(paths.plugins)
        users += [store.load(name).user for name in store.names()]
    for user in users:
        remove_user(user)
    for folder in (paths.lib, paths.log, paths.etc, paths.run):
        if folder.exists():
            shutil.rmtree(folder)
            click.echo(f"removed {folder}")


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise IsolatorError(what, "it changes the system", f"run it with sudo: sudo isolator {what}")


_UNIT = """\
[Unit]
Description=Isolator: runs untrusted plugins in cages
Documentation=man:isolator(8)
After=network.target local-fs.target

[Service]
Type=notify
NotifyAccess=main
ExecStart={program}{root} serve
Restart=on-failure
RestartSec=1
WatchdogSec=30
Delegate=yes
KillMode=mixed
TimeoutStopSec=90
LimitNOFILE=65536
OOMScoreAdjust=-500
UMask=0022
LockPersonality=yes
RestrictRealtime=yes
ProtectClock=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""
