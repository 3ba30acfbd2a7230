"""``plugin add --mcp`` and ``plugin update --mcp``: a server of a registry, fetched in a cage, then registered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import click

from host.cli.arguments import Config
from host.cli.options import Manner
from host.cli.output import safe
from host.cli.packages import fetch
from host.cli.packages.package import Package, Wishes, parse
from host.cli.registration import AS_LONG_AS_STARTS_TAKE, register_plugin, update_plugin
from host.client.client import Client, ask
from isolator.errors import IsolatorError, NeedsApprovalError, UsageError, translated
from isolator.paths import Paths
from isolator.policy.names import parse_egress
from isolator.policy.parse.trusted import load_host_config


def add_package(
    root: str | None, text: str, name: str | None, wishes: Wishes, config: Config, manner: Manner
) -> None:  # fmt: skip
    """Register a package as a plugin; raises IsolatorError."""
    with _fetched(root, parse(text), name, wishes, quiet=manner.as_json) as request, Client(root) as client:
        register_plugin(client, request, config, manner)


def update_package(
    root: str | None, name: str, text: str, wishes: Wishes, config: Config, manner: Manner
) -> None:  # fmt: skip
    """Exchange a plugin that came of a package for another version of it.

    Raises NeedsApprovalError when it asks for more than before, or when its tools are others than those approved.
    """
    package = parse(text)
    manifest = ask(root, "plugin.show", name=name).get("manifest") or {}
    if not fetch.is_of(package, manifest):
        why = f"is no version of {package.kind}:{safe(package.name)}: its grants are not that one's"
        raise UsageError(f"plugin {name}", why, "add it under another name")
    before = fetch.asked_before(manifest)
    wishes = wishes._replace(args=wishes.args or before[0], egress=wishes.egress or before[1])
    others: dict[str, list[str]] = {}
    with (
        _fetched(root, package, name, wishes, quiet=manner.as_json) as request,
        Client(root, timeout=AS_LONG_AS_STARTS_TAKE) as client,
    ):

        def compare() -> dict[str, Any]:
            others.update(_other_tools(client, name))
            return {"tools": others}

        update_plugin(client, request | {"update": name}, config, manner, then=compare)
    if any(others.values()):
        listed = "; ".join(f"{state}: {', '.join(map(safe, names))}" for state, names in others.items() if names)
        why = f"are others than those approved, and blocked until they are, too ({listed[:600]})"
        raise NeedsApprovalError(f"tools of {name}", why, f"isolator mcp approve {name}")


@contextlib.contextmanager
def _fetched(
    root: str | None, package: Package, name: str | None, wishes: Wishes, *, quiet: bool
) -> Iterator[dict[str, Any]]:
    """The request that stages a package, whose files are there meanwhile."""
    with translated(ValueError, UsageError, "--egress"):
        for destination in wishes.egress:
            parse_egress(destination)
    host_config = load_host_config(Paths.of(root).host_toml)
    with fetch.folder_for(package, quiet=quiet) as folder:
        resolved = fetch.resolve(root, package, host_config, folder)
        fetch.write_start(package, fetch.entry_of(package, resolved, wishes.program), folder)
        era = fetch.ask_era(root, folder, wishes.args)
        fetch.write_manifest(package, resolved, folder, name=name, era=era, arguments=wishes.args, egress=wishes.egress)
        yield {"path": str(folder), "resolved": {"package": str(package), "hashes": resolved.hashes}}


def _other_tools(client: Client, name: str) -> dict[str, list[str]]:
    """The tools that are changed, and those that are new, if some are approved; each name as the server gives it."""
    try:
        found = client.call("mcp.tools", name=name)["tools"]
    except IsolatorError as error:
        click.echo(f"isolator: warning: the tools of {name} could not be compared: {safe(str(error))}", err=True)
        return {}
    if all(one["state"] == "new" for one in found):
        return {}  # nobody has approved anything yet
    return {
        state: [one["name"] or "instructions" for one in found if one["state"] == state] for state in ("changed", "new")
    }
