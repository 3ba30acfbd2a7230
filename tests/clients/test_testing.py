"""The fake daemon of the published client as a platform's tests use it; in ``test_contract`` it is a daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from isolator_client import AsyncClient, Client, DeniedError, IsolatorError, UnavailableError, UsageError
from isolator_client.testing import FakeDaemon

EVENT = {"project_id": "p1", "deployment_id": "d1", "url": "https://app.example/", "duration_ms": 12}


def test_events_are_kept_and_their_deliveries_succeed() -> None:
    with FakeDaemon(plugins=["slack"]) as daemon, Client(daemon.path) as client:
        first = client.emit("deploy.completed", EVENT, dedupe_key="k")
        again = client.emit("deploy.completed", EVENT, dedupe_key="k")
        assert first.plugins == ("slack",) and not first.duplicate and again.duplicate and again.id == first.id
        (delivery,) = client.wait(first.id)
        assert delivery.plugin == "slack" and delivery.succeeded
        assert [(one.name, one.payload) for one in daemon.emitted] == [("deploy.completed", EVENT)]
        assert [verb for verb, _ in daemon.asked] == ["event.emit", "event.emit", "event.wait"]
    assert not Path(daemon.root).exists()


def test_answers_are_those_that_the_test_chooses() -> None:
    with FakeDaemon() as daemon, Client(root=daemon.root) as client:
        daemon.answer("event.emit", DeniedError("event deploy.completed", "no role"))
        with pytest.raises(DeniedError, match="no role"):
            client.emit("deploy.completed", EVENT)
        daemon.answer("status", lambda params: {"version": "9", "asked": params})
        assert client.call("status", x=1) == {"version": "9", "asked": {"x": 1}}
        daemon.answer("status", None)
        with pytest.raises(UsageError, match="has no answer"):
            client.call("status")
        daemon.close()
        with pytest.raises(UnavailableError):
            client.plugins()


async def test_methods_of_the_platform_are_called_as_a_plugin_would() -> None:
    async def project(plugin: str, params: dict[str, Any]) -> dict[str, Any]:
        if params["id"] != "p1":
            raise IsolatorError("project", "does not exist")
        return {"name": "shop", "for": plugin}

    with FakeDaemon() as daemon:
        async with AsyncClient(daemon.path) as client:
            await client.serve("projects.get", "read:projects", project)
            found = await asyncio.to_thread(daemon.call, "projects.get", {"id": "p1"}, plugin="slack")
            assert found == {"name": "shop", "for": "slack"}
            with pytest.raises(IsolatorError, match="does not exist"):
                await asyncio.to_thread(daemon.call, "projects.get", {"id": "p2"})
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(daemon.call, "projects.list", timeout=0.05)
