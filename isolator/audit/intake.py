"""Intake: what becomes of each line of a source, on its way from a packet into the chain.

Thousands of records a second pass here. The host's socket is read empty before a packet of any other source comes, so
the dispatch that caused a connection is known when the connection's record comes by (`cause.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time

from isolator.audit.budget import Budgets
from isolator.audit.cause import TAGGED, Causes
from isolator.audit.client import utc_now
from isolator.audit.log import Chain
from isolator.audit.metrics import Metrics
from isolator.audit.notable import Notable
from isolator.audit.record import GAUGES, Incoming, RejectedError, parse_incoming
from isolator.audit.schema import HOST, AuditGap


class Intake:
    """Checks the lines of packets, gives their records the event in flight, and writes or counts each."""

    def __init__(self, chain: Chain, metrics: Metrics) -> None:
        self.chain = chain
        self.causes = Causes()
        self.budgets = Budgets()
        self._metrics = metrics
        self._notable = Notable(logging.getLogger("isolator.audit"))
        self._awaited: dict[str, str] = {}
        """By source, the number that its next record should have."""
        chain.sum_up = self._last_summaries

    def take(self, source: str, packet: bytes) -> int:
        """Take the records of a packet; returns the number of its lines, taken or refused."""
        now, is_host = time.monotonic_ns(), source == HOST
        chain, causes, admit, note, observe = (
            self.chain, self.causes, self.budgets.admit, self._notable.note, self._metrics.observe
        )  # fmt: skip
        refused: dict[str, list[bytes]] = {}
        awaited = self._awaited.get(source, "")
        session, number = _parts(awaited)
        lines = packet.split(b"\n")
        for line in lines:
            if is_host and line.startswith(GAUGES):
                self._take_gauges(line)
                continue
            try:
                record = parse_incoming(source, line, awaited)
                if record.number and record.number != awaited and not self._is_new(record, now):
                    continue
                if is_host:
                    causes.observe(record, now)
                if record.type in TAGGED:
                    causes.tag(record, now)
                note(record)
                written = admit(record, source)
                if written:
                    chain.append(record)
                else:
                    chain.count(record)
            except RejectedError as error:
                refused.setdefault(str(error), []).append(line)
                continue
            observe(record, summed=not written)
            if record.number:
                if record.number != awaited:
                    session, number = _parts(record.number)
                number += 1
                awaited = f"{session}:{number}"
        self._awaited[source] = awaited
        for why, those in refused.items():
            self.append_gap(
                AuditGap(
                    count=len(those),
                    why=f"refused: {why}",
                    source=source,
                    sha256=hashlib.sha256(those[0]).hexdigest(),
                    text=those[0][:512].decode("ascii", "replace"),
                )
            )
        return len(lines)

    def append_gap(self, gap: AuditGap) -> None:
        """Append a record of the writer's own about the trail."""
        self._append(Incoming(utc_now(), gap.TYPE, data=gap.data))

    def sum_up(self, *, everything: bool = False) -> None:
        """Write the summaries that are due, or all."""
        for summary in self.budgets.due(everything=everything):
            self._append(summary)

    def _append(self, record: Incoming) -> None:
        self.chain.append(record)
        self._metrics.observe(record)

    def _last_summaries(self) -> list[Incoming]:
        """The summaries that a full file ends with."""
        summaries = self.budgets.due(everything=True)
        for summary in summaries:
            self._metrics.observe(summary)
        return summaries

    def _take_gauges(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            self._metrics.gauges(json.loads(line).get("gauges"))

    def _is_new(self, record: Incoming, now: int) -> bool:
        """Whether a record whose number is not the awaited one is not in the trail yet; records how many were lost."""
        session, number = _parts(record.number)
        before, last = _parts(self.chain.origins.get(record.source, ""))
        if session != before:
            if record.source == HOST and before:
                self.causes.host_restarted(now)
            return True
        if number > last + 1:
            why = "lost between the source and the writer"
            self.append_gap(AuditGap(count=number - last - 1, why=why, source=record.source))
        return number > last


def _parts(number: str) -> tuple[str, int]:
    session, _, count = number.partition(":")
    return session, int(count) if count.isdigit() else 0
