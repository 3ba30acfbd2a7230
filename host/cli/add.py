"""``isolator plugin add`` and ``update``: from a folder, a single binary, or a package of a registry."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

import click

from host.cli import arguments
from host.cli.options import CONFIG, NAME, F, Manner, declaring, registering
from host.cli.packages.package import Wishes
from host.cli.registration import AS_LONG_AS_STARTS_TAKE, register_plugin, update_plugin
from host.client.client import Client
from isolator.errors import UsageError

_OF_PACKAGE = declaring(
    click.option("--mcp", metavar="PACKAGE", help="An MCP server: npm:NAME@VERSION or pypi:NAME==VERSION."),
    click.option("--program", metavar="P", help="Which program of the package, if it has several."),
    click.option("--arg", "args", metavar="A", multiple=True, help="An argument for it; repeatable."),
    click.option("--egress", metavar="HOST:PORT", multiple=True, help="What it asks to reach; repeatable."),
)
_SHA256 = click.option("--sha256", metavar="HEX", help="Of a package at a URL: its SHA-256, or it is refused.")


def _of_package(command: F) -> F:
    """Declare ``--mcp``, and the ``wishes`` about it."""

    @functools.wraps(command)
    def called(*, program: str | None, args: tuple[str, ...], egress: tuple[str, ...], **others: Any) -> Any:
        return command(wishes=Wishes(program, args, egress), **others)

    return cast(F, _OF_PACKAGE(called))


@click.command(
    epilog="\b\nExamples:\n  isolator plugin add ./slack-deploy-notifier --config slack_webhook_url=@url.txt\n"
    "  isolator plugin add --name indexer --binary /opt/indexer --hooks deploy.completed\n"
    "  isolator plugin add ./plugin --yes --config token=- < token.txt\n"
    "  isolator plugin add deploy-bell-1.0.0.isolator\n"
    "  isolator plugin add https://example.com/deploy-bell-1.0.0.isolator --sha256 3fd2...\n"
    "  isolator plugin add --mcp npm:@scope/server@1.2.3 --egress api.example.com:443\n"
    "  isolator plugin add --mcp pypi:mcp-server-time==2025.9.25 --arg=--local-timezone=UTC"
)
@click.argument("folder", metavar="[DIR | FILE | URL]", required=False)
@_SHA256
@click.option("--name", metavar="N", help="Register a single binary under this name.")
@click.option("--binary", metavar="P", help="The binary; it stays where it is.")
@click.option("--hooks", metavar="A,B", help="Events; of a plugin.json beside it only these.")
@click.option("--files", metavar="DIR", help="A folder that is visible beside the binary.")
@_of_package
@CONFIG
@registering()
def add(
    root: str | None,
    folder: str | None,
    sha256: str | None,
    name: str | None,
    binary: str | None,
    hooks: str | None,
    files: str | None,
    mcp: str | None,
    wishes: Wishes,
    config: tuple[str, ...],
    manner: Manner,
) -> None:
    """Register a plugin: show what it asks for and would get, ask, and do it.

    It is a folder, or a FILE that 'isolator pack' has made; one at a URL
    (https) is fetched in a cage that reaches that name alone. With --mcp the
    package is fetched in a cage that reaches its registry alone ([packages]
    of host.toml), without running a script of it; it asks for no network but
    what --egress names.
    """
    _check_fit("plugin add", folder, sha256, mcp, wishes)
    if mcp is not None:
        if folder or binary or hooks or files:
            raise UsageError("plugin add", "--mcp and DIR, --binary, --hooks, --files exclude each other")
        from host.cli.packages.command import add_package

        add_package(root, mcp, name, wishes, arguments.config_values(config), manner)
        return
    if folder is not None:
        if name or binary or hooks or files:
            raise UsageError("plugin add", "DIR and --name, --binary, --hooks, --files exclude each other")
        values = arguments.config_values(config)
        with _offered(root, folder, sha256, quiet=manner.as_json) as request, Client(root) as client:
            register_plugin(client, request, values, manner)
        return
    if not name or not binary:
        raise UsageError("plugin add", "name a folder, or give --mcp, or --name, --binary and --hooks", "see --help")
    single: dict[str, Any] = {"name": name, "binary": arguments.absolute(binary)}
    single["hooks"] = [hook.strip() for hook in (hooks or "").split(",") if hook.strip()]
    if files:
        single["files"] = arguments.absolute(files)
    values = arguments.config_values(config)
    with Client(root) as client:
        register_plugin(client, single, values, manner)


@click.command(
    epilog="\b\nExamples:\n  isolator plugin update slack ./slack-2.0\n  isolator plugin update slack\n"
    "  isolator plugin update server --mcp npm:@scope/server@1.3.0\n\n"
    "What asks for more than before waits (exit code 5): isolator plugin approve NAME. "
    "So do tools that are others now: isolator mcp approve NAME."
)
@NAME
@click.argument("folder", metavar="[DIR | FILE | URL]", required=False)
@_SHA256
@_of_package
@CONFIG
@registering("Agree also if it asks for more than before.")
def update(
    root: str | None,
    name: str,
    folder: str | None,
    sha256: str | None,
    mcp: str | None,
    wishes: Wishes,
    config: tuple[str, ...],
    manner: Manner,
) -> None:
    """Take over a newer version from DIR, FILE or URL, or from where the last one came from.

    If it is not up in time, the version before comes back by itself. With
    --mcp the newer version of a package is fetched as 'plugin add' does;
    without --arg and --egress it has those of the version before.
    """
    _check_fit("plugin update", folder, sha256, mcp, wishes)
    if mcp is not None:
        if folder:
            raise UsageError("plugin update", "--mcp and DIR exclude each other")
        from host.cli.packages.command import update_package

        update_package(root, name, mcp, wishes, arguments.config_values(config), manner)
        return
    values = arguments.config_values(config)
    with contextlib.ExitStack() as stack:
        request: dict[str, Any] = {"update": name}
        if folder is not None:
            request |= stack.enter_context(_offered(root, folder, sha256, quiet=manner.as_json))
        client = stack.enter_context(Client(root, timeout=AS_LONG_AS_STARTS_TAKE))
        update_plugin(client, request, values, manner)


def _is_address(text: str | None) -> bool:
    return text is not None and "://" in text


@contextlib.contextmanager
def _offered(root: str | None, text: str, sha256: str | None, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """Parameters of ``plugin.stage`` for a folder, a package, or the address of one."""
    if not _is_address(text):
        yield {"path": arguments.absolute(text)}
        return
    from host.cli.packages.download import SCHEME, downloaded

    if not text.startswith(SCHEME):
        raise UsageError(ascii(text)[1:-1][:200], "is no address that is fetched from", "use https://HOST/PATH")
    with downloaded(root, text, sha256, quiet=quiet) as request:
        yield request


def _check_fit(command: str, folder: str | None, sha256: str | None, mcp: str | None, wishes: Wishes) -> None:
    """Raise UsageError for options that go with something else."""
    if sha256 is not None and not _is_address(folder):
        raise UsageError("--sha256", "goes with the address of a package", "name one: https://HOST/PATH")
    if mcp is None and any(wishes):
        raise UsageError(command, "--program, --arg and --egress go with --mcp", "write them into plugin.json")
