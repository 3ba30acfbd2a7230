"""``isolator cluster``: several hosts that deliver one stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from host.cli.output import safe, table
from host.client.client import Client, ask
from isolator.cli.output import Group, here, print_json, print_result
from isolator.errors import IsolatorError, UnavailableError, UsageError, translated
from isolator.policy.cluster import parse_name, parse_server

_SERVERS = click.option(
    "--server", "servers", metavar="HOST:PORT", multiple=True, required=True, help="A server of NATS; repeatable."
)


@click.group(
    cls=Group,
    epilog="\b\nExamples:\n  isolator cluster users --dir /root/nats host-1 host-2 host-3\n"
    "  isolator cluster init --server nats-1:4222 --credentials /root/nats/admin.secret\n"
    "  isolator cluster status\n  sudo isolator cluster leave",
)
def cluster() -> None:
    """Set up and watch a cluster of hosts ([cluster] in host.toml)."""


@cluster.command(
    epilog="\b\nExamples:\n  isolator cluster init --server nats-1:4222 --credentials /root/nats/admin.secret\n"
    "  isolator cluster init --server 127.0.0.1:4222 --replicas 1 --no-tls --json"
)
@_SERVERS
@click.option(
    "--credentials", metavar="FILE", type=click.Path(path_type=Path), help="USER:PASSWORD of an administrator."
)
@click.option("--ca", metavar="FILE", default="", help="Certificates to trust in place of the system's.")
@click.option("--tls/--no-tls", default=True, help="Whether the servers speak TLS.")
@click.option(
    "--replicas", type=click.Choice(["1", "3", "5"]), default="3", show_default=True, help="Copies of the log."
)
@click.option(
    "--max-bytes", type=click.IntRange(1 << 20), default=8 << 30, show_default=True, help="Bytes that the log may have."
)
@here
def init(
    root: str | None, servers: tuple[str, ...], credentials: Path | None, ca: str, tls: bool, replicas: str,
    max_bytes: int, as_json: bool,
) -> None:  # fmt: skip
    """Make the cluster's log, once; a log that is there stays as it is.

    It is the stream ISO of the servers: kept for 14 days or up to --max-bytes, the
    oldest entries go first. The hosts' own users may not make or change it.
    """
    from host.cluster.joining import access_of
    from host.cluster.log import LogUnavailableError

    urls = tuple(_parsed(parse_server, server, "--server") for server in servers)
    secret = ""
    if credentials is not None:
        try:
            secret = credentials.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            why = f"cannot be read: {why}"
            raise IsolatorError(str(credentials), why, "it is admin.secret of 'isolator cluster users'") from None
    access = access_of(urls, secret, tls=tls, ca=ca)
    from host.cluster.nats import NatsLog, make_stream

    async def make() -> tuple[bool, Any]:
        made = await make_stream(access, int(replicas), max_bytes)
        log = NatsLog(access)
        try:
            return made, await log.facts()
        finally:
            await log.close()

    try:
        made, facts = asyncio.run(make())
    except LogUnavailableError as error:
        raise UnavailableError("the cluster's log", f"was not made: {error}", _remedy(error)) from None
    if facts.wrong:
        raise IsolatorError("the cluster's log", "; ".join(facts.wrong), "see docs/cluster.md")
    if as_json:
        print_json({"made": made, "created": facts.created, "replicas": facts.replicas, "servers": list(facts.servers)})
    else:
        what = "made" if made else "is there already, since"
        servers_ = safe(", ".join(facts.servers))
        click.echo(f"log {what} {safe(facts.created)}: {_counted(facts.replicas, 'copies')} on nats-server {servers_}")
        if (facts.replicas, facts.max_bytes) != (int(replicas), max_bytes):
            click.echo(f"it keeps what it was made with: --replicas {facts.replicas} --max-bytes {facts.max_bytes}")
        click.echo("next: [cluster] in host.toml of each host, then isolator reload")


@cluster.command(
    epilog="\b\nExamples:\n  isolator cluster users --dir /root/nats host-1 host-2 host-3\n"
    "  isolator cluster users --dir /root/nats --add host-4"
)
@click.argument("names", metavar="HOST...", nargs=-1, required=True)
@click.option(
    "--dir", "folder", metavar="DIR", type=click.Path(path_type=Path), required=True,
    help="Where to; new files, or with --add those of the cluster.",
)  # fmt: skip
@click.option(
    "--add", "more", is_flag=True, help="Put the hosts into DIR/users.conf; the users in it stay as they are."
)
@here
def users(_: str | None, names: tuple[str, ...], folder: Path, more: bool, as_json: bool) -> None:
    """Write one user for each host, and an administrator, for the servers' configuration.

    DIR/users.conf is for the servers ('include users.conf'; it also has them notice
    a machine that is gone), DIR/HOST.secret for [cluster] credentials of that host,
    DIR/admin.secret for 'cluster init'. A host's user writes under its own name
    alone, and cannot administrate. Files are 0600.

    With --add the hosts join those that users.conf has: copy it to every server, and
    have each read it (nats-server --signal reload=PID). Nothing changes for the others.
    """
    from host.cluster.users import add, write

    hosts = [_parsed(parse_name, name, "HOST") for name in names]
    if len({*hosts}) != len(hosts) or "admin" in hosts:
        raise UsageError("HOST", "each host needs a name of its own, and none is called admin")
    files = [*map(str, (add if more else write)(folder, hosts))]
    print_result({"files": files}, "\n".join(files), as_json=as_json)


@cluster.command(
    epilog="\b\nExamples:\n  isolator cluster status\n  isolator cluster status --json | jq .problems\n\n"
    "Exit code 0: this host is a member and has no problem; 1 otherwise."
)
@here
def status(root: str | None, as_json: bool) -> int:
    """Show this host in its cluster: problems, the log, the hosts, who holds which plugin."""
    found = ask(root, "cluster.status")
    if as_json:
        print_json(found)
    else:
        _show(found)
    return 0 if found["member"] and not found["problems"] else 1


@cluster.command(
    epilog="\b\nExamples:\n  isolator cluster place github --label eu\n"
    "  isolator cluster place audit-copy --all --anew\n  isolator cluster place github --shards 4 --anew --json"
)
@click.argument("plugin")
@click.option("--all/--one", "everywhere", default=None, help="On every host that has it, or on one at a time.")
@click.option("--shards", type=click.IntRange(1, 64), help="Parts of its events, by key, which hosts hold apart.")
@click.option("--label", "labels", metavar="LABEL", multiple=True, help="Only on hosts with it; repeatable.")
@click.option("--no-labels", is_flag=True, help="On hosts with any labels.")
@click.option("--anew", is_flag=True, help="Begin anew: events that wait for it are dropped.")
@here
def place(
    root: str | None, plugin: str, everywhere: bool | None, shards: int | None, labels: tuple[str, ...],
    no_labels: bool, anew: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say where a plugin of the cluster runs; what is left out stays.

    A plugin that was added on a host of the cluster runs on one at a time. Labels are
    those of [cluster] in host.toml: a holder that lacks one drains and releases it.
    --all, --one and --shards take --anew, which alone gives up what waits and leaves
    the rest as it is.
    """
    placement = None if everywhere is None else "all" if everywhere else "one"
    wanted = list(labels) if labels or no_labels else None
    found = ask(root, "cluster.place", name=plugin, placement=placement, shards=shards or 0, labels=wanted, anew=anew)
    if as_json:
        print_json(found)
        return
    click.echo(_where(found))
    if found["problem"]:
        click.echo(f"PROBLEM unheld: {safe(found['problem'])}")


@cluster.command(epilog="\b\nExamples:\n  sudo isolator cluster leave\n  sudo isolator cluster leave --force --json")
@click.option("--force", is_flag=True, help="Also where the log is out of reach: events that wait stay behind.")
@here
def leave(root: str | None, force: bool, as_json: bool) -> None:
    """Give up this host's part in the cluster.

    Each plugin goes to another host when nothing of it is in flight, and events that
    wait are sent. Afterwards remove [cluster] from host.toml and run isolator reload.
    """
    with Client(root, timeout=180) as client:
        found = client.call("cluster.leave", force=force)
    if as_json:
        print_json(found)
        return
    click.echo("left; remove [cluster] from host.toml, if it is there, then run isolator reload")
    if found["left_behind"]:
        events = _counted(found["left_behind"], "events")
        click.echo(
            f"accepted here and not in the log: {events}, which stay in the outbox until it joins a cluster again"
        )


def _where(found: Mapping[str, Any]) -> str:
    one = f"on one host at a time, in {_counted(found['shards'], 'shards')}"
    where = "on every host" if found["placement"] == "all" else one
    only = f", only with {safe(', '.join(found['labels']))}" if found["labels"] else ""
    return f"{safe(found['name'])}: {where}{only}"


def _show(found: Mapping[str, Any]) -> None:
    for problem in found["problems"]:
        click.echo(f"PROBLEM {safe(problem['kind'])}: {safe(problem['line'])}")
    standing = f"a member; may act for {found['seconds_left']} s" if found["member"] else "NOT a member at the moment"
    click.echo(f"host:    {safe(found['host'])}, {standing}")
    log = found["log"]
    if log is not None:
        size = f"{log['bytes'] >> 20} of {log['max_bytes'] >> 20} MiB"
        servers = f"{_counted(log['replicas'], 'copies')} on nats-server {safe(', '.join(log['servers']))}"
        last = max(log["last"], found["place"])  # it is looked at now and then, and read all the time
        click.echo(f"log:     read up to {found['place']} of {last}; {size}; {servers}")
    outbox = found["outbox"]
    size = f"{outbox['bytes'] >> 10} of {outbox['max_bytes'] >> 10} KiB"
    click.echo(f"outbox:  {_counted(outbox['events'], 'events')} to send ({size})")
    click.echo()
    table(
        ["HOST", "STATE", "VERSION", "HOLDS", "BEHIND", "CLOCK", "LABELS"],
        [_row(host, found) for host in found["hosts"]],
    )
    ready = {
        plugin["name"]: [one["name"] for one in found["hosts"] if one["alive"] and plugin["name"] in one["ready"]]
        for plugin in found["plugins"]
    }
    shards = [
        [
            plugin["name"],
            plugin["placement"],
            shard["shard"],
            shard["host"] or "nobody",
            shard["epoch"] or "",
            ", ".join(one for one in ready[plugin["name"]] if one != shard["host"]) or "no other host",
        ]
        for plugin in found["plugins"]
        for shard in plugin["shards"] or [{"shard": "", "host": "every host", "epoch": None}]
    ]
    if shards:
        click.echo()
        table(["PLUGIN", "PLACEMENT", "SHARD", "HELD BY", "EPOCH", "ALSO READY"], shards)


def _row(host: Mapping[str, Any], found: Mapping[str, Any]) -> list[Any]:
    name = f"{host['name']}{' (this)' if host['here'] else ''}"
    clock = "" if host["clock_ahead"] is None else f"{round(host['clock_ahead'], 1) + 0.0:+.1f} s"  # never -0.0
    behind = max(0, found["place"] - host["place"])
    away = "no member" if host["here"] else "SILENT"
    state = "alive" if host["alive"] else "stopped" if host["stopped"] else away
    return [name, state, host["version"], len(host["holds"]), behind, clock, ", ".join(host["labels"])]


_ONE: Final = {"events": "event", "copies": "copy", "shards": "shard"}


def _counted(number: int, what: str) -> str:
    return f"{number} {_ONE[what] if number == 1 else what}"


def _remedy(error: Exception) -> str:
    """Say what to do about a log that could not be made."""
    from host.cluster.log import LogFullError, LogRefusedError

    text = str(error)
    if isinstance(error, LogFullError):
        return "--max-bytes fits into max_file_store of each server, and --replicas is at most the number of servers"
    if isinstance(error, LogRefusedError) and "certificate" in text:
        return "--ca names the authority's certificate, and --server a name that is in the server's own"
    if isinstance(error, LogRefusedError):
        return "--credentials names admin.secret, of the same 'isolator cluster users' as users.conf on the servers"
    if "non-clustered" in text:
        return "a server of its own has --replicas 1; for more, each needs cluster { ... }, as in docs/cluster.md"
    if "temporarily unavailable" in text:
        return "as many servers as --replicas have to see each other: their logs say what is wrong with a route"
    if "no server answers for the stream" in text:
        return "every server's configuration needs jetstream { ... }, as in docs/cluster.md"
    return "see that the servers run, and listen there for clients: docs/cluster.md has their configuration"


def _parsed(parse: Any, text: str, option: str) -> str:
    with translated(ValueError, UsageError, option):
        return str(parse(text))
