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
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from isolator import __version__
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


class _Present(Collector):
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

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Make the metrics, for a scrape."""
        build = GaugeMetricFamily("isolator_build_info", "1, with the version of the daemon", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        states = GaugeMetricFamily("isolator_plugin_state", "1 for the plugin's state", labels=["plugin", "state"])
        for plugin, found in self.plugins.items():
            states.add_metric([plugin, str(found.get("state"))[:32]], 1)
        yield states
        paused = GaugeMetricFamily("isolator_plugin_paused", "1 while an operator has paused it", labels=["plugin"])
        for plugin, found in self.plugins.items():
            paused.add_metric([plugin], int(found.get("paused") is True))
        yield paused
        for limit, (name, meaning) in _LIMITS.items():
            family = GaugeMetricFamily(f"isolator_plugin_limit_{name}", meaning, labels=["plugin"])
            for plugin, found in self.plugins.items():
                if limit in found:
                    family.add_metric([plugin], _number(found[limit]))
            yield family
        age = GaugeMetricFamily(
            "isolator_queue_oldest_seconds", "Age of the oldest event that waits; 0: none", labels=["plugin"]
        )
        now = time.time()
        for plugin, found in self.plugins.items():
            age.add_metric([plugin], max(0.0, now - found["oldest"]) if found.get("oldest") else 0.0)
        yield age


class Metrics:
    """Counters and gauges of one daemon, fed by ``observe``."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # its own
        self.registry = CollectorRegistry()
        to = self.registry
        self._present = _Present()
        to.register(self._present)
        self._records = Counter("isolator_audit_records", "Records in the trail by type", ["type"], registry=to)
        self._summed = Counter(
            "isolator_audit_summed_records", "Records counted in summaries by type", ["type"], registry=to
        )
        self._lifetime = Gauge(
            "isolator_audit_lifetime_seconds", "How long the trail reaches back at its present pace", registry=to
        )
        self._seq = Gauge("isolator_audit_seq", "Number of the last durable record", registry=to)
        self._lost = Counter("isolator_audit_lost_records", "Records known to be lost (audit.gap)", registry=to)
        self._commit = Histogram("isolator_audit_commit_seconds", "Write and fdatasync", buckets=_SECONDS, registry=to)
        self._blocked = Gauge("isolator_audit_blocked", "1 while the trail cannot be written", registry=to)
        self._accepted = Counter("isolator_events_accepted", "Events accepted", ["event"], registry=to)
        self._outcomes = Counter("isolator_deliveries", "Attempts by outcome", ["plugin", "outcome"], registry=to)
        self._latency = Histogram(
            "isolator_delivery_seconds", "Request written to reply read", ["plugin"], buckets=_SECONDS, registry=to
        )
        self._queued = Histogram(
            "isolator_queued_seconds", "Accepted to request written", ["plugin"], buckets=_SECONDS, registry=to
        )
        self._waiting = Gauge("isolator_queue_depth", "Deliveries not done with", ["plugin"], registry=to)
        self._dead = Counter("isolator_dead_letters", "Deliveries given up", ["plugin"], registry=to)
        self._lifecycle = Counter("isolator_plugin", "Starts, stops, crashes", ["plugin", "what"], registry=to)
        self._restarts = Counter("isolator_plugin_restarts", "Starts after a crash", ["plugin"], registry=to)
        self._running = Gauge("isolator_plugin_running", "1 while the plugin runs", ["plugin"], registry=to)
        self._network = Counter("isolator_network", "DNS queries and connections", ["plugin", "what"], registry=to)
        self._traffic = Counter("isolator_network_bytes", "Bytes carried", ["plugin", "direction"], registry=to)
        self._denials = Counter("isolator_denied", "Denied calls, paths, connections", ["plugin", "what"], registry=to)
        self._resources = {
            field: Gauge(f"isolator_plugin_{name}", meaning, ["plugin"], registry=to)
            for field, (name, meaning) in _RESOURCES.items()
        }
        self._cpu = Counter("isolator_plugin_cpu_seconds", "Processor time of the plugin", ["plugin"], registry=to)
        self._throttled = Counter(
            "isolator_plugin_throttled_seconds",
            "Time for which the plugin was held at its cap",
            ["plugin"],
            registry=to,
        )
        self._spent: dict[tuple[str, str], float] = {}
        """By plugin and field, the newest figure in µs of its present run."""
        self._children: dict[tuple[Any, ...], Any] = {}
        self._queues: set[str] = set()

    def pass_on(self) -> tuple[MetricState, ...]:
        """The values of all metrics, for another audit process."""
        values = (
            MetricState(name=name, labels=dict(sample.labels), value=sample.value)
            for name, metric in self._by_name(Counter, Gauge).items()
            for family in metric.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        )
        histograms = (
            MetricState(
                name=name, labels=labels, value=child._sum.get(), buckets=tuple(b.get() for b in child._buckets)
            )
            for name, metric in self._by_name(Histogram).items()
            for labels, child in _histograms(metric)
        )
        present = (
            MetricState(name=_PRESENT_STATE, labels={"plugin": name, "found": json.dumps(found)}, value=0.0)
            for name, found in self._present.plugins.items()
        )
        return (*values, *histograms, *present)

    def take_over(self, values: Iterable[MetricState]) -> None:
        """Go on with the values of another audit process."""
        metrics = self._by_name(Counter, Gauge, Histogram)
        for one in values:
            if one.name == _PRESENT_STATE:
                self._present.update({one.labels["plugin"]: json.loads(one.labels["found"])})
                continue
            metric = metrics[one.name]
            child = metric.labels(**one.labels) if one.labels else metric
            if isinstance(child, Histogram):
                if len(child._buckets) == len(one.buckets):  # else the other version counts in other ones
                    child._sum.inc(one.value)
                    for bucket, count in zip(child._buckets, one.buckets, strict=True):
                        bucket.inc(count)
            elif isinstance(child, Gauge):
                child.set(one.value)
            else:
                child.inc(one.value)
            if one.name.removeprefix("resources ") in _SPENT:
                self._spent[one.labels["plugin"], one.name.removeprefix("resources ")] = one.value
            if metric is self._waiting:
                self._queues.add(one.labels["plugin"])

    def _by_name(self, *kinds: type[Any]) -> dict[str, Any]:
        every = vars(self) | {f"resources {field}": gauge for field, gauge in self._resources.items()}
        return {name: metric for name, metric in every.items() if isinstance(metric, kinds)}

    def observe(self, record: Incoming, *, summed: bool = False) -> None:
        """Count one record, whatever its ``data`` holds; ``summed``: it is in a summary, not in the trail itself."""
        kind, data, plugin = record.type, record.data, record.plugin or ""
        self._of(self._summed if summed else self._records, kind).inc()
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
        elif kind == AuditGap.TYPE and (data.get("why") != RETENTION or record.origin != AUDIT):
            self._lost.inc(_number(data.get("count")))

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
        self._commit.observe(seconds)
        self._seq.set(seq)

    def set_blocked(self, blocked: bool) -> None:
        """Set whether the trail cannot be written at the moment."""
        self._blocked.set(int(blocked))

    def set_lifetime(self, seconds: float) -> None:
        """Set how long the trail reaches back at its present pace."""
        self._lifetime.set(seconds)

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

    def _spend(self, counter: Counter, plugin: str, field: str, total: float) -> None:
        """Count what a run has spent since its last figure; the figures of another run begin anew."""
        if len(self._spent) > MAX_LABELS:
            self._spent.clear()
        before = self._spent.get((plugin, field), 0.0)
        self._spent[plugin, field] = total
        self._of(counter, plugin).inc((total - before if total >= before else total) / 1e6)

    def _of(self, metric: Any, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            if len(self._children) >= MAX_LABELS:
                labels = ("other",) * len(labels)
            child = self._children[(metric, *labels)] = metric.labels(*labels)
        return child


def _histograms(metric: Histogram) -> Iterator[tuple[dict[str, str], Histogram]]:
    """A histogram by its labels; the library has no public way to its values, but cumulated and among their names."""
    if not metric._labelnames:
        yield {}, metric
        return
    for values, child in list(metric._metrics.items()):
        yield dict(zip(metric._labelnames, values, strict=True)), cast(Histogram, child)


def _number(value: Any, otherwise: float = 0) -> float:
    return value if isinstance(value, (int, float)) and value >= 0 else otherwise


async def serve_metrics(metrics: Metrics, listener: socket.socket) -> asyncio.Server:
    """Answer HTTP requests on a listening socket (Unix or TCP) with the current metrics."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIME):
                head = await reader.readuntil(b"\r\n\r\n")
                found = head.split(b" ", 2)[:2] in ([b"GET", b"/metrics"], [b"GET", b"/"])
                body = generate_latest(metrics.registry) if found else b"only GET /metrics\n"
                kind = CONTENT_TYPE_LATEST if found else "text/plain"
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
