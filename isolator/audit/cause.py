"""Causes: connections and denials get the ids of the events that were in flight in their plugin.

An event is in flight in a plugin from the moment its ``event.dispatched`` was recorded (before the request is
written) until its ``event.response`` was; likewise a user's call of a tool, from ``tool.started`` to ``tool.called``,
whose id is taken for an event's. Both carry the CLOCK_MONOTONIC of the host process, and so does
everything that the broker and the supervisor report, so a record belongs to the windows that were open *when the
thing happened*, not when its record arrived. The writer reads the host's socket before it handles another's
record; therefore every window that can matter is known by then. A finished window stays known for a while, as the
record of a connection may arrive after that of the reply which the plugin sent right behind it.

A record that sums up several things (``count``) tells when the first happened and gets every event in between.
``net.closed`` belongs to whatever ``net.connect`` of the same ``data.flow`` belonged to.

Thousands of events a second pass here: open windows are found by what they are of, and finished ones stand in the
order in which they ended, so that the old ones leave at one end and a search stops early.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from isolator.audit import schema
from isolator.audit.record import Incoming
from isolator.base.structs import field, struct_class
from isolator.ipc.body import Body

TAGGED = frozenset(type for type, kind in schema.RECORDS.items() if kind.CAUSED)
_BEGINS = (schema.EventDispatched.TYPE, schema.ToolStarted.TYPE)
_ENDS = (schema.EventResponse.TYPE, schema.ToolCalled.TYPE)
_LINGER_NS = 30 * 10**9
_MAX_OPEN_NS = 3600 * 10**9
_MAX_WINDOWS = 4096
"""Per plugin, open and finished each; far above what can be in flight, so a confused host cannot fill the memory."""
_MAX_FLOWS = 16384
_FOREVER = 1 << 62

_Causes = tuple[tuple[str, str | None], ...]
"""Events and their deliveries."""


class WindowState(Body):
    """A delivery that is or was in flight, on its way to another writer."""

    plugin: str
    event: str
    delivery: str | None
    run: str | None
    start: int
    end: int
    """beyond all time: it is in flight"""


class FlowCause(Body):
    """The events that a connection belongs to, on their way to another writer."""

    run: str | None
    flow: str
    events: tuple[str, ...]
    deliveries: tuple[str | None, ...]


class CauseState(Body):
    """State of the causes, on its way to another writer."""

    windows: tuple[WindowState, ...]
    flows: tuple[FlowCause, ...]


class Window:
    """One delivery in flight; times are CLOCK_MONOTONIC in ns."""

    __slots__ = ("delivery_id", "end", "event_id", "run", "start")

    def __init__(
        self, event_id: str, delivery_id: str | None, run: str | None, start: int, end: int = _FOREVER
    ) -> None:
        self.event_id, self.delivery_id, self.run, self.start, self.end = event_id, delivery_id, run, start, end


@struct_class()
class _Windows:
    """Windows of one plugin."""

    open: dict[tuple[str, str | None], Window] = field(default_factory=dict)
    """In the order of their starts."""
    finished: deque[Window] = field(default_factory=lambda: deque(maxlen=_MAX_WINDOWS))
    """In the order of their ends."""

    def begin(self, window: Window) -> None:
        key = (window.event_id, window.delivery_id)
        if key in self.open:
            self.finish(key, window.start)
        self.open[key] = window
        oldest = next(iter(self.open.values()))
        if oldest.start <= window.start - _MAX_OPEN_NS or len(self.open) > _MAX_WINDOWS:
            del self.open[oldest.event_id, oldest.delivery_id]

    def finish(self, key: tuple[str, str | None], at: int) -> None:
        window = self.open.pop(key, None)
        if window is not None:
            window.end = at
            self.finished.append(window)
        while self.finished and self.finished[0].end <= at - _LINGER_NS:
            self.finished.popleft()

    def between(self, began: int, at: int, run: str | None) -> list[Window]:
        """Windows that were open at some moment from ``began`` to ``at``, in the order of their starts."""
        found = list(self.open.values())
        for window in reversed(self.finished):
            if window.end < began:
                break
            found.append(window)
        found = [w for w in found if w.start <= at and (run is None or w.run is None or run == w.run)]
        return sorted(found, key=lambda w: w.start)


class Causes:
    """Windows of every plugin: ``observe`` takes the host's records, ``tag`` marks those of others."""

    def __init__(self) -> None:
        self._windows: dict[str, _Windows] = {}
        self._flows: OrderedDict[tuple[str | None, str], _Causes] = OrderedDict()

    def observe(self, record: Incoming, now: int) -> None:
        """Take note of the begin and the end of a delivery or a tool's call; ``now`` stands in for a missing time."""
        if record.plugin is None or record.event_id is None:
            return
        at = now if record.happened is None else record.happened
        if record.type in _BEGINS:
            windows = self._windows.get(record.plugin)
            if windows is None:
                windows = self._windows[record.plugin] = _Windows()
            windows.begin(Window(record.event_id, record.delivery_id, record.run, at))
        elif record.type in _ENDS and record.plugin in self._windows:
            self._windows[record.plugin].finish((record.event_id, record.delivery_id), at)

    def pass_on(self) -> CauseState:
        """Everything for another writer: by plugin the finished windows in the order of their ends, then the others."""
        windows = (
            WindowState(plugin=plugin, event=w.event_id, delivery=w.delivery_id, run=w.run, start=w.start, end=w.end)
            for plugin, of in self._windows.items()
            for w in (*of.finished, *of.open.values())
        )
        flows = (
            FlowCause(run=run, flow=flow, events=tuple(e for e, _ in causes), deliveries=tuple(d for _, d in causes))
            for (run, flow), causes in self._flows.items()
        )
        return CauseState(windows=tuple(windows), flows=tuple(flows))

    def take_over(self, state: CauseState) -> None:
        """Go on with what another writer knew."""
        self._windows.clear()
        for one in state.windows:
            window = Window(one.event, one.delivery, one.run, one.start, one.end)
            of = self._windows.setdefault(one.plugin, _Windows())
            if one.end == _FOREVER:
                of.open[window.event_id, window.delivery_id] = window
            else:
                of.finished.append(window)
        for flow in state.flows:
            self._flows[flow.run, flow.flow] = tuple(zip(flow.events, flow.deliveries, strict=True))

    def host_restarted(self, now: int) -> None:
        """Finish every window: the events in flight were those of the old host process."""
        for windows in self._windows.values():
            for key in list(windows.open):
                windows.finish(key, now)

    def tag(self, record: Incoming, now: int) -> None:
        """Give ``record`` the event in flight, or the list of them when there are several."""
        if record.event_id is not None or record.plugin is None or record.type not in TAGGED:
            return
        flow = record.data.get("flow")
        key = (record.run, str(flow))
        if record.type == schema.NetClosed.TYPE and flow is not None and key in self._flows:
            causes = self._flows.pop(key)
        else:
            at = now if record.happened is None else record.happened
            began = at if record.began is None else min(record.began, at)
            causes = self._open_between(record.plugin, record.run, began, at)
            if record.type == schema.NetConnect.TYPE and flow is not None:
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
        windows = self._windows.get(plugin)
        if windows is None:
            return ()
        return tuple((window.event_id, window.delivery_id) for window in windows.between(began, at, run))
