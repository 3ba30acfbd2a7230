"""``GET /v1/...``: one path for each verb of the control socket that reads, and the OpenAPI document of all of it.

Paths, parameters and answers follow from the types in ``host.control.verbs``.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

from host.console.events import STRUCTURED
from host.control.event_types import Emitted
from host.control.parameters import Parameter, Request
from host.control.verbs import verbs
from isolator import __version__
from isolator.errors import UsageError

_NOTIFIES = ("follow",)
"""Parameters that ask for notifications, which have no place in an answer."""
_LONGEST = 4096
STATUS = {"usage": 400, "denied": 403, "not_found": 404, "needs_approval": 403, "unavailable": 503}
"""HTTP status by the code of an error; 502 for any other: the daemon failed."""


def reading() -> dict[str, type[Request]]:
    """The verbs that only read, by path."""
    return {
        f"/v1/{verb.replace('.', '/')}": request
        for verb, request in verbs().items()
        if request.spec.role == "viewer" and not request.spec.recorded
    }


def parameters(request: type[Request]) -> list[Parameter]:
    """The parameters that may be in a query."""
    return [one for one in request.parameters() if one.key not in _NOTIFIES]


def parse_query(request: type[Request], query: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parameters of a verb from those of a query; raises UsageError for one that is unknown, twice there, or wrong."""
    known = {one.key: one for one in parameters(request)}
    found: dict[str, Any] = {}
    for key, text in query:
        if key not in known:
            raise UsageError(f"parameter {key[:80]}", "is not known", f"it takes: {', '.join(known) or 'none'}")
        if key in found:
            raise UsageError(key, "stands there twice")
        found[key] = _value(known[key], text[: _LONGEST + 1])
    request.parse(found)
    return found


def _value(parameter: Parameter, text: str) -> Any:
    kind = parameter.kind.schema().get("type", "string")
    kinds = kind if isinstance(kind, list) else [kind]
    if "integer" in kinds or "number" in kinds:
        if not re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", text, re.ASCII):
            raise UsageError(parameter.key, "is not a number")
        return int(text) if "." not in text else float(text)
    if "boolean" in kinds:
        if text not in ("true", "false"):
            raise UsageError(parameter.key, "must be true or false")
        return text == "true"
    return text


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, request in reading().items():
        answer = _schema(request.spec.result, schemas)
        operation = _operation(request.spec.verb, request.__doc__ or "", answer)
        operation["parameters"] = [
            {"name": one.key, "in": "query", "required": one.required, "schema": _in_query(one.kind.schema())}
            for one in parameters(request)
        ]
        paths[path] = {"get": operation}
    emitted = _schema(Emitted, schemas)
    event = {
        "type": "object", "required": ["specversion", "id", "source", "type"],
        "properties": {
            "specversion": {"const": "1.0"}, "id": {"type": "string", "minLength": 1},
            "source": {"type": "string", "minLength": 1}, "type": {"type": "string", "minLength": 1},
            "data": {"type": "object"},
        },
    }  # fmt: skip
    emit = _operation("events", "Accept one CloudEvent; on the Unix socket, for the role emitter.", emitted)
    emit["requestBody"] = {"required": True, "content": {STRUCTURED: {"schema": event}}}
    paths["/v1/events"] = {"post": emit}
    signed = _operation("ingress", "Accept one event that is signed as Standard Webhooks are.", emitted)
    signed["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}] + [
        {"name": header, "in": "header", "required": True, "schema": {"type": "string"}}
        for header in ("webhook-id", "webhook-timestamp", "webhook-signature")
    ]
    body = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string"}, "data": {"type": "object"}},
    }
    signed["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    paths["/v1/ingress/{name}"] = {"post": signed}
    paths["/healthz"] = {"get": _operation("healthz", "Tell whether the daemon answers.", {"type": "object"})}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Isolator", "version": __version__, "license": {"name": "GPL-3.0-or-later"}},
        "paths": paths,
        "components": {"schemas": schemas},
    }


_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["code", "what", "why", "remedy"],
        "properties": {key: {"type": "string"} for key in ("code", "what", "why", "remedy")},
    }},
}  # fmt: skip


def _operation(name: str, about: str, answer: dict[str, Any]) -> dict[str, Any]:
    failed = {"description": "refused", "content": {"application/json": {"schema": _reference("Error")}}}
    good = {"description": "done", "content": {"application/json": {"schema": answer}}}
    refusals = ("400", "401", "403", "404", "405", "411", "413", "500", "502", "503")
    summary, _, rest = about.partition("\n")
    return {
        "operationId": name, "summary": summary.replace("``", "`"),
        **({"description": " ".join(rest.split())} if rest.strip() else {}),
        "responses": {"200": good, **dict.fromkeys(refusals, failed)},
    }  # fmt: skip


def _in_query(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value as it stands in a query, where there is no null."""
    kind = schema.get("type")
    if isinstance(kind, list):
        schema = {**schema, "type": next(one for one in kind if one != "null")}
    return schema


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schema(hint: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a type of ``host.control.verbs``; typed dictionaries become components."""
    origin = get_origin(hint)
    if origin is typing.Annotated or origin is NotRequired:
        return _schema(get_args(hint)[0], schemas)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(one, schemas) for one in get_args(hint)]}
    if origin is list:
        return {"type": "array", "items": _schema(get_args(hint)[0], schemas)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(hint)[1], schemas)}
    if typing.is_typeddict(hint):
        if hint.__name__ not in schemas:
            schemas[hint.__name__] = {}
            hints = get_type_hints(hint, include_extras=True)
            schemas[hint.__name__] = {
                "type": "object",
                "properties": {key: _schema(one, schemas) for key, one in hints.items()},
                "required": sorted(key for key, one in hints.items() if get_origin(one) is not NotRequired),
            }
        return _reference(hint.__name__)
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", dict: "object"}
    return {"type": names[hint]} if hint in names else {}
