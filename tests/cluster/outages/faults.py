"""Faults of a cluster: ways that are cut, processes that are stopped or killed; two at a time, now and then.

Each lasts for a while and is mended then, whatever happens to the test. ``random`` decides, so a seed tells the order.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos.faults import PROCESSES
from tests.cluster.outages.site import Host, Site
from tests.cluster.outages.stores import Copies, older_database, older_store
from tests.support.nats_servers import Server
from tests.support.processes import family
from tests.support.routed import Machine, Way, both_ways
from tests.support.timeouts import seconds

LONGEST = 30.0
"""Seconds that a fault lasts at most."""
OLDER_DATABASE, OLDER_STORE = "older copy of a host's database", "older copy of a server's store"
_ALONE = {OLDER_DATABASE, OLDER_STORE}
"""Faults beside which there is no other: of two losses at once something is lost."""
_TWO_AT_ONCE = 0.25
_AT_THE_HOLDER = 0.6
"""How likely a fault of a host is one of the plugin's holder."""


@dataclass(frozen=True)
class Done:
    """A fault that is over: its kind, whom it hit, and from when to when, by CLOCK_MONOTONIC."""

    kind: str
    hit: str
    began: float
    ended: float


Fault = tuple[str, object, Callable[[], contextlib.AbstractContextManager[object]]]
"""The kind, what is hit, and what does it and mends it."""


class Faults:
    """What goes wrong. ``holder`` names the host that has the plugin at the moment; ``copies`` are of stores."""

    def __init__(self, site: Site, holder: Callable[[], str], random: random.Random, copies: Copies) -> None:
        self.done: list[Done] = []
        self._site, self._holder, self._random = site, holder, random
        self._copies = copies
        self._hit: list[object] = []
        self._aim = _AT_THE_HOLDER
        self._kinds: dict[str, tuple[int, Callable[[], Fault]]] = {
            "host cut off": (6, self._cut_off),
            "host hears nothing, or is not heard": (4, self._one_way),
            "host without one server": (3, self._one_server),
            "server cut off from servers": (3, self._partition),
            "server gone": (4, self._gone),
            "servers, one way": (4, self._partition_one_way),
            "kill -9 daemon": (5, lambda: self._of_host("kill -9 daemon", self._killed)),
            "daemon stopped in order": (4, lambda: self._of_host("daemon stopped in order", self._ended)),
            "kill -9 process": (6, lambda: self._of_host("kill -9 process", self._process_killed)),
            "SIGSTOP process": (6, lambda: self._of_host("SIGSTOP process", self._process_stopped)),
            "SIGSTOP daemon": (5, lambda: self._of_host("SIGSTOP daemon", self._daemon_stopped)),
            "kill -9 server": (5, lambda: self._of_server("kill -9 server", self._server_killed)),
            "SIGSTOP server": (5, lambda: self._of_server("SIGSTOP server", self._server_stopped)),
            OLDER_DATABASE: (4, lambda: self._of_host(OLDER_DATABASE, self._older_database)),
            OLDER_STORE: (4, lambda: self._of_server(OLDER_STORE, self._older_store)),
        }

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind was."""
        return dict(sorted(Counter(one.kind for one in self.done).items()))

    def one(self, kind: str = "", length: float = 0.0) -> None:
        """Have a fault, or two at once; returns when they are mended. One whose ``kind`` is named hits the holder."""
        self._aim = 1.0 if kind else _AT_THE_HOLDER
        self._have(kind, length, self._random.random() < _TWO_AT_ONCE and not kind)

    def pause(self) -> float:
        """Seconds of calm before the next."""
        return self._random.uniform(0.0, 3.0)

    def _have(self, kind: str, length: float, other: bool) -> None:
        if not kind:
            kinds = {name: one for name, one in self._kinds.items() if not self._hit or name not in _ALONE}
            names, weights = zip(*((name, weight) for name, (weight, _) in kinds.items()), strict=True)
            (kind,) = self._random.choices(names, weights)
        name, target, begin = self._kinds[kind][1]()
        hit = getattr(target, "name", "")
        if any(target is one for one in self._hit):
            return
        length = length or self._random.choice((self._random.uniform(0.5, 6.0), self._random.uniform(6.0, LONGEST)))
        began = time.monotonic()
        self._hit.append(target)
        try:
            with begin():
                if other and kind not in _ALONE:
                    self._have("", length * self._random.uniform(0.3, 1.0), False)
                time.sleep(max(0.0, began + length - time.monotonic()))
        finally:
            self._hit.remove(target)
            self.done.append(Done(name, hit, began, time.monotonic()))

    # Ways

    def _host(self) -> Host:
        holder = [host for host in self._site.hosts if host.name == self._holder()]
        return holder[0] if holder and self._random.random() < self._aim else self._random.choice(self._site.hosts)

    def _ways(self, kind: str, target: object, ways: list[Way]) -> Fault:
        return kind, target, lambda: self._site.network.cut(ways)

    def _cut_off(self) -> Fault:
        host = self._host()
        return self._ways("host cut off", host, both_ways([host.machine], self._site.server_machines))

    def _one_way(self) -> Fault:
        host = self._host()
        others: list[tuple[Machine, Machine]] = [(host.machine, server) for server in self._site.server_machines]
        heard = self._random.random() < 0.5
        ways = others if heard else [(server, machine) for machine, server in others]
        return self._ways("host is not heard" if heard else "host hears nothing", host, ways)

    def _one_server(self) -> Fault:
        host, server = self._host(), self._random.choice(self._site.server_machines)
        return self._ways("host without one server", server, both_ways([host.machine], [server]))

    def _partition(self) -> Fault:
        one = self._random.choice(self._site.server_machines)
        ways = both_ways([one], self._site.server_machines)
        return self._ways("server cut off from servers", one, ways)

    def _gone(self) -> Fault:
        """A server whose machine is there no more, and does not say so."""
        one = self._random.choice(self._site.server_machines)
        return self._ways("server gone", one, both_ways([one], self._site.network.machines))

    def _partition_one_way(self) -> Fault:
        one = self._random.choice(self._site.server_machines)
        ways = [(one, other) for other in self._site.server_machines if other is not one]
        if self._random.random() < 0.5:
            ways = [(b, a) for a, b in ways]
        return self._ways("servers, one way", one, ways)

    # Daemons

    def _of_host(self, kind: str, act: Callable[[Host], contextlib.AbstractContextManager[object]]) -> Fault:
        host = self._host()
        return kind, host, lambda: act(host)

    @contextlib.contextmanager
    def _killed(self, host: Host) -> Iterator[None]:
        host.daemon.kill()
        try:
            yield
        finally:
            host.daemon.start(seconds(90))

    @contextlib.contextmanager
    def _ended(self, host: Host) -> Iterator[None]:
        """Stop a daemon as an operator does: it hands over what it holds."""
        assert host.daemon.stop(seconds(90)) == 0
        try:
            yield
        finally:
            host.daemon.start(seconds(90))

    @contextlib.contextmanager
    def _process_killed(self, host: Host) -> Iterator[None]:
        pid = host.daemon.service_pid(self._random.choice([*PROCESSES.values()]), missing_ok=True)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        yield

    @contextlib.contextmanager
    def _process_stopped(self, host: Host) -> Iterator[None]:
        assert host.daemon.process is not None
        name = self._random.choice(["supervisor", *PROCESSES])
        pid = host.daemon.process.pid
        if name != "supervisor":
            pid = host.daemon.service_pid(PROCESSES[name], missing_ok=True)
        with _stopped([pid] if pid else []):
            yield

    @contextlib.contextmanager
    def _daemon_stopped(self, host: Host) -> Iterator[None]:
        """Stop all that a daemon consists of, cages too, as a machine does that is paused while its clocks go on."""
        assert host.daemon.process is not None
        pids = family(host.daemon.process.pid)
        self._random.shuffle(pids)
        with _stopped(pids):
            yield

    def _older_database(self, host: Host) -> contextlib.AbstractContextManager[None]:
        return older_database(self._site, host, self._copies)

    # Servers

    def _older_store(self, server: Server) -> contextlib.AbstractContextManager[None]:
        return older_store(self._site, server, self._copies)

    def _of_server(self, kind: str, act: Callable[[Server], contextlib.AbstractContextManager[object]]) -> Fault:
        server = self._random.choice(self._site.servers)
        return kind, server, lambda: act(server)

    @contextlib.contextmanager
    def _server_killed(self, server: Server) -> Iterator[None]:
        server.kill()
        try:
            yield
        finally:
            server.start()

    @contextlib.contextmanager
    def _server_stopped(self, server: Server) -> Iterator[None]:
        server.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.signal(signal.SIGCONT)


@contextlib.contextmanager
def _stopped(pids: list[int]) -> Iterator[None]:
    """Stop processes, and let those that are still there go on, in the order of the list."""
    with contextlib.ExitStack() as stack:
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                stack.callback(os.close, fd)
                stack.callback(_send, fd, signal.SIGCONT)
                _send(fd, signal.SIGSTOP)
        yield


def _send(fd: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, number)
