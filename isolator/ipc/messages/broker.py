"""S → B and B → S: the supervisor and the broker."""

from __future__ import annotations

from dataclasses import field

from isolator.ipc.body import Json, Request, omitted


class BrokerHello(Request[None], op="hello"):
    """The first message; answered when the host's addresses are known."""

    root: str
    config: Json
    """JSON of `HostConfig`"""
    parts: int = omitted(default=0)
    """how many `state.part` have come: B takes the place of another, and goes on with that one's state"""
    fences: dict[str, float] = field(default_factory=dict)
    """by plugin that is bound to one, the time until which it may act (as in `fence`)"""


class AttachCage(Request[None], op="cage.attach", fds=range(65)):
    """Serve a cage's network.

    Descriptors: TCP v4, TCP v6, DNS UDP, DNS TCP listeners and the NFLOG socket, all made inside the cage's network
    namespace; then a listener of the host's for each of the policy's `listen` rules, in their order
    """

    run: str
    plugin: str
    policy: Json
    """JSON of `NetworkPolicy`"""


class DetachCage(Request[None], op="cage.detach"):
    """Close a cage's listeners and flows; answered after its `net.closed` records are sent."""

    run: str


class FencePlugin(Request[None], op="fence"):
    """Relay no byte of a plugin's cages past a time: what is to be sent then waits until it is moved on."""

    plugin: str
    until: float | None
    """seconds of CLOCK_BOOTTIME; null: it is bound to none any more"""


class NewAuditSocket(Request[None], op="audit.source", fds=range(1, 2)):
    """Record to a new audit process.

    Descriptors: the new audit end
    """


# --- B → S ---------------------------------------------------------------------------------------------------------


class CageSockets(Request[None], op="cage.sockets"):
    """Make sockets for connections into a cage, to the ports that `listen` rules name; refused without such a rule.

    Reply's descriptors: unconnected TCP sockets made inside the cage's network
    """

    run: str
    count: int
    """at most 16"""
    version: int
    """4 or 6"""
