"""``isolator schema``: JSON Schemas for editors, without daemon and without root."""

from __future__ import annotations

import click

from host.authoring import schemas
from host.client.client import ask
from isolator.cli.output import Group
from isolator.errors import IsolatorError, NotFoundError


@click.group(
    cls=Group,
    epilog="\b\nExamples:\n  isolator schema manifest > plugin.schema.json\n"
    "  isolator schema event deploy.completed\n\n"
    'In a plugin.json an editor finds it by its first key:\n  "$schema": "./plugin.schema.json"',
)
def schema() -> None:
    """Print the JSON Schema of a manifest, a policy or a payload, for editors."""


@schema.command(epilog="\b\nExamples:\n  isolator schema manifest > plugin.schema.json")
def manifest() -> None:
    """Print the schema of plugin.json."""
    click.echo(schemas.text_of(schemas.manifest_schema()), nl=False)


@schema.command(epilog="\b\nExamples:\n  isolator schema policy > policy.schema.json")
def policy() -> None:
    """Print the schema of a policy file (policies/NAME.toml)."""
    click.echo(schemas.text_of(schemas.policy_schema()), nl=False)


@schema.command(epilog="\b\nExamples:\n  isolator schema event deploy.completed\n  isolator schema event backup.failed")
@click.argument("name")
@click.pass_obj
def event(root: str | None, name: str) -> None:
    """Print the schema of an event's payload; a platform's own event is asked of its daemon."""
    try:
        found = schemas.event_schema(name)
    except NotFoundError as unknown:
        found = _of_daemon(root, name, unknown)
    click.echo(schemas.text_of(found), nl=False)


def _of_daemon(root: str | None, name: str, unknown: NotFoundError) -> schemas.Schema:
    try:
        types = ask(root, "event.types")["types"]
    except IsolatorError as error:
        raise NotFoundError(unknown.what, f"is not built in, and {error.what}: {error.why}", unknown.remedy) from None
    for entry in types:
        if entry["name"] == name:
            return {"$schema": schemas.DIALECT, **entry["schema"], "title": name}
    raise unknown
