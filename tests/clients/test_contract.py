"""One contract for the daemon and its stand-in: the same platform runs against both, and sees the same."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from host.authoring.pack import pack_folder
from host.control.event_types import Delivery
from host.control.platform_types import EventTypeEntry, PluginHealthEntry
from host.control.plugin_types import PluginEntry
from host.control.verbs import verbs
from isolator_client import AsyncClient, Client, IsolatorError, NotFoundError, Staged, UsageError
from isolator_client.testing import _USUAL, FakeDaemon
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.answers import check_keys, checked
from tests.support.timeouts import seconds

EVENTS = ("deploy.completed",)
EVENT = {"project_id": "p1", "deployment_id": "d1", "url": "https://app.example/", "duration_ms": 12}
INNER: dict[str, dict[str, Any]] = {
    "event.wait": {"deliveries": Delivery},
    "event.types": {"types": EventTypeEntry},
    "plugin.health": {"plugins": PluginHealthEntry},
    "plugin.commit": {"plugin": PluginEntry},
    "plugin.update": {"plugin": PluginEntry},
}
"""By verb, the types of what is in an answer."""
SCHEMA = {"type": "object", "properties": {"volume": {"type": "string"}}, "required": ["volume"]}


class Either:
    """A daemon, or what stands in for it, with one plugin that succeeds."""

    def __init__(self, path: str, root: Path, fake: FakeDaemon | None) -> None:
        self.path, self.root, self._fake = path, root, fake

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """What a plugin is answered; only the stand-in can play one."""
        assert self._fake is not None
        return await asyncio.to_thread(self._fake.call, method, params, plugin="slack", timeout=seconds(5))

    @property
    def plays_plugins(self) -> bool:
        return self._fake is not None


@pytest.fixture(params=["daemon", "stand-in"])
async def either(request: pytest.FixtureRequest, shared_dir: Path) -> AsyncIterator[Either]:
    if request.param == "stand-in":
        with FakeDaemon(plugins=["slack"]) as fake:
            yield Either(fake.path, shared_dir, fake)
        return
    daemon = Daemon(shared_dir)
    await daemon.start()
    try:
        daemon.add("slack", sidecars.OK)
        yield Either(str(daemon.paths.control_socket), shared_dir, None)
    finally:
        await daemon.stop()


async def test_events_are_accepted_and_delivered(either: Either) -> None:
    async with AsyncClient(either.path) as client:
        first = await client.emit("deploy.completed", EVENT, dedupe_key="k", on_behalf_of="alice")
        again = await client.emit("deploy.completed", EVENT, dedupe_key="k")
        assert first.plugins == ("slack",) and (first.duplicate, again.duplicate, again.id) == (False, True, first.id)
        (delivery,) = await client.wait(first.id, timeout=seconds(10))
        assert (delivery.plugin, delivery.state, delivery.succeeded) == ("slack", "ok", True)
        with pytest.raises(NotFoundError):
            await client.wait("ev_unknown", timeout=0)


async def test_event_types_come_and_go(either: Either) -> None:
    async with AsyncClient(either.path) as client:
        await client.register_event("backup.failed", SCHEMA, order_by="volume")
        await client.register_event("backup.failed", SCHEMA, order_by="volume")

        async def of_ours() -> list[tuple[str, str | None]]:
            found = (await client.call("event.types"))["types"]
            return [(one["name"], one["order_by"]) for one in found if one["name"].startswith("backup.")]

        assert await of_ours() == [("backup.failed", "volume")]
        await client.unregister_event("backup.failed")
        assert await of_ours() == []
        with pytest.raises(NotFoundError, match="no such event"):
            await client.unregister_event("backup.failed")


async def test_methods_come_and_go(either: Either) -> None:
    async def get(plugin: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"for": plugin, **params}

    async with AsyncClient(either.path) as client, AsyncClient(either.path) as other:
        await client.serve("projects.get", "read:projects", get)
        if either.plays_plugins:
            assert await either.call("projects.get", {"id": 1}) == {"for": "slack", "id": 1}
        with pytest.raises(IsolatorError, match="registered already"):
            await other.serve("projects.get", "read:projects", get)
        with pytest.raises(UsageError, match="not served by this connection"):
            await other.unserve("projects.get")
        await client.unserve("projects.get")
        with pytest.raises(UsageError, match="not served by this connection"):
            await client.unserve("projects.get")
        await other.serve("projects.get", "read:projects", get)


async def test_health_of_plugins_is_shown(either: Either) -> None:
    async with AsyncClient(either.path) as client:
        (one,) = await client.health()
        assert (one.name, one.healthy, one.why, one.queue, one.last, one.ping) == ("slack", True, None, 0, None, None)
        assert [found.name for found in await client.health("slack")] == ["slack"]
        with pytest.raises(NotFoundError, match="is not registered"):
            await client.health("slakc")


async def test_plugin_is_handed_over_as_a_path_and_as_a_descriptor(either: Either) -> None:
    folder = either.root / "pager"
    folder.mkdir()
    manifest = {"name": "pager", "version": "1.0.0", "api_version": "1", "binary": "./main", "hooks": [*EVENTS]}
    (folder / "plugin.json").write_text(json.dumps(manifest))
    (folder / "main").write_text(sidecars.OK)
    with await asyncio.to_thread(Client, either.path) as client:

        def hand_over(source: Any) -> Staged:
            return client.stage(source)

        staged = await asyncio.to_thread(hand_over, folder)
        assert (staged.name, staged.registered) == ("pager", False)
        await asyncio.to_thread(client.discard, staged)
        with pytest.raises(UsageError, match="nothing is staged"):
            await asyncio.to_thread(client.commit, staged)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            staged = await asyncio.to_thread(hand_over, descriptor)
            assert os.fstat(descriptor).st_mode
        finally:
            os.close(descriptor)
        assert (await asyncio.to_thread(client.commit, staged))["name"] == "pager"
        if either.plays_plugins:  # the fake supervisor unpacks nothing; a daemon does in tests/system
            package = pack_folder(folder, either.root / "any-name").path
            assert (await asyncio.to_thread(hand_over, package)).name == "pager"
        assert {one["name"] for one in await asyncio.to_thread(client.plugins)} == {"pager", "slack"}
        with pytest.raises(UsageError, match="Bad file descriptor"):
            await asyncio.to_thread(hand_over, descriptor)


async def test_verb_that_nobody_knows_has_its_code(either: Either) -> None:
    reader, writer = await asyncio.open_unix_connection(either.path)
    writer.write(b'{"jsonrpc":"2.0","id":1,"method":"plugin.levitate","params":{}}\n')
    async with asyncio.timeout(seconds(10)):
        line = await reader.readline()
    writer.close()
    assert b"-32601" in line and b'"code":"usage"' in line.replace(b": ", b":")


async def test_answers_of_the_stand_in_have_the_keys_of_their_types() -> None:
    params: dict[str, dict[str, Any]] = {
        "event.emit": {"name": "a.b"},
        "event.wait": {"id": ""},
        "event.register": {"name": "a.b", "schema": SCHEMA},
        "event.unregister": {"name": "a.b"},
        "api.register": {"method": "a.get", "permission": "read:a"},
        "api.answer": {"call": 1},
        "plugin.stage": {"name": "new", "binary": "/bin/true"},
        "plugin.commit": {"token": ""},
        "plugin.update": {"token": ""},
        "plugin.discard": {"token": ""},
    }
    assert set(_USUAL) <= set(verbs())

    def every_verb() -> None:
        with FakeDaemon(plugins=["slack"]) as fake, Client(fake.path) as client:
            for verb in _USUAL:
                given = dict(params.get(verb, {}))
                if "id" in given:
                    given["id"] = fake.emitted[0].id
                if "token" in given:
                    given["token"] = client.call("plugin.stage", name="new", binary="/bin/true")["token"]
                if verb in ("event.types", "event.unregister"):
                    client.call("event.register", name="a.b", schema=SCHEMA)
                answer = checked(verb, client.call(verb, **given))
                for key, kind in INNER.get(verb, {}).items():
                    found = answer[key] if isinstance(answer[key], list) else [answer[key]]
                    assert found, verb
                    for one in found:
                        check_keys(one, kind)

    await asyncio.to_thread(every_verb)
