"""Words between the client of ``isolator run`` and the daemon: what it requests, and how it ended.

A packet is a list of fields, ``NAME=VALUE`` each, with a zero byte between them: as options, arguments and variables
hold none, they need no quoting, and root has nothing to parse but names. With the request come descriptors: standard
input, output and errors, then one for each path to read, then one for each folder to change. Afterwards the client
sends ``signal=NUMBER``; the end of the connection ends the run.

Standard library only, and little of it: the client's start counts.
"""

from __future__ import annotations

import os

from isolator.errors import UsageError

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SOCKET = "run.sock"
"""Name of the socket, in the folder of the daemon's other sockets."""
MAX_BYTES = 128 * 1024
MAX_PATHS = 60
_MAX_FIELDS = 8192
_MAX_OPTION = 1024

OPTIONS = ("memory", "cpu", "tasks", "nofile", "tmp", "net", "cwd")
"""Fields that a request has at most once: options of that name."""
TERMINAL = "terminal"
"""A field of the request: the command has a terminal of its own. Of an answer: here is its other end."""
POLICY, POLICY_NAME = "policy", "policy_name"
"""The content of a policy file, and what errors call it."""
_ONCE = (*OPTIONS, TERMINAL, POLICY, POLICY_NAME)
MAX_POLICY = 64 * 1024
REPEATED = ("egress", "read", "write")
_LISTS = (*REPEATED, "own", "env", "argument")
_MAX_EGRESS = 64

SIGNALS = (1, 2, 3, 15, 18, 20, 28)
"""HUP, INT, QUIT, TERM, CONT, TSTP, WINCH: those that a client passes on."""


def pack(fields: Iterable[tuple[str, str]]) -> bytes:
    """One packet of fields; raises UsageError for a value that no option, argument or variable can have."""
    every = [f"{name}={value}" for name, value in fields]
    if any("\0" in field for field in every):
        raise UsageError("isolator run", "a word holds a zero byte", "leave it out")
    return b"\0".join(os.fsencode(field) for field in every)


def unpack(packet: bytes) -> list[tuple[str, str]]:
    """The fields of a packet, in order; raises UsageError."""
    if packet.count(b"\0") >= _MAX_FIELDS:
        raise UsageError("isolator run", f"more than {_MAX_FIELDS} words", "pass fewer, or put them in a file")
    fields = []
    for field in packet.split(b"\0"):
        name, equals, value = field.partition(b"=")
        if not equals or not name.replace(b"_", b"").isalpha() or len(name) > 16:
            raise UsageError("isolator run", "a request of another form", "use the daemon's own version of the command")
        fields.append((name.decode("ascii"), os.fsdecode(value)))
    return fields


class RunRequest:
    """Request of one client."""

    def __init__(self) -> None:
        self.once: dict[str, str] = {}
        self.egress: list[str] = []
        self.read: list[str] = []
        self.write: list[str] = []
        self.own: list[str] = []
        self.env: list[str] = []
        self.argument: list[str] = []

    @property
    def paths(self) -> list[tuple[str, bool]]:
        """Path, and whether it may be changed, of each descriptor after the standard ones."""
        return [*((path, False) for path in self.read), *((path, True) for path in self.write)]

    def variables(self, texts: Iterable[str]) -> dict[str, str]:
        """The variables of ``own``, the caller's that need not be named, or of ``env``; of one name the last."""
        return {name: value for name, _, value in (text.partition("=") for text in texts)}

    def number(self, name: str) -> int | None:
        """An option that is a whole number; raises UsageError."""
        text = self.once.get(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise UsageError(f"--{name}", "is not a whole number")
        return int(text)


def read_request(packet: bytes) -> RunRequest:
    """The request in a packet, bounded and with the fields of one; raises UsageError."""
    if len(packet) > MAX_BYTES:
        remedy = "pass less, or put it in a file"
        raise UsageError("isolator run", f"command and variables are larger than {MAX_BYTES >> 10} KiB", remedy)
    request = RunRequest()
    for name, value in unpack(packet):
        most = MAX_POLICY if name == POLICY else _MAX_OPTION
        if name in _ONCE and name not in request.once and len(value) <= most:
            request.once[name] = value
        elif name in _LISTS and (name not in REPEATED or len(value) <= _MAX_OPTION):
            getattr(request, name).append(value)
        else:
            raise UsageError("isolator run", f"{name}: unknown, too long, or there twice", "correct the command line")
    if not request.argument or not request.argument[0]:
        raise UsageError("isolator run", "no command", "write it after '--', e.g. isolator run -- id")
    if len(request.paths) > MAX_PATHS or len(request.egress) > _MAX_EGRESS:
        many = f"more than {MAX_PATHS} paths or {_MAX_EGRESS} destinations"
        raise UsageError("isolator run", many, "name fewer, e.g. a folder above")
    if not all(text.partition("=")[1] and text[0] != "=" for text in (*request.own, *request.env)):
        raise UsageError("--env", "is no NAME=VALUE", "write NAME=VALUE")
    if not request.once.get("cwd", "/").startswith("/"):
        raise UsageError("--cwd", "is not absolute", "write it from / on")
    return request


def read_signal(packet: bytes) -> int:
    """The number of a signal that a client passes on; 0 for any other packet."""
    name, _, value = packet[:16].partition(b"=")
    number = int(value) if name == b"signal" and value.isdigit() and len(packet) < 16 else 0
    return number if number in SIGNALS else 0


def error_fields(error: Exception) -> Sequence[tuple[str, str]]:
    """The fields of an answer that is an error; ``error_text`` of the client reads them."""
    made = getattr(error, "to_json", None)
    parts: dict[str, str] = (
        made() if made is not None else {"code": "failed", "what": "isolator run", "why": str(error)}
    )
    return [("error", parts.get("code", "")), *((name, parts.get(name, "")) for name in ("what", "why", "remedy"))]
