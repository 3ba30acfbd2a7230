"""Schemas for editors: never stricter than the parsers, and they notice the usual mistakes. No daemon."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from host.authoring import schemas
from host.cli.examples import example_of, limits_of
from host.events import BUILT_IN, Catalogue
from host.plugins.manifest import from_data
from isolator.errors import UsageError
from isolator.policy.keys import LIMITS, SWITCHES
from isolator.policy.parse.load import parse_plugin_policy
from tests.host.test_cli import isolator

REPO = Path(__file__).resolve().parents[2]
MANIFEST: dict[str, Any] = {
    "$schema": "./plugin.schema.json",
    "name": "bell", "version": "1.0.0-rc.1+x", "api_version": "1.2", "binary": "./bin/.bell",
    "hooks": ["deploy.completed", "on_deploy_start"], "args": ["-v", ""], "permissions": ["read:projects"],
    "description": "x" * 999, "unknown-key": 1,
    "config_schema": {"a": "integer", "b": {"enum": ["x"], "default": None}, "c": {"secret": True, "required": True}},
    "sandbox": {
        "network": {
            "egress": ["a.example:443,8443", {"host": "*.b.example", "ports": [1], "reason": "r"}, "[2606:4700::]:443"],
            "listen": [3000, {"port": 1, "reason": ""}],
        },
        "filesystem": {"read": ["/srv/x", {"path": "/srv/y", "reason": "z"}], "state": 0, "tmp": " 1.5 gib "},
        "resources": {"memory": 67108864, "cpu": "12.5 %", "tasks": 1, "io_read": "none", "io_write": "20MB"},
        "syscalls": {"profile": "strict"},
    },
    "transport": {"mode": "stream", "max_in_flight": 256, "meta": "never"},
    "delivery": {
        "timeout": 2.5, "attempts": 1, "expires": "1d", "order_by": "none", "concurrency": 1,
        "filters": [{"not": {"any": [{"exact": {"a": "b"}}, {"prefix": {"c": "d"}}]}}],
    },
    "restart": {"start_timeout": "2m"},
    "activation": {"start": "eager", "idle": "never"},
    "health": {"ping": False, "interval": "10s", "timeout": 1, "misses": 100},
}  # fmt: skip
"""A manifest that uses every freedom that the daemon's parser leaves."""
POLICY = """
[grant]
hooks = ["*", "deploy.*", "deploy.failed"]
permissions = ["read:*", "*"]
filters = [{exact = {project_id = "shop"}}]
egress = ["public", "a.example:443"]
listen = ["8080:3000"]
tools = ["get_*"]
callers = [1000]
allow_no_sni = false
[limits]
memory = "64M"
idle = 60
[filesystem]
read = ["/srv"]
state = 0
[syscalls]
profile = "default"
[restart]
backoff_min = "1s"
crashes = 3
stop_grace = "5s"
[delivery]
attempts = 3
[env]
TZ = "UTC"
"""
FAULTS = (
    ("name", "Bell"), ("version", "1.0"), ("api_version", "2"), ("api_version", 1), ("binary", "/bin/bell"),
    ("binary", "../bell"), ("binary", "a/../bell"), ("binary", "bin/"), ("hooks", ["deploy.*"]), ("hooks", "deploy.x"),
    ("hooks", None), ("permissions", ["read:*"]), ("args", [1]), ("config_schema.PA TH", "string"),
    ("config_schema.b.typ", "string"), ("config_schema.b", "text"), ("sandbox.network.egres", []),
    ("sandbox.network.egress", [{"ports": [443]}]), ("sandbox.network.egress", [{"host": "a", "ports": []}]),
    ("sandbox.network.egress", [{"host": "a", "ports": [70000]}]), ("sandbox.network.listen", [0]),
    ("sandbox.filesystem.read", ["srv"]), ("sandbox.filesystem.tmp", "32 MX"), ("sandbox.resources.memory", "lots"),
    ("sandbox.resources.memory", 256), ("sandbox.resources.cpu", 25), ("sandbox.resources.tasks", "64"),
    ("sandbox.syscalls", "none"), ("transport.mode", "pipe"), ("transport.max_in_flight", 0),
    ("delivery.timeout", "10"),
    ("delivery.filters", [{"exact": {}}]), ("delivery.filters", [{"is": {"a": "b"}}]),
    ("delivery.filters", [{"exact": {"a": "b"}, "not": {"exact": {"a": "b"}}}]), ("restart.start_timout", "1s"),
    ("activation.start", "now"), ("activation.idle", "soon"), ("health.ping", "yes"), ("health.misses", 0),
)  # fmt: skip
"""Mistakes, by the path of the key that is wrong."""


def _accepts(schema: dict[str, Any], value: Any) -> bool:
    return jsonschema_rs.Draft202012Validator(schema).is_valid(value)


def _changed(path: str, value: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(MANIFEST)
    *around, last = path.split(".")
    here = manifest
    for part in around:
        here = here[part]
    here[last] = value
    return manifest


@pytest.mark.parametrize(("path", "value"), FAULTS)
def test_mistake_in_a_manifest_is_one_for_the_schema_as_it_is_for_the_daemon(path: str, value: Any) -> None:
    with pytest.raises(UsageError):
        from_data(_changed(path, value))
    assert not _accepts(schemas.manifest_schema(), _changed(path, value))


def test_manifest_that_the_daemon_takes_is_one_for_the_schema() -> None:
    from_data(MANIFEST)
    assert _accepts(schemas.manifest_schema(), MANIFEST)
    for left_out in MANIFEST:
        less = {key: value for key, value in MANIFEST.items() if key != left_out}
        try:
            from_data(less)
        except UsageError:
            assert not _accepts(schemas.manifest_schema(), less), left_out
        else:
            assert _accepts(schemas.manifest_schema(), less), left_out


def test_schemas_take_every_manifest_and_policy_of_the_repository() -> None:
    manifests = [*REPO.glob("examples/*/plugin.json"), *REPO.glob("tests/compat/plugins/*/plugin.json")]
    policies = [path for path in REPO.glob("policies/**/*.toml") if path.name != "host.toml"]
    assert len(manifests) > 10 and policies
    refused = [path for path in manifests if not _accepts(schemas.manifest_schema(), json.loads(path.read_text()))]
    refused += [path for path in policies if not _accepts(schemas.policy_schema(), tomllib.loads(path.read_text()))]
    assert not refused


def test_policy_that_the_daemon_takes_is_one_for_the_schema_and_a_mistake_is_not() -> None:
    parse_plugin_policy(POLICY.encode(), source="x.toml")
    assert _accepts(schemas.policy_schema(), tomllib.loads(POLICY))
    for good, bad in (
        ("hooks =", "hoks ="), ('"64M"', '"64 MX"'), ("crashes = 3", "crashes = 0"), ("[env]\nTZ", '[env]\n"T Z"'),
        ('["/srv"]', '["srv"]'), ('"default"', '"none"'), ("[syscalls]", "[sycalls]"), ("1000", "-1"),
    ):  # fmt: skip
        text = POLICY.replace(good, bad)
        assert text != POLICY
        with pytest.raises(UsageError):
            parse_plugin_policy(text.encode(), source="x.toml")
        assert not _accepts(schemas.policy_schema(), tomllib.loads(text)), bad


def test_every_declared_key_is_described_in_the_schema_with_its_default() -> None:
    for schema, place in (
        (schemas.manifest_schema(), lambda key: key.manifest), (schemas.policy_schema(), lambda key: key.policy)
    ):  # fmt: skip
        for key in (*LIMITS, *SWITCHES):
            here = schema
            for part in place(key).split(".") if place(key) else ():
                here = here["properties"][part]
            assert not place(key) or here["description"].lower().startswith(key.about.lower())


@pytest.mark.parametrize("name", [kind.name for kind in BUILT_IN])
def test_example_of_an_event_passes_its_schema_and_the_catalogue(name: str) -> None:
    kind = Catalogue().need(name)
    example = example_of(name, kind.schema(), kind.filled)
    validated = Catalogue().validate(name, example)
    assert _accepts(schemas.event_schema(name), validated.fields)
    assert not _accepts(schemas.event_schema(name), {**validated.fields, "unknown": 1})


def test_field_with_a_pattern_and_no_example_is_named() -> None:
    schema = {"properties": {"code": {"type": "string", "pattern": "^[A-Z]{3}$"}}, "required": ["code"]}
    with pytest.raises(UsageError, match="code has a pattern, and no example"):
        example_of("backup.failed", schema, None)
    schema["properties"]["code"]["examples"] = ["ABC"]
    assert example_of("backup.failed", schema, None) == {"code": "ABC"}


def test_limits_of_a_field_are_shown_in_words() -> None:
    assert limits_of({"type": "string", "minLength": 1, "maxLength": 8}) == "1 to 8 characters"
    assert limits_of({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}) == "at least 0"
    assert limits_of({"type": "string", "pattern": "^x"}) == "like ^x"


async def test_commands_print_schemas_without_a_daemon(tmp_path: Path) -> None:
    for words, expected in (
        (("manifest",), schemas.manifest_schema()),
        (("policy",), schemas.policy_schema()),
        (("event", "deploy.failed"), schemas.event_schema("deploy.failed")),
        (("event", "on_deploy_fail"), schemas.event_schema("deploy.failed")),
    ):
        ran = await isolator(tmp_path, "schema", *words)
        assert ran.json == expected
    ran = await isolator(tmp_path, "schema", "event", "backup.failed")
    assert ran.code == 3 and "backup.failed" in ran.err and "daemon" in ran.err, ran.err
