"""The plan of one cage, as it travels from the supervisor to the process that becomes the cage. Standard library only.

A plan is one message: JSON, in which a part (a layer's section, a mount operation) is ``[KIND, {FIELD: VALUE}]``.
Reading is strict: an unknown kind, fields other than the part's own in their order, or a value of another type is a
ValueError, and the cage does not start. No error quotes a value: files of a plan are secret.
"""

from __future__ import annotations

import binascii
import functools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from isolator.base.structs import field, struct_class
from isolator.linux.descriptors import FdSet


@dataclass_transform(frozen_default=True)
class Part:
    """A part of a plan: frozen, with fields that are str, int, bool, bytes, dict[str, str] or tuples of parts.

    ``class UserSection(Section, kind="user")``: the kind is its name in the packet. A class without one is abstract.
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Part]]] = {}

    def __init_subclass__(cls, *, kind: str = "") -> None:
        if not kind:
            return
        if kind in Part._kinds:
            raise ValueError(f"two parts of a plan are called {kind}")
        cls.kind, Part._kinds[kind] = kind, cls
        struct_class(frozen=True)(cls)


_Reading = tuple[type[Part], list[type], list[str], list[type], list[tuple[str, Callable[[Any], Any]]]]
_learned: dict[str, _Reading] = {}
"""Reading of each kind: its class and the classes above, the fields in their order, the type of each in the packet, and
those that are of another type there, or need a further check, with how to read them. What lies together here would be
read in many places otherwise, and each is a page that pid 1 copies."""


def learn_parts() -> None:
    """Find out how each kind of part is read: a launcher does it once, for every parked process."""
    for kind in Part._kinds.keys() - _learned.keys():
        part = Part._kinds[kind]
        hints = {n: hint for n, hint in get_type_hints(part).items() if get_origin(hint) is not ClassVar}
        types = {name: get_origin(hint) or hint for name, hint in hints.items()}
        wire = [str if one is bytes else list if one is tuple else one for one in types.values()]
        readers = [
            (name, functools.partial(_read_parts, get_args(hints[name])[0]) if one is tuple else _READERS[one])
            for name, one in types.items()
            if one is tuple or one in _READERS
        ]
        _learned[kind] = part, [*part.__mro__], [*types], wire, readers


class Section(Part, ABC):
    """The child's half of one layer: the values of one cage, and the verbs that apply them to the calling process."""

    @staticmethod  # on purpose: most layers are in force in cages alone
    def enter_launcher(order: ParkOrder) -> None:
        """Apply to a launcher what all its cages with the layer may inherit, at the first order for one."""

    @staticmethod  # on purpose: most layers begin with the plan
    def enter_ahead(order: ParkOrder) -> None:
        """Apply to a parked process what no plan changes, for the cage to inherit."""

    @staticmethod  # on purpose, too
    def enter_born(order: ParkOrder) -> None:
        """Apply to a cage's pid 1 what needs its pid namespace and no plan: the plan is made meanwhile."""

    @abstractmethod
    def enter(self, fds: dict[str, int]) -> None:
        """Apply the layer to the calling process; ``fds`` are the plan's. Any exception aborts the start."""


P = TypeVar("P", bound=Part)
S = TypeVar("S", bound=Section)


@struct_class()
class ParkOrder:
    """The order to park a process: the layers that its cage will have, and the kernel's last capability."""

    layers: frozenset[str]
    last_capability: int
    hurried: bool = False
    """Its plan follows at once: what is done ahead to spare the wait for it would be waited for, and nobody awaits its
    word that it is parked."""
    figures: int = -1
    """In the parked process: a descriptor of the file system for the figures of the cage's /proc."""

    def pack(self) -> bytes:
        """The packet to a launcher."""
        wanted = {"layers": sorted(self.layers), "last_capability": self.last_capability, "hurried": self.hurried}
        return json.dumps({"park": wanted}).encode()

    @classmethod
    def of(cls, wanted: dict[str, Any]) -> ParkOrder:
        """The order in a packet's ``park``."""
        return cls(frozenset(wanted["layers"]), wanted["last_capability"], wanted["hurried"])


@struct_class()
class Birth:
    """The order to become pid 1 of a cage, sent before its plan is made, as two packets: its clocks, which can be had
    at once and wake the parked process, and the order itself. The descriptors are this one's own until ``close``.
    """

    cgroup: int = -1
    """A descriptor of the v2 group to be born in."""
    folder: int = -1
    """A descriptor of the parked process's folder in /proc, where its cage has clocks of its own."""
    offsets: str = ""
    """Their text for timens_offsets."""

    def pack_clocks(self) -> tuple[bytes, list[int]]:
        """The first packet to a parked process, and the descriptor that goes with it."""
        return self.offsets.encode() or b"none", [self.folder] if self.folder >= 0 else []

    def pack(self) -> tuple[bytes, list[int]]:
        """The second."""
        return b'{"become": true}', [self.cgroup] if self.cgroup >= 0 else []

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self.cgroup, self.folder):
            if fd >= 0:
                os.close(fd)
        self.cgroup = self.folder = -1


LOGS = ("stdout log", "stderr log")
"""Descriptors that a plan may have: reading ends of the sidecar's output. Pid 1 keeps them and reads nothing: the
supervisor opens them again, for a host process that comes in the place of another."""


@struct_class()
class Plan:
    """Everything that the child needs: one section a layer, by the layer's name, and the program to exec.

    A layer without a section is not entered (only tests of a layer's absence make such plans). ``fds`` maps names to
    descriptors: numbers of the sender until it is sent, positions in the packet on the way, numbers of the child in
    the child.

    Descriptors that every plan has: ``stdin stdout stderr``. A parked process has two more of its own: the link to the
    supervisor (SOCK_SEQPACKET: failures and the seccomp listener go up, one byte ``x`` comes down when everything is
    confirmed, end of file means that exec happened), and the pipe into which pid 1 writes the raw wait status of the
    sidecar.
    """

    cage: str
    argv: list[str]
    env: dict[str, str]
    cwd: str = "/"
    umask: int = 0o022
    sections: dict[str, Section] = field(default_factory=dict)
    fds: dict[str, int] = field(default_factory=dict)
    to_group: bool = False
    """Signals to the cage go to the sidecar's process group, as those of a terminal do, not to the sidecar alone."""
    terminal: bool = False
    """The sidecar leads a session whose terminal is /dev/pts/0, its standard input."""

    def __post_init__(self) -> None:
        self._owned = FdSet()

    def add(self, section: Section) -> None:
        """Add the section of a layer."""
        self.sections[section.kind] = section

    def section(self, kind: type[S]) -> S | None:
        """The section of that type; None when the cage goes without the layer."""
        found = self.sections.get(kind.kind)
        return found if isinstance(found, kind) else None

    def own(self, name: str, fd: int) -> None:
        """Add a descriptor that this plan owns: the sender closes it once the plan was sent."""
        self.fds[name] = self._owned.add(fd)

    def close_owned(self) -> None:
        """Close the descriptors that this plan owns."""
        self._owned.close()

    def pack(self) -> tuple[bytes, list[int]]:
        """The packet, and the descriptors that go with it."""
        body = [
            self.cage, self.argv, self.env, self.cwd, self.umask, list(self.sections.values()),
            list(self.fds), self.to_group, self.terminal,
        ]  # fmt: skip
        return _ENCODER.encode(body).encode(), list(self.fds.values())

    @classmethod
    def unpack(cls, packet: bytes, fds: list[int]) -> Plan:
        """The plan with the receiver's descriptor numbers; raises ValueError for a packet that is no plan."""
        if len(_learned) != len(Part._kinds):
            learn_parts()
        text = packet.decode()
        body, end = _DECODER.raw_decode(text)
        if end != len(text) or type(body) is not list or tuple(map(type, body)) != _WIRE_TYPES:
            raise ValueError("the packet is no plan")
        cage, argv, env, cwd, umask, sections, names, to_group, terminal = body
        if {*map(type, argv), *map(type, names)} - {str}:
            raise ValueError("an argument or a descriptor's name of the plan is no text")
        if len(names) != len(fds):
            raise ValueError(f"the plan names {len(names)} descriptors, {len(fds)} came along")
        found = {section.kind: section for section in _read_parts(Section, sections)}  # type: ignore[type-abstract]
        named = dict(zip(names, fds, strict=True))
        return cls(cage, argv, _read_texts(env), cwd, umask, found, named, to_group, terminal)


_WIRE_TYPES = (str, list, dict, str, int, list, list, bool, bool)


def _wire(value: object) -> Any:
    """Encode a value of a type that JSON does not have, for ``json.dumps``."""
    if isinstance(value, Part):
        return [value.kind, value.__dict__]
    if isinstance(value, bytes):
        return binascii.b2a_base64(value, newline=False).decode()
    raise TypeError(f"no part of a plan may hold a {type(value).__name__}")


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=_wire)
_DECODER = json.JSONDecoder()


def _read_parts(base: type[P], wire: list[Any]) -> tuple[P, ...]:
    """Read parts, each of a subclass of ``base``. Every start waits for this: a part takes 2 µs."""
    parts = []
    for one in wire:
        if type(one) is not list or len(one) != 2 or type(one[0]) is not str or type(one[1]) is not dict:
            raise ValueError("a part of the plan has no kind or no fields")
        kind, fields = one
        if kind not in _learned or base not in (reading := _learned[kind])[1]:
            raise ValueError(f"the plan has no {base.__name__} of the kind {kind}")
        part, _, names, wire_types, readers = reading
        if [*fields] != names or [*map(type, fields.values())] != wire_types:
            raise ValueError(f"the fields of {kind} are not those of a {part.__name__}")
        for name, read in readers:
            fields[name] = read(fields[name])
        made: Any = object.__new__(part)
        made.__dict__.update(fields)  # a third of the time of a frozen __init__
        parts.append(made)
    return tuple(parts)


def _read_texts(wire: dict[str, Any]) -> dict[str, str]:
    if {*map(type, wire.values())} - {str}:
        raise ValueError("a file or variable of the plan is no text")
    return wire


_READERS: dict[type, Callable[[Any], Any]] = {bytes: binascii.a2b_base64, dict: _read_texts}
