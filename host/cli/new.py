"""``isolator new``: start a plugin from a working example. Needs no daemon and no root."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import click

from host.cli.output import SETTINGS
from isolator.errors import UsageError

# language -> pairs of template and the file that is written from it
LANGUAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "python": (("plugin.py.txt", "{name}"),),
    "node": (("plugin.js.txt", "{name}"),),
    "go": (("main.go.txt", "main.go"), ("Makefile.txt", "Makefile")),
    "rust": (("main.rs.txt", "main.rs"), ("Makefile.txt", "Makefile")),
    "sh": (("plugin.sh.txt", "{name}"),),
}


@click.command(context_settings=SETTINGS, epilog="\b\nExample:\n  isolator new ./deploy-bell --lang python")
@click.argument("folder", metavar="DIR")
@click.option("--lang", required=True, type=click.Choice(sorted(LANGUAGES)), help="What it is written in.")
@click.option("--name", metavar="N", help="Its name (default: the folder's).")
@click.option("--hooks", metavar="A,B", default="deploy.completed", show_default=True, help="The events it gets.")
def new(folder: str, lang: str, name: str | None, hooks: str) -> None:
    """Start a new plugin in DIR from a working example."""
    from isolator.policy.request import parse_manifest

    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(folder, "exists and is not an empty folder", "name another")
    plugin = name if name is not None else target.absolute().name
    manifest = {
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
    # What cannot be registered later is refused now; a folder's name is not always a plugin's.
    parse_manifest(manifest, name="isolator new")
    target.mkdir(parents=True, exist_ok=True)
    (target / "plugin.json").write_text(json.dumps(manifest, indent=2) + "\n")
    templates = importlib.resources.files("host.templates") / lang
    for template, file in LANGUAGES[lang]:
        path = target / file.format(name=plugin)
        path.write_text((templates / template).read_text().replace("{{name}}", plugin))
        if path.name == plugin:
            path.chmod(0o755)
    build = f"make -C {folder} && " if (target / "Makefile").exists() else ""
    click.echo(f"wrote {folder}; next:\n  {build}isolator plugin add {folder}")
