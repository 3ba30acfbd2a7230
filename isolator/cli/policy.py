"""``isolator policy``: check policy files before the daemon meets them, and explain one in plain language.

Works without a daemon. A file may be a plugin's policy, a ``host.toml`` or a manifest (``plugin.json``); policies are
held against the ``host.toml`` of the same command line, else against the installed one.
"""

from __future__ import annotations

import copy
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isolator.cli.output import Group, here, print_json
from isolator.errors import DeniedError, IsolatorError, NotFoundError, UsageError, translated
from isolator.paths import Paths

if TYPE_CHECKING:
    from isolator.policy.grant import PluginPolicy
    from isolator.policy.host import HostConfig
    from isolator.policy.meet.proposal import Line, Proposal
    from isolator.policy.parse.strict import Table

_REQUIRED = {"name": "stand-in", "version": "1.0.0", "api_version": "1", "binary": "./stand-in", "hooks": []}
"""Keys of a manifest that may not be missing, with values that are good."""


@click.group(
    cls=Group,
    epilog="\b\nExamples:\n  isolator policy check /etc/isolator/host.toml /etc/isolator/policies/*.toml\n"
    "  isolator policy explain /etc/isolator/policies/slack.toml --manifest plugin.json",
)
def policy() -> None:
    """Check and explain policy files."""


@policy.command(epilog="\b\nExamples:\n  isolator policy check policies/*.toml\n  isolator policy check ./plugin.json")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(["host", "policy", "manifest"]),
    help="What the files are (default: by name and folder, else by content).",
)
@here
def check(root: str | None, files: tuple[Path, ...], kind: str | None, as_json: bool) -> None:
    """Check policy files, host.toml or plugin.json; every problem with its file and line.

    A plugin.json is checked as 'plugin add' does, its program with it; of a list the first problem is shown.

    Exit code: 0 all are good, 1 one is not, 3 one is not there, 4 one may be written by others than root.
    """
    results: list[dict[str, Any]] = []
    worst = 0
    host: HostConfig | None = None
    kinds = {path: kind or _kind(path) for path in files}
    # host.toml first: it is what the others are held against.
    for path in sorted(files, key=lambda path: kinds[path] != "host"):
        notes: list[str] = []
        errors: list[IsolatorError] = []
        try:
            if kinds[path] != "host" and host is None:
                host = _host(root)
            found = _check(path, kinds[path], host, errors, notes)
            host = found or host
            notes += [] if kind else _notes(path, kinds[path])
        except IsolatorError as error:
            errors.append(error)
        for fault in errors:
            worst = max(worst, fault.exit_code if isinstance(fault, (NotFoundError, DeniedError)) else 1)
        results.append({
            "file": str(path), "kind": kinds[path], "ok": not errors, "error": str(errors[0]) if errors else None,
            "errors": list(map(str, errors)), "note": "; ".join(notes) if notes and not errors else None,
        })  # fmt: skip
    if as_json:
        print_json(results)
    else:
        for result in results:
            if result["ok"]:
                click.echo(f"{result['file']}: ok" + (f" ({result['note']})" if result["note"] else ""))
            else:
                for line in result["errors"]:
                    click.echo(f"isolator: {line}", err=True)
    sys.exit(worst)


@policy.command(
    epilog="\b\nExamples:\n  isolator policy explain ./plugin.json\n"
    "  isolator policy explain policies/slack.toml --manifest plugin.json"
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The plugin.json to meet it with (default: what it allows at most).",
)
@here
def explain(root: str | None, file: Path, manifest: Path | None, as_json: bool) -> None:
    """Say in plain words what a policy allows, and where each value comes from.

    FILE is a plugin's policy; or a plugin.json, for what it would be granted by default; or a host.toml, for what a
    plugin may do when nothing is said.
    """
    from isolator.layers.explain import proposal_json

    proposal = _proposal(root, file, manifest)
    if as_json:
        print_json({"file": str(file), **proposal_json(proposal)})
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
    header = ("item", "requested", "granted", "effective", "verdict", "from")
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
    from isolator.policy.names import PLUGIN_NAME
    from isolator.policy.parse.load import load_plugin_policy
    from isolator.policy.parse.trusted import invoker, load_host_config
    from isolator.reader.manifest import parse_manifest_core

    if PLUGIN_NAME.fullmatch(str(file)) and not file.is_file():
        why = "no such file"
        raise NotFoundError(str(file), why, f"of a plugin that is registered: isolator plugin explain {file}")
    kind = _kind(file)
    if kind == "manifest":
        if manifest is not None:
            raise UsageError("--manifest", f"{file} is a manifest itself", "name a policy file before it")
        return meet(parse_manifest_core(_bytes(file), name=str(file)), None, _host(root))
    host = load_host_config(_existing(file), also_owner=invoker()) if kind == "host" else _host(root)
    grant = None if kind == "host" else load_plugin_policy(file, host, also_owner=invoker())
    if manifest is not None:
        return meet(parse_manifest_core(_bytes(manifest), name=str(manifest)), grant, host)
    if grant is None:
        return policy_alone(PluginPolicy(source="no policy file", hooks=()), host, "any-plugin")
    return policy_alone(grant, host, file.stem)


def _host(root: str | None) -> HostConfig:
    from isolator.policy.parse.trusted import invoker, load_host_config

    return load_host_config(Paths.of(root).host_toml, also_owner=invoker())


def _check(
    path: Path, kind: str, host: HostConfig | None, errors: list[IsolatorError], notes: list[str]
) -> HostConfig | None:
    """Collect what is wrong with one file; the settings when it is a good ``host.toml``."""
    from isolator.policy.parse.host_file import host_config_of
    from isolator.policy.parse.load import over_ceiling, policy_of
    from isolator.policy.parse.strict import Table, every_fault
    from isolator.policy.parse.toml_file import document
    from isolator.policy.parse.trusted import invoker, read_trusted
    from isolator.policy.request import MAX_BYTES, MAX_DEPTH
    from isolator.reader.json_text import load_json_with_lines

    if kind == "manifest":
        data, lines = load_json_with_lines(_bytes(path), max_bytes=MAX_BYTES, max_depth=MAX_DEPTH, name=str(path))
        errors += every_fault(
            lambda data: manifest_parser(data, lines=lines, name=str(path)), copy.deepcopy(data), required=_REQUIRED
        )
        if not errors:
            _check_program(path, data, lines, errors)
            found: list[IsolatorError] = []
            manifest_notes(data, found, notes)
            errors += [UsageError(f"{path}: {error.what}", error.why, error.remedy) for error in found]
        return None
    top = document(read_trusted(path, also_owner=invoker()), str(path))
    read: Callable[[Table], HostConfig | PluginPolicy] = host_config_of if kind == "host" else policy_of
    whole = copy.deepcopy(dict(top.data))
    errors += every_fault(lambda data: read(Table(data, name=top.name, lines=top.lines)), whole)
    if kind == "host":
        return None if errors else host_config_of(top)
    if host is not None and not any(type(error) is UsageError for error in errors):
        errors += over_ceiling(policy_of(Table(whole, name=top.name, lines=top.lines)), host)
    return None


def _parse_core(data: dict[str, Any], **about: Any) -> object:
    from isolator.reader.manifest import parse_manifest

    return parse_manifest(data, **about)


manifest_parser: Callable[..., object] = _parse_core
"""Reads the content of a plugin.json; the host's command line puts its own here, which reads the whole of it."""


def _no_notes(data: dict[str, Any], errors: list[IsolatorError], notes: list[str]) -> None:
    """Find nothing: the events are the host's."""


manifest_notes: Callable[[dict[str, Any], list[IsolatorError], list[str]], None] = _no_notes
"""Adds errors and notes on a manifest that can be read; the host's, which knows the events, as above."""


def _check_program(path: Path, data: dict[str, Any], lines: dict[Any, int], errors: list[IsolatorError]) -> None:
    from isolator.reader.manifest import parse_manifest
    from isolator.registration.program import CageView, check_program

    core = parse_manifest(data, lines=lines, name=str(path))
    try:
        check_program(CageView(path.resolve().parent, core.sandbox.read or ()), core.binary, shown=core.binary)
    except UsageError as error:
        errors.append(UsageError(f"{path}: {error.what}", error.why, error.remedy))


def _kind(path: Path) -> str:
    """``host``, ``policy`` or ``manifest``: by its name and folder, else by the tables in it."""
    from isolator.policy.parse.host_file import host_config_of
    from isolator.policy.parse.load import policy_of

    if path.suffix == ".json":
        return "manifest"
    if path.name == "host.toml":
        return "host"
    if path.parent.name == "policies":
        return "policy"
    try:
        with path.open("rb") as file:
            keys = set(tomllib.loads(file.read(256 * 1024).decode("utf-8-sig", "replace")))
    except (OSError, ValueError):
        return "policy"
    of_host, of_policy = _known(host_config_of), _known(policy_of)
    return "host" if keys & (of_host - of_policy) and not keys & (of_policy - of_host) else "policy"


def _known(read: Callable[[Table], object]) -> frozenset[str]:
    """The keys that files of a kind have at the top."""
    from isolator.policy.parse.strict import Table

    top = Table({}, name="", lines={})
    read(top)
    return top.known


def _existing(path: Path) -> Path:
    # For the daemon an absent host.toml means the defaults; for a person who names one it is a mistake.
    with translated(PermissionError, DeniedError, str(path), "", "run as root"):
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


def _notes(path: Path, kind: str) -> list[str]:
    notes = []
    if kind == "host" and path.name != "host.toml":
        notes.append("as a host.toml, by its content; see --kind")
    if kind != "manifest" and path.stat().st_uid != 0:
        notes.append("the daemon will only take it from root: sudo install -o root -m 0644")
    return notes
