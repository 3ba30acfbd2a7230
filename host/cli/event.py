"""``isolator event``: emit events and follow their deliveries."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import click

from host.cli import arguments, examples
from host.cli.complete import event_ids, event_names
from host.cli.many import Aliased
from host.cli.options import SINCE, of_plugin
from host.cli.output import ago, latency, listing, newest, paragraph, result_in, safe, table
from host.client.client import Client, ask
from host.schemas.flat import fields
from isolator.cli.audit import moment
from isolator.cli.output import here, print_json, print_result
from isolator.cli.progress import Progress
from isolator.errors import IsolatorError, NotFoundError, UsageError, nearest
from isolator.layers.phrases import count

_ID = click.argument("event_id", metavar="ID", shell_complete=event_ids)
_FINE = ("ok", "skipped")
_WAITING = ("queued", "retry", "in_flight")
_JOB_LOOK = 0.2
"""Seconds between two looks at a job that is waited for."""


@click.group(
    cls=Aliased,
    epilog="\b\nExamples:\n  isolator event types\n"
    '  isolator event emit deploy.completed \'{"project_id": "p1", "deployment_id": "d1",\n'
    '    "url": "https://shop.example", "duration_ms": 5100}\' --wait\n  isolator event dead',
)
def event() -> None:
    """Emit events and follow their deliveries."""


@event.command(
    epilog='\b\nExamples:\n  isolator event emit project.created \'{"project_id": "p1", "name": "Shop"}\'\n'
    "  isolator event emit deploy.completed @payload.json --wait\n"
    "  isolator event emit deploy.completed - --dedupe-key deploy-d1 < payload.json\n\n"
    "The fields of one: isolator event types NAME"
)
@click.argument("name", shell_complete=event_names)
@click.argument("payload", metavar="[JSON | @FILE | -]", required=False)
@click.option("--wait", is_flag=True, help="Wait for the outcome at every plugin; exit 1 unless each is ok or skipped.")
@click.option("--timeout", default=30.0, show_default=True, type=click.FloatRange(0, 3600), help="Seconds to wait.")
@click.option("--dedupe-key", metavar="KEY", help="Emit once: the same key again returns the first event.")
@here
def emit(
    root: str | None, name: str, payload: str | None, wait: bool, timeout: float, dedupe_key: str | None, as_json: bool
) -> int:
    """Emit an event; it is safe on disk when this returns.

    The payload is a JSON object: as it stands, in a FILE, or (-) on standard input.
    On a host that is cut off from its cluster's log the event waits in the outbox; a
    line, and kept_back in the JSON, say why.
    """
    fields = arguments.json_object(payload)
    with Client(root, timeout=timeout + 150) as client:
        try:
            accepted = client.call("event.emit", name=name, payload=fields, dedupe_key=dedupe_key)
        except UsageError as error:
            raise UsageError(error.what, error.why, error.remedy or f"see 'isolator event types {name}'") from None
        if not wait:
            if as_json:
                print_json(accepted)
            else:
                to = f"to {', '.join(accepted['plugins'])}" if accepted["plugins"] else "no plugin receives it"
                click.echo(f"{accepted['id']}  {'already emitted' if accepted['duplicate'] else to}")
                _say_kept_back(accepted)
            return 0
        if as_json:
            click.echo(f"{accepted['id']}", err=True)
        else:
            click.echo(f"{accepted['id']}  {safe(name)}  {'already emitted' if accepted['duplicate'] else 'emitted'}")
            _say_kept_back(accepted)
        row = client.call("event.wait", id=accepted["id"], timeout=timeout)
    if as_json:
        print_json(row)
    else:
        _show_deliveries(row)
        if any(delivery["state"] in _WAITING for delivery in row["deliveries"]):
            click.echo(
                f"isolator: not all are done after {timeout:g} s; see 'isolator event show {row['id']}'", err=True
            )
    return 0 if all(delivery["state"] in _FINE for delivery in row["deliveries"]) else 1


@event.command(
    "list",
    epilog="\b\nExamples:\n  isolator event list --plugin slack --state retry\n"
    "  isolator event list --type deploy.failed --since 2h --json",
)
@newest("limit", 50, 10_000)
@click.option("--type", "--name", "name", metavar="EVENT", shell_complete=event_names, help="Only events of this type.")
@of_plugin("Only events for this plugin.")
@click.option("--state", metavar="STATE", help="Only with a delivery in this state: retry, dead, ok, ...")
@SINCE
@here
def list_events(
    root: str | None,
    limit: int,
    name: str | None,
    plugin: str | None,
    state: str | None,
    since: str | None,
    as_json: bool,
) -> None:
    """List the newest events.

    In a cluster, of their deliveries those of this host; 'event show' knows the others.
    """
    request: dict[str, Any] = {"limit": limit, "event": name, "plugin": plugin, "state": state, "brief": not as_json}
    if (begin := moment(since)) is not None:
        request["since"] = datetime.fromisoformat(begin).timestamp()
    events = ask(root, "event.list", **request)["events"]

    def row(one: dict[str, Any]) -> list[Any]:
        of = [d for d in one["deliveries"] if plugin in (None, d["plugin"]) and state in (None, d["state"])]
        states = [f"{d['plugin']} {d['state']}" for d in of]
        return [one["id"], one["name"], one["subject"], ago(one["accepted"]), ", ".join(states) or "nobody here"]

    narrowed = any(one is not None for one in (name, plugin, state, since))
    nothing = "no such events" if narrowed else "no events; emit one with 'isolator event emit'"
    listing(events, ["id", "event", "subject", "ago", "deliveries"], row, nothing, as_json=as_json)


@event.command(
    epilog="\b\nExamples:\n  isolator event show ev_0195\n  isolator event show ev_0195 --json | jq .deliveries"
)
@_ID
@here
def show(root: str | None, event_id: str, as_json: bool) -> None:
    """Show one event and where each delivery stands."""
    row = ask(root, "event.show", id=event_id)
    if as_json:
        print_json(row)
        return
    click.echo(f"{row['id']}  {row['name']}  {row['time'][:19]}Z  {safe(row['subject'])}")
    _show_deliveries(row)
    for key, value in row["payload"].items():
        click.echo(f"  {key}: {safe(value)}")


@event.command(epilog="\b\nExamples:\n  isolator event replay ev_0195\n  isolator event replay ev_0195 --plugin slack")
@_ID
@of_plugin("Only there; also repeats a delivery that succeeded.")
@here
def replay(root: str | None, event_id: str, plugin: str | None, as_json: bool) -> None:
    """Deliver again what was given up."""
    answer = ask(root, "event.replay", id=event_id, plugin=plugin)
    print_result(answer, f"queued {answer['id']} again for {', '.join(answer['plugins'])}", as_json=as_json)


def _change(verb: str, summary: str, done: str, *, of_one: bool = True) -> None:
    epilog = f"\b\nExamples:\n  isolator event {verb} ev_0195"

    def command(root: str | None, event_id: str, as_json: bool, plugin: str | None = None) -> None:
        answer = ask(root, f"event.{verb}", id=event_id, **({"plugin": plugin} if plugin is not None else {}))
        print_result(answer, f"{done} {answer['id']} for {', '.join(answer['plugins'])}", as_json=as_json)

    decorated = here(command)
    if of_one:
        decorated = of_plugin("Only there.")(decorated)
        epilog += f"\n  isolator event {verb} ev_0195 --plugin slack"
    decorated = _ID(decorated)
    event.command(verb, help=summary, epilog=epilog)(decorated)


_change("retry", "Try an event at once that waits for its next attempt; the order within its key stays.", "retrying")
_change("skip", "Pass an event over that waits: later events of its key go on.", "skipped")
_change("cancel", "Cancel every delivery of an event that waits, or a recovery job.", "cancelled", of_one=False)


def _rate(_: click.Context, __: click.Parameter, text: str) -> float:
    try:
        return float(text.removesuffix("/s"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not like 20/s") from None


@event.command(
    epilog="\b\nExamples:\n  isolator event recover --plugin slack --since 2h --dry-run\n"
    "  isolator event recover --plugin slack --since 2026-01-31T12:00 --missed --rate 50/s --wait\n\n"
    "It runs in the daemon, over restarts too: isolator event jobs; isolator event cancel JOB"
)
@of_plugin("The plugin to deliver to.", required=True)
@click.option("--since", metavar="TIME", required=True, help="Events since a time, or an age such as 2h.")
@click.option("--dead", is_flag=True, help="Only what was given up; not what killed the plugin.")
@click.option("--missed", is_flag=True, help="Only what it never got, and is granted now.")
@click.option("--rate", metavar="N/s", default="20/s", show_default=True, callback=_rate, help="Deliveries a second.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@click.option("--wait", is_flag=True, help="Wait until all are queued; Ctrl-C ends the waiting alone.")
@here
def recover(
    root: str | None, plugin: str, since: str, dead: bool, missed: bool, rate: float, dry_run: bool, wait: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Deliver again what was given up, and what the plugin has missed."""
    begin = moment(since)
    assert begin is not None
    request = {"plugin": plugin, "since": datetime.fromisoformat(begin).timestamp(), "dead": dead, "missed": missed}
    with Client(root) as client:
        answer = client.call("event.recover", **request, rate=rate, dry_run=dry_run)
        if wait and answer["job"] is not None:
            answer["state"] = _wait_for_job(client, answer["job"], quiet=as_json)
    if as_json:
        print_json(answer)
    elif answer["job"] is None:
        click.echo(f"{count(answer['count'], 'delivery', 'deliveries')} to recover for {plugin}")
    else:
        state = answer.get("state")
        more = f": {state}" if state else "; isolator event jobs"
        click.echo(f"{answer['job']}  {count(answer['count'], 'delivery', 'deliveries')} for {plugin}{more}")
    if answer.get("state", "done") != "done":
        raise IsolatorError(f"job {answer['job']}", f"was {answer['state']}", "isolator event jobs")


def _wait_for_job(client: Client, job: str, *, quiet: bool) -> str:
    """Wait until a recovery job has ended; returns how."""
    with Progress(f"queueing for {job}", quiet=quiet) as progress:
        while True:
            found = next((one for one in client.call("event.jobs")["jobs"] if one["id"] == job), None)
            if found is None or found["state"] != "running":
                return found["state"] if found is not None else "done"
            progress.reach(found["done"], found["total"])
            time.sleep(_JOB_LOOK)


@event.command(epilog="\b\nExamples:\n  isolator event jobs\n  isolator event jobs --json")
@here
def jobs(root: str | None, as_json: bool) -> None:
    """List the recovery jobs and how far they are."""
    kinds = {(True, True): "all", (True, False): "dead", (False, True): "missed"}
    listing(
        ask(root, "event.jobs")["jobs"],
        ["id", "plugin", "which", "state", "queued", "rate", "ago", "by"],
        lambda j: [
            j["id"], j["plugin"], kinds[j["dead"], j["missed"]], j["state"], f"{j['done']}/{j['total']}",
            f"{j['rate']:g}/s", ago(j["created"]), j["by"],
        ],
        "no recovery jobs; see 'isolator event recover --help'", as_json=as_json,
    )  # fmt: skip


@event.command(epilog="\b\nExamples:\n  isolator event dead\n  isolator event dead --plugin slack -n 20")
@of_plugin("Only of this plugin.")
@newest("limit", 1000, 100_000)
@here
def dead(root: str | None, plugin: str | None, limit: int, as_json: bool) -> None:
    """List deliveries that were given up, with the reason."""
    listing(
        ask(root, "event.dead", plugin=plugin, limit=limit)["deliveries"],
        ["id", "event", "plugin", "state", "attempts", "ago", "reason"],
        lambda d: [d["event_id"], d["event"], d["plugin"], d["state"], d["attempts"], ago(d["updated"]), d["detail"]],
        "no dead letters", as_json=as_json,
    )  # fmt: skip


@event.command(
    epilog="\b\nExamples:\n  isolator event types deploy.failed\n  isolator event types deploy.failed --example"
)
@click.argument("name", required=False, shell_complete=event_names)
@click.option("--example", is_flag=True, help="Print a payload with every required field; needs NAME.")
@here
def types(root: str | None, name: str | None, example: bool, as_json: bool) -> None:
    """List the events there are; with NAME: the fields of one, with their limits."""
    if example and name is None:
        raise UsageError("--example", "needs the name of an event", "isolator event types NAME --example")
    found = ask(root, "event.types")["types"]
    if name is not None:
        near = nearest(name, [entry["name"] for entry in found])
        found = [entry for entry in found if entry["name"] == name]
        if not found:
            remedy = f"did you mean {near}?" if near else "see 'isolator event types'"
            raise NotFoundError(f"event {name}", "no such event", remedy)
    if example:
        print_json(examples.example_of(found[0]["name"], found[0]["schema"], found[0].get("filled")))
        return
    if as_json:
        print_json(found)
        return
    rows = []
    for entry in found:
        found_fields = list(fields(entry["schema"]))
        need = {key: "required" if required else "optional" for key, _, required in found_fields}
        if entry.get("filled"):
            need[entry["filled"]] = "filled in"  # with the time, when it is left out
        if name is not None:
            rows += [[key, need[key], _kind(rule), examples.limits_of(rule)] for key, rule, _ in found_fields]
        else:
            required = [key for key in entry["schema"]["properties"] if need[key] == "required"]
            rows.append([entry["name"], entry["order_by"], ", ".join(required)])
    table(["field", "", "type", "limits"] if name is not None else ["event", "ordered by", "required"], rows)


def _kind(rule: Mapping[str, Any]) -> str:
    options = [rule, *rule.get("anyOf", ())]
    for option in options:
        if "enum" in option:
            return " | ".join(map(str, option["enum"]))
        if option.get("type") not in (None, "null"):
            return str(option["type"])
    return "any"


def _say_kept_back(accepted: dict[str, Any]) -> None:
    """Say that an event is on this host's disk alone, where the cluster's log is out of reach."""
    if why := accepted.get("kept_back"):
        click.echo(f"it waits in this host's outbox, and is sent as soon as the log takes it: {safe(why)}")


def _show_deliveries(row: dict[str, Any]) -> None:
    deliveries = row["deliveries"]
    rows = [
        [
            *(d["plugin"], d["state"], d["status"], d["attempts"], latency(d["latency_us"])),
            d["detail"] or d.get("holding"),
        ]
        for d in deliveries
    ]
    if not rows:
        click.echo("no plugin receives it")
        return
    table(["plugin", "outcome", "status", "attempts", "latency", "detail"], rows)
    for delivery in deliveries:
        if delivery["reply"]:
            who = f"{delivery['plugin']} replied " if len(deliveries) > 1 else "reply "
            paragraph(safe(result_in(delivery["reply"])), who)
