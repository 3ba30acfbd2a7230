"""``isolator plugin``: add, inspect, start, stop, update and remove plugins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from host.cli import given
from host.cli.output import AS_JSON, SETTINGS, ago, paragraph, print_json, room, safe, table
from host.client import Client
from isolator.errors import NeedsApprovalError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

HISTORY_HINT = (
    "isolator: hint: secrets given as K=V stay in the shell's history; K=@FILE or K=- does not leave them there"
)

_WIDE = 110
"""Columns from which the grant has a column of its own."""
_NAMES = ("hooks", "permissions", "egress", "listen", "read")


@click.group(
    context_settings=SETTINGS,
    epilog="\b\nExamples:\n  isolator plugin add ./slack-deploy-notifier --config slack_webhook_url=@url.txt\n"
    "  isolator plugin add --name indexer --binary /opt/indexer --hooks deploy.completed\n"
    "  isolator plugin explain slack-deploy-notifier",
)
def plugin() -> None:
    """Add, inspect, start, stop, update and remove plugins."""


@plugin.command()
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
        request: dict[str, Any] = {"path": given.absolute(folder)}
    elif name and binary:
        request = {"name": name, "binary": given.absolute(binary), "hooks": _listed(hooks)}
        if files:
            request["files"] = given.absolute(files)
    else:
        raise UsageError("plugin add", "name a folder, or give --name, --binary and --hooks", "see --help")
    values, spelled_out = given.config_values(config)
    with Client(root) as client:
        _register(client, request, values, spelled_out, yes=yes, as_json=as_json)


@plugin.command()
@click.argument("name")
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--yes", "-y", is_flag=True, help="Agree to what is shown.")
@AS_JSON
@click.pass_obj
def update(root: str | None, name: str, folder: str | None, yes: bool, as_json: bool) -> None:
    """Take over a newer version of a plugin from DIR, or the present content of its binary."""
    with Client(root) as client:
        now = client.call("plugin.show", name=name)
        if folder is not None:
            request: dict[str, Any] = {"path": given.absolute(folder)}
        elif now.get("binary"):
            request = {"name": name, "binary": now["binary"], "hooks": now["hooks"]}
        else:
            raise UsageError(
                "plugin update", "name the folder with the new version", f"isolator plugin update {name} DIR"
            )
        _register(client, request, {}, [], yes=yes, as_json=as_json, must_be=name)


def _register(
    client: Client,
    request: Mapping[str, Any],
    values: dict[str, str],
    spelled_out: list[str],
    *,
    yes: bool,
    as_json: bool,
    must_be: str | None = None,
) -> None:
    staged = client.call("plugin.stage", **request, config=values)
    name = staged["name"]
    if must_be is not None and name != must_be:
        raise UsageError(f"plugin update {must_be}", f"the folder holds {name}", f"isolator plugin add it as {name}")
    if staged.get("registered") and must_be is None:
        raise UsageError(f"plugin {name}", "is already registered", f"isolator plugin update {name} DIR")
    if not as_json:
        _show_staged(staged)
    if {key.lower() for key in staged["secrets_given"]} & {key.lower() for key in spelled_out}:
        click.echo(HISTORY_HINT, err=True)
    if not yes:
        _ask(f"Register {name} with exactly this?")
    done = client.call("plugin.commit", token=staged["token"], config=values)
    if as_json:
        print_json({**done, "proposal": staged["proposal"], "warnings": staged["warnings"]})
        return
    verb = "updated" if staged.get("registered") else "added"
    click.echo(f"{verb} {name} {done['plugin']['version']}; it starts with its first event")
    for key in done["missing"]:
        remedy = f"isolator plugin config {name} set {key}=VALUE"
        click.echo(f"isolator: {name} cannot start before {key} is set: {remedy}", err=True)


def _ask(question: str) -> None:
    """Yes from a person at a terminal, or NeedsApprovalError."""
    if not sys.stdin.isatty():
        raise NeedsApprovalError("plugin add", "nobody is there to agree", "add --yes to agree to what is shown")
    if not click.confirm(question):
        raise NeedsApprovalError("plugin add", "not agreed", "nothing was changed")


def _show_staged(staged: Mapping[str, Any]) -> None:
    what = "flags only, no manifest" if staged["synthesised"] else "plugin.json"
    click.echo(f"{staged['name']} {staged['version']} ({what}, {staged['mode']})")
    if staged["description"]:
        click.echo(f"  {safe(staged['description'])}")
    click.echo()
    _show_proposal(staged["proposal"])
    for field in staged["config"]:
        marks = [field["type"], *(["secret"] if field["secret"] else []), *(["required"] if field["required"] else [])]
        click.echo(f"config {field['key']}: {', '.join(marks)}")
    for warning in staged["warnings"]:
        click.echo(f"isolator: warning: {safe(warning)}", err=True)


def _show_proposal(proposal: Mapping[str, Any]) -> None:
    columns = room()
    narrow = columns is not None and columns < _WIDE
    rows = []
    for line in proposal["lines"]:
        source = _source(line, proposal["policy_file"])
        cells = [line["field"], line["requested"], line["granted"], line["effective"], line["verdict"], source]
        if narrow:
            # Of a name there is all or nothing, and what was granted stands in the policy at the line that is named.
            effect = line["effective"]
            if line["field"] in _NAMES and effect == line["requested"] != "none":
                effect = "yes"
            cells[2:4] = [effect]
        rows.append(cells)
    table(["item", "requested", *([] if narrow else ["granted"]), "effective", "verdict", "from"], rows)
    refused = [line for line in proposal["lines"] if line["verdict"] == "refused" and line.get("reason")]
    if refused:
        click.echo()
        paragraph(
            "; ".join(f"{line['field']} {safe(line['requested'])}: {line['reason']}" for line in refused), "Refused: "
        )
    additions = [line for line in proposal["lines"] if line.get("add")]
    if additions:
        click.echo("\nTo grant what is pending, write in the policy:")
        section = None
        for line in additions:
            if line.get("section") != section:
                section = line.get("section")
                click.echo(f"  [{safe(section)}]")
            click.echo(f"  {safe(line['add'])}")
    click.echo()
    for sentence in proposal["sentences"].values():
        paragraph(safe(sentence), "- ")
    click.echo(f"\npolicy: {proposal['policy_file']}\neffective sha256:\n  {proposal['effective_digest']}\n")


def _source(line: Mapping[str, Any], policy_file: str | None) -> str:
    """Where a line was decided, as short as can be: the policy itself is named once, below the table."""
    source = str(line["source"])
    file, colon, number = source.rpartition(":")
    if colon and number.isdecimal():
        source = f"policy:{number}" if file == policy_file else f"{Path(file).name}:{number}"
    return source


@plugin.command("list")
@AS_JSON
@click.pass_obj
def list_plugins(root: str | None, as_json: bool) -> None:
    """List every plugin with its state."""
    with Client(root) as client:
        plugins = client.call("plugin.list")["plugins"]
    if as_json:
        print_json(plugins)
        return
    if not plugins:
        click.echo("no plugins; add one with 'isolator plugin add DIR'", err=True)
        return
    rows = []
    for p in plugins:
        up = ago(p.get("started_at")) if p.get("pid") else None
        note = p.get("error") or p.get("holding")
        rows.append([p["name"], p["version"], p["state"], p.get("pid"), up, p["restarts"], p["queue"], note])
    table(["name", "version", "state", "pid", "up", "restarts", "queue", "note"], rows)


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
    for key in (*shown, "digest", "effective_digest", "binary", "previous"):
        if found.get(key) not in (None, "", []):
            click.echo(f"{key + ':':18}{safe(found[key])}")
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
        _show_proposal(proposal)


def _simple(verb: str, summary: str, done: str) -> None:
    @plugin.command(verb, help=summary)
    @click.argument("name")
    @AS_JSON
    @click.pass_obj
    def command(root: str | None, name: str, as_json: bool) -> None:
        with Client(root) as client:
            answer = client.call(f"plugin.{verb}", name=name)
        if as_json:
            print_json(answer)
        else:
            pid = f", pid {answer['pid']}" if answer.get("pid") else ""
            click.echo(f"{done} {name}{pid}")


_simple("start", "Start a plugin now instead of at its first event.", "started")
_simple("stop", "Stop a plugin; the next event starts it again.", "stopped")
_simple("restart", "Stop a plugin and start it again.", "restarted")
_simple("enable", "Let a disabled plugin run again.", "enabled")
_simple("disable", "Stop a plugin and keep it stopped; its events wait.", "disabled")
_simple("remove", "Stop a plugin and forget it: files, user, config, queue.", "removed")
_simple("rollback", "Go back to the version before.", "rolled back")


@plugin.command()
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Agree to what is shown.")
@AS_JSON
@click.pass_obj
def approve(root: str | None, name: str, yes: bool, as_json: bool) -> None:
    """Show what waits for an operator's agreement, ask, and agree to it."""
    with Client(root) as client:
        if not as_json:
            _show_proposal(client.call("plugin.explain", name=name)["proposal"])
        if not yes:
            _ask(f"Approve {name} with exactly this?")
        answer = client.call("plugin.approve", name=name)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"approved {name}")


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
            given_values, spelled_out = given.config_values(values)
            if not given_values:
                raise UsageError("plugin config set", "nothing to set", "name KEY=VALUE")
            answer = client.call("config.set", name=name, config=given_values)
            items = client.call("config.list", name=name)["items"]
            secrets = {item["key"] for item in items if item["secret"]}
            if secrets & set(spelled_out):
                click.echo(HISTORY_HINT, err=True)
            _changed(answer, f"set {', '.join(given_values)}", as_json=as_json)
        elif action == "unset":
            if len(values) != 1:
                raise UsageError("plugin config unset", "name one key")
            _changed(client.call("config.unset", name=name, key=values[0]), f"unset {values[0]}", as_json=as_json)
        else:
            items = client.call("config.list", name=name)["items"]
            if values:
                items = [item for item in items if item["key"] in values]
                if not items:
                    raise NotFoundError(f"config {values[0]} of {name}", "no such key")
            if as_json:
                print_json(items)
            else:
                _show_config(items)


def _changed(answer: Mapping[str, Any], what: str, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(what + ("; restarted" if answer.get("restarted") else ""))


def _show_config(items: list[dict[str, Any]]) -> None:
    rows = []
    for item in items:
        value = "[secret]" if item["secret"] and item["is_set"] else item["value"] if item["is_set"] else None
        default = f"(default {item['default']})" if not item["is_set"] and item["default"] is not None else None
        state = "required, not set" if item["required"] and not item["is_set"] else default
        rows.append([item["key"], item["type"], value, state])
    if rows:
        table(["config", "type", "value", "note"], rows)


@plugin.command()
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
