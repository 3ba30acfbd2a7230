"""The host's plugins: what a change of one makes it do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host.database.store import Store
from host.events import Catalogue
from host.plugins.registry import Registry
from isolator.ipc.messages import PluginState, PluginTurned, RegisteredEntry

EVENT = "deploy.completed"
OTHER = "deploy.failed"


def _entry(
    name: str, state: PluginState = PluginState.STOPPED, *, version: str = "1.0.0", hooks: tuple[str, ...] = (EVENT,)
) -> RegisteredEntry:
    manifest = {"name": name, "version": version, "api_version": "1", "binary": "./a", "hooks": list(hooks)}
    return RegisteredEntry(name=name, version=version, digest=version[0] * 64, state=state, manifest=manifest)


def _names(registry: Registry, event: str) -> list[str]:
    kind = Catalogue().get(event)
    assert kind is not None
    return [subscriber.plugin for subscriber in registry.subscribers(kind, {})]


async def test_change_of_a_plugins_state_writes_no_row_and_one_of_its_version_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "host.db")
    registry = Registry(Catalogue(), store)
    written, submit = 0, store.submit

    def counted(*operation: Any, **how: Any) -> Any:
        nonlocal written
        written += 1
        return submit(*operation, **how)

    monkeypatch.setattr(store, "submit", counted)
    try:
        registry.put(_entry("one"))
        for state in (PluginState.STARTING, PluginState.RUNNING, PluginState.STOPPED):
            assert registry.put(_entry("one", state)).state == state
        assert written == 1
        registry.put(_entry("one", version="2.0.0"))
        assert written == 2
        registry.remove("one")
        registry.erase("one")
        registry.put(_entry("one", version="2.0.0"))
        assert written == 4
        await store.run(lambda _: None)  # behind the others
        assert registry.known() == {"one"}
        after = Registry(Catalogue(), store)
        assert after.known() == {"one"}
        written = 0
        after.put(_entry("one", version="2.0.0"))
        assert written == 0, "its row is that of before"
        after.put(_entry("one"))
        assert written == 1
    finally:
        await store.close()


async def test_turn_of_a_plugin_leaves_all_but_its_state_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    registry = Registry(Catalogue(), store)
    state: dict[str, Any] = {"run": "r1", "pid": 7, "started_at": "now", "ready": True, "restarts": 2, "on_trial": True}
    turned = PluginTurned(name="one", state=PluginState.RUNNING, error="frozen", lease="frozen", **state)
    try:
        assert registry.turn(turned) is None and registry.get("one") is None
        before = registry.put(_entry("one"))
        now = registry.turn(turned)
        assert now is registry.get("one") is not None
        assert (now.run, now.pid, now.state, now.error) == ("r1", 7, "running", "frozen")
        assert (now.manifest, now.hooks, now.digest) == (before.manifest, before.hooks, before.digest)
        assert now.raw == before.raw | turned.to_json()
        assert _names(registry, EVENT) == ["one"]
        over = PluginTurned(**{**turned.to_json(), "state": PluginState.RUNNING, "error": "", "lease": ""})
        thawed = registry.turn(over)
        assert thawed is not None and thawed.error is None and "lease" not in thawed.raw
        assert thawed.raw == registry.put(RegisteredEntry(**before.raw | state | {"state": PluginState.RUNNING})).raw
    finally:
        await store.close()


async def test_fault_of_a_manifest_shows_whatever_else_of_the_plugin_has_changed(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    registry = Registry(Catalogue(), store)
    state: dict[str, Any] = {"run": None, "pid": None, "started_at": None, "restarts": 0}
    try:
        entry = _entry("one")
        broken = replace(entry, manifest={**(entry.manifest or {}), "transport": {"mode": "pigeon"}})
        before = registry.put(broken)
        assert before.error
        assert registry.put(replace(broken, state=PluginState.DISABLED)).error == before.error
        more: dict[str, Any] = {"ready": False, "on_trial": False}
        turned = registry.turn(PluginTurned(name="one", state=PluginState.STOPPED, error="", **state, **more))
        assert turned is not None and turned.error == before.error
    finally:
        await store.close()


async def test_event_finds_the_plugin_of_now_whatever_of_it_has_changed(tmp_path: Path) -> None:
    store = Store(tmp_path / "host.db")
    registry = Registry(Catalogue(), store)
    try:
        for name in ("one", "two"):
            registry.put(_entry(name))
        registry.put(_entry("one", PluginState.RUNNING))
        registry.note_run("one", run="r1", pid=7, state="running")
        assert _names(registry, EVENT) == ["one", "two"] and registry.subscribed(EVENT) == ["one", "two"]
        registry.put(_entry("one", hooks=(OTHER,)))
        assert _names(registry, EVENT) == ["two"] and _names(registry, OTHER) == ["one"]
        registry.remove("two")
        assert _names(registry, EVENT) == []
    finally:
        await store.close()
