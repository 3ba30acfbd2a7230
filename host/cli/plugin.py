"""``isolator plugin``: add, inspect, start, stop, update and remove plugins."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from host.cli import arguments
from host.cli.output import AS_JSON, SETTINGS, ago, print_json, safe, show_alarms, table
from host.cli.registration import HISTORY_HINT, approve_plugin, register_plugin, show_proposal, update_plugin
from host.client.client import Client
from isolator.errors import NotFoundError, UsageError
from isolator.pacing import Backoff
from isolator.policy import units

if TYPE_CHECKING:
    from collections.abc import Mapping

_AS_LONG_AS_STARTS_TAKE = None
"""Time for the daemon's answer to what may start one version and then another: it has deadlines of its own."""


@click.group(
    context_settings=SETTINGS,
    epilog="\b\nExamples:\n  isolator plugin add ./slack-deploy-notifier --config slack_webhook_url=@url.txt\n"
    "  isolator plugin add --name indexer --binary /opt/indexer --hooks deploy.completed\n"
    "  isolator plugin explain slack-deploy-notifier",
)
def plugin() -> None:
    """Add, inspect, start, stop, update and remove plugins."""


@plugin.command(
    epilog="\b\nExamples:\n  isolator plugin add ./slack-deploy-notifier --config slack_webhook_url=@url.txt\n"
    "  isolator plugin add --name indexer --binary /opt/indexer --hooks deploy.completed\n"
    "  isolator plugin add ./plugin --yes --config token=- < token.txt"
)
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--name", metavar="N", help="Register a single binary under this name.")
@click.option("--binary", metavar="P", help="The binary; it stays where it is.")
@click.option("--hooks", metavar="A,B", help="Events; of a plugin.json beside it only these.")
@click.option("--files", metavar="DIR", help="A folder that is visible beside the binary.")
@click.option("--config", "config", metavar="K=V", multiple=True, help="K=V, K=@FILE or K=-; repeatable.")
@click.option("--yes", "-y", is_flag=True, help="Agree to what is shown.")
@AS_JSON
@click.pass_obj
def add(
    root: str | None,
    folder: str | None,
    name: str | None,
    binary: str | None,
    hooks: str | None,
    files: str | None,
    config: tuple[str, ...],
    yes: bool,
    as_json: bool,
) -> None:
    """Register a plugin: show what it asks for and would get, ask, and do it."""
    if folder is not None:
        if name or binary or hooks or files:
            raise UsageError("plugin add", "DIR and --name, --binary, --hooks, --files exclude each other")
        request: dict[str, Any] = {"path": arguments.absolute(folder)}
    elif name and binary:
        request = {"name": name, "binary": arguments.absolute(binary), "hooks": _listed(hooks)}
        if files:
            request["files"] = arguments.absolute(files)
    else:
        raise UsageError("plugin add", "name a folder, or give --name, --binary and --hooks", "see --help")
    values, literal = arguments.config_values(config)
    with Client(root) as client:
        register_plugin(client, request, values, literal, yes=yes, as_json=as_json)


@plugin.command(
    epilog="\b\nExamples:\n  isolator plugin update slack ./slack-2.0\n  isolator plugin update slack\n\n"
    "A version that asks for more waits (exit code 5): isolator plugin approve N"
)
@click.argument("name")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--config", "config", metavar="K=V", multiple=True, help="K=V, K=@FILE or K=-; repeatable.")
@click.option("--yes", "-y", is_flag=True, help="Agree also if it asks for more than before.")
@AS_JSON
@click.pass_obj
def update(root: str | None, name: str, folder: str | None, config: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Take over a newer version from DIR, or from where the last one came from.

    If it is not up in time, the version before comes back by itself.
    """
    request: dict[str, Any] = {"update": name}
    if folder is not None:
        request["path"] = arguments.absolute(folder)
    values, literal = arguments.config_values(config)
    with Client(root, timeout=_AS_LONG_AS_STARTS_TAKE) as client:
        update_plugin(client, request, values, literal, yes=yes, as_json=as_json)


@plugin.command("list")
@AS_JSON
@click.pass_obj
def list_plugins(root: str | None, as_json: bool) -> None:
    """List every plugin with its state."""
    with Client(root) as client:
        answer = client.call("plugin.list")
    plugins = answer["plugins"]
    show_alarms(answer["alarms"])
    if as_json:
        print_json(plugins)
        return
    if not plugins:
        click.echo("no plugins; add one with 'isolator plugin add DIR'", err=True)
        return
    rows = []
    for p in plugins:
        up = ago(p.get("started_at")) if p.get("pid") else None
        note = p.get("error") or _waiting(p) or p.get("holding")
        rows.append([p["name"], p["version"], p["state"], p.get("pid"), up, p["restarts"], p["queue"], note])
    table(["name", "version", "state", "pid", "up", "restarts", "queue", "note"], rows)


def _waiting(shown: Mapping[str, Any]) -> str | None:
    """The part of a plugin that waits for an operator, with the remedy."""
    if shown.get("found"):
        return f"found in {shown['found']}; isolator plugin approve {shown['name']}"
    pending = shown.get("pending")
    return f"{pending['version']} asks for more; isolator plugin approve {shown['name']}" if pending else None


@plugin.command()
@click.argument("name")
@AS_JSON
@click.pass_obj
def show(root: str | None, name: str, as_json: bool) -> None:
    """Show everything about one plugin."""
    with Client(root) as client:
        found = client.call("plugin.show", name=name)
    if as_json:
        print_json(found)
        return
    shown = ["name", "version", "state", "error", "holding", "pid", "uid", "run", "restarts", "mode", "hooks", "queue"]
    for key in (*shown, "digest", "effective_digest", "binary", "source", "found", "previous"):
        if found.get(key) not in (None, "", []):
            click.echo(f"{key + ':':18}{safe(found[key])}")
        if key == "state" and (waits := _waits_for_socket(found)):
            click.echo(f"{'start:':18}{waits}")
    if found.get("pending"):
        click.echo(f"{'waits:':18}{safe(_waiting(found))}")
        for phrase in found["pending"]["differences"]:
            click.echo(f"{'':18}{safe(phrase)}")
    _show_config(found["config"])
    for line in found["stderr"]:
        click.echo(f"stderr: {safe(line)}")


@plugin.command()
@click.argument("name")
@AS_JSON
@click.pass_obj
def explain(root: str | None, name: str, as_json: bool) -> None:
    """Show request, grant and effect line by line, and the promise of each layer."""
    with Client(root) as client:
        proposal = client.call("plugin.explain", name=name)["proposal"]
    if as_json:
        print_json(proposal)
    else:
        show_proposal(proposal)


_SOON = 1.0
"""Seconds after which ``plugin start`` says that a plugin is still on its way."""


def _waits_for_socket(shown: Mapping[str, Any]) -> str | None:
    """How long a plugin that runs has been without its socket, and how long it may be."""
    if shown["state"] != "running" or shown.get("ready", True) or not shown.get("effective"):
        return None
    patience = units.format_duration(shown["effective"]["restart"]["start_timeout"])
    return f"its socket is not there yet, after {ago(shown['started_at'])} of {patience}"


def _progress(client: Client, name: str) -> str:
    """Describe a start in its first moments, as the end of a sentence; empty: the plugin is ready.

    By questions with growing pauses, for a second: no notification of the control socket tells of a plugin's socket.
    """
    end, pause = time.monotonic() + _SOON, Backoff(0.02, 0.2)
    while True:
        shown = client.call("plugin.show", name=name)
        waits = _waits_for_socket(shown)
        if waits is None:
            return "" if shown["state"] == "running" else f"; it is {shown['state']}: {safe(shown['error'])}"
        if time.monotonic() > end:
            return f"; {waits} (isolator plugin show {name})"
        time.sleep(pause.next())


def _simple(verb: str, summary: str, done: str) -> None:
    @plugin.command(verb, help=summary)
    @click.argument("name")
    @AS_JSON
    @click.pass_obj
    def command(root: str | None, name: str, as_json: bool) -> None:
        with Client(root, timeout=_AS_LONG_AS_STARTS_TAKE) as client:
            answer = client.call(f"plugin.{verb}", name=name)
            progress = _progress(client, name) if answer.get("pid") and not as_json else ""
        if as_json:
            print_json(answer)
        else:
            pid = f", pid {answer['pid']}" if answer.get("pid") else ""
            click.echo(f"{done} {name}{pid}{progress}")


_simple("start", "Start a plugin now instead of at its first event.", "started")
_simple("stop", "Stop a plugin; the next event starts it again.", "stopped")
_simple("restart", "Stop a plugin and start it again.", "restarted")
_simple("enable", "Let a disabled plugin run again.", "enabled")
_simple("disable", "Stop a plugin and keep it stopped; its events wait.", "disabled")
_simple("rollback", "Go back to the version before; if that is not up in time, nothing changes.", "rolled back")


@plugin.command()
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Agree to what is shown.")
@AS_JSON
@click.pass_obj
def approve(root: str | None, name: str, yes: bool, as_json: bool) -> None:
    """Show what waits for an operator's agreement, ask, and agree to it.

    That is a newer version that asks for more, a binary that was changed, or a plugin found in plugin_dirs.
    """
    with Client(root, timeout=_AS_LONG_AS_STARTS_TAKE) as client:
        now = client.call("plugin.show", name=name)
        if now.get("found"):
            register_plugin(client, {"path": now["found"]}, {}, [], yes=yes, as_json=as_json)
        else:
            approve_plugin(client, name, yes=yes, as_json=as_json)


@plugin.command()
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Do not ask; without a terminal nobody is asked.")
@AS_JSON
@click.pass_obj
def remove(root: str | None, name: str, yes: bool, as_json: bool) -> None:
    """Stop a plugin and forget it: files, user, config, queue, and what it has stored."""
    with Client(root) as client:
        client.call("plugin.show", name=name)
        if not yes and sys.stdin.isatty():
            click.confirm(f"Remove {name} and delete everything it has stored?", abort=True)
        answer = client.call("plugin.remove", name=name)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"removed {name}")


@plugin.command(
    epilog="\b\nExamples:\n  isolator plugin config slack\n  isolator plugin config slack set channel=#ops\n"
    "  isolator plugin config slack set slack_webhook_url=@url.txt\n  isolator plugin config slack unset channel"
)
@click.argument("name")
@click.argument("action", type=click.Choice(["get", "set", "unset"]), default="get")
@click.argument("values", nargs=-1, metavar="[K=V | K]...")
@AS_JSON
@click.pass_obj
def config(root: str | None, name: str, action: str, values: tuple[str, ...], as_json: bool) -> None:
    """Show or change a plugin's config; secrets are never shown. A change restarts the plugin."""
    with Client(root) as client:
        if action == "set":
            chosen, literal = arguments.config_values(values)
            if not chosen:
                raise UsageError("plugin config set", "nothing to set", "name KEY=VALUE")
            answer = client.call("config.set", name=name, config=chosen)
            items = client.call("config.list", name=name)["items"]
            secrets = {item["key"] for item in items if item["secret"]}
            if secrets & set(literal):
                click.echo(HISTORY_HINT, err=True)
            _show_change(answer, f"set {', '.join(chosen)}", as_json=as_json)
        elif action == "unset":
            if len(values) != 1:
                raise UsageError("plugin config unset", "name one key")
            _show_change(client.call("config.unset", name=name, key=values[0]), f"unset {values[0]}", as_json=as_json)
        else:
            items = client.call("config.list", name=name)["items"]
            if values:
                items = [item for item in items if item["key"] in values]
                if not items:
                    raise NotFoundError(f"config {values[0]} of {name}", "no such key")
            if as_json:
                print_json(items)
            elif items:
                _show_config(items)
            else:
                click.echo(f"{name} has no config")


def _show_change(answer: Mapping[str, Any], change: str, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(change + ("; restarted" if answer.get("restarted") else ""))


def _show_config(items: list[dict[str, Any]]) -> None:
    rows = []
    for item in items:
        value = "[secret]" if item["secret"] and item["is_set"] else item["value"] if item["is_set"] else None
        if item["type"] == "file" and value not in (None, "[secret]"):
            value = f"[{len(value.encode())} bytes]"
        default = f"(default {item['default']})" if not item["is_set"] and item["default"] is not None else None
        state = "required, not set" if item["required"] and not item["is_set"] else default
        rows.append([item["key"], item["type"], value, state])
    if rows:
        table(["config", "type", "value", "note"], rows)


@plugin.command(epilog="\b\nExamples:\n  isolator plugin logs slack -f\n  isolator plugin logs slack -n 1000 --json")
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines as they are written.")
@click.option("-n", "--lines", default=100, show_default=True, type=click.IntRange(0, 10_000))
@AS_JSON
@click.pass_obj
def logs(root: str | None, name: str, follow: bool, lines: int, as_json: bool) -> None:
    """Show what a plugin wrote to stdout and stderr."""
    with Client(root) as client:
        answer = client.call("plugin.logs", name=name, lines=lines, follow=follow)
        for entry in answer["lines"]:
            _print_log(entry, as_json=as_json)
        if not follow:
            return
        try:
            for entry in client.notifications():
                _print_log(entry, as_json=as_json)
        except KeyboardInterrupt:
            return


def _print_log(entry: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(entry))
    else:
        mark = {"stdout": " ", "stderr": "!"}.get(entry["stream"], "#")
        click.echo(f"{entry['time'][:23]}Z {mark} {safe(entry['line']) if entry['line'] else ''}")


@plugin.command()
@click.argument("name")
@click.option("-n", "--limit", default=50, show_default=True, type=click.IntRange(1))
@AS_JSON
@click.pass_obj
def denials(root: str | None, name: str, limit: int, as_json: bool) -> None:
    """Show what a plugin was refused, each thing once, and the line that would grant it or why none can."""
    from host.cli import denials as summary
    from isolator.audit import reader
    from isolator.paths import Paths

    with Client(root) as client:
        entry = client.call("plugin.show", name=name)
    records = reader.query(Paths.of(root).audit_log, reader.Query(name, summary.TYPES))
    found = summary.collect((record for _, record in records), entry)[-limit:]
    if as_json:
        print_json([denial.to_json() for denial in found])
    elif found:
        summary.show(found, name)
    else:
        click.echo(f"{name} was refused nothing so far", err=True)


def _listed(hooks: str | None) -> list[str]:
    return [hook.strip() for hook in (hooks or "").split(",") if hook.strip()]
