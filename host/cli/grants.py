"""``isolator plugin grant`` and ``revoke``: one value more or less in a plugin's policy file, in force at once.

The file is the operator's, so it is edited here with the caller's own rights and not by the daemon, which notices that
it has changed. What the daemon says of the plugin is shown and never written without a question.
"""

from __future__ import annotations

import difflib
import pwd
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from host.cli.options import NAME, declaring, yes
from host.cli.output import safe
from host.client.client import Client
from isolator.base.pacing import Backoff
from isolator.cli.output import here, print_result
from isolator.errors import DeniedError, IsolatorError, NeedsApprovalError, NotFoundError, UsageError
from isolator.paths import Paths
from isolator.policy.edit import LISTS, Value

_PATIENCE = 3.0
"""Seconds for the daemon to notice the file and restart the plugin with it."""
_of_an_edit = declaring(
    NAME,
    click.argument("kind", type=click.Choice(["egress", "hook", "permission", "tool", "caller"])),
    click.argument("value"),
    click.option("--dry-run", is_flag=True, help="Show the change and make none."),
    yes("Agree to a list that the file did not have before."),
    here,
)
_NONE_BY_DEFAULT = ("tool", "caller")


@click.command(
    epilog="\b\nExamples:\n  isolator plugin grant slack egress hooks.slack.com:443\n"
    "  isolator plugin grant slack permission read:projects\n"
    "  isolator plugin grant slack hook 'deploy.*' --dry-run\n"
    "  isolator plugin grant github tool 'get_*'\n  isolator plugin grant github caller alice"
)
@_of_an_edit
def grant(root: str | None, name: str, kind: str, value: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Add a value to a plugin's policy file; a plugin that runs is restarted with it.

    Comments and other lines stay as they are. A plugin gets what its manifest
    asks for and its policy grants: both. A tool is one of an MCP server, a
    caller a user (name or uid) who may call its tools: no manifest asks for them.
    """
    from isolator.policy.edit import granted

    _edit(root, name, kind, value, granted, dry_run=dry_run, yes=yes, as_json=as_json)


@click.command(
    epilog="\b\nExamples:\n  isolator plugin revoke slack egress hooks.slack.com:443\n"
    "  isolator plugin revoke slack hook 'deploy.*'"
)
@_of_an_edit
def revoke(root: str | None, name: str, kind: str, value: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Take a value out of a plugin's policy file; a plugin that runs is restarted without it."""
    from isolator.policy.edit import revoked

    _edit(root, name, kind, value, revoked, dry_run=dry_run, yes=yes, as_json=as_json)


def _edit(
    root: str | None,
    name: str,
    kind: str,
    value: str,
    change: Callable[..., str],
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    spelled = _spelled(kind, value)
    with Client(root) as client:
        shown = client.call("plugin.show", name=name)
        path = Paths.of(root).policies / f"{shown['name']}.toml"
        before = _read(path, name)
        after = change(before, kind, spelled, in_force=_in_force(shown, kind))
        _check(root, path, after)
        diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1)
        lines = list(diff)[2:]  # without the two lines that name files
        if not as_json:
            for line in lines:
                click.echo(safe(line))
        state = "stands there already" if not lines else "not written"
        if lines and not dry_run:
            if kind not in _NONE_BY_DEFAULT and _makes_list(before, after, kind):
                _agree(name, kind, yes=yes)
            _write(path, after)
            state = _in_use(client, shown, kind)
    print_result(
        {"plugin": name, "file": str(path), "diff": lines, "state": state}, f"{path}: {state}", as_json=as_json
    )


def _spelled(kind: str, value: str) -> Value:
    """The value as policies have it; raises UsageError."""
    from isolator.policy import names

    try:
        if kind == "egress":
            return value if value == "public" else names.format_egress(names.parse_egress(value))
        if kind == "caller":
            return names.parse_uid(int(value) if value.isdecimal() else pwd.getpwnam(value).pw_uid)
        parse = {"hook": names.parse_hook_grant, "permission": names.parse_permission_grant, "tool": names.parse_tool}
        return parse[kind](value)
    except KeyError:
        raise NotFoundError(f"user {value}", "is not on this host", "name another, or a uid") from None
    except ValueError as error:
        raise UsageError(kind, str(error)) from None


def _in_force(shown: dict[str, Any], kind: str) -> list[Value]:
    """List what a plugin has of this kind now, as a policy would."""
    effective = shown.get("effective") or {}
    if kind == "egress":
        from isolator.policy.model import EgressRule
        from isolator.policy.names import format_egress

        rules = (effective.get("network") or {}).get("egress") or []
        return [format_egress(EgressRule(host=rule["host"], ports=tuple(rule["ports"]))) for rule in rules]
    return list(effective.get(LISTS[kind]) or [])


def _read(path: Path, name: str) -> str:
    from isolator.policy.parse.trusted import read_trusted

    try:
        return read_trusted(path).decode()
    except NotFoundError:
        raise NotFoundError(str(path), f"{name} has no policy file", f"isolator plugin approve {name}") from None
    except UnicodeDecodeError:
        raise UsageError(str(path), "is not UTF-8 text") from None


def _check(root: str | None, path: Path, text: str) -> None:
    """Raise the error that the daemon would have of this file."""
    from isolator.policy.parse.load import check_ceiling, parse_plugin_policy
    from isolator.policy.parse.trusted import load_host_config

    check_ceiling(parse_plugin_policy(text.encode(), source=str(path)), load_host_config(Paths.of(root).host_toml))


def _makes_list(before: str, after: str, kind: str) -> bool:
    import tomllib

    lists = [tomllib.loads(text.removeprefix("\ufeff")).get("grant", {}).get(LISTS[kind]) for text in (before, after)]
    return lists[0] is None and lists[1] is not None


def _agree(name: str, kind: str, *, yes: bool) -> None:
    if yes:
        return
    what = f"so far the file of {name} has no list for {kind}; from now on it has only what is listed"
    if not sys.stdin.isatty():
        raise NeedsApprovalError("plugin policy", what, "add --yes")
    click.confirm(f"{what[0].upper()}{what[1:]}. Go on?", abort=True)


def _write(path: Path, text: str) -> None:
    from isolator.registration.policy_files import write

    try:
        write(path, text)
    except PermissionError:
        raise DeniedError(str(path), "this user may not write it", "use sudo") from None
    except OSError as error:
        raise IsolatorError(str(path), error.strerror or "cannot be written") from None


def _in_use(client: Client, before: dict[str, Any], kind: str) -> str:
    """Wait until the daemon has read the file; how that ended."""
    end, pause = time.monotonic() + _PATIENCE, Backoff(0.02, 0.25)
    read = False
    while time.monotonic() < end:
        shown = client.call("plugin.show", name=before["name"])
        if _in_force(shown, kind) != _in_force(before, kind):
            return "in force"
        # Something else may have changed just now, too, such as what the daemon grants for want of a file.
        read = shown["effective_digest"] != before["effective_digest"]
        if shown["error"] and shown["error"] != before["error"]:
            return f"not in force: {safe(shown['error'])}"
        time.sleep(pause.next())
    if read:
        return "in force; nothing that the plugin has now has changed"
    return "written; what the plugin may do is the same as before (isolator plugin explain says why)"
