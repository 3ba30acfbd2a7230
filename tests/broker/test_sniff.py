"""First bytes: real hellos are read, broken ones refused, and nothing else ever comes out."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isolator.broker.guard import objection
from isolator.broker.sniff import LIMIT, RECORDS, Hello, Malformed, Sniffer


def hello(name: str | None) -> bytes:
    """The first bytes of Python's own TLS client."""
    context = ssl.create_default_context()
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def sniff(data: bytes) -> Hello | None:
    """What is read of these first bytes; None when more are needed."""
    return Sniffer().feed(data)


REAL = hello("hooks.example.com")
REQUEST = b"GET /x HTTP/1.1\r\nUser-Agent: t\r\nHost: Hooks.Example.com:80\r\n\r\nbody"


def with_extension(data: bytes, kind: int, content: bytes) -> bytes:
    """The hello with one more extension at the end."""
    extra = kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content
    body = bytearray(data)
    at = 5 + 4 + 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2], "big")
    at += 1 + body[at]
    for place, size in ((at, 2), (6, 3), (3, 2)):
        number = int.from_bytes(body[place : place + size], "big") + len(extra)
        body[place : place + size] = number.to_bytes(size, "big")
    return bytes(body) + extra


def test_name_in_a_real_client_hello_is_read() -> None:
    assert sniff(REAL) == Hello("tls", ("hooks.example.com",))
    assert sniff(hello(None)) == Hello("tls")


def test_every_prefix_of_a_hello_needs_more() -> None:
    for length in range(len(REAL)):
        assert sniff(REAL[:length]) is None


def in_records(data: bytes, size: int) -> list[bytes]:
    """The records of a hello with ``size`` bytes of it in each."""
    parts = [data[at : at + size] for at in range(5, len(data), size)]
    return [b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts]


def test_hello_spread_over_many_records_is_read_as_one() -> None:
    assert sniff(b"".join(in_records(REAL, 40))) == sniff(REAL)


def test_hello_in_more_records_than_any_client_uses_is_malformed() -> None:
    padded = with_extension(REAL, 21, bytes(RECORDS))
    assert sniff(b"".join(in_records(padded, 4))) == sniff(REAL)
    records = in_records(padded, 1)
    assert sniff(b"".join(records[:RECORDS])) is None
    with pytest.raises(Malformed, match=f"more than {RECORDS}"):
        sniff(b"".join(records[: RECORDS + 1]))


def test_encrypted_hello_is_seen() -> None:
    found = sniff(with_extension(REAL, 0xFE0D, b"secret"))
    assert found == Hello("tls", ("hooks.example.com",), encrypted=True)


def test_two_server_names_are_both_seen() -> None:
    entry = b"\0" + len(b"evil.net").to_bytes(2, "big") + b"evil.net"
    found = sniff(with_extension(REAL, 0, len(entry).to_bytes(2, "big") + entry))
    assert found is not None and set(found.names) == {"hooks.example.com", "evil.net"}
    assert objection(found, "hooks.example.com", 443, allow_no_sni=True) == "sni-mismatch"


def test_host_of_a_real_request_is_read() -> None:
    assert sniff(REQUEST) == Hello("http", ("hooks.example.com",))
    for length in range(REQUEST.index(b"\r\n\r\n") + 4):
        assert sniff(REQUEST[:length]) is None


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (b"GET http://evil.net/ HTTP/1.1\r\nHost: a.com\r\n\r\n", ("evil.net", "a.com")),
        (b"GET http://a.com@evil.net:80/ HTTP/1.1\r\nHost: a.com\r\n\r\n", ("evil.net", "a.com")),
        (b"GET / HTTP/1.1\r\nHost: a.com\r\nhOsT: evil.net\r\n\r\n", ("a.com", "evil.net")),
        (b"\r\n\r\nGET / HTTP/1.1\r\nHost: evil.net\r\n\r\n", ("evil.net",)),
        (b"CONNECT evil.net:443 HTTP/1.1\r\n\r\n", ("evil.net",)),
        (b"GET / HTTP/1.1\nHost: evil.net\n\n", ("evil.net",)),
        (b"GET / HTTP/1.0\r\n\r\n", ()),
        (b"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", ("[2001:db8::1]",)),
    ],
)
def test_every_host_of_a_request_is_seen(data: bytes, names: tuple[str, ...]) -> None:
    assert sniff(data) == Hello("http", names)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: a.com\r\n X: folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a.com\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: y\rHost: evil.net\r\n\r\n",
        b"GET / x HTTP/1.1\r\nHost: a.com\r\n\r\n",
        b"get / http/1.1 \r\nHost: a.com\r\n\r\n",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x40\x01" + b"\x01" + b"\xff" * 40,
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (LIMIT // 6),
    ],
)
def test_bytes_that_break_the_rules_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        sniff(data)


@pytest.mark.parametrize(
    "data",
    [b"EHLO me\r\n", b"SSH-2.0-x\r\n", b"\0\0\0\x08\x04\xd2\x16\x2f", b"AMQP\0\0\x09\x01", b"PING\r\n", b"*1\r\n",
     b"{x", b"h" * 40,
     b"\x16\x02\x00"],
)  # fmt: skip
def test_other_protocols_are_other(data: bytes) -> None:
    assert sniff(data) == Hello("other")


@pytest.mark.parametrize("data", [b"x", b"hello", b"FOO / HT", b"\x14\x03", b"\x80\x2e"])
def test_bytes_that_may_become_a_request_are_not_certain(data: bytes) -> None:
    sniffer = Sniffer()
    assert sniffer.feed(data) is None and not sniffer.certain


@pytest.mark.parametrize("method", ["FOO", "GET", "X-Y"])
def test_request_in_any_pieces_is_seen(method: str) -> None:
    data = f"{method} / HTTP/1.1\r\nHost: evil.net\r\n\r\nrest".encode()
    for cut in range(1, len(data) - 4):
        sniffer = Sniffer()
        assert sniffer.feed(data[:cut]) is None or cut >= len(data) - 4
        assert sniffer.feed(data[cut:]) == Hello("http", ("evil.net",))
        assert sniffer.rest == b"rest"


@pytest.mark.parametrize(
    "data", [b"\x14\x03\x03\0\1\1" + REAL, b"\x15\x03\x03\0\2\1\0" + REAL, REAL[:3] + b"\xff\xff" + REAL[5:] + REAL]
)
def test_tls_that_begins_otherwise_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        sniff(data)


def test_hello_of_ssl_2_is_tls_without_a_name() -> None:
    assert sniff(b"\x80\x2e\x01\x03\x03" + bytes(43)) == Hello("tls")


def test_second_hello_in_the_record_of_the_first_is_malformed() -> None:
    message = REAL[5:] * 2
    with pytest.raises(Malformed, match="behind the ClientHello"):
        sniff(REAL[:3] + len(message).to_bytes(2, "big") + message)


def test_http2_in_the_clear_is_seen() -> None:
    assert sniff(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == Hello("http2")


def work(pieces: list[bytes]) -> int:
    """The number of bytes that a reader looks at, or copies, for these pieces."""
    seen = 0

    class Counted(bytearray):
        def __getitem__(self, key: Any) -> Any:
            nonlocal seen
            seen += len(range(len(self))[key]) if isinstance(key, slice) else 1
            return super().__getitem__(key)

        def find(self, sub: Any, start: int = 0, end: int | None = None) -> int:
            nonlocal seen
            seen += len(self) - start
            return super().find(sub, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isolator.broker.sniff.bytearray", Counted, raising=False)
        sniffer = Sniffer()
        with contextlib.suppress(Malformed):
            for piece in pieces:
                sniffer.feed(piece)
    return seen


@pytest.mark.parametrize("kind", ["tls records", "tls bytes", "head", "lines", "first line"])
def test_work_for_small_pieces_grows_no_faster_than_their_number(kind: str) -> None:
    def pieces(count: int) -> list[bytes]:
        if kind == "tls records":
            message = b"\x01\0\x3f\0" + bytes(count)
            return [b"\x16\x03\x01\0\x01" + message[i : i + 1] for i in range(count)]
        if kind == "tls bytes":
            return [bytes((byte,)) for byte in b"\x16\x03\x01\x3f\0\x01\0\x3e\0" + bytes(count)]
        texts = {
            "head": b"GET / HTTP/1.1\r\na: " + b"b" * count,
            "lines": b"GET / HTTP/1.1\r\n" + b"a:\r\n" * (count // 4),
            "first line": b"GET /" + b"b" * count,
        }
        text = texts[kind]
        return [text[i : i + 1] for i in range(len(text))]

    assert work(pieces(2400)) <= 3 * work(pieces(1200)) + 100


TLS, HTTP, OTHER = Hello("tls", ("a.com",)), Hello("http", ("a.com",)), Hello("other")


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (Hello("tls", ("a.com",), True), None),
        (Hello("tls", ("b.com",), True), "sni-mismatch"),
        (Hello("tls", (), True), "no-sni"),
        (OTHER, "not-tls"),
        (HTTP, "not-tls"),
        (Hello("http2"), "not-tls"),
    ],
)
def test_key_for_hidden_names_lets_nothing_else_through(found: Hello, rule: str | None) -> None:
    assert objection(found, "a.com", 443, allow_no_sni=False, allow_ech=True) == rule


@pytest.mark.parametrize(
    ("found", "name", "port", "lax", "rule"),
    [
        (TLS, "a.com", 443, False, None),
        (TLS, "b.com", 443, True, "sni-mismatch"),
        (TLS, "b.com", 8443, True, "sni-mismatch"),
        (Hello("tls", ("a.com", "b.com")), "a.com", 443, True, "sni-mismatch"),
        (Hello("tls"), "a.com", 443, False, "no-sni"),
        (Hello("tls"), "a.com", 443, True, None),
        (Hello("tls"), "a.com", 9000, False, "no-sni"),
        (Hello("tls", ("a.com",), True), "a.com", 443, False, "encrypted-hello"),
        (Hello("tls", ("a.com",), True), "a.com", 443, True, None),
        (HTTP, "a.com", 80, False, None),
        (HTTP, "b.com", 80, True, "host-mismatch"),
        (HTTP, "b.com", 9000, False, "host-mismatch"),
        (HTTP, "a.com", 443, False, "not-tls"),
        (Hello("http"), "a.com", 80, False, "no-host"),
        (Hello("http", ("a.com", "b.com")), "a.com", 80, True, "host-mismatch"),
        (OTHER, "a.com", 443, False, "not-tls"),
        (OTHER, "a.com", 80, False, "not-http"),
        (OTHER, "a.com", 22, False, None),
        (Hello("http2"), "a.com", 443, False, "not-tls"),
        (Hello("http2"), "a.com", 80, False, "not-http"),
        (Hello("http2"), "a.com", 50051, False, "http2"),
        (Hello("http2"), "a.com", 50051, True, None),
    ],
)
def test_guard_objects_to_another_or_no_name(found: Hello, name: str, port: int, lax: bool, rule: str | None) -> None:
    assert objection(found, name, port, allow_no_sni=lax) == rule


def only_known_outcomes(data: bytes) -> None:
    try:
        found = sniff(data)
    except Malformed:
        return
    assert found is None or isinstance(found, Hello)
    if found is None:
        assert len(data) < LIMIT + 10


@given(st.binary(max_size=2000))
@example(b"\x16\x03")
def test_any_bytes_have_a_known_outcome(data: bytes) -> None:
    only_known_outcomes(data)


@given(st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 255)), max_size=12), st.integers(0, len(REAL)))
def test_hello_with_any_bytes_changed_has_a_known_outcome(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(REAL)
    for place, value in changes:
        data[place] = value
    only_known_outcomes(bytes(data[:cut] if cut % 2 else data))


@given(st.lists(st.tuples(st.integers(0, len(REQUEST) - 1), st.integers(0, 255)), max_size=12))
def test_request_with_any_bytes_changed_has_a_known_outcome(changes: list[tuple[int, int]]) -> None:
    data = bytearray(REQUEST)
    for place, value in changes:
        data[place] = value
    only_known_outcomes(bytes(data))


@given(st.binary(max_size=LIMIT * 2))
def test_the_reader_asks_for_more_only_up_to_its_limit(tail: bytes) -> None:
    for head in (b"\x16\x03\x01\x3f\xff\x01\x00\x3f\x00", b"GET / HTTP/1.1\r\n"):
        data = head + tail
        if len(data) > LIMIT + 5:
            with contextlib.suppress(Malformed):
                assert sniff(data) is not None
