"""Records of names and connections."""

from __future__ import annotations

from typing import Literal

from isolator.audit.schema.base import ABSENT, BROKER, SUPERVISOR, RecordData, Summed


class _Net(RecordData, caused=True, summed=Summed("all", by="rule")):
    rule: str
    """The grant that allowed it, or the reason of a refusal."""
    various: Literal[True] = ABSENT
    """Many different ones with the same rule were counted together; the other fields are missing."""
    count: int = ABSENT
    """Number that this record stands for; 1 when missing."""


class NetQuery(_Net, type="net.query", sources=(BROKER,)):
    """A plugin looked up a name."""

    name: str | None = ABSENT
    type: str | None = ABSENT
    """Record type: ``A``, ``AAAA``, ..."""
    verdict: str = ABSENT
    """``allowed``, ``denied``, ``withheld`` (the name has no address that may be reached) or ``failed``."""


class NetConnect(_Net, type="net.connect", sources=(BROKER,)):
    """A connection was opened, or its other side could not be reached."""

    name: str | None = ABSENT
    """Name that the plugin looked up; null when it used an address."""
    address: str = ABSENT
    """Of the far end."""
    port: int = ABSENT
    direction: Literal["in"] = ABSENT
    """There for a connection from outside to a ``listen`` port."""
    cage_port: int = ABSENT
    """Port inside the cage of such a connection."""
    verdict: Literal["allowed", "failed"] = ABSENT
    flow: str = ABSENT
    """Identifies the connection in its ``net.closed``."""
    error: str = ABSENT
    """Why the other side could not be reached, such as ``econnrefused``; ``upstream``: its name was not resolved;
    ``cage ended``, ``idle``: it was given up then."""
    via: str = ABSENT
    """The proxy that it goes through; where that looks the name up, ``address`` is the one inside the cage."""


class NetClosed(RecordData, type="net.closed", sources=(BROKER,), caused=True, summed=Summed("all", by="name")):
    """A connection ended."""

    name: str | None
    address: str
    port: int
    direction: Literal["in"] = ABSENT
    cage_port: int = ABSENT
    sent: int
    """Bytes from the plugin."""
    received: int
    """Bytes to the plugin."""
    duration_ms: float
    reason: str
    """``closed``, ``idle``, ``cage ended``, a refusal's rule, or an error such as ``econnreset``."""
    flow: str


class NetDenied(_Net, type="net.denied", sources=(BROKER, SUPERVISOR)):
    """A connection or packet was refused."""

    name: str | None = ABSENT
    """Name that the plugin looked up; null when it used an address."""
    address: str | None = ABSENT
    port: int | None = ABSENT
    direction: Literal["in"] = ABSENT
    cage_port: int = ABSENT
    protocol: str = ABSENT
    """``tcp``, ``udp``, ``icmp``, ..."""
    verdict: Literal["denied"] = ABSENT
    detail: str = ABSENT
    """In which way the first bytes were malformed."""
    asked: list[str] = ABSENT
    """Names in the first bytes, where they differ from ``name``."""
    why: str = ABSENT
    """Difference of the cage's ruleset from the one that was made (rule ``ruleset-changed``)."""
