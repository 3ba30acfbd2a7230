"""The contract of the control socket: every verb is typed, served, and answers with the keys that it declares."""

from __future__ import annotations

import inspect
import json
from typing import Any, get_type_hints

import pytest

from host.control import (
    api_verbs,
    catalogue_verbs,
    cluster_verbs,
    config_verbs,
    daemon_verbs,
    event_verbs,
    follow,
    mcp_verbs,
    plugin_verbs,
    registration_verbs,
    searches,
)
from host.control.audit_types import AuditFollow
from host.control.event_types import EventEmit, EventReplay, EventWait
from host.control.parameters import Request
from host.control.platform_types import EventRegister
from host.control.plugin_types import PluginLogs, PluginShow, PluginStage, PluginUpdate
from host.control.verbs import listing, verbs
from isolator.errors import UsageError
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars

MODULES = (
    api_verbs,
    catalogue_verbs,
    cluster_verbs,
    config_verbs,
    daemon_verbs,
    event_verbs,
    follow,
    mcp_verbs,
    plugin_verbs,
    registration_verbs,
    searches,
)


async def test_every_verb_is_served(daemon: Daemon) -> None:
    for verb in verbs():
        answer = await daemon.answer(verb, {"name": 5, "id": 5, "token": 5, "method": 5, "call": "x", "after": -1})
        assert "does not exist" not in json.dumps(answer), verb


def test_every_handler_returns_the_declared_result() -> None:
    results = {request: request.spec.result for request in verbs().values()}
    for module in MODULES:
        for _, group in inspect.getmembers(module, inspect.isclass):
            for name, handler in inspect.getmembers(group, inspect.iscoroutinefunction):
                hints = get_type_hints(handler)
                request = hints.get("request") or hints.get("_")
                if group.__module__ == module.__name__ and not name.startswith("_") and request in results:
                    assert hints["return"] is results.pop(request), name
    assert list(results) == [EventEmit]  # answers through a callback


@pytest.mark.parametrize(
    ("request_type", "params", "error"),
    [
        (PluginShow, {}, "name: is missing or not text"),
        (PluginShow, {"name": ""}, "name: is missing or not text"),
        (PluginShow, {"name": ["x"]}, "name: is missing or not text"),
        (PluginShow, {"name": "x" * 4097}, "name: must be text of at most 4096 characters"),
        (EventWait, {"id": "e", "timeout": "5"}, "timeout: must be a number from 0 to 3600.0"),
        (EventWait, {"id": "e", "timeout": None}, "timeout: must be a number from 0 to 3600.0"),
        (EventWait, {"id": "e", "timeout": True}, "timeout: must be a number from 0 to 3600.0"),
        (EventWait, {"id": "e", "timeout": float("nan")}, "timeout: must be a number from 0 to 3600.0"),
        (PluginLogs, {"name": "p", "lines": 10_001}, "lines: must be a number from 0 to 10000"),
        (PluginLogs, {"name": "p", "follow": 1}, "follow: must be true or false"),
        (EventEmit, {"name": "e", "payload": []}, "event: the payload must be an object"),
        (EventRegister, {"name": "e", "schema": 5}, "event: schema must be a JSON Schema object"),
        (EventEmit, {"name": "e", "ttl": 1e9}, "ttl: must be a number from 0 to 2678400.0"),
        (EventEmit, {"name": "e", "dedupe_key": "k" * 257}, "dedupe_key: must be text of at most 256 characters"),
        (EventReplay, {"id": "e", "plugin": 5}, "plugin: is missing or not text"),
        (AuditFollow, {"after": None}, "after: must be a number from 0 to 9007199254740992"),
        (PluginStage, {"hooks": "a.b"}, "hooks: must be a list of texts"),
        (PluginUpdate, {"token": "t", "config": {"k": 1}}, "config: must be an object of texts, at most 64"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(
    request_type: type[Request], params: dict[str, Any], error: str
) -> None:
    with pytest.raises(UsageError) as raised:
        request_type.parse(params)
    assert str(raised.value) == error


def test_defaults_stand_for_missing_parameters_and_unknown_ones_are_ignored() -> None:
    assert EventWait.parse({"id": "e", "colour": 1}) == EventWait(id="e", timeout=30.0)
    assert PluginLogs.parse({"name": "p", "lines": 7.9}).lines == 7
    assert PluginStage.parse({"path": None, "config": None}) == PluginStage()
    assert EventEmit.parse({"name": "e", "ttl": None, "dedupe_key": None}) == EventEmit(name="e")


def test_the_listing_is_plain_data_with_types_and_optionality() -> None:
    entry = json.loads(json.dumps(listing()))["event.wait"]
    assert entry["role"] == "emitter" and entry["recorded"] is False
    assert entry["params"]["id"] == {"schema": {"type": "string", "minLength": 1, "maxLength": 4096}, "required": True}
    assert entry["params"]["timeout"]["required"] is False
    assert entry["result"]["deliveries"] is True
    assert listing()["plugin.update"]["result"]["pending"] is False
    assert all(entry["summary"] for entry in listing().values())


async def test_answers_have_the_declared_keys(daemon: Daemon) -> None:
    # ``ask`` compares each answer with its verb's type; verbs of plugins' registration are called in test_cli.
    daemon.add("one", sidecars.OK, config_schema={"level": "string"})
    emitted = await daemon.emit()
    await daemon.outcome(emitted)
    await daemon.ask("event.replay", id=emitted["id"], plugin="one")
    schema = {"type": "object", "properties": {"volume": {"type": "string"}}}
    await daemon.ask("event.register", name="backup.failed", schema=schema)
    await daemon.ask("api.register", method="projects.get", permission="read:projects")
    await daemon.ask("config.set", name="one", config={"level": "low"})
    await daemon.ask("config.unset", name="one", key="level")
    for verb in ("event.list", "event.dead", "event.types", "plugin.list", "config.rotate_key", "status"):
        await daemon.ask(verb)
    for verb in ("show", "explain", "logs", "restart", "stop", "start", "disable", "enable", "remove"):
        await daemon.ask(f"plugin.{verb}", name="one")
