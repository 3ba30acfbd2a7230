"""A look at every cage, again and again: its use is recorded, its figures follow, a change of it is noticed.

Each look goes through the cages in short turns of the event loop. Records of plugins come at its end, all together: the
writer of the trail and whoever follows it wake up once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from isolator.ipc.messages import Origin
from isolator.ipc.tasks import report
from isolator.linux.shortage import is_shortage

if TYPE_CHECKING:
    from isolator.supervisor.alarms import Alarms
    from isolator.supervisor.lifecycle.plugin import Plugin
    from isolator.supervisor.plugins import PluginTable
    from isolator.supervisor.run import Run
    from isolator.supervisor.runners.runners import Runners

logger = logging.getLogger(__name__)

_TURN = 0.003
"""Seconds of a turn of the event loop after which the others go on; one look is a fraction of one."""
_BLIND = "looks"
"""Key of the alarm of a look that was not possible."""
_RECORDS = 100
"""Records in one turn."""


async def keep_snapshots(table: PluginTable, runners: Runners | None, interval: float, alarms: Alarms) -> None:
    """Look at all cages every ``interval`` seconds; that it was not possible, as no descriptor is free, is an alarm."""
    comparing: dict[str, asyncio.Task[None]] = {}
    while True:
        await asyncio.sleep(interval)
        unseen = runners.take_snapshots() if runners is not None else None
        used: list[tuple[Plugin, Run, dict[str, Any]]] = []
        until = time.monotonic() + _TURN
        for plugin in list(table.plugins.values()):
            if time.monotonic() >= until:
                await asyncio.sleep(0)
                until = time.monotonic() + _TURN
            try:
                run = _look_at(plugin)
            except OSError as error:
                logger.error("plugin %s: no snapshot: %s", plugin.name, error)
                unseen = error if is_shortage(error) else unseen
                continue
            except Exception as error:  # whatever it was, it is one plugin's; the others' turn comes
                report(asyncio.get_running_loop(), "snapshots", error, f"; plugin {plugin.name} is left out")
                continue
            if run is not None:
                used.append((plugin, run, run.use.latest))
                if run.shown and (plugin.name not in comparing or comparing[plugin.name].done()):
                    comparing[plugin.name] = table.own(plugin.compare_files(), to_the_end=False)
        if unseen is not None:
            why = f"cages cannot be looked at ({unseen.strerror}): whoever changes one is not noticed meanwhile"
            alarms.raise_(_BLIND, why)
        else:
            alarms.settle(_BLIND)
        for number, (plugin, run, usage) in enumerate(used, 1):
            if plugin.run is run and not run.exited:  # else its last record has been written meanwhile
                plugin.record_use(run, usage)
            if number % _RECORDS == 0:
                await asyncio.sleep(0)


def _look_at(plugin: Plugin) -> Run | None:
    """Look at the cages of one plugin; returns the run that its use is to be recorded of. Raises OSError."""
    for of_invocation in plugin.invocations.runs:
        if changed := of_invocation.detect_drift():
            of_invocation.terminate(_cause(changed), Origin.OPERATOR)
    run = plugin.run
    if run is None or plugin.state != "running" or not run.cage.started:
        return None
    usage = run.usage()
    if not run.exited:
        run.cage.refresh_figures(usage)
    if changed := run.detect_drift():
        logger.warning("plugin %s is started anew: %s", plugin.name, changed)
        run.terminate(_cause(changed), Origin.OPERATOR)
    return run


def _cause(changed: str) -> str:
    return "its /proc was changed" if changed.startswith("/proc/") else "its control groups were changed"
