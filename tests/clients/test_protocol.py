"""The bytes of the published client against the parser and the errors of the daemon."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import isolator.errors
import isolator_client.errors
from host.wire import lines, strict_json
from isolator_client import protocol
from isolator_client.errors import IsolatorError, UsageError
from isolator_client.protocol import Lines, Notification, Reply, error_of, request

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    # Surrogates are not text; the daemon refuses them as well.
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), VALUES, max_size=3)), st.data())
def test_messages_arrive_whole_however_they_are_cut(results: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = b"".join(strict_json.line({"jsonrpc": "2.0", "id": n, "result": r}) for n, r in enumerate(results))
    arriving, messages = Lines(), []
    while stream:
        step = data.draw(st.integers(1, len(stream)))
        messages += arriving.feed(stream[:step])
        stream = stream[step:]
    assert messages == [Reply(number, result, None) for number, result in enumerate(results)]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_the_daemon_reads_whatever_is_sent(value: Any) -> None:
    line = request(7, "event.emit", {"payload": value})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    message = strict_json.parse_object(line[:-1])
    assert message == {"jsonrpc": "2.0", "id": 7, "method": "event.emit", "params": {"payload": value}}


def _nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def _endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), object(), {1, 2}, b"bytes", "\ud800", _endless(), 10**5000),
        "x" * protocol.REQUEST_LIMIT,
        "ä" * (protocol.REQUEST_LIMIT // 2),
        [0] * (protocol.COMMA_LIMIT + 1),
        _nested(protocol.DEPTH_LIMIT - 1),
        _nested(100_000),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_what_the_daemon_would_not_read_is_not_sent(value: Any) -> None:
    with pytest.raises(UsageError, match=r"request event\.emit: cannot be sent"):
        request(1, "event.emit", {"payload": value})


def test_the_bounds_are_those_of_the_daemon() -> None:
    assert lines.LineProtocol.limit == protocol.REQUEST_LIMIT
    assert (protocol.DEPTH_LIMIT, protocol.COMMA_LIMIT) == (strict_json.MAX_DEPTH, strict_json.MAX_VALUES)
    for value in (_nested(protocol.DEPTH_LIMIT - 2), [0] * (protocol.COMMA_LIMIT - 10)):
        strict_json.parse_object(request(1, "m", {"v": value})[:-1])
    with pytest.raises(strict_json.WireError):
        deeper = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "m", "params": {"v": _nested(63)}})
        strict_json.parse_object(deeper.encode())


@pytest.mark.parametrize("line", [b"nonsense", b"[]", b'"text"', b"\xff", b"[" * 100_000])
def test_what_is_no_message_is_an_error(line: bytes) -> None:
    with pytest.raises(IsolatorError, match="check that it is the socket of an Isolator daemon"):
        Lines().feed(b'{"id":1,"result":{}}\n' + line + b"\n")


def test_a_line_without_end_is_an_error() -> None:
    arriving = Lines(limit=1000)
    assert arriving.feed(b"x" * 1000) == []
    with pytest.raises(IsolatorError, match="more than 1000 bytes"):
        arriving.feed(b"x")


def test_notifications_and_odd_answers() -> None:
    stream = (
        b'{"jsonrpc":"2.0","method":"log","params":{"text":"a"}}\n\n{"method":"odd","params":[1]}\n'
        b'{"id":1,"result":null}\n{"id":"x","error":{"code":-32700,"message":"not valid JSON"}}\n'
    )
    log, odd, empty, unread = Lines().feed(stream)
    assert (log, odd) == (Notification("log", {"text": "a"}), Notification("odd", {}))
    assert empty == Reply(1, {}, None)
    assert isinstance(unread, Reply) and unread.number is None
    assert (str(unread.error), unread.error and unread.error.code) == ("not valid JSON", "failed")


def test_each_error_of_the_daemon_has_its_class_here() -> None:
    named = [isolator.errors.IsolatorError, *isolator.errors.IsolatorError.__subclasses__()]
    kinds = [kind for kind in named if kind.__module__ == "isolator.errors"]  # others stay within one command
    assert {kind.code for kind in kinds} == set(isolator_client.errors.CLASSES)
    for kind in kinds:
        raised = kind("plugin p", "does not start", "see its log")
        arrived = error_of({"code": -32000, "message": str(raised), "data": raised.to_json()})
        assert (type(arrived).__name__, arrived.code) == (kind.__name__, kind.code)
        assert str(arrived) == str(raised)
        assert arrived.args == (raised.what, raised.why, raised.remedy)


def test_an_error_of_a_later_release_keeps_its_code() -> None:
    arrived = error_of({"data": {"code": "novel", "what": "w"}})
    assert (type(arrived), arrived.code, str(arrived)) == (IsolatorError, "novel", "w")
    for odd in (None, {"data": {"code": None, "why": None}}, {"data": {"why": ""}}):
        assert error_of(odd).code == "failed" and str(error_of(odd))
