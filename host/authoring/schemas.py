"""JSON Schemas (draft 2020-12) of what an author and an operator write: ``plugin.json``, a policy, and payloads.

They serve editors and other tools; the daemon reads with its own parsers, which also see what no schema says (one key
needs another, an address is private). A schema never refuses what they take: a test holds the two against each other.
Keys that are declared (``isolator/policy/keys.py``) come from their declarations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from host.events import BUILT_IN, Catalogue
from host.plugins.manifest import CONFIG_TYPES, ERAS, MAX_KEYS
from isolator.policy import filters, keys, names, request
from isolator.policy.parse import load

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILE_NAME = "plugin.schema.json"
"""The manifest's schema, as ``isolator new`` writes it beside ``plugin.json``."""
_SIZE = r"^\s*[0-9]{1,16}(\.[0-9]{1,6})?\s*(([KMGTkmgt]([Ii]?[Bb])?)|[Bb])?\s*$"
_TIME = r"^\s*[0-9]{1,9}(\.[0-9]{1,6})?\s*(ms|s|m|h|d)\s*$"
_UNITS: tuple[tuple[keys.Unit, Schema], ...] = (
    (keys.SIZE, {"type": ["string", "integer"], "pattern": _SIZE}),
    (keys.VOLUME, {"type": ["string", "integer"], "pattern": _SIZE}),
    (keys.RATE, {"type": ["string", "integer"], "pattern": f"^none$|{_SIZE}"}),
    (keys.CPU, {"type": "string", "pattern": r"^\s*[0-9]{1,6}(\.[0-9])?\s*%\s*$"}),
    (keys.COUNT, {"type": "integer", "maximum": 2**31 - 1}),
    (keys.TIME, {"type": ["string", "number"], "pattern": _TIME}),
)
_DURATION: Schema = {"type": ["string", "number"], "pattern": _TIME, "examples": ["10s"]}


def manifest_schema() -> Schema:
    """The schema of ``plugin.json``."""
    sandbox = {
        "network": _closed(
            egress={
                "description": "Destinations it connects to; [] is no network. Left out: any public address, TCP 80 "
                "and 443.",
                "anyOf": [
                    {"const": "public"},
                    _list({"anyOf": [_text(512, examples=["api.example.com:443"]), _EGRESS]}),
                ],
            },
            listen=_list({"anyOf": [_PORT, _closed(port=_PORT, reason=_REASON, needs=["port"])]}, 16),
        ),
        "filesystem": _closed(
            read=_list({"anyOf": [_ABSOLUTE, _closed(path=_ABSOLUTE, reason=_REASON, needs=["path"])]}, 32),
        ),
        "resources": _closed(),
        "syscalls": {"anyOf": [_PROFILE, _closed(profile=_PROFILE)]},
    }
    properties: Schema = {
        "$schema": {"description": "The schema that an editor checks this file with."},
        "name": {
            "type": "string", "pattern": _whole(names.PLUGIN_NAME.pattern),
            "description": "2 to 63 lower-case letters, digits and dashes, a letter first.",
        },
        "version": {
            "type": "string", "pattern": _whole(request.VERSION.pattern.replace(r"\d", "[0-9]")), "maxLength": 256,
            "examples": ["1.2.0"], "description": "A semantic version.",
        },
        "api_version": {
            "type": "string", "pattern": f"^({'|'.join(map(str, request.API_MAJORS))})(\\.[0-9]{{1,4}})?$",
            "description": "The protocol that it speaks.", "examples": ["1"],
        },
        "binary": _text(
            512, "The program, relative to this file.",
            # No "..", nothing absolute, no folder.
            pattern=r"^(?!/)(?!(.*/)?\.\.(/|$)).*[^/]$", examples=["./notifier"],
        ),
        "hooks": _list(_HOOK) | {"description": "The events that it receives, each by its name."},
        "args": _list({"type": "string", "maxLength": request.MAX_ARGUMENT}, request.MAX_ARGUMENTS),
        "description": _REASON | {"description": "One sentence for the operator."},
        "permissions": _list({"type": "string", "pattern": _whole(names.PERMISSION.pattern)}) | {
            "description": "What it asks of the host, such as read:projects."
        },
        "config_schema": {
            "type": "object", "maxProperties": MAX_KEYS,
            "description": "Values that the operator sets; each becomes a variable.",
            "propertyNames": {"pattern": r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"},
            "additionalProperties": {"anyOf": [{"enum": list(CONFIG_TYPES)}, _CONFIG_FIELD]},
        },
        "sandbox": _closed(**sandbox) | {"description": "What it needs; the operator's policy decides."},
        "transport": _closed(
            mode={"enum": list(request.MODES), "default": request.MODES[0], "description": "How events reach it."},
            meta={"enum": ["fit", "never"]},
            max_in_flight=_number(1, 256),
            path={"type": "string", "pattern": "^/"},
            port=_number(request.MIN_PORT, request.MAX_PORT),
            secret=_text(),
            era={"enum": list(ERAS)},
            calls={"type": "object", "additionalProperties": _closed(
                tool=_text(128), arguments={"type": ["object", "null"]}, needs=["tool"]
            )},
        ),
        "delivery": _closed(
            order_by=_text(), concurrency=_number(1, 256), expires=_DURATION, filters=_list(_FILTER, filters.MOST),
        ),
        "restart": _closed(),
        "activation": _closed(start={"enum": ["lazy", "eager"]}, idle=_DURATION_OR_NEVER),
        "health": _closed(
            ping={"type": "boolean"}, interval=_DURATION, timeout=_DURATION, misses=_number(1, 100)
        ),
    }  # fmt: skip
    _declare(properties, lambda key: key.manifest)
    return {
        "$schema": DIALECT, "$id": "isolator:schema/plugin.json", "title": "plugin.json", "type": "object",
        "description": "Manifest of a plugin for Isolator (docs/manifest.md).",
        "properties": properties, "required": ["name", "version", "api_version", "binary", "hooks"],
        "$defs": {"filter": _filter_definition()},
    }  # fmt: skip


def policy_schema() -> Schema:
    """The schema of a policy file, for editors that check TOML with JSON Schema."""
    low = {"type": "integer", "minimum": 1, "maximum": 1000}
    properties: Schema = {
        "grant": _closed(
            hooks=_list({"type": "string", "pattern": _granted(names.HOOK.pattern, r"\.")}),
            permissions=_list({"type": "string", "pattern": _granted(names.PERMISSION.pattern, ":")}),
            filters=_list(_FILTER, filters.MOST),
            egress={"anyOf": [{"const": "public"}, _list(_text(1024, examples=["api.example.com:443"]), 256)]},
            listen=_list(_text(1024, examples=["8080:3000"]), 32),
            tools=_list(_text(128), 256),
            callers=_list(_number(0, 2**32 - 2)),
        ),
        "limits": _closed(),
        "filesystem": _closed(read=_list(_ABSOLUTE)),
        "syscalls": _closed(profile=_PROFILE),
        "restart": _closed(backoff_min=_DURATION, backoff_max=_DURATION, crashes=low, window=_DURATION),
        "delivery": _closed(),
        "require": _closed(certified={
            "type": "boolean", "default": False, "description": "Take no version that is not certified.",
        }),
        "env": {
            "type": "object", "maxProperties": load.MAX_VARIABLES,
            "propertyNames": {"pattern": _whole(names.VARIABLE.pattern)},
            "additionalProperties": {"type": "string", "maxLength": names.MAX_VARIABLE},
        },
    }  # fmt: skip
    _declare(properties, lambda key: key.policy)
    return {
        "$schema": DIALECT, "$id": "isolator:schema/policy", "title": "policies/NAME.toml",
        "description": "Policy of one plugin for Isolator (docs/policy.md).", "type": "object",
        "properties": properties, "additionalProperties": False, "$defs": {"filter": _filter_definition()},
    }  # fmt: skip


def event_schema(name: str) -> Schema:
    """The schema of a built-in event's payload, by either spelling of its name; raises NotFoundError."""
    event_type = Catalogue().need(name)
    return {"$schema": DIALECT, **event_type.schema(), "title": event_type.name}


def text_of(schema: Schema) -> str:
    """A schema as the text of its file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


EVENTS = tuple(event.name for event in BUILT_IN)
"""The events that every daemon knows."""


def _declare(properties: Schema, place: Callable[[keys.Key], str]) -> None:
    """Add the declared keys, each where a file of this kind has it; ``place``: its dotted key, or ""."""
    declared: Iterable[keys.Key] = (*keys.LIMITS, *keys.SWITCHES)
    for key in declared:
        section, _, name = place(key).rpartition(".")
        if not name:
            continue
        here = properties
        for part in section.split("."):
            here = here[part]["properties"]
        here[name] = _of_key(key)


def _of_key(key: keys.Key) -> Schema:
    described = {"description": key.about[0].upper() + key.about[1:] + "."}
    if not isinstance(key, keys.Limit):
        return {"type": "boolean", **described}
    default = getattr(keys.Limits(), key.name)
    found = next(schema for unit, schema in _UNITS if unit is key.unit)
    bounds = {} if key.unit is keys.CPU else {"minimum": key.least}
    return {**found, **bounds, "default": default if key.unit is keys.COUNT else key.show(default), **described}


def _closed(*, needs: Iterable[str] = (), **properties: Schema) -> Schema:
    """An object without further keys."""
    required = {"required": list(needs)} if needs else {}
    return {"type": "object", "properties": properties, "additionalProperties": False, **required}


def _text(limit: int = 256, description: str = "", **more: Any) -> Schema:
    return {"type": "string", "maxLength": limit, **({"description": description} if description else {}), **more}


def _list(items: Schema, most: int = 64) -> Schema:
    return {"type": "array", "items": items, "maxItems": most}


def _number(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _whole(pattern: str) -> str:
    return f"^(?:{pattern})$"


def _granted(pattern: str, separator: str) -> str:
    return rf"^(?:\*|(?:{pattern})(?:{separator}\*)?)$"


def _filter_definition() -> Schema:
    texts = {
        "type": "object", "minProperties": 1, "additionalProperties": {"type": "string", "maxLength": filters.TEXT}
    }  # fmt: skip
    several = {"type": "array", "items": _FILTER, "minItems": 1, "maxItems": filters.PARTS}
    kinds = {"exact": texts, "prefix": texts, "suffix": texts, "all": several, "any": several, "not": _FILTER}
    return _closed(**kinds) | {"minProperties": 1, "maxProperties": 1}


_FILTER: Schema = {"$ref": "#/$defs/filter"}
_HOOK: Schema = {"type": "string", "pattern": _whole(names.HOOK.pattern), "examples": list(EVENTS[:6])}
_REASON: Schema = {"type": "string"}
_PORT = _number(1, 65535)
_PROFILE: Schema = {"enum": ["default", "strict"]}
_ABSOLUTE = _text(1024, pattern="^/")
_DURATION_OR_NEVER: Schema = {"anyOf": [{"const": "never"}, _DURATION]}
_EGRESS = _closed(
    host=_text(300, examples=["api.example.com"]),
    ports=_list(_PORT, 32) | {"minItems": 1, "default": [443]},
    reason=_REASON | {"description": "Shown to the operator."},
    needs=["host"],
)
_CONFIG_FIELD = _closed(
    type={"enum": list(CONFIG_TYPES), "default": "string"},
    required={"type": "boolean", "description": "It does not start without."},
    secret={"type": "boolean", "description": "Never shown again, and taken out of logs and trail."},
    default={"type": ["string", "number", "boolean", "null"]},
    values=_list(_text(1024)),
    enum=_list(_text(1024)),
    description=_REASON,
)
