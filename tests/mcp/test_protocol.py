"""Messages, templates and pins of MCP as pure functions: each line is read, or refused in a known way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host.mcp import template, tools
from host.mcp.tools import INSTRUCTIONS, Item
from host.plugins.manifest import ERAS
from host.wire import mcp as protocol
from host.wire.mcp import SESSION, STATELESS, Answer, Call
from host.wire.strict_json import WireError
from tests.support.steps import steps

QUICK = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["jsonrpc", "id", "method", "params", "result", "error", "code", "x"])
MESSAGES = st.dictionaries(KEYS, JSON | st.just("2.0"), max_size=6)


def _read(message: Any) -> Answer | Call:
    return protocol.read(json.dumps(message).encode())


@QUICK
@given(st.binary(max_size=200) | MESSAGES.map(lambda message: json.dumps(message).encode()))
def test_every_line_is_a_message_or_a_wire_error(data: bytes) -> None:
    try:
        message = protocol.read(data)
    except WireError:
        return
    if isinstance(message, Answer):
        assert (message.result is None) != (message.error is None)
        assert protocol.judge(message).verdict
    else:
        assert (protocol.refuse(message) is None) == (message.id is None)
        protocol.progress_of(message)


@QUICK
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4), st.sampled_from(ERAS), st.booleans())
def test_request_is_one_line_that_reads_back(params: dict[str, Any], era: Any, progress: bool) -> None:
    params.pop("_meta", None)
    line = protocol.request(era, "abc", "tools/call", params, progress=progress)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    call = protocol.read(line)
    assert isinstance(call, Call) and call.id == (True, "abc")
    meta = dict(call.params).pop("_meta", None)
    assert {key: value for key, value in call.params.items() if key != "_meta"} == params
    assert (meta is not None) == (era == STATELESS or progress)
    if era == STATELESS:
        assert meta["io.modelcontextprotocol/protocolVersion"] == STATELESS
        assert meta["io.modelcontextprotocol/clientCapabilities"] == {}


@pytest.mark.parametrize(
    "line",
    [b"[]", b"1", b'{"id":1,"result":{}}', b'{"jsonrpc":"2.0","id":null,"method":"x"}',
     b'{"jsonrpc":"2.0","id":true,"method":"x"}', b'{"jsonrpc":"2.0","id":1.5,"result":{}}',
     b'{"jsonrpc":"2.0","id":1,"result":{},"error":{}}', b'{"jsonrpc":"2.0","id":1,"result":3}',
     b'{"jsonrpc":"2.0","method":"x","params":[]}', b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":NaN}}',
     b'{"jsonrpc":"2.0","id":1,"result":' + b'{"a":' * 64 + b"1" + b"}" * 64 + b"}",
     b'{"jsonrpc":"2.0","method":"x","params":{"a":"' + b"a" * protocol.MAX_LINE + b'"}}'],
)  # fmt: skip
def test_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(WireError):
        protocol.read(line)


def test_text_and_number_are_different_ids() -> None:
    as_text, as_number = (
        _read({"jsonrpc": "2.0", "id": "1", "result": {}}),
        _read({"jsonrpc": "2.0", "id": 1, "result": {}}),
    )
    assert as_text.id != as_number.id


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ({"result": {"content": [{"type": "text", "text": "done"}]}}, "ok"),
        ({"result": {"content": [], "resultType": "complete"}}, "ok"),
        ({"result": {"content": [{"type": "text", "text": "no such repository"}], "isError": True}}, "tool_error"),
        ({"result": {"resultType": "input_required", "inputRequests": {}}}, "input_required"),
        ({"result": {"resultType": "later"}}, "bad_reply"),
        ({"error": {"code": -32601, "message": "unknown"}}, "refused"),
        ({"error": {"code": -32602, "message": "bad arguments"}}, "refused"),
        ({"error": {"code": -32603, "message": "broken"}}, "error"),
        ({"error": {"code": "x"}}, "error"),
        ({"error": {}}, "error"),
    ],
)
def test_answers_to_a_call_are_judged(answer: dict[str, Any], verdict: str) -> None:
    read = _read({"jsonrpc": "2.0", "id": 1} | answer)
    assert isinstance(read, Answer) and protocol.judge(read).verdict == verdict


def test_server_without_the_version_is_refused_with_the_reason() -> None:
    def greet(era: Any, **answer: Any) -> protocol.Greeting:
        read = _read({"jsonrpc": "2.0", "id": 1, **answer})
        assert isinstance(read, Answer)
        return protocol.greeting(era, read)

    found = greet(SESSION, result={"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "instructions": "i"})
    assert (found.version, found.instructions, found.tools) == ("2025-06-18", "i", True)
    with pytest.raises(ValueError, match="1999"):
        greet(SESSION, result={"protocolVersion": "1999-01-01"})
    with pytest.raises(ValueError, match="does not speak"):
        greet(STATELESS, result={"supportedVersions": ["2027-01-01"]})
    with pytest.raises(ValueError, match="right era"):
        greet(STATELESS, error={"code": -32601, "message": "unknown method"})
    assert not greet(STATELESS, result={"supportedVersions": [STATELESS], "capabilities": 3}).tools


# Templates


def test_template_keeps_the_type_of_a_field_alone_and_writes_out_the_others() -> None:
    made = template.fill(
        {"text": "{{ url }} is live after {{ms}} ms", "ms": "{{ ms }}", "none": "{{ missing }}",
         "in": ["{{ missing }}"],
         "fixed": {"a": [1, True, None]}, "odd": "a {{ missing }} b"},
        {"url": "https://a/{{ms}}", "ms": 12},
    )  # fmt: skip
    assert made == {
        "text": "https://a/{{ms}} is live after 12 ms", "ms": 12, "in": [None], "fixed": {"a": [1, True, None]},
        "odd": "a  b",
    }  # fmt: skip


def test_template_names_its_fields_and_refuses_stray_braces() -> None:
    shape = {"a": "{{ url }}", "b": [{"c": "{{ms}} and {{ url }}"}], "{{ key }}": 1}
    assert template.fields(shape) == {"url", "ms"}
    template.check(shape)
    for bad in ("{{ url", "url }}", "{{ a b }}", "{{}}", "{{ a.b }}"):
        with pytest.raises(ValueError, match="braces"):
            template.check({"x": [bad]})


@QUICK
@given(st.text(max_size=20), st.dictionaries(st.sampled_from("abc"), JSON, max_size=3))
def test_value_of_a_field_is_never_a_template(text: str, payload: dict[str, Any]) -> None:
    payload["a"] = "{{ b }}"
    assert template.fill("{{ a }}", payload) == "{{ b }}"
    assert template.fill("x{{ a }}", payload) == "x{{ b }}"
    assert template.fill({"t": text}, {})["t"] == text if "{{" not in text else True


# Tools

TOOL = {"name": "search", "description": "Searches.", "inputSchema": {"type": "object", "properties": {"q": {}}}}


@QUICK
@given(st.dictionaries(st.sampled_from(["title", "description", "inputSchema", "annotations", "x"]), JSON, max_size=4))
def test_any_difference_of_a_tool_makes_it_another(change: dict[str, Any]) -> None:
    (before,), (after,) = tools.offered("", [TOOL]), tools.offered("", [TOOL | change])
    same = json.dumps(TOOL, sort_keys=True) == json.dumps(TOOL | change, sort_keys=True)
    assert (tools.compare([before], [after])[0].state == "approved") is same
    assert (tools.digest_of([before]) == tools.digest_of([after])) is same


def test_order_of_keys_makes_no_difference() -> None:
    (before,), (after,) = tools.offered("", [TOOL]), tools.offered("", [dict(reversed(TOOL.items()))])
    assert before.digest == after.digest


def test_comparison_shows_new_changed_missing_and_renamed() -> None:
    other = {"name": "write", "description": "Writes.", "inputSchema": {"type": "object"}}
    plain = {"name": "plain", "inputSchema": {"type": "object"}}
    before = tools.offered("Be kind.", [TOOL, other, plain])
    now = tools.offered("Be kind!", [TOOL | {"name": "find"}, other, plain | {"name": "bare"}])
    found = {one.item.name: (one.state, one.renamed) for one in tools.compare(before, now)}
    assert found == {
        INSTRUCTIONS: ("changed", ""), "search": ("missing", ""), "write": ("approved", ""), "plain": ("missing", ""),
        "find": ("new", "search"), "bare": ("new", "plain"),
    }  # fmt: skip
    reordered = tools.compare(before, tuple(reversed(now)))
    assert [one.item.name for one in reordered][:4] == ["", "search", "write", "plain"]


def test_name_that_only_looks_like_another_is_another_tool() -> None:
    for name in ("s\u0435arch", "search\u0301", "\uff53earch", "Search"):
        approved, now = tools.offered("", [TOOL]), tools.offered("", [TOOL | {"name": name}])
        assert [(one.state, one.renamed) for one in tools.compare(approved, now)] == [
            ("missing", ""),
            ("new", "search"),
        ]
    for name in ("search\u200b", "\u202esearch", "sea\u00adrch", "search\ufeff", "search\U000e0041"):
        with pytest.raises(ValueError):
            tools.offered("", [TOOL | {"name": name}])


def test_comparison_takes_steps_in_proportion_to_the_tools() -> None:
    def compared(count: int) -> int:
        listed = [{"name": f"t{n}", "description": f"d{n}", "inputSchema": {"properties": {str(n): {}}}} for n in
                  range(2 * count)]  # fmt: skip
        return steps(lambda: tools.compare(tools.offered("", listed[:count]), tools.offered("", listed[count:])))

    compared(2)
    assert compared(256) <= 2.2 * compared(128)


@pytest.mark.parametrize(
    "listed", [[3], [{}], [{"name": ""}], [{"name": "a\x1b[2J"}], [{"name": "a" * 129}], [TOOL, TOOL],
               [{"name": f"t{n}"} for n in range(513)]],
)  # fmt: skip
def test_list_that_is_no_list_of_tools_is_refused(listed: list[Any]) -> None:
    with pytest.raises(ValueError):
        tools.offered("", listed)


def test_grant_names_tools_by_pattern() -> None:
    assert tools.permits(["search", "get_*"], "get_issue") and tools.permits(["search"], "search")
    assert not tools.permits(["search", "get_*"], "delete_issue") and not tools.permits([], "search")
    assert not tools.permits(["Search"], "search") and not tools.permits(["get[_a]x"], "get_x")
    assert not tools.permits(["get_?"], "get_x") and tools.permits(["get_?", "a[*"], "a[b]")


def test_digest_is_that_of_canonical_json() -> None:
    assert Item("a", {"b": 1, "a": "é"}).digest == Item("a", {"a": "é", "b": 1}).digest
