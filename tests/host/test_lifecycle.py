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
from isolator.ipc.messages import PluginState, PluginTurned, RegisteredEntry


class Parts(SimpleNamespace):
    """The parts of a host that hold something of a plugin; one forgets it when ``forgetting`` is set."""

    workers: dict[str, None] = {"one": None}  # noqa: RUF012 # nothing writes to it

    def __init__(self) -> None:
        super().__init__(forgetting=asyncio.Event())

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    async def plugin_removed(self, _: str) -> None:
        await self.forgetting.wait()

    async def forget(self, _: str) -> None: ...

    async def purge(self, _: str) -> None: ...

    async def update(self, *_: object) -> None: ...

    def unfinished(self, _: str) -> list[Any]:
        return []


async def test_states_of_a_plugin_that_waits_for_its_forerunner_s_end_are_taken_in_order(tmp_path: Path) -> None:
    store, parts = Store(tmp_path / "host.db"), Parts()
    registry = Registry(Catalogue(), store)
    other: Any = parts
    quiet: Any = SimpleNamespace(forget=lambda _: None)
    lifecycle = PluginLifecycle(
        link=other, audit=other, store=cast(Any, SimpleNamespace(run=parts.forget)), registry=registry, config=other,
        queue=other, records=other, logs=other, api=quiet, dispatcher=other, watches=other,
    )  # fmt: skip

    def turned(state: PluginState) -> PluginTurned:
        run: dict[str, Any] = {"run": None, "pid": None, "started_at": None}
        return PluginTurned(name="one", state=state, error="", ready=False, restarts=0, on_trial=False, **run)

    def state() -> str | None:
        plugin = registry.get("one")
        return plugin.state if plugin is not None else None

    entry = RegisteredEntry(name="one", version="1.0.0", digest="1" * 64, state=PluginState.STOPPED)
    try:
        async with asyncio.timeout(20):
            await lifecycle.adopt(entry)
            lifecycle.turn(turned(PluginState.STARTING))
            assert state() == "starting"
            removal = asyncio.create_task(lifecycle.forget("one"))
            await asyncio.sleep(0)
            lifecycle.turn(turned(PluginState.STOPPING))
            assert state() is None, "it is the removed one's"
            adoption = asyncio.create_task(lifecycle.adopt(entry))
            await asyncio.sleep(0)
            lifecycle.turn(turned(PluginState.STARTING))
            lifecycle._removals["one"].add_done_callback(lambda _: lifecycle.turn(turned(PluginState.RUNNING)))
            parts.forgetting.set()
            await asyncio.gather(removal, adoption)
            while lifecycle._late:  # noqa: ASYNC110 # a turn or two
                await asyncio.sleep(0)
            assert state() == "running"
    finally:
        await store.close()
