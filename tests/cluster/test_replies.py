"""Replies of plugins that another host holds are asked for there; what a host answers is taken within its bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from host.cluster.delivery import replies
from host.cluster.entries import Plugin
from host.cluster.log import LogUnavailableError
from host.cluster.snapshots import subject_of
from host.queue.interface import Delivery, DeliveryRow, Result
from tests.cluster.queues import Hosts, Make, SimHost

ONE = Plugin("p", "d", hooks=("deploy.completed",))


@pytest.fixture(autouse=True)
def with_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each plugin answer with what it had, and where."""

    async def reply(self: SimHost, plugin: str, delivery: Delivery, outcome: str) -> None:
        await self.clock.sleep(0.001)
        consumer, text = self.queue.consumer(plugin), json.dumps({"host": self.name, "event": delivery.event_id})
        if outcome == "retry":
            consumer.nak(delivery, Result("retry", "error", "its far end is away", text, 900), delay=1000.0)
        elif outcome == "dead":
            consumer.term(delivery, Result("dead", "rejected", "it was rejected", text, 800))
        else:
            consumer.ack(delivery, Result("ok", "ok", None, text, 1700))

    monkeypatch.setattr(SimHost, "_reply", reply)


async def _started(make: Make, **chances: float) -> tuple[Hosts, SimHost, SimHost]:
    """A cluster, the plugin's holder and another host."""
    hosts = make()
    vars(hosts).update(chances)
    await hosts.start(ONE)
    await hosts.until(lambda: hosts.holder("p"))
    holder = hosts.holder("p")
    assert holder is not None
    return hosts, holder, next(host for host in hosts.hosts if host is not holder)


async def _emitted(hosts: Hosts, host: SimHost, seconds: float = 5.0) -> str:
    await hosts.emit(host, "k")
    await hosts.passes(seconds)
    return hosts.accepted[-1]


async def _shown(hosts: Hosts, host: SimHost, event: str) -> DeliveryRow:
    """The delivery as ``event show`` has it on a host."""
    before = hosts.clock.time
    row = await hosts.during(host.queue.complete(host.show(event)))
    assert hosts.clock.time - before <= replies.WITHIN + 0.5, "it may take two seconds"
    (delivery,) = row.deliveries
    return delivery


async def test_reply_latency_and_status_come_from_the_holder(make: Make) -> None:
    hosts, holder, other = await _started(make)
    event = await _emitted(hosts, other)
    there = await _shown(hosts, holder, event)
    here = await _shown(hosts, other, event)
    assert there.reply == json.dumps({"host": holder.name, "event": event})
    assert (here.state, here.status, here.reply, here.latency_us) == ("ok", "ok", there.reply, 1700)
    assert here.detail == f"on {holder.name}" and here.attempts == 1


async def test_last_error_of_what_waits_for_its_retry_comes_from_the_holder(make: Make) -> None:
    hosts, holder, other = await _started(make, failing=1.0)
    event = await _emitted(hosts, other)
    here = await _shown(hosts, other, event)
    assert (here.state, here.status, here.detail) == ("retry", "error", f"on {holder.name}: its far end is away")
    assert here.attempts >= 1 and here.next_attempt is not None


async def test_reply_of_a_dead_letter_comes_from_the_holder(make: Make) -> None:
    hosts, holder, other = await _started(make, rejecting=1.0)
    event = await _emitted(hosts, other)
    here = await _shown(hosts, other, event)
    assert (here.state, here.status, here.latency_us) == ("dead", "rejected", 800)
    assert here.detail == f"on {holder.name}: it was rejected" and here.reply is not None


async def test_waiting_for_an_event_ends_with_the_reply(make: Make) -> None:
    hosts, holder, other = await _started(make)
    await hosts.emit(other, "k")

    async def wait() -> Any:
        return await other.queue.complete(await other.queue.wait(hosts.accepted[0], timeout=60))

    (delivery,) = (await hosts.during(wait())).deliveries
    assert delivery.state == "ok" and json.loads(str(delivery.reply))["host"] == holder.name


@pytest.mark.parametrize("silent", [False, True])
async def test_holder_that_does_not_answer_is_said_and_the_log_tells_the_rest(make: Make, silent: bool) -> None:
    hosts, holder, other = await _started(make)
    event = await _emitted(hosts, other)
    ask = other.log.ask

    async def unheard(subject: str, body: bytes) -> bytes:
        if not silent:
            raise LogUnavailableError("no other host answers")
        await hosts.clock.sleep(60)
        return await ask(subject, body)

    other.log.ask = unheard  # type: ignore[method-assign]
    here = await _shown(hosts, other, event)
    assert (here.state, here.reply, here.latency_us) == ("ok", None, None)
    assert here.detail == f"on {holder.name}, which does not answer: this is what the log says of it"


async def test_reply_comes_from_whoever_held_the_plugin_then(make: Make) -> None:
    hosts, first, third = await _started(make)
    event = await _emitted(hosts, third)
    first.plugins.pop("p")
    first.follower.look()
    await hosts.until(lambda: hosts.holder("p") not in (None, first))
    await hosts.passes(3.0)
    second = hosts.holder("p")
    third = next(host for host in hosts.hosts if host not in (first, second))
    here = await _shown(hosts, third, event)
    assert here.state == "ok" and json.loads(str(here.reply))["host"] == first.name
    assert here.detail == f"on {first.name}"
    await first.end()
    here = await _shown(hosts, third, event)
    assert here.reply is None and second is not None
    assert here.detail == f"on {second.name}; no living host has its reply"


async def test_event_of_a_plugin_that_is_not_here_is_waited_for_and_shown(make: Make) -> None:
    hosts, holder, other = await _started(make, failing=1.0)
    other.plugins.pop("p")
    event = await _emitted(hosts, other)
    waiting = await _shown(hosts, other, event)
    assert waiting.state == "queued" and waiting.detail == f"on {holder.name}: its far end is away"
    hosts.failing = 0.0
    await hosts.during(holder.queue.retry(event))

    async def wait() -> Any:
        return await other.queue.complete(await other.queue.wait(event, timeout=60))

    (delivery,) = (await hosts.during(wait())).deliveries
    assert delivery.state == "ok" and json.loads(str(delivery.reply))["host"] == holder.name
    holder.plugins.pop("p")  # as one whose filter lets nothing through
    row = await hosts.during(other.queue.complete(other.show(event)))
    assert [one.plugin for one in row.deliveries] == ["p"]


async def test_event_that_a_plugin_elsewhere_filters_is_none_of_its_deliveries(make: Make) -> None:
    hosts, holder, other = await _started(make)
    other.plugins.pop("p")
    holder._subscribers = lambda _: {}  # type: ignore[method-assign]
    holder.follower._subscriptions = lambda _: {}
    for held in holder.follower._held.values():
        held._subscriptions = lambda _: {}
    event = await _emitted(hosts, other)
    row = await hosts.during(other.queue.complete(await hosts.during(other.queue.wait(event, timeout=60))))
    assert row.deliveries == ()


def _lying(**more: Any) -> bytes:
    return json.dumps({"state": "ok", "attempts": 1, "reply": "r", **more}).encode()


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"no JSON", b"[]", b"{" * 5000, b"[" * 60_000, _lying(reply="x" * 5000), _lying(reply=7),
        _lying(attempts=-1), _lying(latency_us=1 << 70), _lying(more=1), _lying(detail="x" * 100_000),
        _lying(status={"a": 1}), _lying(state=None), b'{"state":"ok","next_attempt":1e999}', b"\xff\xfe",
    ],
)  # fmt: skip
async def test_answer_that_no_host_gives_is_none(make: Make, answer: bytes) -> None:
    hosts, holder, other = await _started(make)
    event = await _emitted(hosts, other)
    _have_answered(hosts, holder, lambda _: answer)
    here = await _shown(hosts, other, event)
    assert (here.state, here.reply) == ("ok", None)
    assert here.detail == f"on {holder.name}, which does not answer: this is what the log says of it"


def _have_answered(hosts: Hosts, host: SimHost, handler: Callable[[bytes], bytes | None]) -> None:
    """Have a host answer as a hostile one may."""
    hosts.servers.answers[subject_of(host.name)] = [(host.log, handler)]


async def test_answer_changes_no_state_that_the_log_has(make: Make) -> None:
    hosts, holder, other = await _started(make, failing=1.0)
    event = await _emitted(hosts, other)
    _have_answered(hosts, holder, lambda _: _lying(state="ok"))
    assert (await _shown(hosts, other, event)).state == "retry"
    hosts.failing = 0.0
    await hosts.during(holder.queue.retry(event))
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(3.0)
    _have_answered(hosts, holder, lambda _: _lying(state="dead"))
    here = await _shown(hosts, other, event)
    assert (here.state, here.reply) == ("ok", None)


@pytest.mark.parametrize(
    "question",
    [b"", b"[]", b"{}", b'{"delivery":7}', b'{"delivery":["e"]}', b'{"delivery":["e",7]}', b"[" * 4000, b"x" * 5000],
)
async def test_question_that_is_none_has_no_answer(make: Make, question: bytes) -> None:
    hosts, holder, other = await _started(make)
    with pytest.raises(LogUnavailableError):
        await hosts.during(other.node.ask(holder.name, question))


async def test_host_tells_nothing_of_what_it_does_not_have(make: Make) -> None:
    hosts, holder, other = await _started(make)
    asked = json.dumps({"delivery": ["ev_0", "p"]}).encode()
    told = await hosts.during(other.node.ask(holder.name, asked))
    assert json.loads(told)["state"] == ""
