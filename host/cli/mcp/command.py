"""``isolator mcp``: a caged MCP server for editors and agents, and the approval of its tools."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, BinaryIO, Final

import click

from host.cli.options import NAME, yes
from host.cli.output import safe
from host.client.client import Client, ask
from isolator.cli.output import Group, here, print_json, print_result
from isolator.errors import NeedsApprovalError, UsageError

_LARGEST: Final = 16 << 20
"""Bytes that are read of a file with tools."""


@click.group(cls=Group, epilog="\b\nExamples:\n  isolator mcp serve github\n  isolator mcp tools github")
def mcp() -> None:
    """Use MCP servers from editors and agents; approve their tools."""


@mcp.command(
    epilog="\b\nExamples:\n  isolator mcp serve github\n\n\b\nIn an editor's configuration:\n"
    '  {"mcpServers": {"github": {"command": "isolator", "args": ["mcp", "serve", "github"]}}}'
)
@NAME
@click.pass_obj
def serve(root: str | None, name: str) -> None:
    """Be the MCP server NAME for the client at standard input and output.

    Takes the role 'caller', and this user's uid in 'callers' of [grant] in the
    policy of NAME. The client sees approved tools that 'tools' there names.
    """
    from host.cli.mcp.front import Front
    from isolator_client import address

    asyncio.run(Front(address.control_socket(root=root), name).serve())


@mcp.command(epilog="\b\nExamples:\n  isolator mcp tools github\n  isolator mcp tools github --json")
@NAME
@here
def tools(root: str | None, name: str, as_json: bool) -> None:
    """Show what the MCP server NAME offers, and what of it is approved."""
    found = ask(root, "mcp.tools", name=name)
    if as_json:
        print_json(found)
        return
    _show(found["tools"], whole=False)


@mcp.command(
    epilog="\b\nExamples:\n  isolator mcp approve github\n  isolator mcp approve github --yes\n"
    "  isolator mcp approve github --digest 3b1f... --yes\n"
    "  isolator mcp approve github --from tools-of-h2.json"
)
@NAME
@yes("Agree without a question.")
@click.option("--digest", metavar="HEX", help="Agree only to what has this digest ('mcp tools --json').")
@click.option("--from", "shown", metavar="FILE", type=click.File("rb"), help="What 'mcp tools --json' shows elsewhere.")
@here
def approve(
    root: str | None, name: str, yes: bool, digest: str | None, shown: BinaryIO | None, as_json: bool
) -> None:  # fmt: skip
    """Approve the tools and instructions of the MCP server NAME as they are now.

    Each is shown whole, since a model obeys it. A tool that changes or comes
    later is blocked until it is approved, too. Which users may call which
    tools, 'callers' and 'tools' in [grant] of its policy say.

    In a cluster approvals are each host's own. On one that does not hold NAME its
    server does not run: --from takes what the holder's 'mcp tools --json' shows.
    """
    with Client(root) as client:
        more = {"tools": _read(name, shown)} if shown is not None else {}
        found = client.call("mcp.tools", name=name, **more)
        if digest is not None and digest != found["digest"]:
            raise UsageError(f"tools of {name}", f"have the digest {found['digest']}", "look at them again")
        if not as_json:
            _show(found["tools"], whole=True)
        if not yes and not (sys.stdin.isatty() and click.confirm("Approve all of this?", err=True)):
            raise NeedsApprovalError(f"tools of {name}", "were not approved", "add --yes to agree")
        approved = client.call("mcp.approve", name=name, digest=found["digest"], **more)
    print_result(
        {"name": name, "digest": found["digest"], **approved}, f"{approved['approved']} approved", as_json=as_json
    )


def _read(name: str, file: BinaryIO) -> list[dict[str, Any]]:
    """Read what a file, an answer to ``mcp.tools``, shows as offered; raises UsageError."""
    try:
        return [dict(one["body"]) for one in json.loads(file.read(_LARGEST))["tools"] if one["state"] != "missing"]
    except (ValueError, TypeError, KeyError, RecursionError):
        why = "is not what 'isolator mcp tools --json' shows"
        raise UsageError(file.name, why, f"have it show {name} on its holder") from None


def _show(items: list[dict[str, Any]], *, whole: bool) -> None:
    for item in items:
        title = _title(item["name"])
        state = item["state"] + (f", was {_title(item['renamed'])}?" if item["renamed"] else "")
        granted = "" if item["granted"] or not item["name"] else "  not granted to callers"
        click.echo(f"{title:<32} {state:<10} {item['sha256'][:12]}{granted}")
        if whole and item["state"] != "approved":
            for line in json.dumps(item["body"], indent=2, ensure_ascii=True).splitlines():
                click.echo(f"    {line}")
    if not items:
        click.echo("it offers no tools")


def _title(name: str) -> str:
    """The name of a tool; of one that may only look like another also its characters beyond ASCII."""
    return f"{safe(name)}{'' if name.isascii() else f' = {name!a}'}" or "(instructions)"
