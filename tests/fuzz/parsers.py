"""Parsers of what strangers send, as fuzzing sees them, and a measure of their work that no busy machine changes."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from host.channel.http import AnswerReader
from host.channel.reply import LostError
from host.wire.mcp import read as read_mcp
from host.wire.strict_json import WireError, parse_object
from isolator.broker import wire
from isolator.broker.gate.gate import Gate
from isolator.broker.guard import Denied
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.folder_stream import FolderWriter
from isolator.ipc.run_request import read_request
from isolator.policy.parse.load import parse_plugin_policy
from isolator.reader.libraries import Elf, NotUnderstoodError
from isolator.reader.manifest import parse_manifest_core
from isolator.reader.package import SIGNATURES, SUM, header, read_package
from tests.support.steps import steps as count_lines

HEADER = b"\x12\x34\x81\x80\0\1\0\x40\0\0\0\0"
ASKED = wire.query(0x1234, "a.example.com", wire.A)


def _through_gate(data: bytes) -> None:
    gate = Gate(lambda hello: None, strict=True)
    for at in range(0, len(data), 4096):
        gate.feed(data[at : at + 4096])


def _as_reply(data: bytes) -> None:
    if wire.answers(data, ASKED):
        wire.read_reply(data, ASKED, wire.A)


def _as_answer(data: bytes) -> None:
    reader = AnswerReader("POST")
    for at in range(0, len(data), 512):
        if reader.feed(data[at : at + 512]) is not None:
            return
    reader.feed(b"")


def _as_package(data: bytes) -> None:
    with Path(os.devnull).open("wb") as folder:
        read_package(io.BytesIO(data).read, FolderWriter(folder.fileno()))


def _as_program(data: bytes) -> None:
    fd = os.memfd_create("program", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        Elf.read(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Parser:
    """A parser, the errors that it may raise, and of which pieces its input is made up to how many bytes."""

    parse: Callable[[bytes], object]
    errors: type[Exception]
    size: int
    begins: tuple[bytes, ...]
    pieces: tuple[bytes, ...]
    ends: tuple[bytes, ...] = (b"",)


GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
ELF = (
    b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    + struct.pack("<IIQQQQQQ", 1, 4, 0, 0, 0, 1 << 16, 1 << 16, 1)
    + struct.pack("<IIQQQQQQ", 2, 4, 176, 176, 0, 1 << 12, 1 << 12, 1)
    + struct.pack("<8Q", 5, 64, 10, 1 << 12, 0x6FFFFFFE, 240, 0x6FFFFFFF, 9)
)  # fmt: skip
JSON = (*(bytes((byte,)) for byte in b'"\\{}[]:,1e-.a '), b"\\u", b"d83d", b"\xc3\xa9")
PARSERS = {
    "DNS question": Parser(wire.read_question, wire.Broken, 256, (HEADER, b""),
                           (b"\0", b"\1a", b"\x3f" + b"b" * 63, b"\xc0\x0c", b"\xc0", b"\xff", b"\0\1")),
    "DNS answer": Parser(_as_reply, wire.Broken, 8192,
                         (ASKED[:2] + HEADER[2:] + ASKED[12:], HEADER, b""),
                         (b"\0", b"\1a", b"\xc0\x0c", b"\xc0\xff", b"\0\1\0\1\0\0\0\x3c\0\4\1\2\3\4", b"\0\5\0\1")),
    "TLS": Parser(_through_gate, Denied, 8192, (b"\x16\x03\x01\x20\0\1\0\x1f\xf0\3\3", b"\x16\x03\x01\0\1\1", b"\x80"),
                  (b"\0", b"\x16\x03\x01\0\1", b"\x14\x03\x03\0\1\1", b"\xff", b"\0\0\0\5", b"\x15\x03\x03\0\2\1\x70")),
    "HTTP": Parser(_through_gate, Denied, 8192,
                   (GET, CHUNKED, GET + b"\r\n"),
                   (b"\r\n", b"\n", b"a: b\r\n", b"1\r\nx\r\n", GET + b"\r\n", b" ", b"a", b":", b"0")),
    "HTTP answer": Parser(_as_answer, LostError, 8192,
                          (OK, OK + b"Content-Length: 9999\r\n\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n", b""),
                          (b"\r\n", b"\n", b"a: b\r\n", b"1\r\nx\r\n", b"HTTP/1.1 100 C\r\n\r\n", b" ", b":", b"0"),
                          (b"", b"\r\n\r\n", b"0\r\n\r\n")),
    "JSON line": Parser(parse_object, WireError, 32768, (b"", b'{"a":', b'{"a":"'), JSON, (b"", b'"}', b"}")),
    "MCP line": Parser(read_mcp, WireError, 32768, (b"", b'{"jsonrpc":"2.0","id":1,"result":', b'{"a":"'), JSON,
                       (b"", b'"}', b"}")),
    "manifest": Parser(parse_manifest_core, IsolatorError, 16384, (b"", b'{"a":', b'{"a":"'), JSON, (b"", b'"}', b"}")),
    "policy": Parser(lambda data: parse_plugin_policy(data, source="p.toml"), IsolatorError, 8192,
                     (b"", b"[grant]\n", b"[grant]\nhooks = [", b'[grant]\negress = ["'),
                     (*(bytes((byte,)) for byte in b"\"'\\\n[]a=1,.{}# "), b'"""', b"0x", b"1_")),
    "run request": Parser(read_request, UsageError, 32768, (b"", b"argument=a\0", b"policy="),
                          (b"\0", b"=", b"read=/", b"env=A=", b"\0argument=", b"\0cwd=/", b"memory=1", b"\xff", b"a")),
    "package": Parser(_as_package, UsageError, 16384, (b"", header(b"a", 512), header(b"a", 0, folder=True)),
                      (header(b"a/b", 0), header(b"b", 3), header(SIGNATURES, 9), header(SUM, 65), bytes(512), b"{"),
                      (b"", bytes(1024))),
    "program": Parser(_as_program, NotUnderstoodError, 8192, (ELF, b"\x7fELF\2\2", b""),
                      (b"\0", b"\1", b"\xff", bytes(8), b"\5" + bytes(7), b"\1\0\2\0\0\0\0\0\x10\0\0\0\x10\0\0\0",
                       b"GLIBC_2.36\0", b"\1" + bytes(15))),
}  # fmt: skip


def steps(parser: Parser, data: bytes) -> int:
    """Lines executed in reading ``data``."""

    def read() -> None:
        with contextlib.suppress(parser.errors):
            parser.parse(data)

    return count_lines(read)
