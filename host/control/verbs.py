"""The verbs of the control socket: one type each, with parameters, result, role, and whether each call is recorded.

This is the contract. The server reads requests with it, the table in docs/embedding.md is generated from it, and
clients are tested against ``listing``. Types and handlers stand in two modules per noun beside this one.
"""

from __future__ import annotations

import inspect
from typing import Any, NotRequired, get_origin, get_type_hints

from host.control import (
    audit_types,
    cluster_types,
    config_types,
    daemon_types,
    event_types,
    mcp_types,
    platform_types,
    plugin_types,
)
from host.control.parameters import Request

NOTIFICATIONS: dict[str, type[Any]] = {
    "api.call": platform_types.ApiCall,
    "audit.records": audit_types.AuditRecords,
    "audit.found": audit_types.AuditFound,
    "log": plugin_types.LogLine,
    "mcp.progress": mcp_types.McpProgress,
}

_NOUNS = ("event", "api", "audit", "plugin", "config", "daemon")
_MODULES = tuple(
    module.__name__
    for module in (
        platform_types, cluster_types, event_types, audit_types, plugin_types, config_types, daemon_types, mcp_types,
    )
)  # fmt: skip
"""The order in which verbs are listed, by noun and then by module; those of others, and without a noun, come last."""


def verbs() -> dict[str, type[Request]]:
    def place(request: type[Request]) -> tuple[int, int]:
        noun, module = request.spec.verb.partition(".")[0], request.__module__
        return (
            _NOUNS.index(noun) if noun in _NOUNS else len(_NOUNS),
            _MODULES.index(module) if module in _MODULES else len(_MODULES),
        )

    return {request.spec.verb: request for request in sorted(Request.__subclasses__(), key=place)}


def listing() -> dict[str, dict[str, Any]]:
    """The verbs as plain data, for documents and for tests of clients.

    Each has ``summary`` (one sentence), ``about`` (all of it), ``role``, ``recorded``, ``params`` (by key: JSON Schema
    and ``required``) and ``result`` (by key: whether it is always there).
    """
    return {
        verb: {
            "summary": (request.__doc__ or "").partition("\n")[0],
            "about": inspect.cleandoc(request.__doc__ or ""),
            "role": request.spec.role,
            "recorded": request.spec.recorded,
            "params": {p.key: {"schema": p.kind.schema(), "required": p.required} for p in request.parameters()},
            "result": result_keys(request.spec.result),
        }
        for verb, request in verbs().items()
    }


def result_keys(result: type[Any]) -> dict[str, bool]:
    """The keys of an answer, each with whether it is always there."""
    hints = get_type_hints(result, include_extras=True)
    return {key: get_origin(hint) is not NotRequired for key, hint in hints.items()}
