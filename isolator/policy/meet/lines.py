"""Explanation line by line: request, grant, effective value and its source, and the line of a policy that grants it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from isolator.policy import names
from isolator.policy.addresses import bracketed
from isolator.policy.destinations import PUBLIC, never_reachable
from isolator.policy.filters import phrase
from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import LIMITS, RATE, SWITCHES, Limit, Switch
from isolator.policy.meet.bounds import Egress, ceiling_egress, egress_within, meet_egress, normal_egress
from isolator.policy.meet.proposal import DEFAULT_GRANT, Line, Verdict
from isolator.policy.meet.sides import grant_bounds, request_bounds
from isolator.policy.model import EffectivePolicy, EgressRule
from isolator.policy.request import ManifestCore
from isolator.policy.units import NO_CAP

MANIFEST = "plugin.json"
DEFAULT = "default"


def explain_lines(
    core: ManifestCore, grant: PluginPolicy, host: HostConfig, effective: EffectivePolicy
) -> tuple[Line, ...]:
    """Every line of ``explain``, in the order in which people ask: events, permissions, network, numbers, folders."""
    explainer = _Explainer(core, grant, host, effective)
    return tuple(explainer.lines())


def toml_list(key: str, values: Iterable[str]) -> str:
    """``key = ["a", "b"]``; JSON's escapes are TOML's, and control characters were refused when the names were read."""
    return f"{key} = [{', '.join(json.dumps(value, ensure_ascii=False) for value in values)}]"


def egress_texts(egress: Egress) -> list[str]:
    """The set as it stands in a policy file's list."""
    return [*(["public"] if egress.public else []), *map(names.format_egress, egress.rules)]


class _Explainer:
    def __init__(self, core: ManifestCore, grant: PluginPolicy, host: HostConfig, effective: EffectivePolicy) -> None:
        self.core, self.grant, self.host, self.effective = core, grant, host, effective
        self._file = "" if grant.source == DEFAULT_GRANT else grant.source
        self.allowed = grant_bounds(grant, host, unwritten=core.synthesised)
        self.wanted = request_bounds(core, host, unwritten=core.synthesised)

    def lines(self) -> Iterator[Line]:
        yield from self._names("hooks", names.covers_hook)
        yield from self._names("permissions", names.covers_permission)
        for index, text in enumerate(self.grant.filters or ()):
            words = phrase(text)
            yield self._line("filters", None, words, f"only {words}", "granted", key=f"grant.filters[{index}]")
        yield from self._egress()
        for switch in SWITCHES:
            if self.grant.switches.get(switch.name) or self.core.switches.get(switch.name):
                yield self._switch(switch)
        yield from self._listen()
        for limit in LIMITS:
            if limit.always_shown or limit.name in self.grant.limits or self._is_capped(limit):
                yield self._limit(limit)
        yield from self._read()
        yield self._syscalls()
        for key, granted in (("tools", self.effective.tools), ("callers", map(str, self.effective.callers))):
            for index, value in enumerate(granted):
                yield self._line(key, None, value, value, "granted", key=f"grant.{key}[{index}]")
        for name, value in self.effective.env.items():
            setting = f"{name}={value}"
            yield self._line("env", None, setting, setting, "granted", key=f"env.{name}")

    def _line(
        self, field: str, requested: str | None, granted: str | None, effective: str, verdict: Verdict, *, key: str,
        source: str | None = None, add: str = "", reason: str = "",
    ) -> Line:  # fmt: skip
        """A line; ``key`` is the dotted key of the policy file that decides about it."""
        if source is None:
            source = self.grant.where.get(key) or (DEFAULT_GRANT if self.grant.source == DEFAULT_GRANT else DEFAULT)
        section = at = ""
        if add:
            section, at = key.partition(".")[0], self.grant.where.get(key.partition("[")[0], self._file)
        return Line(field, requested, granted, effective, verdict, source, add, section, at, reason)

    def _ceiling_source(self, key: str) -> str:
        return self.host.where.get(f"ceiling.{key}") or "ceiling"

    def _names(self, kind: str, covers: Callable[[str, str], bool]) -> Iterator[Line]:
        """Events or permissions, by the field that each side has of them: one line for each that is requested."""
        sides = (self.core, self.grant, self.effective, self.host.ceiling)
        wanted, granted, effective, most = (getattr(side, kind) or () for side in sides)
        for name in wanted:
            pattern = next(((i, g) for i, g in enumerate(granted) if covers(g, name)), None)
            granting = pattern[1] if pattern else None
            key = f"grant.{kind}[{pattern[0]}]" if pattern else f"grant.{kind}"
            if any(covers(e, name) for e in effective):
                yield self._line(kind, name, granting, name, "granted", key=key)
            elif not any(covers(m, name) for m in most):
                source = self._ceiling_source(kind)
                yield self._line(
                    kind, name, granting, "no", "refused", key=key, source=source, reason="over the ceiling"
                )
            else:
                add = toml_list(kind, (*granted, name))
                yield self._line(kind, name, None, "no", "pending", key=f"grant.{kind}", add=add)

    def _egress(self) -> Iterator[Line]:
        network, granted = self.effective.network, self.allowed.egress
        granting = ", ".join(egress_texts(granted)) or "none"
        request = self.core.sandbox.network
        if request is not None and request.egress is not None:
            if not request.egress:
                yield self._line("egress", "none", granting, "none", "granted", key="grant.egress", source=MANIFEST)
            for entry in request.egress:
                yield self._destination(EgressRule(host=entry.host, ports=entry.ports), entry.reason)
            return
        shown = [*([PUBLIC] if network.mode == "public" else []), *map(names.format_egress, network.egress)]
        requested = None if self.core.synthesised else PUBLIC
        yield self._line("egress", requested, granting, ", ".join(shown) or "none", "granted", key="grant.egress")

    def _destination(self, rule: EgressRule, reason: str) -> Line:
        text = names.format_egress(rule)
        one = Egress(rules=(rule,))
        kept = meet_egress(meet_egress(ceiling_egress(self.host.ceiling), self.allowed.egress), one)
        rules = tuple(r for r in kept.rules if never_reachable(r, self.host.exceptions, self.host.virtual) is None)
        shown = ", ".join(map(names.format_egress, rules)) or "no"
        covering = self._covering(rule)
        key = f"grant.egress[{covering[0]}]" if covering else "grant.egress"
        granted = covering[1] if covering else ("public" if self.allowed.egress.public and rules else None)
        blocked = never_reachable(rule, self.host.exceptions, self.host.virtual)
        if blocked:
            why = f"never reachable: {blocked}"
            return self._line("egress", text, granted, "no", "refused", key=key, source="always blocked", reason=why)
        if egress_within(one, Egress(rules=rules)):
            return self._line("egress", text, granted, shown, "granted", key=key, reason=reason)
        if not egress_within(one, ceiling_egress(self.host.ceiling)):
            source = self._ceiling_source("egress")
            why = "over the ceiling"
            return self._line("egress", text, granted, shown, "refused", key=key, source=source, reason=why)
        merged = normal_egress(Egress(public=self.allowed.egress.public, rules=(*self.allowed.egress.rules, rule)))
        add = toml_list("egress", egress_texts(merged))
        return self._line("egress", text, granted, shown, "pending", key="grant.egress", add=add, reason=reason)

    def _covering(self, rule: EgressRule) -> tuple[int, str] | None:
        """The first granted rule that has something in common with ``rule``: its place in the list and its text."""
        for index, granted in enumerate(self.grant.egress or ()):
            if meet_egress(Egress(rules=(granted,)), Egress(rules=(rule,))).rules:
                return index, names.format_egress(granted)
        return None

    def _switch(self, switch: Switch) -> Line:
        field, key = switch.name, switch.policy
        wanted, got = field in self.wanted.switches, self.effective.value(switch)
        granting = "yes" if self.grant.switches.get(field) else None
        moot = switch.needs_network and self.effective.network.mode == "none"
        if got or not wanted or moot:
            requested = None if self.core.synthesised or not switch.manifest else "yes" if wanted else "no"
            return self._line(field, requested, granting, "yes" if got else "no", "granted", key=key)
        if not getattr(self.host.ceiling, field):
            return self._line(field, "yes", granting, "no", "refused", key=key, source=self._ceiling_source(field))
        return self._line(field, "yes", granting, "no", "pending", key=key, add=f"{switch.key} = true")

    def _listen(self) -> Iterator[Line]:
        request = self.core.sandbox.network
        wanted = request.listen if request is not None else None
        present = [names.format_listen(rule) for rule in self.grant.listen or ()]
        kept = {rule.cage_port: names.format_listen(rule) for rule in self.effective.network.listen}
        for index, rule in enumerate(self.grant.listen or ()):
            if wanted is None and rule in self.effective.network.listen:
                text = names.format_listen(rule)
                yield self._line("listen", None, text, text, "granted", key=f"grant.listen[{index}]")
        for entry in wanted or ():
            text = f"port {entry.port}"
            if entry.port in kept:
                shown = kept[entry.port]
                key = f"grant.listen[{present.index(shown)}]"
                yield self._line("listen", text, shown, shown, "granted", key=key, reason=entry.reason)
            elif not (self.host.inbound.ports and self.host.inbound.addresses):
                source = self.host.where.get("inbound.ports") or "ceiling"
                why = "this host forwards no ports; see [inbound] in host.toml"
                yield self._line("listen", text, None, "no", "refused", key="grant.listen", source=source, reason=why)
            else:
                address = self.host.inbound.addresses[0]
                port = entry.port if self.host.inbound.allows(address, entry.port) else self.host.inbound.ports[0][0]
                add = toml_list("listen", [*present, f"{bracketed(address)}:{port}:{entry.port}"])
                yield self._line(
                    "listen", text, None, "no", "pending", key="grant.listen", add=add, reason=entry.reason
                )

    def _limit(self, limit: Limit) -> Line:
        field, key = limit.name, limit.policy
        wanted, set_to = self.core.limits.get(field), self.grant.limits.get(field)
        most, allowed = getattr(self.host.ceiling.limits, field), getattr(self.allowed.limits, field)
        value = min(most, allowed, getattr(self.wanted.limits, field))
        granting, shown = None if set_to is None else limit.show(set_to), limit.show(value)
        requested = None if wanted is None else limit.show(wanted)
        if wanted is not None and value < wanted:
            if wanted > most:
                why = f"over the ceiling, {limit.show(most)}"
                source = self._ceiling_source(field) if value == most else None
                return self._line(field, requested, granting, shown, "refused", key=key, source=source, reason=why)
            return self._line(field, requested, granting, shown, "pending", key=key, add=limit.toml(wanted))
        source = MANIFEST if wanted == value and set_to != value else None
        if source is None and value != allowed:
            # The manifest is silent, and its default or the ceiling is less than what is granted.
            source = self._ceiling_source(field) if value == most else self._default_source(field)
        elif source is None and set_to is None:
            source = self._default_source(field)
        return self._line(field, requested, granting, shown, "granted", key=key, source=source)

    def _is_capped(self, limit: Limit) -> bool:
        """Whether a limit is a rate (no cap unless somebody sets one) with a cap or a request."""
        return limit.unit is RATE and (self.effective.value(limit) < NO_CAP or limit.name in self.core.limits)

    def _default_source(self, field: str) -> str:
        return self.host.where.get(f"defaults.{field}") or DEFAULT

    def _read(self) -> Iterator[Line]:
        wanted, granted = self.core.sandbox.read, self.grant.read or ()
        if wanted is None:
            for index, path in enumerate(granted):
                if path in self.effective.filesystem.read:
                    yield self._line("read", None, path, path, "granted", key=f"filesystem.read[{index}]")
        for path in wanted or ():
            kept = [p for p in self.effective.filesystem.read if names.path_covers(path, p)]
            covering = next((i for i, g in enumerate(granted) if names.path_covers(g, path)), None)
            if path in kept or any(names.path_covers(p, path) for p in self.effective.filesystem.read):
                key = f"filesystem.read[{covering}]" if covering is not None else "filesystem.read"
                granting = granted[covering] if covering is not None else None
                yield self._line("read", path, granting, path, "granted", key=key)
            elif not any(names.path_covers(most, path) for most in self.host.ceiling.read):
                source = self._ceiling_source("read")
                shown = ", ".join(kept) or "no"
                yield self._line("read", path, None, shown, "refused", key="filesystem.read", source=source)
            else:
                add = toml_list("read", (*granted, path))
                granting = ", ".join(kept) or None
                yield self._line("read", path, granting, granting or "no", "pending", key="filesystem.read", add=add)

    def _syscalls(self) -> Line:
        wanted, granting, got = self.core.sandbox.syscalls, self.grant.syscalls, self.effective.syscalls
        key = "syscalls.profile"
        if wanted == "default" and got == "strict":
            if self.host.ceiling.syscalls == "strict":
                source = self._ceiling_source("syscalls")
                return self._line("syscalls", wanted, granting, got, "refused", key=key, source=source)
            return self._line("syscalls", wanted, granting, got, "pending", key=key, add='profile = "default"')
        origin = MANIFEST if wanted == got == "strict" and granting != got else None
        return self._line("syscalls", wanted, granting, got, "granted", key=key, source=origin)
