"""The OpenAPI document of the console's HTTP API."""

from __future__ import annotations

import json

from host.console import api


def document() -> str:
    """The document, indented."""
    return json.dumps(api.document(), indent=1) + "\n"
