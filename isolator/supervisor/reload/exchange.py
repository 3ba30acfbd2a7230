"""Exchange of a service's process for a new one that goes on with its state: nobody notices.

1. The new process is started and loads; when it waits for its hello it answers which formats of a state it reads. Until
   here a failure changes nothing. What callers have asked the old process to change is let come to its end.
2. What the supervisor notifies the service of waits for the new process; requests to it wait, too.
3. The old process gets ``leave``. It finishes what it can, and sends its state, in a format that the new one reads. The
   parts are passed on unread.
4. The new one gets its hello, with all that the old one had been notified of, and then what waited.
5. The old one ends.

An old process that refuses stays. If one of them fails, or the old one does not answer in ``ANSWER`` seconds, both are
killed, and another is introduced as after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.messages import BreakOff, Leave, ReadableFormats, ReadFormats, StatePart, WriteFormat
from isolator.ipc.succession import Passage
from isolator.supervisor.rest import LATER, REPEATED
from isolator.supervisor.service import ChildProcess, Generation

CHANGES = 30.0
"""Seconds for which the old process is let finish what callers have asked it to change."""
_LOOK = 0.005
ANSWER = 10.0
"""Seconds in which the old process has to have handed over everything."""

logger = logging.getLogger(__name__)


async def exchange(service: ChildProcess) -> None:
    """Put a new process in the place of the one that serves; raises IsolatorError when nothing came of it.

    After the error the old process goes on, or it has ended and is started again as after a crash.
    """
    name, began = service.spec.name, time.monotonic()
    if service.ways.succeed is None:
        raise UnavailableError(name, "hands nothing on", "restart the daemon")
    async with service.changing:
        old = service.current
        if old is None or old.channel.closed.is_set() or not service.up.is_set():
            raise UnavailableError(name, "is not up", "try again when it is")
        async with service.zygotes.ready() as zygote:
            new = await service.spawn(zygote, service.ways.succession())
        try:
            readable = await service.first_answer(new.channel.ask(ReadFormats()), new)
        except BaseException:
            await service.discard(new)
            raise
        await _until_settled(old)
        service.hold()
        left = time.monotonic()
        try:
            await _hand_over(service, old, new, readable)
        except _RefusedError as refused:
            service.go_on(old)
            await service.discard(new)
            raise UnavailableError(name, f"cannot be exchanged now: {refused}", "try again") from None
        except BaseException as error:
            service.blame = f"it could not be exchanged: {error}"
            service.go_on(None)
            old.channel.close()
            old.leaf.kill()
            await service.discard(new)
            raise
        service.go_on(new)
    now = time.monotonic()
    logger.info("%s was exchanged in %.0f ms, and away for %.0f", name, (now - began) * 1000, (now - left) * 1000)
    await service.retire(old)


async def _until_settled(old: Generation) -> None:
    """Wait until nothing is under way that the old process has asked for and the new one could not ask for again."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CHANGES):
            while old.channel.serves_beside(REPEATED | LATER):  # noqa: ASYNC110 # the old one serves meanwhile
                await asyncio.sleep(_LOOK)


async def _hand_over(service: ChildProcess, old: Generation, new: Generation, readable: ReadableFormats) -> None:
    assert service.ways.succeed is not None
    introduce = service.ways.succeed()
    passage = Passage(new.channel)

    async def break_off(_: BreakOff) -> None:
        old.channel.break_off(REPEATED, unanswered=LATER)

    for op, handler in (StatePart.on_fds(passage.part), BreakOff.on(break_off)):
        old.channel.handle(op, handler)
    old.channel.tell(WriteFormat(formats=readable.formats))
    left = await old.channel.ask(Leave(), timeout=ANSWER)
    if left.refused:
        raise _RefusedError(left.refused)
    if left.parts != passage.parts:
        raise IsolatorError(service.spec.name, f"sent {passage.parts} parts of its state instead of {left.parts}")
    await service.first_answer(introduce(new.channel, left.parts), new)


class _RefusedError(Exception):
    """The old process stays."""
