"""JSON Schemas for authors and operators in docs/author/: of manifests, of policies, and of each built-in payload."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from host.authoring import schemas


def _event(name: str) -> str:
    return schemas.text_of(schemas.event_schema(name))


FILES: dict[str, Callable[[], str]] = {
    f"docs/author/{schemas.FILE_NAME}": lambda: schemas.text_of(schemas.manifest_schema()),
    "docs/author/policy.schema.json": lambda: schemas.text_of(schemas.policy_schema()),
    **{f"docs/author/event/{name}.schema.json": partial(_event, name) for name in schemas.EVENTS},
}
"""Text of each file, by its path."""
