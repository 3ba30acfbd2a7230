"""The records of one run's connections and questions: those of which many alike may come are counted."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from isolator.audit.client import AuditClient
from isolator.audit.schema import NetDenied, NetQuery, RecordData
from isolator.broker import nflog
from isolator.broker.dns import QUERIES_PER_SECOND, QUERY_BURST
from isolator.broker.repeats import RepeatCounter
from isolator.broker.virtual import VirtualPool
from isolator.linux.netlink import parse_nflog
from isolator.policy.denial import DenialRule
from isolator.policy.destinations import Rules

KERNEL_LATE = 0.1
"""Seconds by which a refusal of the kernel may be read after the plugin felt it: record and reset leave together."""
QUESTION_KEYS = 4 * (QUERY_BURST + QUERIES_PER_SECOND)
"""Different questions that are counted one by one; a cage cannot ask that many between two flushes."""


class Records:
    """Writes the records of one run. ``clock``: the event loop's, in seconds. ``busy``: as in `RepeatCounter`."""

    def __init__(
        self, audit: AuditClient, plugin: str, run: str, clock: Callable[[], float], busy: Callable[[], None]
    ) -> None:
        self._audit, self._plugin, self._run = audit, plugin, run
        self._repeats = RepeatCounter(self.write, clock, busy=busy)
        # The rate of questions bounds these: each name that is looked at has a record of its own.
        self._questions = RepeatCounter(self.write, clock, keys=QUESTION_KEYS, busy=busy)
        self.count = self._repeats.add

    def write(
        self, record: RecordData, *, since_ns: int | None = None, happened_ns: int | None = None, urgent: bool = False
    ) -> None:
        """Write one record; the arguments are those of ``AuditClient.record``."""
        self._audit.record(
            record, plugin=self._plugin, run=self._run, since_ns=since_ns, happened_ns=happened_ns, urgent=urgent
        )

    def query(self, name: str, kind: str, verdict: str, rule: str, count: int = 1) -> None:
        """Count a question to the name server."""
        self._questions.add(NetQuery(name=name or None, type=kind or None, verdict=verdict, rule=rule), count=count)

    def flush(self, *, everything: bool = False) -> bool:
        """Write the counts that are due, or all; returns whether others will be."""
        self._repeats.flush(everything=everything)
        self._questions.flush(everything=everything)
        return bool(self._repeats or self._questions)

    def read_refusals(self, log: socket.socket, rules: Rules, pool: VirtualPool) -> None:
        """Count the packets that the ruleset refused before they reached a listener."""
        for _ in range(64):
            try:
                packet = log.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self.count(NetDenied(rule=DenialRule.RECORDS_LOST))
                    continue
                return
            for prefix, payload in parse_nflog(packet):
                refused = nflog.read(prefix, payload)
                self.count(nflog.describe(refused, rules, pool), count=refused.count, late=KERNEL_LATE)
