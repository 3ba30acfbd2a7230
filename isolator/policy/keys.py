"""The keys of a policy that are a number or yes-or-no, each declared once.

A declaration is an annotated field: its type and default, and as a ``Limit`` or ``Switch`` how it is written, what the
host allows at most, and where a policy file and a manifest have it. The sections of the effective policy
(``model.py``) and the host's ``Limits`` and ``Ceiling`` inherit the fields; whatever reads, meets, explains or writes
policies goes over ``LIMITS`` and ``SWITCHES``. ``docs/recipes/policy-key.md`` says how to add one.

Sizes are bytes, cpu is thousandths of one core (``25%`` = 250), durations are seconds.
Like other models of a policy it does without ``from __future__ import annotations``: evaluating the text of so many
annotations takes longer than making a cage.
"""

import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from isolator.base.structs import replace, struct_class
from isolator.policy import units
from isolator.policy.frozen import Frozen, field_types

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_REQUESTS = {
    "grant": "sandbox.network",
    "limits": "sandbox.resources",
    "filesystem": "sandbox.filesystem",
    "delivery": "delivery",
    "restart": "restart",
}
"""Tables of a policy file, and where a manifest has their keys."""


@struct_class(frozen=True)
class Unit:
    """Spelling of a kind of number: ``parse`` (raises ValueError) reads back exactly what ``show`` writes."""

    parse: Callable[[Any], float]
    show: Callable[[Any], str]


SIZE = Unit(units.parse_size, units.format_size)
VOLUME = Unit(units.parse_volume, units.format_size)
RATE = Unit(units.parse_rate, units.format_rate)
CPU = Unit(units.parse_cpu, units.format_cpu)
COUNT = Unit(units.parse_count, str)
TIME = Unit(units.parse_duration, units.format_duration)


@struct_class(frozen=True)
class Key:
    """Declaration of one key. ``[ceiling]`` and ``[defaults]`` of ``host.toml`` have it under its field's name."""

    policy: str
    """Dotted key in a policy file: ``limits.memory``."""
    about: str
    """Meaning, as a phrase of Markdown for the tables of the documents."""
    requestable: bool = False
    """A manifest has it, too; where it has not, an author has no say."""
    name: str = ""
    """The field's name; filled in by ``_declared``."""

    @property
    def section(self) -> str:
        """The table of a policy file that holds it."""
        return self.policy.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The last part of ``policy``: the key in that table."""
        return self.policy.rpartition(".")[2]

    @property
    def manifest(self) -> str:
        """Dotted key in a manifest: ``sandbox.resources.memory``; empty where an author has no say."""
        return f"{_REQUESTS[self.section]}.{self.key}" if self.requestable else ""

    def check(self, value: Any) -> Any:
        """The model's value of one from a file; raises ValueError."""
        raise NotImplementedError


@struct_class(frozen=True)
class Limit(Key):
    """A number; the smallest of ceiling, grant and request counts."""

    unit: Unit = COUNT
    most: float = 0
    """The ceiling of a host that does not say otherwise."""
    least: float = 0
    """The least that makes sense; less is taken for a typing error (``memory = 256`` is 256 bytes)."""
    written: bool = False
    """The policy file that ``plugin add`` writes has it."""
    left_to_author: bool = False
    """The author chooses up to the ceiling where the policy file is silent: the number confines nobody."""

    @property
    def always_shown(self) -> bool:
        """Whether ``explain`` has a line of it even where nobody speaks of it."""
        return self.written or self.left_to_author

    def check(self, value: Any) -> float:
        """``unit.parse``, and refuse what is too small to make sense."""
        number = self.unit.parse(value)
        if number < self.least:
            unit = "; a number alone is bytes" if self.unit is SIZE and str(value).isdecimal() else ""
            raise ValueError(f"{self.show(number)} is less than the least that works, {self.show(self.least)}{unit}")
        return number

    def show(self, number: float) -> str:
        """The number as people write it."""
        return self.unit.show(number)

    def toml(self, number: float) -> str:
        """``key = value`` as it stands in a policy file."""
        shown = self.show(number)
        return f"{self.key} = {shown}" if shown.isdigit() else f'{self.key} = "{shown}"'


@struct_class(frozen=True)
class Switch(Key):
    """Yes or no; yes only where ceiling, grant and request all say yes. A ceiling that is silent says yes."""

    phrase: str = ""
    """The request of a manifest that says yes, as an update lists it: ``TLS without a server name``."""
    needs_network: bool = False
    """Meaningless, and so no, where a plugin has no network."""

    def check(self, value: Any) -> bool:
        """True or false; raises ValueError."""
        return units.parse_boolean(value)


class ResourceLimits(Frozen):
    """Caps kept by the cgroup and rlimits layers."""

    memory: Annotated[int, Limit(
        "limits.memory", "memory, without any swap; a plugin that takes more is ended",
        unit=SIZE, most=2 * GIB, least=4 * MIB, written=True, requestable=True,
    )] = 256 * MIB  # fmt: skip
    cpu: Annotated[int, Limit(
        "limits.cpu", "share of one core; `200%` is two cores",
        unit=CPU, most=4000, least=10, written=True, requestable=True,
    )] = 250  # fmt: skip
    tasks: Annotated[int, Limit(
        "limits.tasks", "processes and threads together", most=512, least=1, written=True, requestable=True,
    )] = 64  # fmt: skip
    nofile: Annotated[int, Limit(
        "limits.nofile", "open files", most=4096, least=16, written=True, requestable=True,
    )] = 1024  # fmt: skip
    io_read: Annotated[int, Limit(
        "limits.io_read", "bytes per second from each disk it reaches: the one its state is on, and those of what it "
        "reads", unit=RATE, most=units.NO_CAP, least=64 * KIB, requestable=True,
    )] = units.NO_CAP  # fmt: skip
    io_write: Annotated[int, Limit(
        "limits.io_write", "bytes per second to each of those disks",
        unit=RATE, most=units.NO_CAP, least=64 * KIB, requestable=True,
    )] = units.NO_CAP  # fmt: skip


# A tmpfs of size 0 or with 0 inodes is one without a limit (tmpfs(5)), so zero must never get there.
class FileLimits(Frozen):
    """Sizes of the file systems that a cage may fill."""

    state: Annotated[int, Limit(
        "filesystem.state", "size of `/state`, which is kept; `0`: none",
        unit=VOLUME, most=10 * GIB, written=True, requestable=True,
    )] = 64 * MIB  # fmt: skip
    tmp: Annotated[int, Limit(
        "filesystem.tmp", "size of `/tmp`, in memory",
        unit=SIZE, most=256 * MIB, least=64 * KIB, written=True, requestable=True,
    )] = 32 * MIB  # fmt: skip
    shm: Annotated[int, Limit(
        "filesystem.shm", "size of `/dev/shm`, in memory", unit=SIZE, most=64 * MIB, least=64 * KIB,
    )] = 8 * MIB  # fmt: skip
    state_inodes: Annotated[int, Limit(
        "filesystem.state_inodes", "number of files in `/state`; at most one for each 4 KiB", most=1 << 20, least=16,
    )] = 16384  # fmt: skip
    tmp_inodes: Annotated[int, Limit(
        "filesystem.tmp_inodes", "number of files in `/tmp`", most=1 << 16, least=16,
    )] = 4096  # fmt: skip


class ConnectionLimits(Frozen):
    """Caps kept by the broker."""

    connects_per_second: Annotated[int, Limit(
        "limits.connects_per_second", "new connections, on average", most=200, least=1,
    )] = 20  # fmt: skip
    connect_burst: Annotated[int, Limit("limits.connect_burst", "new connections at once", most=400, least=1)] = 40
    connects_open: Annotated[int, Limit("limits.connects_open", "connections at one time", most=512, least=1)] = 64
    idle: Annotated[float, Limit(
        "limits.idle", "time without a byte after which a connection is ended; a dead one ends within two minutes",
        unit=TIME, most=30 * 86400.0, least=1.0,
    )] = 86400.0  # fmt: skip


class DeliveryLimits(Frozen):
    """Patience with one event, kept by the host."""

    delivery_timeout: Annotated[float, Limit(
        "delivery.timeout", "time for one answer to an event",
        unit=TIME, most=900.0, least=0.1, left_to_author=True, requestable=True,
    )] = 10.0  # fmt: skip
    delivery_attempts: Annotated[int, Limit(
        "delivery.attempts", "attempts before an event is dead",
        most=100, least=1, left_to_author=True, requestable=True,
    )] = 12  # fmt: skip


class RunLimits(Frozen):
    """Patience with a plugin that stops or starts, kept by the supervisor."""

    stop_grace: Annotated[float, Limit(
        "restart.stop_grace", "time between SIGTERM and SIGKILL", unit=TIME, most=60.0,
    )] = 5.0  # fmt: skip
    start_timeout: Annotated[float, Limit(
        "restart.start_timeout", "time from a start to the plugin's socket",
        unit=TIME, most=300.0, least=1.0, left_to_author=True, requestable=True,
    )] = 10.0  # fmt: skip


class NetworkSwitches(Frozen):
    """Yes-or-no keys kept by the broker."""

    allow_no_sni: Annotated[bool, Switch(
        "grant.allow_no_sni", "let TLS to a granted name through that does not name its server, or hides it "
        "(encrypted ClientHello)", phrase="TLS without a server name", needs_network=True, requestable=True,
    )] = False  # fmt: skip
    allow_ech: Annotated[bool, Switch(
        "grant.allow_ech", "let TLS through that may hide a second server name (ECH, as browsers send it); the one "
        "in the clear is checked all the same",
        phrase="TLS that may hide a second server name", needs_network=True, requestable=True,
    )] = False  # fmt: skip


# The fields of the last base come first; their order is part of ``HostConfig.digest``.
class Limits(RunLimits, DeliveryLimits, ConnectionLimits, FileLimits, ResourceLimits):
    """Every number that has a default and a ceiling."""


class Switches(NetworkSwitches):
    """Every yes-or-no key."""


K = TypeVar("K", bound=Key)


def _declared(model: type[Frozen], kind: type[K]) -> tuple[K, ...]:
    hints = field_types(model).items()
    return tuple(
        replace(key, name=name) for name, hint in hints for key in typing.get_args(hint) if isinstance(key, kind)
    )


_SECTIONS = ("limits", "filesystem", "delivery", "restart")
LIMITS = tuple(sorted(_declared(Limits, Limit), key=lambda limit: _SECTIONS.index(limit.section)))
"""In the order in which ``explain`` shows them."""
SWITCHES = _declared(Switches, Switch)
BY_NAME = {limit.name: limit for limit in LIMITS}

CEILING = Limits.model_validate({limit.name: limit.most for limit in LIMITS})
