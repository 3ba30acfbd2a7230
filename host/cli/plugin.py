"""``isolator plugin``: add, inspect, start, stop, update and remove plugins."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import click

from host.cli import arguments, notes, registration
from host.cli.add import add, update
from host.cli.grants import grant, revoke
from host.cli.many import Aliased, each
from host.cli.options import NAME, NAMES, Manner, registering, yes
from host.cli.output import ago, listing, safe, show_alarms, table
from host.client.client import Client, ask
from isolator.base.pacing import Backoff
from isolator.cli.audit import moment
from isolator.cli.output import confirm, here, print_json, print_result
from isolator.cli.progress import Progress
from isolator.errors import IsolatorError, NotFoundError, UsageError
from isolator.policy import units

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.group(
    cls=Aliased,
    lazy={
        "denials": "host.cli.denials_command:denials",
        "logs": "host.cli.logs:logs",
        "test": "host.authoring.trial_command:test",
    },
    epilog="\b\nExamples:\n  isolator plugin add ./slack-deploy-notifier --config slack_webhook_url=@url.txt\n"
    "  isolator plugin add --name indexer --binary /opt/indexer --hooks deploy.completed\n"
    "  isolator plugin explain slack-deploy-notifier",
)
def plugin() -> None:
    """Add, inspect, start, stop, update and remove plugins."""


plugin.add_command(add)
plugin.add_command(update)


@plugin.command("list", epilog="\b\nExamples:\n  isolator plugin list\n  isolator plugin list --failed --json")
@click.option("--failed", is_flag=True, help="Only those that fail, were refused or hold events back.")
@here
def list_plugins(root: str | None, failed: bool, as_json: bool) -> None:
    """List every plugin with its state."""
    answer = ask(root, "plugin.list")
    plugins = [p for p in answer["plugins"] if not failed or notes.fails(p)]
    show_alarms(answer["alarms"])

    def row(p: Mapping[str, Any]) -> list[Any]:
        up = ago(p.get("started_at")) if p.get("pid") else None
        version = p["version"] if len(p["version"]) <= _SHORT else p["version"][: _SHORT - 1] + "…"
        note = "; ".join(notes.all_notes(p))
        return [p["name"], version, p["state"], p.get("pid"), up, p["restarts"], p["queue"], note]

    nothing = "no plugin fails" if failed else "no plugins; add one with 'isolator plugin add DIR'"
    headings = ["name", "version", "state", "pid", "up", "restarts", "queue", "note"]
    listing(plugins, headings, row, nothing, as_json=as_json)


@plugin.command(
    epilog="\b\nExamples:\n  isolator plugin show slack\n  isolator plugin show slack --json | jq .effective"
)
@NAME
@here
def show(root: str | None, name: str, as_json: bool) -> None:
    """Show everything about one plugin."""
    found = ask(root, "plugin.show", name=name)
    if as_json:
        print_json(found)
        return
    shown = ["name", "version", "state", "error", "holding", "pid", "uid", "run", "restarts", "mode", "hooks", "queue"]
    for key in (*shown, "lease", "digest", "signer", "effective_digest", "binary", "source", "found", "previous"):
        if found.get(key) not in (None, "", []):
            click.echo(f"{key + ':':18}{safe(found[key])}")
        if key == "state" and (waits := _waits_for_socket(found)):
            click.echo(f"{'start:':18}{waits}")
    if found.get("cluster"):
        click.echo(f"{'cluster:':18}{safe(_in_cluster(found['cluster']))}")
    if found.get("last"):
        last = found["last"]
        detail = f", {safe(last['detail'])}" if last["detail"] else ""
        click.echo(f"{'last outcome:':18}{last['outcome']}, {ago(last['at'])} ago{detail}  ({last['event_id']})")
    for label, note in (
        ("paused:", notes.paused(found)),
        ("failing:", notes.failing(found)),
        ("held back by:", found.get("held_by")),
    ):
        if note:
            click.echo(f"{label:18}{safe(note)}")
    if found.get("pending"):
        click.echo(f"{'waits:':18}{safe(notes.waiting(found))}")
        for phrase in found["pending"]["differences"]:
            click.echo(f"{'':18}{safe(phrase)}")
    _show_config(found["config"])
    _show_troubles(root, found)
    for line in found["stderr"]:
        click.echo(f"stderr: {safe(line)}")


def _in_cluster(plugin: Mapping[str, Any]) -> str:
    """The host that has a plugin in the cluster, or the reason why none has."""
    if plugin["problem"]:
        return str(plugin["problem"])
    if plugin["placement"] == "all":
        return "on every host"
    several = len(plugin["shards"]) > 1
    held = [
        (f"shard {shard['shard']} " if several else "") + f"held by {shard['host'] or 'nobody'}"
        for shard in plugin["shards"]
    ]
    return ", ".join(held)


def _show_troubles(root: str | None, found: Mapping[str, Any]) -> None:
    """Print what failed, and which limits it ran into, within a day: one line each."""
    from host.cli import denials as summary
    from host.cli import trail
    from isolator.audit.reader import Query

    wanted = Query(found["name"], summary.TROUBLES, since=moment("1d"))
    try:
        records = [record for _, record in trail.search(root, wanted, limit=_MOST_RECORDS)]
    except IsolatorError as error:
        click.echo(f"isolator: {error}", err=True)
        return
    for one in summary.collect(records, found):
        if one.kind != "refusal":
            why = one.advice.why if one.kind == "failure" else "see 'isolator plugin denials'"
            click.echo(f"{'trouble:':18}{one.count} × {summary.attempt(one)} ({ago(one.last)} ago): {safe(why)}")


@plugin.command(
    epilog="\b\nExamples:\n  isolator plugin explain slack\n"
    "  isolator plugin explain slack --json | jq .effective.network"
)
@NAME
@here
def explain(root: str | None, name: str, as_json: bool) -> None:
    """Show request, grant and effect line by line, and the promise of each layer."""
    proposal = ask(root, "plugin.explain", name=name)["proposal"]
    if as_json:
        print_json(proposal)
        return
    approve = f"'isolator plugin approve {name}'"
    if proposal.get("differences"):
        click.echo(f"{safe(proposal['version'])} waits for approval; this is what {approve} would grant it:\n")
    elif proposal["needs_approval"]:
        click.echo(f"{proposal['policy_file']} is not there; this is what {approve} would grant:\n")
    registration.show_proposal(proposal, verbose=True)


_SOON = 1.0
"""Seconds after which ``plugin start`` says that a plugin is still on its way."""
_HISTORY = tuple(
    f"plugin.{what}"
    for what in ("added", "pending", "approved", "declined", "updated", "rolled_back", "removed", "rejected")
)
_SHORT = 16
"""Characters of a version that listings show."""
_MOST_RECORDS = 10_000
"""Records that are looked at for a plugin's troubles."""
_LAST_WORDS = 3
"""Lines of stderr that are shown of a plugin that did not come up."""


def _waits_for_socket(shown: Mapping[str, Any]) -> str | None:
    """How long a plugin that runs has been without its socket, and how long it may be."""
    if shown["state"] != "running" or shown.get("ready", True) or not shown.get("effective"):
        return None
    patience = units.format_duration(shown["effective"]["restart"]["start_timeout"])
    return f"its socket is not there yet, after {ago(shown['started_at'])} of {patience}"


def wait_ready(client: Client, name: str, run: str) -> None:
    """Wait until a plugin that was started has its socket; raises IsolatorError with its last words if it ends before.

    By questions with growing pauses: no notification of the control socket tells of a plugin's socket. The daemon ends
    a plugin whose socket is not there in time, so this ends too.
    """
    soon, pause = time.monotonic() + _SOON, Backoff(0.02, 0.5)
    while True:
        shown = client.call("plugin.show", name=name)
        waits = _waits_for_socket(shown)
        if waits is None or shown["run"] != run:
            break
        if time.monotonic() > soon:
            click.echo(f"{name}: {waits}", err=True)
            soon = float("inf")
        time.sleep(pause.next())
    if shown["state"] != "running" or shown["run"] != run:
        for line in shown["stderr"][-_LAST_WORDS:]:
            click.echo(f"stderr: {safe(line)}", err=True)
        why = shown["error"] or "it ended before its socket was there"
        raise IsolatorError(f"plugin {name}", f"is {shown['state']}: {why}", f"isolator plugin logs {name}")


def _simple(verb: str, summary: str, done: str, *, waits: bool = False) -> None:
    epilog = f"\b\nExamples:\n  isolator plugin {verb} slack\n  isolator plugin {verb} slack indexer"

    def command(root: str | None, names: tuple[str, ...], as_json: bool, no_wait: bool = False) -> int:
        def change(client: Client, name: str) -> dict[str, Any]:
            with Progress(f"{verb} {name}", quiet=as_json):
                answer = client.call(f"plugin.{verb}", name=name)
            if waits and not no_wait:
                wait_ready(client, name, answer["run"])
            if not as_json:
                pid = f", pid {answer['pid']}" if answer.get("pid") else ""
                click.echo(f"{done} {name}{pid}")
                if holders := answer.get("holders"):
                    hosts = safe(", ".join(holders))
                    click.echo(f"on this host alone: {hosts} has {name}, and goes on as before", err=True)
            return answer

        with Client(root, timeout=registration.AS_LONG_AS_STARTS_TAKE) as client:
            return each(names, functools.partial(change, client), as_json=as_json)

    decorated = here(command)
    if waits:
        decorated = click.option("--no-wait", is_flag=True, help="Do not wait until its socket is there.")(decorated)
    plugin.command(verb, help=summary, epilog=epilog)(NAMES(decorated))


_simple("start", "Start a plugin now instead of at its first event, and wait until it is up.", "started", waits=True)
_simple("stop", "Stop a plugin; the next event starts it again.", "stopped")
_simple("restart", "Stop a plugin, start it again, and wait until it is up.", "restarted", waits=True)
_simple("enable", "Let a disabled plugin run again.", "enabled")
_simple("pause", "Send a plugin no events until it is resumed; they wait, and its sidecar stays.", "paused")
_simple("resume", "Send a paused plugin its events again.", "resumed")
_simple("disable", "Stop a plugin and keep it stopped; its events wait.", "disabled")


@plugin.command(
    epilog="\b\nExamples:\n  isolator plugin rollback slack\n  isolator plugin rollback slack --to 1.4.0\n"
    "  isolator plugin rollback slack --to 9f86d081"
)
@NAME
@click.option("--to", metavar="VERSION|DIGEST", help="One of the kept versions instead of the one before.")
@here
def rollback(root: str | None, name: str, to: str | None, as_json: bool) -> None:
    """Go back to the version before; if that is not up in time, nothing changes."""
    with (
        Client(root, timeout=registration.AS_LONG_AS_STARTS_TAKE) as client,
        Progress(f"rollback {name}", quiet=as_json),
    ):
        answer = client.call("plugin.rollback", name=name, **({"to": to} if to else {}))
    print_result(answer, f"rolled back {name}; {answer['plugin']['version']} is in use now", as_json=as_json)


@plugin.command(epilog="\b\nExamples:\n  isolator plugin reject slack")
@NAME
@here
def reject(root: str | None, name: str, as_json: bool) -> None:
    """Refuse the version that waits for approval; the one in use stays."""
    with Client(root) as client:
        waiting = client.call("plugin.show", name=name).get("pending") or {}
        answer = client.call("plugin.reject", name=name)
    print_result(
        answer,
        f"rejected {name} {safe(waiting.get('version'))}; {answer['plugin']['version']} stays in use",
        as_json=as_json,
    )


@plugin.command(epilog="\b\nExamples:\n  isolator plugin history slack\n  isolator plugin history slack --json")
@NAME
@here
def history(root: str | None, name: str, as_json: bool) -> None:
    """Show which versions a plugin had, since when, and who decided it; from the audit trail."""
    from host.cli import trail
    from isolator.audit.reader import Query

    records = [record for _, record in trail.search(root, Query(name, _HISTORY))]
    if as_json:
        print_json([{"time": r.time, "type": r.type, "seq": r.seq, "data": r.data} for r in records])
        return
    if not records:
        raise NotFoundError(f"plugin {name}", "the trail has no record of its versions", "see 'isolator plugin list'")
    rows = [
        [r.time[:19] + "Z", r.type.removeprefix("plugin."), r.data.get("version"),
         str(r.data.get("new") or r.data.get("digest") or r.data.get("old") or "")[:12],
         r.data.get("who") or r.data.get("by"), r.data.get("reason") or "; ".join(r.data.get("differences") or [])]
        for r in records
    ]  # fmt: skip
    table(["time", "what", "version", "digest", "by", "why"], rows)


@plugin.command(epilog="\b\nExamples:\n  isolator plugin approve slack\n  isolator plugin approve slack --verbose")
@NAME
@registering()
def approve(root: str | None, name: str, manner: Manner) -> None:
    """Show what waits for an operator's agreement, ask, and agree to it.

    That is a newer version that asks for more, a binary that was changed, or a plugin found in plugin_dirs.
    """
    with Client(root, timeout=registration.AS_LONG_AS_STARTS_TAKE) as client:
        now = client.call("plugin.show", name=name)
        if now.get("found"):
            registration.register_plugin(client, {"path": now["found"]}, arguments.Config({}, []), manner)
        else:
            registration.approve_plugin(client, now, manner)


@plugin.command(epilog="\b\nExamples:\n  isolator plugin remove slack\n  isolator plugin remove --yes slack indexer")
@NAMES
@yes("Do not ask; needed where nobody can be asked.")
@click.option("--cluster", is_flag=True, help="Have the cluster forget them, also where no living host has them.")
@here
def remove(root: str | None, names: tuple[str, ...], yes: bool, cluster: bool, as_json: bool) -> int:
    """Stop plugins and forget them: files, user, config, queue, and what they have stored."""
    with Client(root) as client:
        for name in names if not cluster else ():
            client.call("plugin.show", name=name)
        if not yes:
            confirm("plugin remove", f"Remove {', '.join(names)} and delete everything stored there?")

        def one(name: str) -> dict[str, Any]:
            more = {"cluster": True} if cluster else {}
            answer = client.call("plugin.remove", name=name, **more)
            if not as_json:
                click.echo(f"removed {name}")
            return answer

        return each(names, one, as_json=as_json)


plugin.add_command(grant)
plugin.add_command(revoke)


@plugin.command(
    epilog="\b\nExamples:\n  isolator plugin config slack\n  isolator plugin config slack set channel=#ops\n"
    "  isolator plugin config slack set slack_webhook_url=@url.txt\n  isolator plugin config slack unset channel"
)
@NAME
@click.argument("action", type=click.Choice(["get", "set", "unset"]), default="get")
@click.argument("values", nargs=-1, metavar="[K=V | K]...")
@here
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
                click.echo(registration.HISTORY_HINT, err=True)
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
    print_result(answer, change + ("; restarted" if answer.get("restarted") else ""), as_json=as_json)


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
