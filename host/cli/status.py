"""``isolator status``: the daemon at a glance, with an exit code for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from host.cli.notes import BAD_STATES
from host.cli.output import ago, safe, show_alarms
from host.client.client import ask
from isolator.cli.output import here, print_json
from isolator.layers.phrases import count
from isolator.paths import Paths


@click.command(
    epilog="\b\nExamples:\n  isolator status\n  isolator status --json | jq .queue\n\n"
    "Exit code 0: all is well; 1: an alarm, a process that is away, or a plugin that fails."
)
@here
def status(root: str | None, as_json: bool) -> int:
    """Show the daemon on one screen: processes, plugins, queue, trail, alarms."""
    found = ask(root, "status")
    where = str(Paths.of(root).root)
    if as_json:
        print_json({"root": where, **found})
    else:
        show_alarms(found["alarms"])
        for name, value in _lines(found, where):
            click.echo(f"{name + ':':11}{value}")
    return 0 if _well(found) else 1


def _well(found: Mapping[str, Any]) -> bool:
    states = found["states"]
    services = found["services"]
    return not (
        found["alarms"]
        or found["failing"]
        or any(states.get(state) for state in BAD_STATES)
        or not services
        or not all(service["up"] for service in services)
    )


def _lines(found: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    lines = [("daemon", f"isolator {found['version']} at {where}, for {ago(found['started_at'])}")]
    services = [_service(service) for service in found["services"]]
    lines.append(("processes", ", ".join(services) or "the supervisor does not answer"))
    states = ", ".join(f"{count} {state}" for state, count in sorted(found["states"].items()))
    lines.append(("plugins", states or "none; add one with 'isolator plugin add DIR'"))
    if found["failing"]:
        lines.append(("failing", f"{safe(found['failing'])}; isolator plugin list --failed"))
    if found["waiting"]:
        lines.append(("waiting", f"{safe(found['waiting'])}; isolator plugin approve NAME"))
    if found["paused"]:
        lines.append(("paused", f"{safe(found['paused'])}; isolator plugin resume NAME"))
    queue = {name: depth for name, depth in found["queue"].items() if depth}
    most = sorted(queue.items(), key=lambda item: -item[1])[:3]
    waits = f" ({', '.join(f'{safe(name)} {depth}' for name, depth in most)})" if most else ""
    lines.append(("queue", f"{count(sum(queue.values()), 'delivery', 'deliveries')} not done{waits}"))
    trail = found["trail"]
    last = "cannot be read" if trail["last"] is None else count(trail["last"], "record")
    pending = f", {trail['pending']} on their way" if trail["pending"] else ""
    lines.append(("trail", f"BLOCKED: {safe(trail['blocked'])}" if trail["blocked"] else f"{last}{pending}"))
    if found["database_blocked"]:
        lines.append(("database", f"BLOCKED: {safe(found['database_blocked'])}"))
    return lines


def _service(service: Mapping[str, Any]) -> str:
    again = f", started {service['starts']} times (the last one: {service['ended']})" if service["starts"] > 1 else ""
    return f"{service['name']} {service['pid'] if service['up'] else 'AWAY'}{again}"
