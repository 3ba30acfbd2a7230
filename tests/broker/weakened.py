"""A broker with some of its checks switched off, to show that the tests which rely on them can fail.

``python weakened.py CHECK... --channel-fd N ...``: the real broker process, with each named check replaced by one
that lets everything through. Nothing but tests starts it; the product has no such switch.

===================  ==================================================================================================
``blocked``          the always-blocked list
``host``             the host's own addresses and gateways
``dial``             the resolved address is not checked again when it is dialled
``granted-names``    any name is granted, at 80 and 443
``granted-literals``  any address is granted, at any port
``first:RULE``       that one objection to a connection's first bytes
``sniff``            the first bytes are not read at all: they are of no known protocol, which passes
``later``            nothing behind the first hello or request is looked at
``allocated``        a virtual address that was never answered stands for hooks.example.com
``open``             the number of open connections
``buffers``           the outer connections of a cage may all have large buffers
``dns-rate``         the rate of questions
``recordable``       connections are let out that cannot be recorded
``fence``            the deadline of the plugin
===================  ==================================================================================================
"""

from __future__ import annotations

import sys
from typing import Any

from isolator.broker import buffers, dns, flow, guard, host_addresses, outbound, shared, sniff
from isolator.broker.gate import gate
from isolator.broker.service import main
from isolator.ipc import fence
from isolator.policy import destinations


def _without_dial_check() -> None:
    made = outbound.Outbound.__init__

    def init(self: Any, *arguments: Any) -> None:
        made(self, *arguments)  # the name server has taken the real check by now
        self._reach.blocked = lambda address, port: None

    outbound.Outbound.__init__ = init  # type: ignore[method-assign]


def _without_objection(rule: str) -> None:
    judge = guard.objection

    def objection(*arguments: Any, **named: Any) -> str | None:
        found = judge(*arguments, **named)
        return None if found == rule else found

    guard.objection = objection


def _any_virtual_address() -> None:
    from isolator.broker.virtual import VirtualPool

    real = VirtualPool.entry

    def entry(self: Any, address: Any) -> Any:
        return real(self, address) or self._by_name.get("hooks.example.com")

    VirtualPool.entry = entry  # type: ignore[method-assign]


def switch_off(check: str) -> None:
    """Replace one check."""
    allowed = destinations.Verdict(True, "switched off")
    everything = frozenset({80, 443})
    if check == "blocked":
        destinations.Rules.blocked = lambda self, address, port: False  # type: ignore[method-assign]
    elif check == "host":
        host_addresses.HostAddresses.owner = lambda self, address: None  # type: ignore[method-assign]
    elif check == "dial":
        _without_dial_check()
    elif check == "granted-names":
        destinations.Rules.name_ports = lambda self, name: everything  # type: ignore[method-assign]
        destinations.Rules.name = lambda self, name, port: allowed  # type: ignore[method-assign]
    elif check == "granted-literals":
        destinations.Rules.literal = lambda self, address, port: allowed  # type: ignore[method-assign]
    elif check.startswith("first:"):
        _without_objection(check.removeprefix("first:"))
    elif check == "sniff":
        sniff.Sniffer.feed = lambda self, part: sniff.Hello("other")  # type: ignore[method-assign]
        guard.objection = lambda *arguments, **named: None
    elif check == "later":
        gate.Gate._behind_hello = lambda self, hello: None  # type: ignore[method-assign]
    elif check == "allocated":
        _any_virtual_address()
    elif check == "open":
        flow.FlowTable.full = property(lambda self: False)  # type: ignore[method-assign, assignment]
    elif check == "buffers":
        buffers.BUDGET = 1 << 40
    elif check == "dns-rate":
        dns.QUERY_BURST = 1 << 30
    elif check == "recordable":
        shared.Shared.unrecordable = lambda self: None  # type: ignore[method-assign]
    elif check == "fence":
        fence.Fence.closed = property(lambda self: False)  # type: ignore[method-assign, assignment]
    else:
        raise SystemExit(f"no such check: {check}")


if __name__ == "__main__":
    while not sys.argv[1].startswith("--"):
        switch_off(sys.argv.pop(1))
    main()
