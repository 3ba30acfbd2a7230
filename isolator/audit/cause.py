"""Which event made a plugin do it: connections and denials get the ids of the events in flight.

An event is in flight in a plugin from the moment its ``event.dispatched`` was recorded (before the request is
written) until its ``event.response`` was. Both carry the CLOCK_MONOTONIC of the host process, and so does
everything that the broker and the supervisor report, so a record belongs to the windows that were open *when the
thing happened*, not when its record arrived. The writer reads the host's socket before it handles another's
record; therefore every window that can matter is known by then. A finished window stays known for a while, as the
record of a connection may arrive after that of the reply which the plugin sent right behind it.

A record that sums up several things (``count``) tells when the first happened and gets every event in between.
``net.closed`` belongs to whatever ``net.connect`` of the same ``data.flow`` belonged to.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from isolator.audit.record import Incoming

TAGGED = ("net.", "syscall.denied", "fs.denied", "api.called", "plugin.crashed")
_LINGER_NS = 30 * 10**9
_MAX_OPEN_NS = 3600 * 10**9
_MAX_WINDOWS = 4096
"""Per plugin; far above what can be in flight, so a confused host cannot fill the memory."""
_MAX_FLOWS = 16384
_FOREVER = 1 << 62

_Causes = tuple[tuple[str, str | None], ...]
"""Events and their deliveries."""


@dataclass
class Window:
    """One delivery in flight; times are CLOCK_MONOTONIC in ns."""

    event_id: str
    delivery_id: str | None
    run: str | None
    start: int
    end: int = _FOREVER


class Causes:
    """The windows of every plugin; fed with the host's records, asked for everybody else's."""

    def __init__(self) -> None:
        self._windows: dict[str, list[Window]] = {}
        self._flows: OrderedDict[tuple[str | None, str], _Causes] = OrderedDict()

    def observe(self, record: Incoming, now: int) -> None:
        """Take note of ``event.dispatched`` and ``event.response``; ``now`` stands in for a missing time."""
        if record.plugin is None or record.event_id is None:
            return
        at = now if record.happened is None else record.happened
        if record.type == "event.dispatched":
            windows = self._windows.setdefault(record.plugin, [])
            self._finish(windows, record.event_id, record.delivery_id, at)
            windows.append(Window(record.event_id, record.delivery_id, record.run, at))
            self._forget(windows, at)
        elif record.type == "event.response":
            self._finish(self._windows.get(record.plugin, []), record.event_id, record.delivery_id, at)

    def host_gone(self, now: int) -> None:
        """A new host process: whatever the old one had in flight is no longer."""
        for windows in self._windows.values():
            for window in windows:
                window.end = min(window.end, now)

    def tag(self, record: Incoming, now: int) -> None:
        """Give ``record`` the event in flight, or the list of them when there are several."""
        if record.event_id is not None or record.plugin is None or not record.type.startswith(TAGGED):
            return
        flow = record.data.get("flow")
        key = (record.run, str(flow))
        if record.type == "net.closed" and flow is not None and key in self._flows:
            causes = self._flows.pop(key)
        else:
            at = now if record.happened is None else record.happened
            began = at if record.began is None else min(record.began, at)
            causes = self._open_between(record.plugin, record.run, began, at)
            if record.type == "net.connect" and flow is not None:
                self._flows[key] = causes
                if len(self._flows) > _MAX_FLOWS:
                    self._flows.popitem(last=False)
        if len(causes) == 1:
            record.event_id = causes[0][0]
            record.delivery_id = record.delivery_id or causes[0][1]
        elif causes:
            record.data = {
                **record.data,
                "event_ids": [event for event, _ in causes],
                "delivery_ids": [delivery for _, delivery in causes],
            }

    def _open_between(self, plugin: str, run: str | None, began: int, at: int) -> _Causes:
        return tuple(
            (window.event_id, window.delivery_id)
            for window in self._windows.get(plugin, ())
            if window.start <= at and began <= window.end and (run is None or window.run is None or run == window.run)
        )

    @staticmethod
    def _finish(windows: list[Window], event_id: str, delivery_id: str | None, at: int) -> None:
        for window in windows:
            if window.end == _FOREVER and (window.event_id, window.delivery_id) == (event_id, delivery_id):
                window.end = at

    @staticmethod
    def _forget(windows: list[Window], at: int) -> None:
        if len(windows) > 8:
            windows[:] = [
                w for w in windows if (w.end > at - _LINGER_NS if w.end != _FOREVER else w.start > at - _MAX_OPEN_NS)
            ][-_MAX_WINDOWS:]
