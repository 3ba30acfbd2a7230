"""An event type that one host registers is known by all, in step with the log, and changed by none behind another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

from host.cluster.entries import EventType, Plugin
from host.cluster.fold import MAX_TYPES
from host.control.catalogue_verbs import CatalogueVerbs
from host.control.endpoints import Caller
from host.control.platform_types import EventRegister, EventUnregister
from host.events import from_schema
from host.membership.types import OF_CLUSTER
from host.plugins.registry import Registry
from isolator.errors import IsolatorError, NotFoundError, UnavailableError, UsageError
from tests.cluster.queues import Hosts, Make, SimHost
from tests.cluster.test_fold import Log

READER = Plugin("p", "d", hooks=("shop.order",))
_CALLER = Caller(7, 1, "operator", False, lambda *_: None, lambda _: None, lambda: None)


def _schema(*required: str, **optional: str) -> dict[str, Any]:
    fields = {name: {"type": "string"} for name in required} | {name: {"type": one} for name, one in optional.items()}
    return {"type": "object", "properties": fields, "required": [*required], "additionalProperties": False}


def _verbs(host: SimHost) -> CatalogueVerbs:
    assert host.store is not None
    return CatalogueVerbs(host.catalogue, Registry(host.catalogue, host.store), host.store, host.types)


async def _register(hosts: Hosts, host: SimHost, schema: dict[str, Any], **more: Any) -> None:
    request = EventRegister(name="shop.order", schema=schema, **more)
    await _settled(hosts, _verbs(host).register(request, _CALLER))


async def _settled(hosts: Hosts, work: Coroutine[Any, Any, Any]) -> Any:
    done = await hosts.during(work)
    await hosts.passes(1.0)
    return done


def _known(host: SimHost, name: str = "shop.order") -> dict[str, Any] | None:
    """The type as the host knows it, in its catalogue; its rows have to say the same."""
    assert host.store is not None
    found = host.catalogue.get(name)
    rows = host.store.read(
        lambda db: db.execute("SELECT version, by FROM event_types WHERE name=?", (name,)).fetchall()
    )
    assert rows == ([(found.version, f"{OF_CLUSTER}uid:7")] if found is not None else [])
    return found.schema() if found is not None else None


async def test_type_that_one_host_registers_is_known_by_all_and_after_a_restart(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first, second, third = hosts.hosts
    await third.end()
    await _register(hosts, first, _schema("order_id"), order_by="order_id", version=3)
    assert (known := _known(first)) is not None and _known(second) == known
    assert second.catalogue.validate("shop.order", {"order_id": "7"}).json == '{"order_id":"7"}'
    with pytest.raises(IsolatorError, match="order_id is required"):
        second.catalogue.validate("shop.order", {})
    await third.start()
    await hosts.passes(3.0)
    assert _known(third) == known and third.catalogue.need("shop.order").order_by == "order_id"
    await second.end()
    await second.start()
    assert _known(second) == known, "it knows it before it has read anything"


async def test_type_is_known_before_the_first_event_of_it_is_read(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first, second, _ = hosts.hosts
    validated: list[bool] = []
    second.queue.places.apply, whole = (  # type: ignore[method-assign]
        lambda *args: (validated.append(second.catalogue.get("shop.order") is not None), whole(*args))[1],
        second.queue.places.apply,
    )
    second.cut_until(1e9)
    await _register(hosts, first, _schema("order_id"))
    validated.clear()
    await hosts.emit(first, "k")
    await hosts.passes(2.0)
    await hosts.heal()
    await hosts.passes(2.0)
    assert validated[0] is False and validated[-1] is True
    assert second.node.state.digest == first.node.state.digest


async def test_change_that_would_surprise_a_plugin_of_another_host_is_refused(make: Make) -> None:
    hosts = make()
    await hosts.start(READER)
    first, second, _ = hosts.hosts
    await _register(hosts, first, _schema("order_id", note="string"))
    with pytest.raises(UsageError, match=r"note.*p subscribes to it as it is"):
        await _register(hosts, second, _schema("order_id"))
    with pytest.raises(UsageError, match="p subscribes to it"):
        await hosts.during(_verbs(second).unregister(EventUnregister(name="shop.order"), _CALLER))
    before = _known(first)
    await _register(hosts, second, _schema("order_id", note="string", more="string"))
    assert before != _known(first) == _known(second)
    await _register(hosts, second, _schema("order_id"), breaking=True)
    assert "note" not in str(_known(first)) and _known(first) == _known(second)


async def test_required_field_is_refused_while_events_of_any_host_wait_without_it(make: Make) -> None:
    hosts = make()
    hosts.failing = 1.0
    await hosts.start(READER)
    await hosts.until(lambda: hosts.holder("p"))
    holder = hosts.holder("p")
    first, other = (host for host in hosts.hosts if host is not holder)
    await _register(hosts, first, _schema("order_id", note="string"))
    for _ in range(2):
        await hosts.emit(first, "k", name="shop.order")
    await hosts.passes(3.0)
    with pytest.raises(UsageError, match=r"note.* in the 2 deliveries that wait"):
        await _register(hosts, other, _schema("order_id", "note"))
    hosts.failing = 0.0
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(3.0)
    await _register(hosts, other, _schema("order_id", "note"))
    assert "note" in first.catalogue.need("shop.order").schema()["required"]


async def test_of_two_hosts_that_change_a_type_at_once_one_is_told(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first, second, _ = hosts.hosts
    changes = [
        asyncio.create_task(_verbs(host).register(EventRegister(name="shop.order", schema=_schema(field)), _CALLER))
        for host, field in ((first, "a"), (second, "b"))
    ]
    await hosts.until(lambda: all(task.done() for task in changes))
    await hosts.passes(1.0)
    errors = [task.exception() for task in changes]
    assert sorted(map(bool, errors)) == [False, True]
    assert "it has changed since" in str(next(filter(None, errors)))
    assert _known(first) == _known(second) is not None


async def test_type_is_forgotten_by_all_and_only_by_command(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first, second, third = hosts.hosts
    await _register(hosts, first, _schema("a"))
    await third.end()
    await _settled(hosts, _verbs(second).unregister(EventUnregister(name="shop.order"), _CALLER))
    assert _known(first) is None and _known(second) is None
    await third.start()
    assert _known(third) is not None
    await hosts.passes(3.0)
    assert _known(third) is None
    with pytest.raises(NotFoundError):
        await _verbs(third).unregister(EventUnregister(name="shop.order"), _CALLER)


async def test_host_that_is_cut_off_changes_no_type_and_takes_one_that_is_as_it_was(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first = hosts.hosts[0]
    await _register(hosts, first, _schema("a"))
    first.cut_until(1e9)
    await _register(hosts, first, _schema("a"))  # as a platform does at each of its starts
    first.catalogue.register(from_schema("shop.own", _schema("b")))  # from before this host had a cluster
    await _settled(hosts, _verbs(first).register(EventRegister(name="shop.own", schema=_schema("b")), _CALLER))
    with pytest.raises(UnavailableError, match="all hosts have to know it"):
        await _register(hosts, first, _schema("a", more="string"))


async def test_type_stays_when_its_host_leaves_and_that_host_keeps_it_as_its_own(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first, second, _ = hosts.hosts
    await _register(hosts, first, _schema("a"))
    await hosts.during(first.node.leave())
    await hosts.passes(1.0)
    assert _known(second) is not None
    assert first.store is not None and first.catalogue.get("shop.order") is not None
    rows = first.store.read(lambda db: db.execute("SELECT name, by FROM event_types").fetchall())
    assert rows == [("shop.order", "uid:7")]
    await _settled(hosts, _verbs(second).unregister(EventUnregister(name="shop.order"), _CALLER))
    assert _known(second) is None


async def test_types_that_hosts_had_before_become_the_clusters_and_the_first_one_holds(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first, second, third = hosts.hosts
    for host, field, more in ((first, "a", ["shop.one"]), (second, "b", [])):
        assert host.store is not None
        for name in ("shop.order", *more):
            row = (name, json.dumps(_schema(field)), None, 1, "uid:7")
            await host.store.run(lambda db, row=row: db.execute("INSERT INTO event_types VALUES (?,?,?,?,?)", row))
        await host.end()
        await host.start()
    await _settled(hosts, first.types.share())
    await _settled(hosts, second.types.share())
    assert (known := _known(third)) is not None and "a" in known["properties"]
    assert _known(first) == known == _known(second) and _known(third, "shop.one") is not None
    assert not first.types.problems
    assert "was another one on this host" in second.types.problems["shop.order"]


@pytest.mark.parametrize(
    "entry",
    [
        EventType("shop.bad", "no JSON"),
        EventType("shop.bad", "[]"),
        EventType("shop.bad", '{"type":"object","properties":{"a":{"type":"new"}}}'),
        EventType("Not A Name", json.dumps(_schema("a"))),
        EventType("deploy.started", json.dumps(_schema("a"))),
        EventType("isolator.denied", json.dumps(_schema("a"))),
        EventType("shop.bad", json.dumps(_schema("a")), order_by="none"),
    ],
)
async def test_type_that_no_host_would_register_is_said_and_passed_over(make: Make, entry: EventType) -> None:
    hosts = make()
    await hosts.start()
    first, second, _ = hosts.hosts
    before = [*second.catalogue]
    await hosts.during(first.node.decide(entry))
    await hosts.passes(1.0)
    assert [*second.catalogue] == before and second.node.is_member
    assert "passed over" in second.types.problems[entry.name]
    assert second.store is not None
    assert second.store.read(lambda db: db.execute("SELECT * FROM event_types").fetchall()) == []


async def test_types_that_a_hostile_host_makes_are_few_lines(make: Make) -> None:
    hosts = make()
    await hosts.start()
    first, second, _ = hosts.hosts
    for number in range(9):
        await hosts.during(first.node.decide(EventType(f"shop.bad{number}", "no JSON")))
    await hosts.passes(1.0)
    lines = second.types.lines()
    assert len(lines) == 6 and lines[-1].startswith("4 more event types have problems")


def test_fold_lets_nobody_fill_it_with_types() -> None:
    log = Log()
    made = [EventType(f"a.b{number}", "{}") for number in range(MAX_TYPES + 1)]
    assert log.put("a", *made) == [""] * MAX_TYPES + [f"there are {MAX_TYPES} event types"]
    assert log.put("a", EventType("a.b0", "[]", replaces=made[0].digest)) == [""]


def test_type_counts_if_it_replaces_what_it_was_compared_with_and_nobody_minds() -> None:
    log = Log()
    one, other = EventType("a.b", "{}"), EventType("a.b", "[]")
    assert log.put("a", one) == [""]
    assert log.put("b", other) == ["it has changed since"]
    changed = EventType("a.b", "[]", replaces=one.digest, unread=True)
    log.put("c", Plugin("p", "d", hooks=("a.b",)))
    assert log.put("b", changed) == ["p subscribes to it"]
    log.put("c", Plugin("p", "d", removed=True))
    assert log.put("b", changed) == [""]
    gone = EventType("a.b", "", replaces=changed.digest, removed=True)
    assert log.put("a", gone, gone) == ["", "it is gone"]
    assert log.state.types == {}
