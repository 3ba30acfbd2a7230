"""``isolator install`` and ``uninstall``: users, folders, policies, the systemd unit, completions, man pages.

Safe to repeat: an upgrade is the same command from the new version. What an operator may have changed (``host.toml``,
policies, a drop-in of the unit) is never written over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import click

from isolator.cli.output import confirm, need_root
from isolator.errors import IsolatorError
from isolator.paths import Paths

PACKAGE = Path("/usr/lib/isolator/dist")
"""There while the Debian package is installed (packaging/build.py)."""
LINK = Path("/usr/local/bin/isolator")
COMPLETIONS = {
    "bash": Path("/usr/share/bash-completion/completions/isolator"),
    "zsh": Path("/usr/local/share/zsh/site-functions/_isolator"),
    "fish": Path("/usr/share/fish/vendor_completions.d/isolator.fish"),
}
MAN_PAGES = Path("/usr/local/share/man/man1")
_REFUSED, _OUTDATED = "refused, and nothing has changed", "goes on as before the reload"
"""Words of ``isolator reload`` when a daemon that knows reloads does not do this one, or not the whole of it."""


@click.command(
    epilog="\b\nExamples:\n  sudo isolator install\n  sudo isolator install --no-start\n  isolator install --print-unit"
)
@click.option("--start/--no-start", default=True, help="Enable and start the service (default: yes).")
@click.option("--print-unit", is_flag=True, help="Print the unit that would be written, and do nothing.")
@click.pass_obj
def install(root: str | None, start: bool, print_unit: bool) -> None:
    """Install the systemd service, its users, folders, host.toml, completions, man pages.

    The code and its dependencies are copied to a folder of their own below /opt/isolator first, from which the service
    runs. Repeat it to upgrade: host.toml and policies stay as they are.
    """
    from isolator.cli import environment
    from isolator.cli.unit import unit

    paths, program = Paths.of(root), environment.program()
    if print_unit:
        click.echo(unit(program, paths), nl=False)
        return
    need_root("install", "it changes the system")
    if PACKAGE.exists():
        why = "the Debian package isolator is installed, and this would be a second service"
        raise IsolatorError("install", why, "upgrade that, or 'apt-get remove isolator' (plugins and trail stay)")
    if not Path("/run/systemd/system").exists():
        raise IsolatorError("systemd", "it does not run this host", "start the daemon yourself: isolator serve")
    _refuse_unfit_host(paths)
    environment.make_stable()
    click.echo(f"the service runs {program}")
    _make_folders(paths)
    _make_users(paths)
    _link(program)
    _write_completions(program)
    _write_man_pages(program)
    place = _unit_path(paths)
    place.write_text(unit(program, paths))
    click.echo(f"wrote {place}")
    _systemctl("daemon-reload")
    if not start:
        return
    _systemctl("enable", "--quiet", place.name)
    if _run("systemctl", "is-active", "--quiet", place.name).returncode == 0 and _reload(program, paths):
        click.echo(f"{place.name} was reloaded: its plugins run on, and the unit itself takes effect at a restart")
    else:
        _systemctl("restart", place.name)
        click.echo(f"{place.name} is enabled and running")
    environment.remove_old()


@click.command(epilog="\b\nExamples:\n  sudo isolator uninstall\n  sudo isolator uninstall --purge --yes")
@click.option("--purge", is_flag=True, help="Also delete plugins, state, config, queue, trail and their users.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask; needed where nobody can be asked.")
@click.pass_obj
def uninstall(root: str | None, purge: bool, yes: bool) -> None:
    """Remove the service; with --purge everything that this root holds."""
    need_root("uninstall", "it changes the system")
    paths = Paths.of(root)
    if PACKAGE.exists() and not paths.instance:
        remedy = f"apt-get {'purge' if purge else 'remove'} isolator"
        raise IsolatorError("uninstall", "this service is the Debian package isolator's", remedy)
    if purge and not yes:
        confirm("uninstall --purge", f"Delete every plugin, its state and the audit trail below {paths.root}?")
    place = _unit_path(paths)
    if place.exists():
        _systemctl("disable", "--now", "--quiet", place.name, check=False)
        place.unlink()
        _systemctl("daemon-reload", check=False)
        click.echo(f"removed {place}")
    elif not purge:
        click.echo("no service is installed; --purge removes plugins, state and trail", err=True)
    if purge:
        from isolator.cli.purge import purge_root

        for folder in purge_root(paths):
            click.echo(f"removed {folder}")
    if not paths.instance:
        _remove_program()


def _unit_path(paths: Paths) -> Path:
    return Path(f"/etc/systemd/system/{paths.named('isolator')}.service")


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _systemctl(*arguments: str, check: bool = True) -> None:
    result = _run("systemctl", *arguments)
    if check and result.returncode != 0:
        unit = arguments[-1]
        why = result.stderr.strip().splitlines()[0] if result.stderr else "it failed"
        remedy = f"journalctl -u {unit} -n 20" if unit.endswith(".service") else "see the journal"
        raise IsolatorError(f"systemctl {' '.join(arguments)}", why, remedy)


def _reload(program: Path, paths: Paths) -> bool:
    """Have the daemon that runs execute the new version; False when it is of a version that cannot.

    Raises IsolatorError when it can and refuses: then it, or the service that is named, still is of the version before.
    """
    root = ["--root", str(paths.root)] if paths.instance else []
    result = _run(program, *root, "reload")
    why = result.stderr.strip().removeprefix("isolator: ")
    if result.returncode and (_REFUSED in why or _OUTDATED in why):
        raise IsolatorError("upgrade", why, f"mend that and repeat it, or 'systemctl restart {_unit_path(paths).name}'")
    return result.returncode == 0


def _refuse_unfit_host(paths: Paths) -> None:
    """Raise IsolatorError for whatever would keep the daemon from starting, before anything is changed."""
    from isolator.layers.ledger import missing
    from isolator.policy.parse.trusted import load_host_config

    config = load_host_config(paths.host_toml)
    for control in missing(frozenset(config.may_degrade)):
        raise IsolatorError(f"this host cannot enforce {control.name}", control.reason, control.remedy)


def _make_folders(paths: Paths) -> None:
    from isolator.cli.environment import shipped

    for folder in (paths.etc, paths.policies, paths.lib, paths.log):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
    if not paths.host_toml.exists():
        shutil.copyfile(shipped("policies/host.toml"), paths.host_toml)
        paths.host_toml.chmod(0o644)
        click.echo(f"wrote {paths.host_toml}")


def _make_users(paths: Paths) -> None:
    from isolator.cli.purge import SERVICES
    from isolator.layers.user import add_service_user

    for service in SERVICES:
        add_service_user(paths.named(f"isolator-{service}"), comment=f"Isolator {service}")


def _link(program: Path) -> None:
    """Put the command on every PATH, sudo's included; a file of somebody else's is left alone."""
    if LINK.is_symlink() or not LINK.exists():
        temporary = LINK.with_name(f".isolator.{os.getpid()}")
        LINK.parent.mkdir(parents=True, exist_ok=True)
        temporary.symlink_to(program)
        temporary.rename(LINK)
    else:
        click.echo(f"{LINK} is not ours and stays as it is; the command is {program}")


def _write_completions(program: Path) -> None:
    """Write click's completions for bash, and for the other shells that are installed."""
    for shell, path in COMPLETIONS.items():
        if shell != "bash" and shutil.which(shell) is None:
            continue
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "_ISOLATOR_COMPLETE": f"{shell}_source",
            "LANG": "C.UTF-8",
        }
        result = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
        if result.returncode == 0 and result.stdout:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(result.stdout)


def _write_man_pages(program: Path) -> None:
    """Have the program that was installed write its pages: the commands are known above this package alone."""
    result = _run(program, "man", MAN_PAGES)
    if result.returncode:
        click.echo(f"no man pages: {result.stderr.strip()}", err=True)


def _remove_program() -> None:
    from isolator.cli import environment

    for page in MAN_PAGES.glob("isolator*.1"):
        page.unlink()
    for path in COMPLETIONS.values():
        path.unlink(missing_ok=True)
    if LINK.is_symlink() and "isolator" in str(LINK.readlink()):
        LINK.unlink()
    for place in environment.remove_all():
        click.echo(f"removed {place}")
