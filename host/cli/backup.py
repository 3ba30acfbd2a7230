"""``isolator backup`` and ``restore``: a daemon's data in a folder, and back; with the daemon running or not."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import click

from host.cli.output import size
from isolator.cli.output import here, need_root, print_json
from isolator.cli.progress import Progress
from isolator.errors import UsageError
from isolator.paths import Paths

_PASSPHRASE = click.option(
    "--passphrase-file", metavar="FILE", type=click.Path(path_type=Path),
    help="Read the passphrase from FILE's first line (default: ask).",
)  # fmt: skip
_SNAPSHOT_SECONDS = 150.0
_WHY_ROOT = "it reads and writes what is root's"


@click.command(
    epilog="\b\nExamples:\n  sudo isolator backup /var/backups/isolator-monday\n"
    "  sudo isolator backup /var/backups/nightly-$(date +%F) --passphrase-file /root/backup.pass"
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@_PASSPHRASE
@here
def backup(root: str | None, directory: Path, passphrase_file: Path | None, as_json: bool) -> None:
    """Copy everything a daemon keeps to DIR, which must be new.

    Database, trail, plugins, policies, host.toml and keys are of one moment, and
    a running daemon goes on; each plugin is frozen while its state is copied.
    The keys are encrypted under the passphrase: without it nothing can be
    restored. Events, stored values and state are not encrypted: files are 0600.
    Logs of plugins, and programs registered by path, are not in it, and named.
    """
    from dataclasses import asdict

    from host.client.client import Client
    from isolator.backup.take import take

    need_root("backup", _WHY_ROOT)
    passphrase = _passphrase(passphrase_file, new=True)

    def snapshot(backup_id: str) -> str:
        with Client(root, timeout=_SNAPSHOT_SECONDS) as client:
            return str(client.call("daemon.snapshot", id=backup_id)["file"])

    with Progress("copying", quiet=as_json):
        made = take(Paths.of(root), directory, passphrase, snapshot)
    if as_json:
        print_json({**asdict(made), "place": str(made.place)})
        return
    plugins = f"{made.plugins} plugin{'' if made.plugins == 1 else 's'}"
    click.echo(f"{made.place}: {plugins}, {size(made.bytes)}, as of {made.taken[:19]}Z (backup {made.id})")
    for line in made.left_out:
        click.echo(line)


@click.command(
    epilog="\b\nExamples:\n  sudo isolator restore /var/backups/isolator-monday\n"
    "  sudo isolator restore /var/backups/isolator-monday --replace"
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@_PASSPHRASE
@click.option("--replace", is_flag=True, help="Put plugins, queue and trail that are here aside, in replaced-TIME.")
@here
def restore(root: str | None, directory: Path, passphrase_file: Path | None, replace: bool, as_json: bool) -> None:
    """Put the backup in DIR in the place of what is here; the daemon must not run.

    All of it is checked first: a backup that is damaged or was changed is
    refused, and nothing has changed then. Users are made where they are missing;
    plugins whose uid is taken here get another. The trail shows the restore.
    """
    from dataclasses import asdict

    from isolator.backup.restore import restore as put_back

    need_root("restore", _WHY_ROOT)
    passphrase = _passphrase(passphrase_file, new=False)
    with Progress("restoring", quiet=as_json):
        done = put_back(Paths.of(root), directory, passphrase, replace_data=replace)
    if as_json:
        print_json(asdict(done))
        return
    click.echo(
        f"restored backup {done.id} of {done.machine}, {done.taken[:19]}Z: {', '.join(done.plugins) or 'no plugin'}"
    )
    if done.moved:
        click.echo(f"with another uid than before: {', '.join(done.moved)}")
    for path in done.binaries:
        click.echo(f"not here, and a plugin runs it: {path}")
    if done.replaced:
        click.echo(f"the data of before are in {done.replaced}, and in folders of that name beside settings and logs")


def _passphrase(file: Path | None, *, new: bool) -> str:
    from isolator.linux.files import read_plain

    if file is not None:
        try:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                raise UsageError(str(file), "can be read by others", f"chmod 600 {file}")
            return read_plain(file.resolve(), most=4096).decode().partition("\n")[0]
        except OSError as error:
            raise UsageError(str(file), error.strerror or "cannot be read", "name a plain file") from None
        except UnicodeDecodeError:
            raise UsageError(str(file), "is no text in UTF-8", "name a plain file") from None
    if not sys.stdin.isatty():
        raise UsageError("passphrase", "there is no terminal to ask on", "use --passphrase-file FILE")
    return str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=new, err=True))
