"""Metrics for Prometheus, taken from the stream of records as it passes the writer.

Nothing is measured twice: a counter here is a count of records in the trail, by the type, plugin and outcome that
they state. Labels come from closed sets (types that were accepted, plugin names that exist, outcomes); a set that
grows beyond ``MAX_LABELS`` is counted under ``other``, so nothing a plugin does can grow the memory. What the host
alone knows (queues, states, limits) comes from it as it is at present, and is no record. Names follow Prometheus' rules
(base units, ``_total`` for counters); those of before that do not have stayed, and are marked as old.
Served as text over HTTP on listening sockets that the supervisor made (a Unix socket, and TCP if configured).
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from isolator import __version__
from isolator.audit.families import CONTENT_TYPE, Child, Family, text
from isolator.audit.record import Incoming
from isolator.audit.schema import AUDIT, RETENTION, ApiCalled, AuditGap, FsDenied, Resources, SyscallDenied
from isolator.ipc.body import Body, omitted

MAX_LABELS = 4096
_REQUEST_TIME = 5.0
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
# Fields of a ``resources`` record and what they are called; anything else there is not a metric.
_RESOURCES = {
    "memory": ("memory_bytes", "Memory of the plugin"),
    "memory_peak": ("memory_peak_bytes", "Most memory of the plugin in its present run"),
    "cpu_us": ("cpu_microseconds", "Old: use isolator_plugin_cpu_seconds_total"),
    "throttled_us": ("throttled_microseconds", "Old: use isolator_plugin_throttled_seconds_total"),
    "tasks": ("tasks", "Processes and threads of the plugin"),
    "open_files": ("open_files", "Open files of the plugin"),
}
_PRESENT_STATE = "present"
_SPENT = ("cpu_us", "throttled_us")
_LIMITS = {
    "memory": ("memory_bytes", "Memory that the plugin may use"),
    "cpu": ("cpu_cores", "Cores that the plugin may use"),
    "tasks": ("tasks", "Processes and threads that the plugin may have"),
    "open_files": ("open_files", "Files that a process of the plugin may have open"),
}
"""Limits that the host sends, and the names and meanings of their metrics."""
_PRESENT = ("memory", "tasks", "open_files")
"""Fields that are 0 once the plugin has ended; the others keep their last value."""


class MetricState(Body):
    """A value of a counter or gauge, or a histogram, on its way to another audit process."""

    name: str
    labels: dict[str, str]
    value: float
    """of a histogram, the sum"""
    buckets: tuple[float, ...] = omitted(default=())
    """of a histogram, the numbers in its buckets"""


class _Present:
    """Metrics of what is so at present, as the host has sent it; nothing of what was stays."""

    def __init__(self) -> None:
        self.plugins: dict[str, dict[str, Any]] = {}
        """By plugin, its state, whether it is ``paused``, its limits, and since when its oldest event waits."""

    def update(self, changed: Mapping[str, Any]) -> None:
        """Take over what has changed, by plugin; None: it is gone."""
        for name, found in changed.items():
            if isinstance(found, dict) and len(self.plugins) < MAX_LABELS:
                self.plugins[name] = found
            else:
                self.plugins.pop(name, None)

    def families(self) -> Iterator[Family]:
        """Make the metrics, for a scrape."""
        build = Family("gauge", "isolator_build_info", "1, with the version of the daemon", ("version",))
        build.of(__version__).set(1)
        yield build
        states = Family("gauge", "isolator_plugin_state", "1 for the plugin's state", ("plugin", "state"))
        paused = Family("gauge", "isolator_plugin_paused", "1 while an operator has paused it", ("plugin",))
        for plugin, found in self.plugins.items():
            states.of(plugin, str(found.get("state"))[:32]).set(1)
            paused.of(plugin).set(found.get("paused") is True)
        yield from (states, paused)
        for limit, (name, meaning) in _LIMITS.items():
            family = Family("gauge", f"isolator_plugin_limit_{name}", meaning, ("plugin",))
            for plugin, found in self.plugins.items():
                if limit in found:
                    family.of(plugin).set(_number(found[limit]))
            yield family
        meaning = "Age of the oldest event that waits; 0: none"
        age = Family("gauge", "isolator_queue_oldest_seconds", meaning, ("plugin",))
        now = time.time()
        for plugin, found in self.plugins.items():
            age.of(plugin).set(max(0.0, now - found["oldest"]) if found.get("oldest") else 0.0)
        yield age


def _counter(name: str, meaning: str, *labels: str) -> Family:
    return Family("counter", f"isolator_{name}", meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Family:
    return Family("gauge", f"isolator_{name}", meaning, labels)


def _histogram(name: str, meaning: str, *labels: str) -> Family:
    return Family("histogram", f"isolator_{name}", meaning, labels, _SECONDS)


class Metrics:
    """Counters and gauges of one daemon, fed by ``observe``."""

    def __init__(self) -> None:
        self._present = _Present()
        self._records = _counter("audit_records", "Records in the trail by type", "type")
        self._summed = _counter("audit_summed_records", "Records counted in summaries by type", "type")
        self._lifetime = _gauge("audit_lifetime_seconds", "How long the trail reaches back at its present pace")
        self._seq = _gauge("audit_seq", "Number of the last durable record")
        self._lost = _counter("audit_lost_records", "Records known to be lost (audit.gap)")
        self._commit = _histogram("audit_commit_seconds", "Write and fdatasync")
        self._blocked = _gauge("audit_blocked", "1 while the trail cannot be written")
        self._accepted = _counter("events_accepted", "Events accepted", "event")
        self._outcomes = _counter("deliveries", "Attempts by outcome", "plugin", "outcome")
        self._latency = _histogram("delivery_seconds", "Request written to reply read", "plugin")
        self._queued = _histogram("queued_seconds", "Accepted to request written", "plugin")
        self._waiting = _gauge("queue_depth", "Deliveries not done with", "plugin")
        self._dead = _counter("dead_letters", "Deliveries given up", "plugin")
        self._lifecycle = _counter("plugin", "Starts, stops, crashes", "plugin", "what")
        self._restarts = _counter("plugin_restarts", "Starts after a crash", "plugin")
        self._running = _gauge("plugin_running", "1 while the plugin runs", "plugin")
        self._network = _counter("network", "DNS queries and connections", "plugin", "what")
        self._traffic = _counter("network_bytes", "Bytes carried", "plugin", "direction")
        self._denials = _counter("denied", "Denied calls, paths, connections", "plugin", "what")
        self._resources = {
            field: _gauge(f"plugin_{name}", meaning, "plugin") for field, (name, meaning) in _RESOURCES.items()
        }
        self._cpu = _counter("plugin_cpu_seconds", "Processor time of the plugin", "plugin")
        held = "Time for which the plugin was held at its cap"
        self._throttled = _counter("plugin_throttled_seconds", held, "plugin")
        self._spent: dict[tuple[str, str], float] = {}
        """By plugin and field, the newest figure in µs of its present run."""
        self._children = 0
        """Children of all families."""
        self._queues: set[str] = set()

    def families(self) -> Iterator[Family]:
        """Every metric with its present values."""
        yield from self._present.families()
        yield from self._by_name().values()

    def pass_on(self) -> tuple[MetricState, ...]:
        """The values of all metrics, for another audit process."""
        values = (
            MetricState(name=name, labels=labels, value=child.value, buckets=tuple(child.counts))
            for name, family in self._by_name().items()
            for labels, child in family.labelled()
        )
        present = (
            MetricState(name=_PRESENT_STATE, labels={"plugin": name, "found": json.dumps(found)}, value=0.0)
            for name, found in self._present.plugins.items()
        )
        return (*values, *present)

    def take_over(self, values: Iterable[MetricState]) -> None:
        """Go on with the values of another audit process."""
        families = self._by_name()
        for one in values:
            if one.name == _PRESENT_STATE:
                self._present.update({one.labels["plugin"]: json.loads(one.labels["found"])})
                continue
            family = families[one.name]
            child = self._of(family, *(one.labels[name] for name in family.names))
            if len(child.counts) != len(one.buckets):
                continue  # the other version counts in other ones
            child.value = one.value if family.kind == "gauge" else child.value + one.value
            child.counts = [mine + theirs for mine, theirs in zip(child.counts, one.buckets, strict=True)]
            if one.name.removeprefix("resources ") in _SPENT:
                self._spent[one.labels["plugin"], one.name.removeprefix("resources ")] = one.value
            if family is self._waiting:
                self._queues.add(one.labels["plugin"])

    def _by_name(self) -> dict[str, Family]:
        every = vars(self) | {f"resources {field}": gauge for field, gauge in self._resources.items()}
        return {name: family for name, family in every.items() if isinstance(family, Family)}

    def observe(self, record: Incoming, *, summed: bool = False) -> None:
        """Count one record, whatever its ``data`` holds; ``summed``: it is in a summary, not in the trail itself."""
        kind, data, plugin = record.type, record.data, record.plugin or ""
        self._of(self._summed if summed else self._records, kind).value += 1.0
        area, _, what = kind.partition(".")
        if area == "event":
            self._event(what, data, plugin)
        elif area == "plugin":
            self._plugin(what, data, plugin)
        elif area == "net":
            self._of(self._network, plugin, what).inc()
            if what == "denied":
                self._of(self._denials, plugin, "network").inc(_number(data.get("count"), 1))
            elif what == "closed":
                self._of(self._traffic, plugin, "out").inc(_number(data.get("sent")))
                self._of(self._traffic, plugin, "in").inc(_number(data.get("received")))
        elif kind in (SyscallDenied.TYPE, FsDenied.TYPE):
            self._of(self._denials, plugin, area).inc(_number(data.get("count"), 1))
        elif kind == ApiCalled.TYPE:
            if data.get("verdict") == "denied":
                self._of(self._denials, plugin, "api").inc()
        elif kind == Resources.TYPE:
            self._of(self._running, plugin).set(1)  # at a stop they come before the record of it
            for field, gauge in self._resources.items():
                if field in data:
                    self._of(gauge, plugin).set(_number(data[field]))
            for field, counter in (("cpu_us", self._cpu), ("throttled_us", self._throttled)):
                self._spend(counter, plugin, field, _number(data.get(field)))
        elif kind == AuditGap.TYPE and (data.get("why") != RETENTION or record.source != AUDIT):
            self._lost.of().inc(_number(data.get("count")))

    def gauges(self, data: dict[str, Any]) -> None:
        """Take present values of the host's, which are no record, by plugin.

        ``queue``: its unfinished deliveries; ``plugins``: of those that have changed its state, its limits, whether it
        is paused, and the Unix time since when its ``oldest`` event waits.
        """
        plugins = data.get("plugins")
        if isinstance(plugins, dict):
            self._present.update(plugins)
            for name in plugins.keys() & self._present.plugins.keys():
                self._of(self._dead, name)  # from 0 on, or the first one would be no increase
        queue = data.get("queue")
        if isinstance(queue, dict):
            for plugin in self._queues - queue.keys():
                self._of(self._waiting, plugin).set(0)
            self._queues = {str(plugin) for plugin in list(queue)[:MAX_LABELS]}
            for plugin in self._queues:
                self._of(self._waiting, plugin).set(_number(queue[plugin]))

    def committed(self, seconds: float, seq: int) -> None:
        """Count a commit that took ``seconds`` and made records up to ``seq`` durable."""
        self._commit.of().observe(seconds)
        self._seq.of().set(seq)

    def set_blocked(self, blocked: bool) -> None:
        """Set whether the trail cannot be written at the moment."""
        self._blocked.of().set(int(blocked))

    def set_lifetime(self, seconds: float) -> None:
        """Set how long the trail reaches back at its present pace."""
        self._lifetime.of().set(seconds)

    def _event(self, what: str, data: dict[str, Any], plugin: str) -> None:
        if what == "accepted":
            self._of(self._accepted, str(data.get("event") or data.get("type") or "")[:64]).inc()
        elif what == "dispatched":
            self._of(self._queued, plugin).observe(_number(data.get("queued_us")) / 1e6)
        elif what == "response":
            self._of(self._outcomes, plugin, str(data.get("outcome", ""))[:32]).inc()
            self._of(self._latency, plugin).observe(_number(data.get("latency_us")) / 1e6)
        elif what == "dead":
            self._of(self._dead, plugin).inc()

    def _plugin(self, what: str, data: dict[str, Any], plugin: str) -> None:
        if what not in ("started", "stopped", "crashed", "failed"):
            return
        self._of(self._lifecycle, plugin, what).inc()
        self._of(self._running, plugin).set(int(what == "started"))
        if what == "started":
            self._spent.update({(plugin, field): 0.0 for field in _SPENT})
        if what == "started" and str(data.get("reason")).startswith("restart"):
            self._of(self._restarts, plugin).inc()
        elif what != "started":
            for field in _PRESENT:
                self._of(self._resources[field], plugin).set(0)

    def _spend(self, counter: Family, plugin: str, field: str, total: float) -> None:
        """Count what a run has spent since its last figure; the figures of another run begin anew."""
        if len(self._spent) > MAX_LABELS:
            self._spent.clear()
        before = self._spent.get((plugin, field), 0.0)
        self._spent[plugin, field] = total
        self._of(counter, plugin).inc((total - before if total >= before else total) / 1e6)

    def _of(self, family: Family, *labels: str) -> Child:
        child = family.children.get(labels)
        if child is None:
            if self._children >= MAX_LABELS:
                labels = ("other",) * len(labels)
            self._children += labels not in family.children
            child = family.of(*labels)
        return child


def _number(value: Any, otherwise: float = 0) -> float:
    return value if isinstance(value, (int, float)) and value >= 0 else otherwise


async def serve_metrics(metrics: Metrics, listener: socket.socket) -> asyncio.Server:
    """Answer HTTP requests on a listening socket (Unix or TCP) with the current metrics."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIME):
                head = await reader.readuntil(b"\r\n\r\n")
                found = head.split(b" ", 2)[:2] in ([b"GET", b"/metrics"], [b"GET", b"/"])
                body = text(metrics.families()).encode() if found else b"only GET /metrics\n"
                kind = CONTENT_TYPE if found else "text/plain"
                status = "200 OK" if found else "404 Not Found"
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a scraper that closed or sent nothing; the next one is served
        finally:
            writer.close()

    listener.setblocking(False)
    if listener.family == socket.AF_UNIX:
        # The supervisor made the socket's name and removes it; from 3.13 on, asyncio would.
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        return await asyncio.start_unix_server(answer, sock=listener, limit=8192, **options)
    return await asyncio.start_server(answer, sock=listener, limit=8192)
