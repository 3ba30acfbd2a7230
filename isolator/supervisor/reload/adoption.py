"""Runs from before an exec: each goes on, or is ended, on record; what is wrong with one is its own matter.

A run whose take-over fails is killed by what the journal and its state name. Its plugin is started again as after a
crash that was no fault of its own.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from isolator.audit.schema import ExecEnded, PluginCrashed, RecordData, RunEnded
from isolator.errors import UnavailableError
from isolator.ipc.handover import CageState, DaemonState, PluginKept, RunnerState, RunState, descriptors
from isolator.ipc.messages import InvocationEnded, Origin
from isolator.ipc.tasks import Tasks, report
from isolator.linux.descriptors import close_all
from isolator.recovery.daemon import clear_cage

if TYPE_CHECKING:
    from isolator.launcher.client import Launcher
    from isolator.supervisor.lifecycle.plugin import Plugin
    from isolator.supervisor.plugins import PluginTable
    from isolator.supervisor.run import RunContext
    from isolator.supervisor.runners.runners import Runners

_CAUSE = "not taken over when the daemon was reloaded"
_logger = logging.getLogger(__name__)


class Adoption:
    """Take-over of the state ``before`` by the new image; ``kept_by``: the launcher of then."""

    def __init__(self, context: RunContext, before: DaemonState, kept_by: Launcher) -> None:
        self._context, self._before, self._kept_by = context, before, kept_by
        self._tasks = Tasks()
        self._named = Counter(descriptors(before))

    def plugins(self, table: PluginTable) -> int:
        """Have every plugin go on from where it was; returns the number of runs that do."""
        return sum(self._plugin(one, table.plugins.get(one.name)) for one in self._before.plugins)

    def _plugin(self, one: PluginKept, plugin: Plugin | None) -> int:
        runs = [*([one.run] if one.run is not None else []), *(invocation.run for invocation in one.invocations)]
        problems = dict.fromkeys((run.id for run in runs), "the plugin cannot be read any more")
        if plugin is not None:
            try:
                problems = plugin.take_over(one, self._kept_by)
            except Exception as error:  # whatever it was, the others go on
                problems = dict.fromkeys(problems, self._fault(one.name, error))
        known = {run.id for run in plugin.runs} if plugin is not None else set()
        problems |= {run.id: "nobody wants it" for run in runs if run.id not in known | problems.keys()}
        for lost, problem in problems.items():
            _logger.error("run %s of plugin %s was not taken over: %s", lost, one.name, problem)
        if one.run is not None and one.run.id not in known:
            self._end(one.name, one.run, PluginCrashed(cause=_CAUSE, origin=Origin.DAEMON, reason=problems[one.run.id]))
        for invocation in one.invocations:
            if (run := invocation.run).id not in known:
                self._end(one.name, run, ExecEnded(cause=_CAUSE, origin=Origin.DAEMON, reason=problems[run.id]))
                ended = InvocationEnded(
                    name=one.name, run=run.id, exit_code=None, signal=None, cause=_CAUSE, origin=Origin.DAEMON
                )
                self._context.host.invocation_ended(ended)
        if plugin is not None and one.wanted and not plugin.wanted:
            plugin.start_again(one.run.id if one.run is not None else None, "; ".join(problems.values()))
        return len(runs) - len(problems)

    def _end(self, name: str, run: RunState | RunnerState, record: RecordData, fds: Iterable[int] = ()) -> None:
        """End a run of which nothing was taken over, and put that on record."""
        self._clear(f"{name}.{run.id}", run.cage, fds or descriptors(run))
        self._context.broker.forget(run.id)
        self._context.audit.record(record, plugin=name, run=run.id)

    def runs(self, runners: Runners | None) -> int:
        """Have the runs of users go on; returns the number of those that do."""
        adopted = 0
        if runners is not None and self._before.runners is not None:
            for one, problem in runners.take_over(self._before.runners, self._kept_by):
                adopted += not problem
                if problem:
                    name = f"_run.{one.uid}"
                    _logger.error("run %s of %s was not taken over: %s", one.id, name, problem)
                    # The connection and what the caller has sent are closed apart.
                    fds = [*descriptors(one.cage), one.listener, one.lock]
                    self._end(name, one, RunEnded(cause=f"{_CAUSE}: {problem}"[:512]), fds)
        return adopted

    async def change_launchers(self, table: PluginTable, runners: Runners | None) -> None:
        """Have the new launcher keep every cage, and kill the one before, which would end them, and which may hang."""
        cages = [run.cage for plugin in table.plugins.values() for run in plugin.runs]
        for cage in (*cages, *(runners.cages if runners is not None else ())):
            try:
                await cage.be_kept_by(self._context.runtime.launcher)
            except (FileNotFoundError, UnavailableError):
                pass  # it has ended, and its group is gone; or a launcher has died, and its watch ends the runs
            except Exception as error:  # whatever it was, the others are kept
                report(asyncio.get_running_loop(), f"change of the launcher of {cage.spec.leaf}", error)
                cage.kill()
        self._kept_by.kill()
        self._kept_by.close()

    def _clear(self, name: str, cage: CageState, fds: Iterable[int]) -> None:
        """Kill a cage, and close its descriptors but those that the state names in another place, too."""
        loop = asyncio.get_running_loop()
        own = [fd for fd in fds if fd >= 0 and self._named[fd] == 1]
        for fd in own:
            loop.remove_reader(fd)
        gc.collect()  # an object that was half made closes its own now, not later, when the number is another's
        close_all(own)
        self._tasks.run(f"end of {name}", clear_cage(self._context.runtime.journal, name, cage.pid))

    @staticmethod
    def _fault(name: str, error: Exception) -> str:
        report(asyncio.get_running_loop(), f"take-over of plugin {name}", error)
        return f"{type(error).__name__}: {error}"
