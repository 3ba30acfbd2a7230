"""Plugins that change while one of the same name is being forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from host.database.store import Store
from host.events import Catalogue
from host.lifecycle.lifecycle import PluginLifecycle
from host.plugins.registry import Registry
from isolator.ipc.messages import PluginState, PluginTurned, RegisteredEntry, RestartRun


class Parts(SimpleNamespace):
    """The parts of a host that hold something of a plugin; one forgets it when ``forgetting`` is set."""

    def __init__(self) -> None:
        super().__init__(forgetting=asyncio.Event(), workers={"one": None}, unacknowledged=0)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    async def plugin_removed(self, _: str) -> None:
        await self.forgetting.wait()

    async def forget(self, _: str) -> None: ...

    async def purge(self, _: str) -> None: ...

    async def update(self, *_: object) -> None: ...


def _lifecycle(folder: Path, parts: Parts) -> PluginLifecycle:
    other: Any = parts
    quiet: Any = SimpleNamespace(forget=lambda _: None, pay=lambda _: None)
    store = Store(folder / "host.db")
    return PluginLifecycle(
        link=other, audit=other, store=cast(Any, SimpleNamespace(run=parts.forget, close=store.close)),
        registry=Registry(Catalogue(), store), config=other, queue=other, debts=quiet, logs=other, api=quiet,
        dispatcher=other, watches=other,
    )  # fmt: skip


def _turned(state: PluginState) -> PluginTurned:
    run: dict[str, Any] = {"run": None, "pid": None, "started_at": None}
    return PluginTurned(name="one", state=state, error="", ready=False, restarts=0, on_trial=False, **run)


ENTRY = RegisteredEntry(name="one", version="1.0.0", digest="1" * 64, state=PluginState.STOPPED)


async def test_states_of_a_plugin_that_waits_for_its_forerunner_s_end_are_taken_in_order(tmp_path: Path) -> None:
    parts = Parts()
    lifecycle = _lifecycle(tmp_path, parts)

    def state() -> str | None:
        plugin = lifecycle.registry.get("one")
        return plugin.state if plugin is not None else None

    try:
        async with asyncio.timeout(20):
            await lifecycle.adopt(ENTRY)
            lifecycle.turn(_turned(PluginState.STARTING))
            assert state() == "starting"
            removal = asyncio.create_task(lifecycle.forget("one"))
            await asyncio.sleep(0)
            lifecycle.turn(_turned(PluginState.STOPPING))
            assert state() is None, "it is the removed one's"
            adoption = asyncio.create_task(lifecycle.adopt(ENTRY))
            await asyncio.sleep(0)
            lifecycle.turn(_turned(PluginState.STARTING))
            lifecycle._removals["one"].add_done_callback(lambda _: lifecycle.turn(_turned(PluginState.RUNNING)))
            parts.forgetting.set()
            await asyncio.gather(removal, adoption)
            while lifecycle._late:  # noqa: ASYNC110 # a turn or two
                await asyncio.sleep(0)
            assert state() == "running" and not lifecycle._queues
    finally:
        await lifecycle.store.close()


async def test_plugin_that_starts_as_its_config_changes_starts_again_with_the_new_one(tmp_path: Path) -> None:
    """It may have been given the old one; nobody else would notice."""
    asked: list[Any] = []
    parts = Parts()
    parts.workers = {"one": SimpleNamespace(fence=SimpleNamespace(closed=False))}

    async def ask(request: Any) -> None:
        asked.append(request)

    parts.ask = ask
    lifecycle = _lifecycle(tmp_path, parts)
    try:
        plugin = await lifecycle.adopt(ENTRY)
        assert not await lifecycle.restart_for_config(plugin, ["key"]) and not asked
        lifecycle.turn(_turned(PluginState.STARTING))
        assert await lifecycle.restart_for_config(plugin, ["key"])
        assert asked == [RestartRun(name="one", reason="config")]
    finally:
        await lifecycle.store.close()
