"""Replies of plugins that another host holds: asked for when somebody wants to see them, and kept nowhere else.

What an event's deliveries have come to is the log's to say. Reply, latency and last error are in the database of the
host that had the delivery; it is asked by a message of its own, and answers from there. An answer is a stranger's: it
is taken within its bounds or not at all, and says nothing about the state of a delivery.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Final

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic.dataclasses import dataclass

from host.cluster.delivery.fates import Elsewhere
from host.cluster.log import LogUnavailableError
from host.cluster.node import Node
from host.database.store import Store
from host.queue import rows
from host.queue.interface import FINAL, DeliveryRow

WITHIN: Final = 2.0
"""Seconds for all answers about an event."""
LARGEST: Final = 64 << 10
"""Bytes of an answer."""
MOST: Final = 32
"""Hosts that are asked about one delivery, and deliveries of an event that are asked about."""
_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Text = Annotated[str, StringConstraints(max_length=4096)]
_Short = Annotated[str, StringConstraints(max_length=200)]


@dataclass(frozen=True, slots=True, config=_CHECKED)
class Told:
    """A delivery as the host has it that is asked: one of ``state`` ``""`` it does not know, or has given away."""

    state: _Short = ""
    attempts: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    status: _Short | None = None
    detail: _Text | None = None
    reply: _Text | None = None
    latency_us: Annotated[int, Field(ge=0, le=1 << 53)] | None = None
    next_attempt: Annotated[float, Field(ge=0, le=1e11)] | None = None


_TOLD: Final = TypeAdapter(Told)


class Replies:
    """Asks other hosts about deliveries, and answers them."""

    def __init__(self, store: Store, node: Node) -> None:
        self._store, self._node = store, node
        node.answers.append(self.answer)

    def answer(self, question: bytes) -> bytes | None:
        """Answer another host; None for what is no question about a delivery."""
        try:
            event_id, plugin = json.loads(question)["delivery"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(event_id, str) or not isinstance(plugin, str):
            return None
        row = self._store.read(lambda db: rows.delivery(db, event_id, plugin))
        return _TOLD.dump_json(_told(row))

    async def complete(self, deliveries: Iterable[DeliveryRow], elsewhere: Sequence[Elsewhere]) -> list[DeliveryRow]:
        """The deliveries, those that other hosts have with what these tell within ``WITHIN`` seconds."""
        found = {row.plugin: row for row in deliveries}
        asked = elsewhere[:MOST]
        tasks = [asyncio.create_task(self._find(found.get(one.plugin), one)) for one in asked]
        try:
            async with self._node.limit(WITHIN):
                await asyncio.gather(*tasks)
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
        before = dict(found)
        for one, task in zip(asked, tasks, strict=True):
            row = before.get(one.plugin)
            told = task.result() if task.done() and not task.cancelled() else row and _unanswered(row, one.holder)
            if told is not None and told is not row:
                found[one.plugin] = told
        return [found[plugin] for plugin in sorted(found)]

    async def _find(self, row: DeliveryRow | None, one: Elsewhere) -> DeliveryRow | None:
        """The delivery with what its holder tells, or, of one that has ended, whoever held it then.

        None: of a plugin that is not here, and for which nobody has had the event.
        """
        if row is None:
            return await self._look_for(one)
        told = await self._ask(one.holder, row)
        if told is None:
            return _unanswered(row, one.holder)
        if _fits(row, told):
            return _filled(row, one.holder, told)
        if row.state not in FINAL:
            return row
        found = await self._earlier(one, row)
        return found or replace(row, detail=f"on {one.holder}; no living host has its reply", host=None)

    async def _look_for(self, one: Elsewhere) -> DeliveryRow | None:
        assert one.row is not None
        told = await self._ask(one.holder, one.row)
        if told is not None and told.state in FINAL:
            return _filled(replace(one.row, state=told.state), one.holder, told)
        return await self._earlier(one, one.row) if told is not None and not told.state else None

    async def _earlier(self, one: Elsewhere, row: DeliveryRow) -> DeliveryRow | None:
        """The delivery as a host has it that held the plugin before."""
        others = [host for host in self._node.alive() if host not in (one.holder, self._node.host)][:MOST]
        for host, told in zip(others, await asyncio.gather(*(self._ask(host, row) for host in others)), strict=True):
            if told is not None and _fits(row, told):
                return _filled(row, host, told)
        return None

    async def _ask(self, host: str, row: DeliveryRow) -> Told | None:
        """What a host tells; None if it does not answer, or not as a host does."""
        try:
            body = await self._node.ask(host, json.dumps({"delivery": [row.event_id, row.plugin]}).encode())
            return _TOLD.validate_json(body) if len(body) <= LARGEST else None
        except (LogUnavailableError, ValueError):
            return None


def _told(row: DeliveryRow | None) -> Told:
    if row is None or row.state == "moved":
        return Told()
    reply, detail = (text[:4096] if text is not None else None for text in (row.reply, row.detail))
    status = row.status[:200] if row.status is not None else None
    return Told(row.state, row.attempts, status, detail, reply, row.latency_us, row.next_attempt)


def _fits(row: DeliveryRow, told: Told) -> bool:
    """Whether an answer is about the delivery as the log has it: of one that has ended the reply, else the attempts."""
    return told.state != "" and (row.state not in FINAL or told.state == row.state)


def _filled(row: DeliveryRow, host: str, told: Told) -> DeliveryRow:
    detail = f"on {host}: {told.detail}" if told.detail else f"on {host}"
    return replace(
        row, host=host, attempts=max(row.attempts, told.attempts), status=told.status, detail=detail, reply=told.reply,
        latency_us=told.latency_us, next_attempt=told.next_attempt if row.state == "retry" else None,
    )  # fmt: skip


def _unanswered(row: DeliveryRow, host: str) -> DeliveryRow:
    return replace(row, host=host, detail=f"on {host}, which does not answer: this is what the log says of it")
