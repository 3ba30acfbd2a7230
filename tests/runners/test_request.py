"""Requests to the daemon's socket for runs: what a client packs is what root reads, and nothing else is read."""

from __future__ import annotations

import pytest

from isolator.errors import DeniedError, UsageError
from isolator.ipc.run_request import (
    MAX_BYTES,
    MAX_PATHS,
    error_fields,
    pack,
    read_request,
    read_signal,
    unpack,
)


def test_request_is_read_as_it_was_packed() -> None:
    fields = [
        ("memory", "64M"), ("tasks", "3"), ("net", "names"), ("cwd", "/a"), ("egress", "a.com:443"), ("read", "/a=b"),
        ("read", "/\udcff"), ("write", "/w"), ("env", "A=b=c"), ("env", "B="), ("argument", "sh"), ("argument", ""),
        ("argument", "-c\nx"),
    ]  # fmt: skip
    request = read_request(pack(fields))
    assert request.once == {"memory": "64M", "tasks": "3", "net": "names", "cwd": "/a"}
    assert request.paths == [("/a=b", False), ("/\udcff", False), ("/w", True)]
    assert request.variables(request.env) == {"A": "b=c", "B": ""}
    assert request.argument == ["sh", "", "-c\nx"]
    assert (request.number("tasks"), request.number("nofile")) == (3, None)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\0",
        b"argument",
        b"=x",
        b"argument=",
        b"memory=1M",
        b"argument=x\0",
        b"argument=x\0memory=1M\0memory=2M",
        b"argument=x\0audit=/etc/shadow",
        b"argument=x\0ARGUMENT=y",
        b"argument=x\0__class__=y",
        b"argument=x\0number=y",
        b"argument=x\0\xff\xfe=y",
        b"argument=x\0memory=" + b"1" * 2000,
        b"argument=x\0read=" + b"/" * 2000,
        b"argument=x\0cwd=tmp",
        b"argument=x\0env=A",
        b"argument=x\0env==A",
        b"argument=x\0own=A",
        b"argument=x\0policy=" + b"#" * 70_000,
        b"argument=x" + b"\0read=/a" * (MAX_PATHS + 1),
        b"argument=x" + b"\0egress=a:1" * 65,
        b"argument=x" + b"\0argument=" * 9000,
        b"argument=" + b"x" * MAX_BYTES,
        b"{" * 5000,
        bytes(range(256)) * 100,
    ],
    ids=range(26),
)
def test_malformed_request_is_refused(packet: bytes) -> None:
    with pytest.raises(UsageError):
        read_request(packet)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "9" * 16, "\u0663", "0x1"])
def test_number_of_another_form_is_refused(text: str) -> None:
    request = read_request(pack([("tasks", text), ("argument", "x")]))
    with pytest.raises(UsageError):
        request.number("tasks")


def test_word_with_a_zero_byte_cannot_be_packed() -> None:
    with pytest.raises(UsageError):
        pack([("argument", "x\0memory=1G")])


def test_only_the_signals_of_a_terminal_are_passed_on() -> None:
    passed = [number for number in range(-5, 100) if read_signal(f"signal={number}".encode())]
    assert passed == [1, 2, 3, 15, 18, 20, 28]
    for packet in (b"", b"signal", b"signal=", b"signal=9x", b"signal=" + b"1" * 50, b"kill=15", b"signal=\xb2"):
        assert read_signal(packet) == 0


def test_error_comes_back_word_for_word() -> None:
    error = DeniedError("it", "is so", "do this")
    assert dict(unpack(pack(error_fields(error)))) == {
        "error": "denied",
        "what": "it",
        "why": "is so",
        "remedy": "do this",
    }
    assert dict(error_fields(OSError(5, "odd")))["error"] == "failed"
