"""Fences of the daemon's plugins, as this process keeps them: the third place, behind the host and the broker.

Whoever may let a plugin act (the host, by a lease) moves its deadline on. Once it has passed, by this process's own
clock and whatever has become of the host, the plugin's cages are frozen and none is started. They are thawed when the
deadline is moved on in time, and killed, frozen as they are, when the plugin is lost. A frozen cage cannot end by
itself, so one that is to stop is killed.

Nobody enforces anything while this process executes another program: the cages of plugins with a deadline stand still.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from isolator.audit.schema import PluginFrozen, PluginLost, PluginThawed
from isolator.errors import UnavailableError
from isolator.ipc.fence import LOST, Fence
from isolator.ipc.messages import Origin
from isolator.linux.boottime import BootAlarm, boottime

if TYPE_CHECKING:
    from isolator.audit.client import AuditClient
    from isolator.ipc.handover import FenceState
    from isolator.supervisor.broker_link import BrokerLink
    from isolator.supervisor.host_link import HostLink
    from isolator.supervisor.lifecycle.plugin import Plugin
    from isolator.supervisor.run import Run

logger = logging.getLogger(__name__)

FROZEN = "frozen: lease (not extended in time)"
WAITS = "waits for its lease"
LEASE_LOST = "its lease was lost"


class Fences:
    """The fence of each plugin. The broker gets each change, and all deadlines when it begins, as the host does."""

    def __init__(self, audit: AuditClient, broker: BrokerLink, host: HostLink) -> None:
        self.plugins: Mapping[str, Plugin] = {}
        """The daemon's plugins, by name."""
        self.lose: Callable[[str], None] = lambda name: None
        """Called for a plugin that is lost: it is to be stopped."""
        self._audit, self._broker = audit, broker
        broker.deadlines = host.deadlines = lambda: self.deadlines
        self._fences: dict[str, Fence] = {}
        self._frozen: dict[str, float] = {}
        """By plugin whose cages are frozen, when they were."""
        self._alarm = BootAlarm()
        asyncio.get_running_loop().add_reader(self._alarm.fileno(), self._look)

    def close(self) -> None:
        """Enforce nothing any more: every cage is about to end."""
        asyncio.get_running_loop().remove_reader(self._alarm.fileno())
        self._alarm.close()

    def of(self, name: str) -> Fence:
        """The fence of a plugin."""
        return self._fences.setdefault(name, Fence())

    @property
    def deadlines(self) -> dict[str, float]:
        """The deadlines, by plugin that has one."""
        return {name: fence.until for name, fence in self._fences.items() if fence.until is not None}

    def check(self, name: str) -> None:
        """Raise UnavailableError if a plugin may not act now."""
        if self.of(name).closed:
            why = "has no lease: nothing of it runs on this host until it has"
            raise UnavailableError(f"plugin {name}", why, "it is started on the host that holds it")

    def notice(self, name: str) -> str:
        """Text for an operator about a plugin that may not act, empty if it may."""
        if name in self._frozen and self._runs(name):
            return FROZEN
        return WAITS if self.of(name).closed else ""

    # --- what the host asks for ----------------------------------------------------------------------------------

    def hold(self, name: str, until: float) -> None:
        """Let a plugin act until then."""
        self._move(name, until)

    def free(self, name: str) -> None:
        """Bind a plugin to no time any more."""
        self._move(name, None)

    def lost(self, name: str) -> None:
        """Kill the cages of a plugin, frozen, and start none until ``hold``."""
        self._move(name, LOST)
        runs = self._runs(name)
        for run in runs:
            run.terminate(LEASE_LOST, Origin.DAEMON)
        if runs:
            self._audit.record(PluginLost(runs=[run.id for run in runs]), plugin=name, urgent=True)
        if name in self.plugins:
            self.lose(name)

    def forget(self, name: str) -> None:
        """Forget a plugin that was removed."""
        self._move(name, None)
        del self._fences[name]

    def _move(self, name: str, until: float | None) -> None:
        fence = self.of(name)
        if until == fence.until:
            return
        fence.move(until)
        self._broker.fence(name, until)
        if not fence.closed and name in self._frozen:
            self._thaw(name)
        self._look()

    # --- cages -----------------------------------------------------------------------------------------------------

    def started(self, name: str, run: Run) -> None:
        """Take note of a run that begins: its plugin's deadline may have passed at this very moment."""
        if self.of(name).closed:
            run.freeze()
            self._record_frozen(name, [run])

    def _runs(self, name: str) -> list[Run]:
        plugin = self.plugins.get(name)
        return [run for run in plugin.runs if run.executes] if plugin is not None else []

    def _look(self) -> None:
        """Freeze what has to be by now, and set the alarm for what comes next."""
        self._alarm.clear()
        for name, fence in self._fences.items():
            if fence.closed and name not in self._frozen:
                self._frozen[name] = boottime()
                runs = self._runs(name)
                for run in runs:
                    run.freeze()
                self._record_frozen(name, runs)
        self._alarm.set(
            min((until for name, until in self.deadlines.items() if name not in self._frozen), default=None)
        )

    def _record_frozen(self, name: str, runs: list[Run]) -> None:
        if runs:
            until = self.of(name).until
            late = round((boottime() - until) * 1000, 3) if until else None
            ids = [run.id for run in runs]
            self._audit.record(PluginFrozen(runs=ids, late_ms=late), plugin=name, urgent=True)
            logger.warning("plugin %s is frozen: its lease was not extended in time", name)
        self._announce(name)

    def _thaw(self, name: str) -> None:
        since, runs = self._frozen.pop(name), self._runs(name)
        for run in runs:
            run.thaw()
        if runs:
            seconds = round(boottime() - since, 3)
            self._audit.record(PluginThawed(runs=[run.id for run in runs], seconds=seconds), plugin=name)
        self._announce(name)

    def _announce(self, name: str) -> None:
        plugin = self.plugins.get(name)
        if plugin is not None:
            plugin.announce_change()

    # --- over an exec of this process ------------------------------------------------------------------------------

    def stand_still(self) -> None:
        """Freeze every cage of a plugin with a deadline until ``go_on``, here or in a later image of this process."""
        for name in self.deadlines:
            for run in self._runs(name):
                run.freeze()

    def go_on(self) -> None:
        """Thaw those whose deadline has not passed."""
        for name in self.deadlines:
            for run in self._runs(name):
                run.freeze() if name in self._frozen else run.thaw()
        self._look()

    def hand_over(self, name: str) -> FenceState | None:
        """The state of a plugin's fence, before an exec."""
        from isolator.ipc.handover import FenceState

        until = self.of(name).until
        return FenceState(until=until, frozen=self._frozen.get(name)) if until is not None else None

    def adopt(self, name: str, before: FenceState) -> None:
        """Go on with a plugin's fence; its cages stand still until ``go_on``."""
        self.of(name).until = before.until
        if before.frozen is not None:
            self._frozen[name] = before.frozen
