"""``isolator new``: start a plugin from a working example, without daemon and without root."""

from __future__ import annotations

import importlib.resources
import json
import shlex
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import click

from host.authoring.languages import CALLS, COMPILED, LANGUAGES, MODES, RELEASES, SHARED, TESTS
from isolator.errors import UsageError


@click.command(
    epilog="\b\nExamples:\n  isolator new ./deploy-bell --lang python\n"
    "  isolator new ./deploy-count --lang go --mode stream\n  isolator new ./deploy-log --lang sh --mode exec\n"
    "  isolator new ./deploy-tools --lang python --mode mcp",
)
@click.argument("folder", metavar="DIR")
@click.option("--lang", required=True, type=click.Choice(sorted(LANGUAGES)), help="What it is written in.")
@click.option(
    "--mode", default="oneshot", show_default=True, type=click.Choice(sorted(MODES)), help="How events reach it."
)
@click.option("--name", metavar="N", help="Its name (default: the folder's).")
@click.option("--hooks", metavar="A,B", default="deploy.completed", show_default=True, help="The events it gets.")
def new(folder: str, lang: str, mode: str, name: str | None, hooks: str) -> None:
    """Start a new plugin in DIR from a working example, with tests and a recipe for CI.

    What it writes is under the licence 0BSD, which asks nothing of you.
    """
    from host.authoring import schemas
    from isolator.reader.manifest import parse_manifest

    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(folder, "exists and is not an empty folder", "name another")
    files = MODES[mode].get(lang)
    if files is None:
        raise UsageError(f"--lang {lang}", f"has no example of the mode {mode}", f"use {' or '.join(MODES[mode])}")
    plugin = name if name is not None else target.absolute().name
    manifest: dict[str, Any] = {
        "$schema": f"./{schemas.FILE_NAME}",
        "name": plugin,
        "version": "0.1.0",
        "description": "",
        "api_version": "1",
        "binary": f"./{plugin}",
        "hooks": [hook.strip() for hook in hooks.split(",") if hook.strip()],
        "sandbox": {
            "network": {"egress": []},
            "filesystem": {"state": "16M"},
            "resources": {"memory": "128M", "cpu": "25%", "tasks": 32},
        },
    }
    if mode != "oneshot":
        manifest["transport"] = {"mode": mode}
    if mode == "mcp":
        call = {"tool": "notify", "arguments": {"text": "something has happened", "project": "{{ project_id }}"}}
        manifest["transport"]["calls"] = dict.fromkeys(manifest["hooks"], call)
    # A manifest that cannot be registered is refused now: not every folder's name is a name for a plugin.
    parse_manifest(manifest, name=folder)
    if not manifest["hooks"]:
        raise UsageError("--hooks", "names no event", "see 'isolator event types'")
    event = manifest["hooks"][0]
    target.mkdir(parents=True, exist_ok=True)
    (target / "plugin.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (target / schemas.FILE_NAME).write_text(schemas.text_of(schemas.manifest_schema()))
    compiled = lang in COMPILED
    tested, outcome = CALLS.get((mode, lang), ("", ""))
    fields = {
        "call": tested.replace("{name}", plugin),
        "result": outcome,
        "name": plugin,
        "hooks": ", ".join(f"`{hook}`" for hook in manifest["hooks"]),
        "source": files[0][1].format(name=plugin),
        "build": "make\n" if compiled else "",
        "test": TESTS[lang],
        "release": f"{RELEASES[lang]}\n" if lang in RELEASES else "",
        "ci_build": "make && " if compiled else "",
        "event": event,
        "payload": json.dumps(_sample(event)),
    }
    templates = importlib.resources.files("host.templates")
    _fill(templates / "README.md.txt", target / "README.md", fields)
    for template, file in (*files, *SHARED):
        path = target / file.format(name=plugin)
        path.parent.mkdir(parents=True, exist_ok=True)
        _fill(templates / template, path, fields)
        if path.name == plugin:
            path.chmod(0o755)
    place = shlex.quote(folder)
    made = f"make -C {place} && " if compiled else ""
    click.echo(f"wrote {folder}; next (its README.md has the rest):")
    for command in (f"{made}sudo isolator dev", "sudo isolator plugin test", "sudo isolator plugin add"):
        click.echo(f"  {command} {place}")


def _sample(event: str) -> dict[str, Any]:
    """A payload to try an event with, for the README."""
    from host.cli.examples import example_of
    from host.events import Catalogue

    catalogue = Catalogue()
    found = catalogue.get(catalogue.canonical(event))
    if found is None:  # the platform's own
        return {"see": f"isolator event types {event} --example"}
    return example_of(event, found.schema(), found.filled)


def _fill(template: Traversable, path: Path, fields: dict[str, str]) -> None:
    text = template.read_text()
    for field, value in fields.items():
        text = text.replace("{{" + field + "}}", value)
    path.write_text(text)
