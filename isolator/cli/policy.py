"""``isolator policy``: check policy files before the daemon meets them, and explain one in plain language.

Works without a daemon. A file may be a plugin's policy, a ``host.toml`` or a manifest (``plugin.json``); policies are
held against the ``host.toml`` of the same command line, else against the installed one.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isolator.errors import DeniedError, IsolatorError, NotFoundError, UsageError
from isolator.paths import Paths

if TYPE_CHECKING:
    from isolator.policy.host import HostConfig
    from isolator.policy.meet.proposal import Line, Proposal

_HOST_KEYS = {
    "uid_range",
    "plugin_dirs",
    "may_degrade",
    "ceiling",
    "defaults",
    "roles",
    "network",
    "inbound",
    "metrics",
}
_POLICY_KEYS = {"grant", "limits", "filesystem", "syscalls", "env"}


@click.group(
    epilog="\b\nExamples:\n  isolator policy check /etc/isolator/host.toml /etc/isolator/policies/*.toml\n"
    "  isolator policy explain /etc/isolator/policies/slack.toml --manifest plugin.json",
)
def policy() -> None:
    """Check and explain policy files."""


@policy.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_obj
def check(root: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """Check policy files, host.toml or plugin.json; every problem with its file and line.

    Exit code: 0 all are good, 1 one is not, 3 one is not there, 4 one may be written by others than root.
    """
    results: list[dict[str, Any]] = []
    worst = 0
    host: HostConfig | None = None
    # host.toml first: it is what the others are held against.
    for path in sorted(files, key=lambda path: _kind(path) != "host"):
        try:
            if _kind(path) != "host" and host is None:
                host = _host(root)
            found = _check(path, host)
            host = found or host
            results.append({"file": str(path), "kind": _kind(path), "ok": True, "error": None, "note": _note(path)})
        except IsolatorError as error:
            worst = max(worst, error.exit_code if isinstance(error, (NotFoundError, DeniedError)) else 1)
            results.append({"file": str(path), "kind": _kind(path), "ok": False, "error": str(error), "note": None})
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        for result in results:
            if result["ok"]:
                click.echo(f"{result['file']}: ok" + (f" ({result['note']})" if result["note"] else ""))
            else:
                click.echo(f"isolator: {result['error']}", err=True)
    sys.exit(worst)


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    help="The plugin.json to meet it with (default: what it allows at most).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def explain(root: str | None, file: Path, manifest: Path | None, as_json: bool) -> None:
    """Say in plain words what a policy allows, and where each value comes from.

    FILE is a plugin's policy; or a plugin.json, for what it would be granted by default; or a host.toml, for what a
    plugin may do when nothing is said.
    """
    from isolator.layers.explain import proposal_json

    proposal = _proposal(root, file, manifest)
    if as_json:
        click.echo(json.dumps({"file": str(file), **proposal_json(proposal)}, indent=2))
        return
    for line in proposal_text(proposal):
        click.echo(line)


def proposal_text(proposal: Proposal) -> list[str]:
    """A proposal as lines for a terminal: the sentences, the table, and how to grant what is pending."""
    from isolator.layers.explain import sentences

    text = [f"{proposal.effective.plugin}  (effective policy {proposal.effective.digest()[:16]})", ""]
    text += [f"  {layer:<13} {sentence}" for layer, sentence in sentences(proposal.effective).items()]
    text += ["", *_table(proposal.lines)]
    for line in proposal.pending:
        where = f" of {line.at}" if line.at else ""
        text.append(f"to grant {line.field} {line.requested}, write in [{line.section}]{where}: {line.add}")
    return text


def _table(lines: tuple[Line, ...]) -> list[str]:
    has_requests = any(line.requested is not None for line in lines)
    header = ("what", "asked", "granted", "effective", "verdict", "from")
    rows = [header]
    for line in lines:
        source = f"{line.source}: {line.reason}" if line.verdict == "refused" and line.reason else line.source
        rows.append((line.field, line.requested or "-", line.granted or "-", line.effective, line.verdict, source))
    if not has_requests:
        rows = [(row[0], row[2], row[3], row[5]) for row in rows]  # type: ignore[misc]  # fewer columns, all text
    widths = [min(40, max(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _proposal(root: str | None, file: Path, manifest: Path | None) -> Proposal:
    from isolator.policy.grant import PluginPolicy
    from isolator.policy.meet.effective import meet, policy_alone
    from isolator.policy.parse.load import invoker, load_host_config, load_plugin_policy
    from isolator.reader.manifest import parse_manifest_core

    kind = _kind(file)
    if kind == "manifest":
        if manifest is not None:
            raise UsageError("--manifest", f"{file} is a manifest itself", "name a policy file before it")
        return meet(parse_manifest_core(_bytes(file), name=str(file)), None, _host(root))
    if kind == "host":
        host = load_host_config(_existing(file), also_owner=invoker())
        core = parse_manifest_core(_bytes(manifest), name=str(manifest)) if manifest else None
        nothing = PluginPolicy(source="no policy file", hooks=())
        return meet(core, None, host) if core else policy_alone(nothing, host, "any-plugin")
    host = _host(root)
    grant = load_plugin_policy(file, host, also_owner=invoker())
    if manifest is None:
        return policy_alone(grant, host, file.stem)
    return meet(parse_manifest_core(_bytes(manifest), name=str(manifest)), grant, host)


def _host(root: str | None) -> HostConfig:
    from isolator.policy.parse.load import invoker, load_host_config

    return load_host_config(Paths.of(root).host_toml, also_owner=invoker())


def _check(path: Path, host: HostConfig | None) -> HostConfig | None:
    """Raise what is wrong with one file; the settings when it is a ``host.toml``."""
    from isolator.policy.parse.load import invoker, load_host_config, load_plugin_policy
    from isolator.reader.manifest import parse_manifest_core

    kind = _kind(path)
    if kind == "host":
        return load_host_config(_existing(path), also_owner=invoker())
    if kind == "manifest":
        parse_manifest_core(_bytes(path), name=str(path))
    else:
        load_plugin_policy(path, host, also_owner=invoker())
    return None


def _kind(path: Path) -> str:
    """``host``, ``policy`` or ``manifest``: by its name, else by the tables in it."""
    if path.suffix == ".json":
        return "manifest"
    if path.name == "host.toml":
        return "host"
    try:
        with path.open("rb") as file:
            keys = set(tomllib.loads(file.read(256 * 1024).decode("utf-8", "replace")))
    except (OSError, ValueError):
        return "policy"
    return "host" if keys & _HOST_KEYS and not keys & _POLICY_KEYS else "policy"


def _existing(path: Path) -> Path:
    # For the daemon an absent host.toml means the defaults; for a person who names one it is a mistake.
    if not path.exists():
        raise NotFoundError(str(path), "no such file")
    return path


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512 * 1024)
    except FileNotFoundError:
        raise NotFoundError(str(path), "no such file") from None
    except OSError as error:
        raise IsolatorError(str(path), error.strerror or str(error)) from None


def _note(path: Path) -> str | None:
    if path.suffix == ".json" or path.stat().st_uid == 0:
        return None
    return "the daemon will only take it from root: sudo install -o root -m 0644"
