"""Event types of a platform: nested payloads, changes that would surprise somebody, and their end."""

from __future__ import annotations

import asyncio
import enum
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from host.client.plugin_host import PluginHost
from host.events import Catalogue, from_schema
from host.schemas.flat import fields
from isolator.errors import NotFoundError, UsageError
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds


class Kind(enum.Enum):
    """Kinds of an item."""

    GOOD = "good"
    SERVICE = "service"


class Item(BaseModel):
    """What is ordered."""

    sku: str = Field(max_length=20, description="as in the stock")
    kind: Kind = Kind.GOOD
    price: float | None = None


class Address(BaseModel):
    """A place."""

    model_config = ConfigDict(extra="forbid")

    city: str
    lines: list[str] = Field(min_length=1, max_length=3)


class Order(BaseModel):
    """Nested models, lists and tables of them, and one that may be missing."""

    order_id: str
    items: list[Item] = Field(max_length=3)
    ship_to: Address
    bill_to: Address | None = None
    notes: dict[str, Item] = {}


ITEM = {"sku": "a-1", "kind": "service"}
ORDER: dict[str, Any] = {"order_id": "o1", "items": [ITEM], "ship_to": {"city": "Graz", "lines": ["Sackstraße 1"]}}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"items": [{"skuu": "a"}]}, "unknown field items.0.skuu (did you mean sku?); items.0.sku is required"),
        ({"items": [{"sku": "a", "price": "1"}]}, "items.0.price: Input should be a valid number"),
        ({"items": [{"sku": "a", "kind": "bad"}]}, "items.0.kind: Input should be 'good' or 'service'"),
        ({"items": [ITEM] * 4}, "items: List should have at most 3 items"),
        ({"ship_to": {"city": "Graz", "lines": []}}, "ship_to.lines: List should have at least 1 item"),
        ({"bill_to": {"city": "Graz"}}, "bill_to.lines is required"),
        ({"notes": {"x": {"sku": 1}}}, "notes.x.sku: Input should be a valid string"),
        ({"ship_to": "Graz"}, "ship_to: Input should be"),
    ],
)
def test_fault_in_a_nested_payload_is_named_with_its_place(wrong: dict[str, Any], why: str) -> None:
    catalogue = Catalogue()
    catalogue.register(from_schema("order.placed", Order.model_json_schema(), "order_id"))
    assert json.loads(catalogue.validate("order.placed", ORDER).json) == ORDER
    with pytest.raises(UsageError) as raised:
        catalogue.validate("order.placed", ORDER | wrong)
    assert why in str(raised.value)


class Strict(BaseModel):
    """A payload's model, if pydantic made one."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Inner(Strict):
    """An object in a payload."""

    x: str | None = None
    k: Literal["a", "b"] | None = None


class Every(Strict):
    """A field of each kind."""

    s: Annotated[str, Field(max_length=3)] | None = None
    i: int | None = None
    f: float | None = None
    b: bool | None = None
    o: dict[str, Any] | None = None
    l: Annotated[list[int], Field(max_length=2)] | None = None  # noqa: E741
    t: dict[str, Inner] | None = None
    n: Inner | None = None
    c: Literal["x", 1, True] | None = None


VALUES: list[Any] = [
    None, "a", "abcd", 1, 0, 1.5, 2.0, True, False, [], [1], [1, 2, 3], ["1"], {}, {"x": "y"}, {"x": 1}, {"k": "a"},
    {"k": "z"}, {"q": {"x": "y"}}, {"q": {"x": 1}}, {"q": None}, {"q": {"z": 1}}, {"x": None}, 10**30, -1e308, "\ud800",
    {"1": [None, {"a": None}]}, b"a",
]  # fmt: skip


@pytest.mark.parametrize("key", [*Every.model_fields, "more"])
def test_payload_is_checked_as_pydantics_own_strict_model_checks_it(key: str) -> None:
    checked = from_schema("every.kind", Every.model_json_schema()).check

    def outcome(check: Callable[[Any], Any], value: Any) -> Any:
        try:
            return check({key: value})
        except ValueError as error:
            assert isinstance(error, ValidationError)
            return [(one["type"].replace("model_type", "dict_type"), one["loc"]) for one in error.errors()]

    for value in VALUES:
        wanted = outcome(lambda made: Every.model_validate(made).model_dump(exclude_none=True), value)
        assert repr(outcome(checked.validate_python, value)) == repr(wanted), value


def test_published_schema_says_of_nested_payloads_what_is_checked() -> None:
    event_type = from_schema("order.placed", Order.model_json_schema(), "order_id")
    again = from_schema("order.placed", event_type.schema(), "order_id")  # it is a schema that can be registered
    assert again.schema() == event_type.schema()
    assert event_type.schema()["$defs"]["Item"]["properties"]["sku"]["description"] == "as in the stock"


class Node(BaseModel):
    """A tree, which has no bound."""

    children: list[Node] = []


class Tree(BaseModel):
    """A payload with one."""

    root: Node


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (Tree.model_json_schema(), "contains itself"),
        ({"a": {"type": "string", "pattern": "("}}, "no model can be made"),
        ({"a": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}, "a: keyword 'uniqueItems'"),
        ({"a": {"type": "object", "properties": {"b": {"type": "date"}}}}, "a.b: type 'date'"),
        ({"a": {"type": "object", "properties": {"b": {"format": "date", "type": "string"}}}}, "a.b: keyword 'format'"),
        ({"a": {"type": "object", "properties": {}, "additionalProperties": True}}, "a: unknown fields"),
        ({"a": {"type": "object", "properties": {}, "required": ["b"]}}, "a: required names no field: 'b'"),
        ({"a": {"$ref": "#/$defs/Nobody"}}, "leads nowhere"),
        ({"a": {"$ref": 5}}, "leads nowhere"),
        ({"a": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}, "anyOf of several types"),
        ({"a": {"enum": []}}, "enum lists"),
        ({"a": {"enum": [{}]}}, "enum lists"),
        ({"a": {"type": "string", "maxLength": "5"}}, "maxLength is no number"),
        ({"a": 5}, "its schema is no object"),
        ({"_meta": {"type": "string"}}, "begins with an underscore"),
        ({"a": {"type": "integer", "maxLength": 5}}, "maxLength says nothing about values of its type"),
    ],
)
def test_schema_that_could_not_be_checked_is_refused_with_the_place(schema: dict[str, Any], why: str) -> None:
    whole = schema if "properties" in schema else {"type": "object", "properties": schema}
    with pytest.raises(UsageError) as raised:
        from_schema("order.placed", whole)
    assert why in str(raised.value) and str(raised.value).count("\n") == 0


def test_references_that_multiply_are_read_once() -> None:
    doubled = {f"d{n}": {"type": "object", "properties": {s: {"$ref": f"#/$defs/d{n + 1}"} for s in "abcdefgh"}}
               for n in range(9)}  # fmt: skip
    doubled["d9"] = {"type": "object", "properties": {"x": {"type": "string"}}}
    schema = {"type": "object", "properties": {"top": {"$ref": "#/$defs/d0"}}, "$defs": doubled}
    event_type = from_schema("order.placed", schema)
    assert len(event_type.schema()["$defs"]) == 10  # not eight to the ninth
    assert event_type.surprise(from_schema("order.placed", schema)) is None
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(UsageError, match="levels deep"):
        from_schema("order.placed", deep)


def changed(**fields: Any) -> dict[str, Any]:
    """The schema of ``BASE`` with other fields; None takes one away."""
    properties = {name: rule for name, rule in {**BASE["properties"], **fields}.items() if rule is not None}
    return {**BASE, "properties": properties, "required": [name for name in BASE["required"] if name in properties]}


ENTRY = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "size": {"type": "integer"}},
    "required": ["path"],
}
BASE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "volume": {"type": "string", "maxLength": 64},
        "ratio": {"type": "number"},
        "state": {"enum": ["done", "failed"]},
        "files": {"type": "array", "items": ENTRY},
        "more": {"type": "object"},
        "note": {"type": "string"},
    },
    "required": ["volume", "state", "files"],
}
SURPRISES = [
    (changed(volume=None), "field volume is not in it"),
    (changed(note=None), "field note is not in it"),
    ({**BASE, "required": ["state", "files"]}, "field volume may be missing"),
    (changed(volume={"type": "integer"}), "field volume is integer instead of string"),
    (changed(volume={"type": "string", "maxLength": 65}), "field volume has another maxLength"),
    (changed(volume={"type": "string"}), "field volume has no maxLength"),
    (changed(ratio={"type": "string"}), "field ratio is string instead of number"),
    (changed(state={"enum": ["done", "failed", "lost"]}), "field state may be 'lost'"),
    (changed(state={"type": "string"}), "field state is string instead of one of done, failed"),
    (changed(files={"type": "array", "items": {**ENTRY, "required": []}}), "field files[].path may be missing"),
    (changed(files=ENTRY), "field files is an object files instead of a list"),
    (changed(more={"type": "array", "items": {"type": "string"}}), "field more is a list instead of any object"),
]
HARMLESS = [
    changed(),
    changed(added={"type": "string"}),
    {**changed(added={"type": "string"}), "required": [*BASE["required"], "note", "added"]},
    changed(volume={"type": "string", "maxLength": 32, "minLength": 1}),
    changed(ratio={"type": "integer"}),
    changed(state={"const": "done"}),
    changed(volume={"type": "string", "maxLength": 64, "description": "another"}),
    changed(files={"type": "array", "maxItems": 5, "items": {**ENTRY, "properties": {
        **ENTRY["properties"], "mode": {"type": "string"}}}}),
    changed(more=ENTRY),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "surprise"), SURPRISES)
def test_change_that_a_plugin_would_not_expect_is_named(schema: dict[str, Any], surprise: str) -> None:
    assert from_schema("backup.done", BASE).surprise(from_schema("backup.done", schema)) == surprise


@pytest.mark.parametrize("number", range(len(HARMLESS)))
def test_change_that_only_adds_or_narrows_surprises_nobody(number: int) -> None:
    assert from_schema("backup.done", BASE).surprise(from_schema("backup.done", HARMLESS[number])) is None


def test_order_is_part_of_the_contract() -> None:
    before = from_schema("backup.done", BASE, "volume")
    assert before.surprise(from_schema("backup.done", BASE)) == "events are ordered by nothing instead of volume"


PAYLOAD = {"volume": "v", "state": "done", "files": [{"path": "/a"}]}


async def test_type_that_a_plugin_relies_on_changes_only_as_it_expects(daemon: Daemon) -> None:
    register, name = "event.register", "backup.done"
    await daemon.ask(register, name=name, schema=BASE)
    assert "error" in await daemon.answer(register, {"name": f"{name}\n", "schema": BASE})
    narrower = changed(volume={"type": "string", "maxLength": 9})
    await daemon.ask(register, name=name, schema=narrower)
    await daemon.ask(register, name=name, schema=BASE)  # nobody subscribes, nothing waits
    daemon.add("reader", sidecars.OK, hooks=[name])
    refused = await daemon.answer(register, {"name": name, "schema": changed(volume=None)})
    assert refused["error"]["data"]["why"] == "field volume is not in it, and reader subscribes to it as it is"
    emitted = await daemon.ask("event.emit", name=name, payload=PAYLOAD)
    assert emitted["plugins"] == ["reader"]
    await daemon.outcome(emitted)
    await daemon.ask(register, name=name, schema=changed(volume=None), breaking=True)
    refused = await daemon.answer("event.emit", {"name": name, "payload": PAYLOAD})
    assert "unknown field volume" in refused["error"]["message"]


async def test_events_that_wait_keep_their_type(daemon: Daemon) -> None:
    name, stricter = "backup.done", {**BASE, "required": [*BASE["required"], "note"]}
    await daemon.ask("event.register", name=name, schema=BASE)
    daemon.add("reader", sidecars.OK, hooks=[name])
    await daemon.ask("plugin.pause", name="reader")
    emitted = await daemon.ask("event.emit", name=name, payload=PAYLOAD)
    refused = await daemon.answer("event.register", {"name": name, "schema": stricter})
    assert "field note may be missing in the 1 deliveries that wait" in refused["error"]["message"]
    refused = await daemon.answer("event.unregister", {"name": name})
    assert "reader subscribes to it" in refused["error"]["message"]
    await daemon.ask("plugin.resume", name="reader")
    await daemon.outcome(emitted)
    await daemon.ask("event.register", name=name, schema=stricter)
    await daemon.ask("plugin.remove", name="reader")
    await daemon.ask("event.unregister", name=name)
    assert "no such event" in (await daemon.answer("event.emit", {"name": name}))["error"]["message"]
    assert "is built in" in (await daemon.answer("event.unregister", {"name": "deploy.started"}))["error"]["message"]
    await daemon.kill_host()
    await daemon.start_host()
    assert name not in [one["name"] for one in (await daemon.ask("event.types"))["types"]]


async def test_nested_types_outlive_the_host_and_reach_plugins_whole(daemon: Daemon) -> None:
    daemon.add("reader", sidecars.oneshot('return {"status": "ok", "got": params["ship_to"]}'), hooks=["order.placed"])
    async with PluginHost.connect(daemon.root) as host:
        await host.register_event("order.placed", Order, order_by="order_id")
    await daemon.kill_host()
    await daemon.start_host()
    async with PluginHost.connect(daemon.root) as host:
        (delivery,) = await host.wait((await host.emit("order.placed", ORDER, on_behalf_of="alice")).id)
        assert json.loads(delivery.reply or "")["result"]["got"] == ORDER["ship_to"]
        with pytest.raises(UsageError, match="bill_to"):
            await host.emit("order.placed", ORDER | {"bill_to": {}})
        with pytest.raises(UsageError, match="reader subscribes"):
            await host.unregister_event("order.placed")
        with pytest.raises(NotFoundError):
            await host.unregister_event("order.gone")
    (accepted,) = [one["data"] for one in daemon.records if one["type"] == "event.accepted"]
    assert (accepted["by"], accepted["on_behalf_of"]) == ("uid:0", "alice")


async def until(asked: Callable[[], Awaitable[Any]], wanted: Callable[[Any], bool]) -> Any:
    """Ask until the answer is the wanted one, and return it."""
    async with asyncio.timeout(seconds(20)):
        while not wanted(found := await asked()):  # noqa: ASYNC110 # another process has it
            await asyncio.sleep(0.02)
    return found


async def test_health_tells_what_keeps_a_plugin_from_its_work(daemon: Daemon) -> None:
    fails = sidecars.oneshot('return {"status": "retry"} if params["project_id"] == "bad" else {"status": "ok"}')
    daemon.add("moody", fails)
    stubborn = sidecars.stream('if method != "ping" and id is not None:\n    send(id=id, result={})')
    fast = {"ping": True, "interval": "100ms", "timeout": "100ms", "misses": 100}
    daemon.add("stubborn", stubborn, transport={"mode": "stream"}, health=fast, hooks=["project.created"])

    async def health(name: str) -> Any:
        return (await daemon.ask("plugin.health", name=name))["plugins"][0]

    await daemon.outcome(await daemon.emit(project_id="good"))
    found = await health("moody")
    assert (found["healthy"], found["why"], found["last"]["outcome"], found["queue"]) == (True, None, "ok", 0)
    bad = await daemon.emit(project_id="bad")
    found = await until(lambda: health("moody"), lambda one: one["failing_since"] is not None)
    assert not found["healthy"] and found["why"].startswith("its attempts fail") and found["queue"] == 1
    assert found["next_attempt"] and found["last"]["event_id"] == bad["id"]
    assert (await health("stubborn"))["ping"] is None
    project = {"project_id": "p", "name": "shop"}
    await daemon.outcome(await daemon.ask("event.emit", name="project.created", payload=project))  # opens the stream
    found = await until(lambda: health("stubborn"), lambda one: one["ping"] is not None)
    assert not found["ping"]["ok"] and "missed" in found["why"], found
    await daemon.ask("plugin.disable", name="stubborn")
    found = await health("stubborn")
    assert (found["healthy"], found["why"], found["ping"]) == (False, "it is disabled", None)
    assert {one["name"] for one in (await daemon.ask("plugin.health"))["plugins"]} == {"moody", "stubborn"}


def test_fields_of_nested_objects_are_listed_with_their_places() -> None:
    listed = {place: (rule["type"], required) for place, rule, required in fields(
        from_schema("order.placed", Order.model_json_schema()).schema())}  # fmt: skip
    assert listed["items"] == ("array", True) and listed["bill_to.city"] == ("string", True)
    assert listed["items[].sku"] == ("string", True) and listed["notes.*.price"] == ("number", False)
    assert listed["bill_to"] == ("object", False) and listed["ship_to.lines"] == ("array", True)
