"""Reach of one cage's connections: names and addresses against its policy, the lists and the host's own."""

from __future__ import annotations

from ipaddress import IPv4Address

from isolator.broker.flow import DescribedError, Flow
from isolator.broker.guard import Denied
from isolator.broker.resolver import ResolveError, Resolver
from isolator.broker.shared import Shared
from isolator.broker.virtual import Entry, VirtualPool
from isolator.policy.addresses import Address
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import Rules


class Reach:
    """Judges destinations. ``pool``: the names that addresses stand for in the cage; ``resolver``: their real ones."""

    def __init__(self, rules: Rules, pool: VirtualPool, resolver: Resolver, shared: Shared) -> None:
        self._rules, self._pool, self._resolver, self._shared = rules, pool, resolver, shared

    def entry(self, flow: Flow) -> Entry | None:
        """The name that the flow's destination stands for, if it is a virtual address that was answered."""
        return self._pool.entry(flow.address) if isinstance(flow.address, IPv4Address) else None

    def admit(self, flow: Flow) -> None:
        """Hold a destination to the policy, before anything is looked up; raises Denied."""
        refusal = self._shared.unrecordable()
        if refusal is not None:
            entry = self.entry(flow)
            flow.name = entry.name if entry is not None else None
            raise Denied(refusal)
        flow.entry = self.entry(flow)
        if flow.entry is not None:
            flow.entry.flows += 1
            flow.name = flow.entry.name
            verdict = self._rules.name(flow.name, flow.port)
        elif isinstance(flow.address, IPv4Address) and flow.address in self._rules.virtual:
            raise Denied(DenialRule.UNALLOCATED)
        else:
            verdict = self._rules.literal(flow.address, flow.port)
        flow.rule = verdict.rule
        if not verdict.allowed:
            raise Denied(verdict.rule)

    async def addresses(self, flow: Flow) -> tuple[Address, ...]:
        """The addresses that this flow may go to; none where the proxy looks its name up."""
        found: tuple[Address, ...] = (flow.address,)
        if flow.name is not None:
            if self._rules.looked_up_by_proxy(flow.name):
                return ()
            try:
                found = (await self._resolver.resolve(flow.name)).addresses
            except ResolveError as error:
                raise DescribedError(DenialRule.UPSTREAM) from error
        if any(address.version == 6 for address in found):
            await self._shared.nat64.refresh()
        return self.usable(flow, found)

    def usable(self, flow: Flow, found: tuple[Address, ...]) -> tuple[Address, ...]:
        """Addresses among them that may be dialled; raises Denied, or DescribedError when there are none at all."""
        reasons = [self.blocked(address, flow.port) for address in found]
        if flow.name is None and reasons[0] is DenialRule.NEIGHBOUR and flow.rule != "public":
            return found  # whoever wrote the address, or its network, into the policy meant the neighbour
        usable = tuple(address for address, reason in zip(found, reasons, strict=True) if reason is None)
        if not found:
            raise DescribedError("no-address")
        if not usable:
            flow.dialled = found[0]
            raise Denied(reasons[0] or "")
        return usable

    def blocked(self, address: Address, port: int) -> DenialRule | None:
        """The rule that keeps a resolved address out of reach at ``port``, or None."""
        if self._rules.excepted(address, port):
            return None
        if self._rules.blocked(address, port):
            return DenialRule.BLOCKED_ADDRESS
        inside = self._shared.nat64.inside(address)
        reason = None if inside is None else self.blocked(inside, port)
        return reason or self._shared.host.owner(address)
