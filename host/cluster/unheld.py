"""Plugins that nobody can hold: no host that is alive has them, so their events wait until a person does something."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from host.cluster.fold import State
from host.cluster.lease import SILENCE

LASTS: Final = SILENCE + 8.0
"""Seconds for which it has to be so: hosts that start, and versions that change, take less."""
_SHOWN = 5


class Unheld:
    """Plugins that no host can hold, each with the reason and the remedy, in one life of this host."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self.lines: Mapping[str, str] = {}
        """By plugin."""

    def look(self, state: State, alive: Collection[str], now: float) -> None:
        """Look who could hold what; ``alive``: the hosts that are not silent, ``now`` by this host's clock."""
        found = {name: line for name in state.plugins if (line := why_unheld(state, name, alive)) is not None}
        self._since = {name: self._since.get(name, now) for name in found}
        self.lines = {name: found[name] for name in sorted(found) if now - self._since[name] >= LASTS}

    @property
    def line(self) -> str | None:
        """All of them in one line; None: there is none."""
        lines = [*self.lines.values()]
        more = f"; and {len(lines) - _SHOWN} more plugins" if len(lines) > _SHOWN else ""
        return "; ".join(lines[:_SHOWN]) + more if lines else None


def why_unheld(state: State, name: str, alive: Collection[str]) -> str | None:
    """The reason why no living host can hold a plugin, and what to do; None if one can, or holds all of it."""
    known = state.plugins[name]
    plugin = known.plugin
    if plugin.placement != "one":
        return None
    leases = [state.leases.get((name, shard)) for shard in range(plugin.shards)]
    beats = {host: member.beat for host, member in state.members.items()}
    fitting = [host for host in alive if host in beats and known.fits(beats[host].labels)]
    if all(lease is not None and lease.holder in fitting for lease in leases):
        return None
    having = [host for host in alive if host in beats and name in beats[host].ready]
    if any(host in fitting for host in having):
        return None
    nobody = f"nobody holds plugin {name}, and its events wait: "
    if having:
        labels = ", ".join(plugin.labels)
        why = f"no living host that has it ({_some(having)}) has the labels {labels}"
        remedy = f"isolator cluster place {name} with other labels, or give a host these: [cluster] labels in host.toml"
        return f"{nobody}{why}; {remedy}"
    lacking = [host for host in alive if host in beats and name in beats[host].lacking]
    if lacking:
        have = "has" if len(lacking) == 1 else "have"
        why = f"{_some(lacking)} {have} it, and not the events, which the log has no more"
        remedy = (
            f"isolator plugin add it on a host that has read them, or isolator cluster place {name} --anew without them"
        )
        return f"{nobody}{why}; {remedy}"
    gone = [host for host, beat in beats.items() if host not in alive and name in beat.ready]
    silent = f" ({_some(gone)} had it, and {'is' if len(gone) == 1 else 'are'} silent)" if gone else ""
    remedy = f"isolator plugin add or enable it on a living one, or isolator plugin remove --cluster {name}"
    return (
        f"{nobody}no living host has the version {plugin.digest[:19]} enabled{silent}; start one that has it, {remedy}"
    )


def _some(hosts: Collection[str]) -> str:
    names = sorted(hosts)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
