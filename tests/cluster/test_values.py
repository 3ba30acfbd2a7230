"""Values of plugins (``kv.*``) are where the plugin is, and a host that holds it no longer changes none."""

from __future__ import annotations

from typing import Any

import pytest

from host.cluster.entries import Plugin
from host.host_api.methods import ApiError, Context
from host.membership.values import ClusterKeyValue
from host.plugins.registry import Plugin as Registered
from tests.cluster.queues import Hosts, Make, SimHost

_CONTEXT = Context(Registered("p", "1", "d", "running", None, None, None, None, None, None, {}), None)


def _values(host: SimHost) -> ClusterKeyValue:
    assert host.store is not None
    return ClusterKeyValue(host.store, host.follower, host.node.decide)


async def _started(make: Make) -> tuple[Hosts, SimHost]:
    hosts = make()
    await hosts.start(Plugin("p", "d"))
    await hosts.until(lambda: hosts.holder("p"))
    holder = hosts.holder("p")
    assert holder is not None
    return hosts, holder


async def _set(hosts: Hosts, host: SimHost, key: str, value: Any, **more: Any) -> None:
    await hosts.during(_values(host).set(_CONTEXT, {"key": key, "value": value, **more}))


async def test_value_moves_with_the_plugin(make: Make) -> None:
    hosts, first = await _started(make)
    await _set(hosts, first, "a", {"n": 1})
    await _set(hosts, first, "b", [])
    assert await hosts.during(_values(first).delete(_CONTEXT, {"key": "b"})) == {"deleted": True}
    await first.end()
    await hosts.until(lambda: hosts.holder("p"))
    second = hosts.holder("p")
    assert second is not None and second is not first
    assert await _values(second).get(_CONTEXT, {"key": "a"}) == {"value": {"n": 1}, "found": True}
    assert await _values(second).list(_CONTEXT, {}) == {"keys": ["a"]}


async def test_host_that_is_cut_off_keeps_no_value_and_says_so(make: Make) -> None:
    hosts, holder = await _started(make)
    await _set(hosts, holder, "a", 1)
    holder.cut_until(1e9)
    with pytest.raises(ApiError, match="unknown"):
        await _set(hosts, holder, "a", 2)
    await hosts.until(lambda: any(host is not holder and host.node.held for host in hosts.hosts))
    await hosts.heal()
    await hosts.until(lambda: hosts.holder("p") is not holder)
    other = hosts.holder("p")
    assert other is not None
    assert (await _values(other).get(_CONTEXT, {"key": "a"}))["value"] == 1


async def test_value_is_forgotten_when_its_time_is_over(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, holder = await _started(make)
    await _set(hosts, holder, "a", 1, ttl=60)
    assert (await _values(holder).get(_CONTEXT, {"key": "a"}))["found"]
    import time

    now = time.time()
    monkeypatch.setattr("host.membership.values.time.time", lambda: now + 61)
    assert await _values(holder).get(_CONTEXT, {"key": "a"}) == {"value": None, "found": False}
    assert await _values(holder).list(_CONTEXT, {}) == {"keys": []}


async def test_values_have_the_bounds_of_a_single_host(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, holder = await _started(make)
    monkeypatch.setattr("host.membership.values.KV_KEYS", 1)
    await _set(hosts, holder, "a", 1)
    await _set(hosts, holder, "a", 2)
    with pytest.raises(ApiError, match="at most 1 keys"):
        await _set(hosts, holder, "b", 1)
    with pytest.raises(ApiError, match="bytes"):
        await _set(hosts, holder, "a", "x" * 70_000)


async def test_values_of_a_plugin_that_runs_on_all_hosts_are_each_hosts_own(make: Make) -> None:
    hosts = make()
    await hosts.start(Plugin("p", "d", placement="all"))
    one, other = hosts.hosts[:2]
    await _set(hosts, one, "a", 1)
    assert (await _values(one).get(_CONTEXT, {"key": "a"}))["found"]
    assert not (await _values(other).get(_CONTEXT, {"key": "a"}))["found"]
