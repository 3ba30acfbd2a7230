"""Registering, updating and approving at the command line: show request and grant, ask for consent, do it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from host.cli.arguments import Config
from host.cli.options import Manner
from host.cli.output import paragraph, safe, size, table, terminal_width
from isolator.cli.output import print_json
from isolator.cli.progress import Progress
from isolator.errors import NeedsApprovalError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from host.client.client import Client

HISTORY_HINT = (
    "isolator: hint: secrets given as K=V stay in the shell's history; K=@FILE or K=- does not leave them there"
)

AS_LONG_AS_STARTS_TAKE = None
"""Time for the daemon's answer to what may start one version and then another: it has deadlines of its own."""
_WIDE = 110
"""Columns from which the grant has a column of its own."""
_NAMES = ("hooks", "permissions", "egress", "listen", "read")


def register_plugin(client: Client, request: Mapping[str, Any], config: Config, manner: Manner) -> None:
    """Register a new plugin; raises NeedsApprovalError when nobody agrees."""
    staged = _stage(client, request, config, quiet=manner.as_json)
    name = staged["name"]
    if staged.get("registered"):
        raise UsageError(f"plugin {name}", "is already registered", f"isolator plugin update {name} DIR")
    if not manner.as_json:
        _show_staged(staged, verbose=manner.verbose)
    _warn_of_history(staged, config)
    if not manner.yes:
        _require_consent("plugin add", f"Register {name} with exactly this?")
    with Progress(f"registering {name}", quiet=manner.as_json):
        done = client.call("plugin.commit", token=staged["token"], config=config.values)
    if manner.as_json:
        print_json({**done, "proposal": staged["proposal"], "warnings": [*staged["warnings"], *staged["faults"]]})
        return
    manifest = client.call("plugin.show", name=name)["manifest"] or {}
    click.echo(f"added {name} {done['plugin']['version']}; {_starts(staged, manifest)}")
    _show_withheld(staged["proposal"])
    _warn_of_missing(name, done["missing"])


def _starts(staged: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """When a new plugin starts."""
    if manifest.get("activation", {}).get("start") == "eager":
        return "it starts by itself, without an event"
    if staged["proposal"]["effective"]["hooks"]:
        return "it starts with its first event"
    return "it starts with its first call" if staged["mode"] == "mcp" else "no event starts it, for it gets none"


def update_plugin(
    client: Client,
    request: Mapping[str, Any],
    config: Config,
    manner: Manner,
    then: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Exchange a version; raises NeedsApprovalError when it asks for more and nobody agrees: then it waits.

    ``then`` is called once the new version is in use; what it returns goes along with ``--json``.
    """
    staged = _stage(client, request, config, quiet=manner.as_json)
    name, more = staged["name"], staged["differences"]
    if not manner.as_json:
        _show_staged(staged, verbose=manner.verbose)
        _show_differences(name, more)
    _warn_of_history(staged, config)
    agreed = manner.yes or (bool(more) and sys.stdin.isatty() and click.confirm(f"Let {name} have exactly this?"))
    with Progress(f"exchanging {name}", quiet=manner.as_json):
        done = client.call("plugin.update", token=staged["token"], config=config.values, approve=agreed)
    more_known = then() if not done.get("pending") else {}
    if manner.as_json:
        warnings = [*staged["warnings"], *staged["faults"]]
        print_json({**done, "proposal": staged["proposal"], "warnings": warnings, **more_known})
    if done.get("pending"):
        why = f"asks for more than {done['plugin']['version']}, which stays in use: {'; '.join(map(safe, more))}"
        raise NeedsApprovalError(f"{name} {staged['version']}", why, f"isolator plugin approve {name}")
    if not manner.as_json:
        unchanged = done.get("unchanged")
        click.echo(f"{name} {done['plugin']['version']} {'is in use already' if unchanged else 'is in use now'}")
        _show_withheld(staged["proposal"])
        _warn_of_missing(name, done["missing"])


def approve_plugin(client: Client, entry: Mapping[str, Any], manner: Manner) -> None:
    """Approve the pending version of a registered plugin, exactly as it is shown; ``entry`` is the plugin as it is."""
    name = entry["name"]
    proposal = client.call("plugin.explain", name=name)["proposal"]
    if not (entry.get("pending") or entry.get("error") or proposal["changed_binary"]):
        raise UsageError(f"plugin {name}", "nothing waits for approval", "see 'isolator plugin list'")
    if not manner.as_json:
        click.echo(f"{name} {safe(proposal['version'])}\n")
        show_proposal(proposal, verbose=manner.verbose)
        _show_differences(name, proposal["differences"])
        if proposal.get("policy_diff"):
            click.echo(f"{proposal['policy_file']} has been edited; only this changes in it:")
            for line in proposal["policy_diff"]:
                click.echo(f"  {safe(line)}")
            click.echo()
        if proposal["changed_binary"]:
            click.echo("Its binary is another file than the one that was approved.\n")
    if not manner.yes:
        _require_consent("plugin approve", f"Approve {name} with exactly this?")
    with Progress(f"approving {name}", quiet=manner.as_json):
        answer = client.call("plugin.approve", name=name, digest=proposal["digest"])
    if manner.as_json:
        print_json({**answer, "withheld": _withheld(proposal)})
        return
    click.echo(f"approved {name}; {answer['plugin']['version']} is in use now")
    _show_withheld(proposal)


def _stage(client: Client, request: Mapping[str, Any], config: Config, *, quiet: bool) -> dict[str, Any]:
    """Have the daemon copy and read what is offered."""
    with Progress("copying and reading the plugin", quiet=quiet):
        return client.call("plugin.stage", **request, config=config.values)


def _show_withheld(proposal: Mapping[str, Any]) -> None:
    withheld = _withheld(proposal)
    if withheld:
        click.echo(f"What its policy withholds ({proposal['policy_file']}) stays withheld:")
        for request in withheld:
            click.echo(f"  - {safe(request)}")


def _withheld(proposal: Mapping[str, Any]) -> list[str]:
    """Requests that the policy, or the host, does not grant, or not wholly."""
    return [f"{line['field']} {line['requested']}" for line in proposal["lines"] if line["verdict"] != "granted"]


def _show_differences(name: str, more: Sequence[str]) -> None:
    if more:
        click.echo(f"It asks for more than {name} was granted so far:")
        for phrase in more:
            click.echo(f"  + {safe(phrase)}")
        click.echo()


def _warn_of_history(staged: Mapping[str, Any], config: Config) -> None:
    if {key.lower() for key in staged["secrets_given"]} & {key.lower() for key in config.literal}:
        click.echo(HISTORY_HINT, err=True)


def _warn_of_missing(name: str, missing: Sequence[str]) -> None:
    for key in missing:
        remedy = f"isolator plugin config {name} set {key}=@FILE"
        click.echo(f"isolator: {name} cannot start before {key} is set: {remedy}", err=True)


def _require_consent(command: str, question: str) -> None:
    """Ask the person at the terminal; raises NeedsApprovalError unless the answer is yes."""
    if not sys.stdin.isatty():
        raise NeedsApprovalError(command, "nobody is there to agree", "add --yes to agree to what is shown")
    if not click.confirm(question):
        raise NeedsApprovalError(command, "not agreed", "nothing was changed")


def _show_staged(staged: Mapping[str, Any], *, verbose: bool) -> None:
    manifest = "flags only, no manifest" if staged["synthesised"] else "plugin.json"
    click.echo(f"{staged['name']} {staged['version']} ({manifest}, {staged['mode']})")
    if staged["description"]:
        click.echo(f"  {safe(staged['description'])}")
    click.echo()
    if staged.get("signer"):
        click.echo(f"signed by {staged['signer']}\n")
    if staged["files"]:
        click.echo(f"{staged['files']} files and folders, {size(staged['size'])}\n")
    for field in staged["config"]:
        marks = [field["type"], *(["secret"] if field["secret"] else []), *(["required"] if field["required"] else [])]
        if field["default"] is not None:
            marks.append(f"default {safe(field['default'])}")
        about = f"; {safe(field['description'])}" if field["description"] else ""
        paragraph(f"{', '.join(marks)}{about}", f"config {field['key']}: ")
    if staged["config"]:
        click.echo()
    show_proposal(staged["proposal"], verbose=verbose)
    for warning in (*staged["warnings"], *staged["faults"]):
        click.echo(f"isolator: warning: {safe(warning)}", err=True)


def show_proposal(proposal: Mapping[str, Any], *, verbose: bool) -> None:
    """Print request, grant and effect line by line; ``verbose``: also the promise of each layer."""
    columns = terminal_width()
    narrow = columns is not None and columns < _WIDE
    rows = []
    for line in proposal["lines"]:
        source = _source(line, proposal["policy_file"])
        cells = [line["field"], line["requested"], line["granted"], line["effective"], line["verdict"], source]
        if narrow:
            # A name is granted whole or not at all, and the grant stands in the policy at the line in the last column.
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
    reasons = [line for line in proposal["lines"] if line["verdict"] != "refused" and line.get("reason")]
    if reasons:
        click.echo("\nReasons of its author, unverified:")
        for line in reasons:
            paragraph(safe(line["reason"]), f"  {line['field']} {safe(line['requested'])}: ")
    additions = [line for line in proposal["lines"] if line.get("add")]
    if additions:
        click.echo("\nTo grant what is pending, write in the policy:")
        section = None
        for line in additions:
            if line.get("section") != section:
                section = line.get("section")
                click.echo(f"  [{safe(section)}]")
            click.echo(f"  {safe(line['add'])}")
    if verbose:
        click.echo()
        for sentence in proposal["sentences"].values():
            paragraph(safe(sentence), "- ")
    else:
        click.echo("\nWhat each layer promises, in sentences: --verbose")
    click.echo(f"\npolicy: {proposal['policy_file']}\neffective sha256:\n  {proposal['effective_digest']}\n")


def _source(line: Mapping[str, Any], policy_file: str | None) -> str:
    """The place where a line was decided, short: the policy itself is named once, below the table."""
    source = str(line["source"])
    file, colon, number = source.rpartition(":")
    if colon and number.isdecimal():
        source = f"policy:{number}" if file == policy_file else f"{Path(file).name}:{number}"
    return source
