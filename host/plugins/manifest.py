"""Whole manifest: the part that the supervisor reads (``ManifestCore``) and the part that only the host needs.

The core decides about security and is parsed for the supervisor too, with the same code; here ``transport``,
``delivery``, ``activation``, ``health`` and ``config_schema`` are read as strictly, because a typo in any of them
changes what the plugin receives. Unknown top-level keys are a warning: newer authors, older hosts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from isolator.base.structs import field
from isolator.errors import NotFoundError, UsageError, translated
from isolator.policy.filters import MOST, parse_filter
from isolator.policy.frozen import Frozen
from isolator.policy.parse.strict import Table, did_you_mean, printable, prose
from isolator.policy.request import MANIFEST_NAME, MAX_BYTES, MAX_DEPTH, MODES, ManifestCore
from isolator.policy.units import parse_duration
from isolator.reader.json_text import load_json_with_lines
from isolator.reader.manifest import parse_manifest

Era = Literal["2025-11-25", "2026-07-28"]
ERAS: tuple[Era, ...] = get_args(Era)
CALLED_IDLE = 600.0
"""Seconds after which an MCP server that nobody uses is stopped."""
ConfigType = Literal["string", "integer", "number", "boolean", "enum", "file"]
CONFIG_TYPES: tuple[str, ...] = get_args(ConfigType)
NO_ORDER = "none"
MAX_KEYS = 64
"""Entries of ``config_schema``."""

MAX_VALUE = 8 * 1024
MAX_SECRET_FILE = 32 * 1024
"""A secret is looked for, in several spellings, in each line that the plugin writes."""
MAX_FILE, MAX_FILES = 256 * 1024, 1 << 20
"""Bytes of one file that is no secret, and of all of them: the cage has 2 MiB for them."""
MAX_CONFIG = 96 * 1024
"""Bytes of all other values of one plugin, each counted twice: it may have two variables."""

_TARGET = re.compile(r"/[A-Za-z0-9/._~!$&'()*+,;=:@%?-]*")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")

# Names that decide how a program is loaded, found or resolved, or that belong to the cage. A config value of such a
# name would be code execution or a lie about the cage, so it is refused in either spelling.
_RESERVED = re.compile(
    r"PATH|HOME|LANG|TZ|TMPDIR|SHELL|USER|LOGNAME|PWD|OLDPWD|IFS|ENV|BASH_ENV|SHELLOPTS|BASHOPTS|PS4|"
    r"CDPATH|PROMPT_COMMAND|NODE_OPTIONS|NODE_PATH|NODE_EXTRA_CA_CERTS|GCONV_PATH|LOCPATH|NLSPATH|"
    r"HOSTALIASES|RES_OPTIONS|LOCALDOMAIN|RESOLV_HOST_CONF|GETCONF_DIR|GLIBC_TUNABLES|OPENSSL_CONF|"
    r"OPENSSL_MODULES|OPENSSL_ENGINES|JAVA_TOOL_OPTIONS|_JAVA_OPTIONS|JDK_JAVA_OPTIONS|CLASSPATH|GODEBUG|"
    r"GOTRACEBACK|RUST_BACKTRACE|NOTIFY_SOCKET|LISTEN_FDS|LISTEN_PID|TERM|TERMINFO|TERMINFO_DIRS"
    r"|(LD_|DYLD_|PYTHON|PLUGIN_|ISOLATOR_|LC_|MALLOC_|BASH_FUNC_|PERL5|RUBY).*"
)


class ConfigField(Frozen):
    """Entry of ``config_schema``."""

    key: str
    type: ConfigType = "string"
    required: bool = False
    secret: bool = False
    default: str | None = None
    """The text that is injected."""
    values: tuple[str, ...] = ()
    """The choices of an enum."""
    description: str = ""


class ToolCall(Frozen):
    """The call of a tool that an event becomes; ``arguments`` is a template (``host.mcp.template``)."""

    tool: str
    arguments: dict[str, Any]


class Transport(Frozen):
    """``transport``: how requests reach the sidecar. Declared, never probed."""

    mode: str = MODES[0]
    meta: Literal["fit", "never"] = "fit"
    """Whether ``_meta`` goes along in one-shot requests when it fits."""
    max_in_flight: int = 16
    """Modes stream and http: requests that may be unanswered at a time."""
    path: str = "/events"
    """Mode http: where events are posted."""
    port: int | None = None
    """Mode http: the port of its own loopback that the sidecar listens on; None: its socket."""
    secret: str | None = None
    """Mode http: the key of its config with which requests are signed."""
    era: Era = ERAS[0]
    """Mode mcp: the newest version of the protocol before, or the first since, it does without sessions."""
    calls: dict[str, ToolCall] = field(default_factory=dict)
    """Mode mcp: by hook."""


class DeliverySpec(Frozen):
    """``delivery``: the author's wishes; the operator's figures are in the effective policy."""

    order_by: str | None = None
    """None: the event type's order; ``NO_ORDER``: no order; else a payload field."""
    concurrency: int = 16
    """Keys in parallel; one at a time in one-shot mode, and in the mode exec unless more are asked for."""
    expires: float | None = None
    filters: tuple[str, ...] = ()
    """The author wants only events that pass all of these (``isolator.policy.filters``)."""

    def order_key(self, by: str | None, payload: Mapping[str, Any]) -> str | None:
        """The key by which an event is ordered; ``by``: the field that orders its type."""
        field = by if self.order_by is None else None if self.order_by == NO_ORDER else self.order_by
        value = payload.get(field) if field is not None else None
        return None if value is None else f"{field}={value}"


class Activation(Frozen):
    """``activation``: when the sidecar starts and stops by itself."""

    start: Literal["lazy", "eager"] = "lazy"
    idle: float | None = None
    """Seconds without an event after which it is stopped; None: never."""


class Health(Frozen):
    """``health``: pings; ``ping`` None is the mode's default (stream: yes, oneshot: no)."""

    ping: bool | None = None
    interval: float = 30.0
    timeout: float = 2.0
    misses: int = 3


class Manifest(Frozen):
    """Whole ``plugin.json``."""

    core: ManifestCore
    transport: Transport = Transport()
    delivery: DeliverySpec = DeliverySpec()
    activation: Activation = Activation()
    health: Health = Health()
    config: tuple[ConfigField, ...] | None = None
    """None: no schema, so any key that comes with the registration is an implicit secret string."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Oddities that do no harm, one line each."""
        return tuple(f'unknown key "{key}" is ignored' for key in self.core.extra)

    @property
    def required(self) -> list[str]:
        """Keys of its config without which it does not start."""
        return [field.key for field in self.config or () if field.required and field.default is None]

    def field(self, key: str) -> ConfigField | None:
        """Find the schema's entry for a key."""
        return next((field for field in self.config or () if field.key == key), None)


def parse(text: bytes, *, name: str = MANIFEST_NAME) -> Manifest:
    """Parse a whole manifest; raises UsageError with file, line, key and a remedy."""
    data, lines = load_json_with_lines(text, max_bytes=MAX_BYTES, max_depth=MAX_DEPTH, name=name)
    return from_data(data, lines=lines, name=name)


def from_data(data: dict[str, Any], *, lines: Mapping[Any, int] | None = None, name: str = MANIFEST_NAME) -> Manifest:
    """Read a manifest from parsed JSON; without ``lines`` errors name keys only. Raises UsageError."""
    where = dict(lines or {})
    core = parse_manifest(data, lines=where, name=name)
    top = Table(data, name=name, lines=where)
    mode = core.mode
    manifest = Manifest(
        core=core,
        transport=_transport(top.table("transport"), core.hooks),
        delivery=_delivery(top.table("delivery"), mode),
        activation=_activation(top.table("activation"), mode),
        health=_health(top.table("health"), mode),
        config=_config(top.table("config_schema")) if "config_schema" in top else None,
    )
    secret = manifest.transport.secret
    if secret is not None and manifest.config is not None and manifest.field(secret) is None:
        top.table("transport").fail("secret", "names no key of config_schema", "declare it there, as a secret")
    return manifest


def environment_names(key: str) -> tuple[str, ...]:
    """Variables that a config key is injected as: in its own spelling, and in UPPER_SNAKE."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    upper = re.sub(r"[^A-Z0-9_]", "_", snake.upper())
    return (key,) if upper == key else (key, upper)


def check_key(key: str) -> str:
    """Check that a config key can be a variable; raises ValueError for a bad or reserved one."""
    if not _KEY.fullmatch(key):
        raise ValueError("must be letters, digits, '_', '-' or '.', starting with a letter")
    for variable in environment_names(key):
        if _RESERVED.fullmatch(variable.upper()):
            raise ValueError(f"{variable.upper()} is a reserved variable; choose another key")
    return key


def check_value(field: ConfigField, text: str) -> str:
    """Check a config value and return the text that is injected; raises UsageError."""
    limit = MAX_VALUE if field.type != "file" else MAX_SECRET_FILE if field.secret else MAX_FILE
    subject = f"config {field.key}"
    if len(text.encode("utf-8", "surrogateescape")) > limit:
        remedy = "put it where 'read' of [filesystem] in the policy shows it" if field.type == "file" else ""
        raise UsageError(subject, f"is longer than {limit} bytes", remedy)
    if "\0" in text:
        raise UsageError(subject, "contains a NUL character")
    with translated(UnicodeEncodeError, UsageError, subject, "is not valid UTF-8"):
        text.encode()
    if field.type == "file":
        return text
    text = text.removesuffix("\n")
    if "\n" in text or "\r" in text:
        raise UsageError(subject, "contains a line break", 'declare it as {"type": "file"}')
    if field.type == "integer" and not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise UsageError(subject, "must be a whole number")
    if field.type == "number" and not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        raise UsageError(subject, "must be a number")
    if field.type == "boolean":
        truth = {"true": "true", "1": "true", "yes": "true", "on": "true"}
        truth |= {"false": "false", "0": "false", "no": "false", "off": "false"}
        if text.lower() not in truth:
            raise UsageError(subject, "must be true or false")
        text = truth[text.lower()]
    if field.type == "enum" and text not in field.values:
        raise UsageError(subject, "must be one of " + ", ".join(field.values))
    return text


def check_values(manifest: Manifest, values: Mapping[str, str]) -> dict[str, tuple[ConfigField, str]]:
    """Check config values, and return them by key as they would be stored; raises UsageError or NotFoundError.

    A key may be named by its variable, too: ``SLACK_WEBHOOK_URL`` means ``slack_webhook_url``.
    """
    checked = {}
    for key, text in values.items():
        if manifest.config is None:
            with translated(ValueError, UsageError, f"config {key}"):
                spec = ConfigField(key=check_key(key), secret=True)
        else:
            named = manifest.field(key) or next((f for f in manifest.config if key in environment_names(f.key)), None)
            if named is None:
                known = tuple(f.key for f in manifest.config)
                raise NotFoundError(f"config {key}", "is not in the plugin's schema", did_you_mean(key, known))
            spec = named
        checked[spec.key] = (spec, check_value(spec, text))
    return checked


def _transport(table: Table, hooks: Sequence[str]) -> Transport:
    mode = table.choice("mode", MODES, MODES[0])
    meta = table.choice("meta", ("fit", "never"), "fit")
    found = {"mode": mode, "meta": meta, "max_in_flight": table.integer("max_in_flight", 16, low=1, high=256)}
    if mode == "http":
        found["path"] = table.parsed("path", _path, "/events")
        found["port"] = table.take("port")  # checked by the core
        found["secret"] = table.text("secret", "") or None
    if mode == "mcp":
        found |= {"era": table.choice("era", ERAS, ERAS[0]), "calls": _calls(table, hooks)}
    table.finish()
    return Transport.model_validate(found)


def _calls(table: Table, hooks: Sequence[str]) -> dict[str, ToolCall]:
    """The call of each hook."""
    calls, found = table.table("calls"), {}
    for hook in hooks:
        if hook not in calls.data:
            calls.fail((), f"no call for {hook}", f'write "{hook}": {{"tool": "NAME", "arguments": {{}}}}')
        entry = calls.table(hook)
        tool = entry.parsed("tool", lambda value: printable(value, 128), "")
        arguments = entry.take("arguments")
        if not tool:
            entry.fail("tool", "is missing")
        if not isinstance(arguments, dict | None):
            entry.fail("arguments", "must be an object")
        entry.finish()
        found[hook] = ToolCall(tool=tool, arguments=arguments or {})
    for hook in calls.data:
        if hook not in found:
            calls.fail(hook, "is no hook of this plugin", "add it to hooks")
    return found


def _delivery(table: Table, mode: str) -> DeliverySpec:
    for checked_by_core in ("timeout", "attempts"):
        table.take(checked_by_core)
    spec = DeliverySpec(
        order_by=table.text("order_by", "") or None,
        concurrency=table.integer("concurrency", 1 if mode == "exec" else 16, low=1, high=256),
        expires=table.parsed("expires", _duration, None),
        filters=table.items("filters", parse_filter, limit=MOST) or (),
    )
    table.finish()
    return spec


def _activation(table: Table, mode: str) -> Activation:
    if mode == "exec":
        _refuse(table, ("start", "idle"), "its program runs while there is an event, and not between them")
    start = table.choice("start", ("lazy", "eager"), "lazy")
    idle = (
        None
        if table.data.get("idle") == "never"
        else table.parsed("idle", _duration, CALLED_IDLE if mode == "mcp" else None)
    )
    table.take("idle")
    table.finish()
    return Activation.model_validate({"start": start, "idle": idle})


def _health(table: Table, mode: str) -> Health:
    if mode == "exec":
        _refuse(table, table.data, "between events nothing runs that could answer")
    spec = Health(
        ping=table.boolean("ping", None),
        interval=table.parsed("interval", _duration, 30.0),
        timeout=table.parsed("timeout", _duration, 2.0),
        misses=table.integer("misses", 3, low=1, high=100),
    )
    table.finish()
    return spec


def _path(value: Any) -> str:
    path = printable(value, 1024)
    if not _TARGET.fullmatch(path):
        raise ValueError('must be the path of a URL, like "/events"')
    return path


def _refuse(table: Table, keys: Iterable[str], why: str) -> None:
    for key in keys:
        if key in table.data:
            table.fail(key, f"is nothing for the mode exec: {why}", "leave it out")


def _duration(value: Any) -> float:
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError("must be more than nothing")
    return seconds


def _config(table: Table) -> tuple[ConfigField, ...]:
    fields: list[ConfigField] = []
    taken: dict[str, str] = {}
    if len(table.data) > MAX_KEYS:
        raise UsageError(table.where(), f"config_schema: {len(table.data)} keys; at most {MAX_KEYS}")
    for key in table.data:
        try:
            check_key(key)
        except ValueError as error:
            table.fail(key, str(error))
        for variable in environment_names(key):
            if variable in taken:
                table.fail(key, f'becomes the same variable {variable} as "{taken[variable]}"')
            taken[variable] = key
        fields.append(_config_field(table, key))
    return tuple(fields)


def _config_field(table: Table, key: str) -> ConfigField:
    if isinstance(table.data[key], str):
        entry = Table({"type": table.take(key)}, name=table.name, lines=table.lines, path=(*table.path, key))
    else:
        entry = table.table(key)
    values = entry.strings("values", lambda value: value) or entry.strings("enum", lambda value: value) or ()
    kind = entry.choice("type", CONFIG_TYPES, None)
    if kind is None:
        kind = "enum" if values else "string"
    if kind == "enum" and not values:
        entry.fail("values", "an enum needs its values", 'write "values": ["a", "b"]')
    default = entry.take("default")
    field = ConfigField.model_validate(
        {
            "key": key,
            "type": kind,
            "required": entry.boolean("required", False),
            "secret": entry.boolean("secret", False),
            "values": values,
            "description": entry.parsed("description", prose, ""),
        }
    )
    entry.finish()
    if default is None:
        return field
    if field.secret:
        entry.fail("default", "a secret cannot have a default: everybody could read it here")
    if isinstance(default, bool):
        text = "true" if default else "false"
    elif isinstance(default, (int, float)):
        text = str(default)
    else:
        text = printable(default, MAX_VALUE) if field.type != "file" else str(default)
    try:
        text = check_value(field, text)
    except UsageError as error:
        entry.fail("default", error.why)
    return field.model_copy(update={"default": text})
