"""``isolator plugin add`` and ``update``: from a folder, a single binary, or a package of a registry."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import click

from host.cli import arguments
from host.cli.options import CONFIG, NAME, VERBOSE, here, yes
from host.cli.registration import AS_LONG_AS_STARTS_TAKE, register_plugin, update_plugin
from host.client.client import Client
from isolator.errors import UsageError
from isolator.paths import Paths


@click.command(
    epilog="\b\nExamples:\n  isolator plugin add ./slack-deploy-notifier --config slack_webhook_url=@url.txt\n"
    "  isolator plugin add --name indexer --binary /opt/indexer --hooks deploy.completed\n"
    "  isolator plugin add ./plugin --yes --config token=- < token.txt\n"
    "  isolator plugin add deploy-bell-1.0.0.isolator\n"
    "  isolator plugin add --mcp npm:@scope/server@1.2.3 --egress api.example.com:443\n"
    "  isolator plugin add --mcp pypi:mcp-server-time==2025.9.25 --arg=--local-timezone=UTC"
)
@click.argument("folder", metavar="[DIR | FILE]", required=False)
@click.option("--name", metavar="N", help="Register a single binary under this name.")
@click.option("--binary", metavar="P", help="The binary; it stays where it is.")
@click.option("--hooks", metavar="A,B", help="Events; of a plugin.json beside it only these.")
@click.option("--files", metavar="DIR", help="A folder that is visible beside the binary.")
@click.option("--mcp", metavar="PACKAGE", help="An MCP server: npm:NAME@VERSION or pypi:NAME==VERSION.")
@click.option("--program", metavar="P", help="Which program of the package, if it has several.")
@click.option("--arg", "args", metavar="A", multiple=True, help="An argument for it; repeatable.")
@click.option("--egress", metavar="HOST:PORT", multiple=True, help="What it asks to reach; repeatable.")
@CONFIG
@yes()
@VERBOSE
@here
def add(
    root: str | None,
    folder: str | None,
    name: str | None,
    binary: str | None,
    hooks: str | None,
    files: str | None,
    mcp: str | None,
    program: str | None,
    args: tuple[str, ...],
    egress: tuple[str, ...],
    config: tuple[str, ...],
    yes: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Register a plugin: show what it asks for and would get, ask, and do it.

    It is a folder, or a FILE that 'isolator pack' has made. With --mcp the
    package is fetched in a cage that reaches its registry alone ([packages]
    of host.toml), without running a script of it; it asks for no network but
    what --egress names.
    """
    if mcp is not None:
        if folder or binary or hooks or files:
            raise UsageError("plugin add", "--mcp and DIR, --binary, --hooks, --files exclude each other")
        _add_package(root, mcp, name, program, args, egress, config, yes=yes, verbose=verbose, as_json=as_json)
        return
    if program or args or egress:
        raise UsageError("plugin add", "--program, --arg and --egress go with --mcp", "write them into plugin.json")
    if folder is not None:
        if name or binary or hooks or files:
            raise UsageError("plugin add", "DIR and --name, --binary, --hooks, --files exclude each other")
        request: dict[str, Any] = {"path": arguments.absolute(folder)}
    elif name and binary:
        request = {"name": name, "binary": arguments.absolute(binary), "hooks": _listed(hooks)}
        if files:
            request["files"] = arguments.absolute(files)
    else:
        raise UsageError("plugin add", "name a folder, or give --mcp, or --name, --binary and --hooks", "see --help")
    values, literal = arguments.config_values(config)
    with Client(root) as client:
        register_plugin(client, request, values, literal, yes=yes, verbose=verbose, as_json=as_json)


@click.command(
    epilog="\b\nExamples:\n  isolator plugin update slack ./slack-2.0\n  isolator plugin update slack\n\n"
    "A version that asks for more waits (exit code 5): isolator plugin approve N"
)
@NAME
@click.argument("folder", metavar="[DIR | FILE]", required=False)
@CONFIG
@yes("Agree also if it asks for more than before.")
@VERBOSE
@here
def update(
    root: str | None, name: str, folder: str | None, config: tuple[str, ...], yes: bool, verbose: bool, as_json: bool
) -> None:
    """Take over a newer version from DIR or FILE, or from where the last one came from.

    If it is not up in time, the version before comes back by itself.
    """
    request: dict[str, Any] = {"update": name}
    if folder is not None:
        request["path"] = arguments.absolute(folder)
    values, literal = arguments.config_values(config)
    with Client(root, timeout=AS_LONG_AS_STARTS_TAKE) as client:
        update_plugin(client, request, values, literal, yes=yes, verbose=verbose, as_json=as_json)


def _add_package(
    root: str | None, text: str, name: str | None, program: str | None, args: tuple[str, ...], egress: tuple[str, ...],
    config: tuple[str, ...], *, yes: bool, verbose: bool, as_json: bool,
) -> None:  # fmt: skip
    from host.cli.packages import fetch
    from host.cli.packages.package import parse
    from isolator.policy.parse.load import load_host_config

    package = parse(text)
    for destination in egress:
        _check_destination(destination)
    values, literal = arguments.config_values(config)
    host_config = load_host_config(Paths.of(root).host_toml)
    folder = Path(tempfile.mkdtemp(prefix="isolator-package-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        if not as_json:
            click.echo(f"fetching {package}", err=True)
        resolved = fetch.resolve(root, package, host_config, folder)
        fetch.write_start(package, fetch.entry_of(package, resolved, program), folder)
        era = fetch.ask_era(root, folder, args)
        fetch.write_manifest(package, resolved, folder, name=name, era=era, arguments=args, egress=egress)
        request = {"path": str(folder), "resolved": {"package": str(package), "hashes": resolved.hashes}}
        with Client(root) as client:
            register_plugin(client, request, values, literal, yes=yes, verbose=verbose, as_json=as_json)
    finally:
        shutil.rmtree(folder)


def _check_destination(text: str) -> None:
    from isolator.policy.names import parse_egress

    try:
        parse_egress(text)
    except ValueError as error:
        raise UsageError("--egress", str(error)) from None


def _listed(hooks: str | None) -> list[str]:
    return [hook.strip() for hook in (hooks or "").split(",") if hook.strip()]
