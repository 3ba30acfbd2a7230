"""Events to a plugin in a private daemon: payloads to try it with, and the outcome of the first attempt of each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from host.authoring.private_daemon import wait_until
from host.cli.examples import example_of
from host.client.client import Client
from isolator.errors import UsageError, nearest
from isolator.policy.names import OLDER_HOOKS

_DOWN = ("backoff", "failed", "rejected")
_PAUSE = 0.01


@dataclass(frozen=True)
class Answer:
    """Outcome of one event: of its first attempt."""

    event: str
    payload: Mapping[str, Any]
    outcome: str
    detail: str | None = None
    reply: str | None = None
    latency_us: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the plugin has handled it, or passed it over."""
        return self.outcome in ("ok", "skipped")

    def to_json(self) -> dict[str, Any]:
        return {
            "event": self.event, "payload": dict(self.payload), "ok": self.ok, "outcome": self.outcome,
            "detail": self.detail, "reply": self.reply, "latency_us": self.latency_us,
        }  # fmt: skip


def hooks_of(client: Client, name: str) -> list[str]:
    """The events that a plugin's manifest asks for, by their present names, without its patterns."""
    manifest = client.call("plugin.show", name=name).get("manifest") or {}
    return list(dict.fromkeys(OLDER_HOOKS.get(hook, hook) for hook in manifest.get("hooks", ())))


def no_event(name: str) -> UsageError:
    """The error of a plugin to which no event can be sent."""
    return UsageError(f"plugin {name}", "asks for no event", "name one in hooks of its manifest, or with --event")


def payload_for(client: Client, event: str) -> dict[str, Any]:
    """An example of a payload; raises UsageError where there is no such event, or no example of it."""
    types = {entry["name"]: entry for entry in client.call("event.types")["types"]}
    entry = types.get(OLDER_HOOKS.get(event, event))
    if entry is None:
        near = nearest(event, types)
        remedy = f"did you mean {near!r}? " if near else ""
        raise UsageError(f"event {event}", "no such event", f"{remedy}an event of your platform: --schema {event}=FILE")
    return example_of(event, entry["schema"], entry["filled"])


def send(
    client: Client, name: str, event: str, payload: Mapping[str, Any], timeout: float, *,
    given_up: Callable[[], bool] = lambda: False,
) -> Answer:  # fmt: skip
    """Emit an event and wait for the plugin's first attempt, ``timeout`` seconds at most, or until it is given up."""
    emitted = client.call("event.emit", name=event, payload=dict(payload))
    if name not in emitted["plugins"]:
        return Answer(event, payload, "withheld", "its manifest, its filters or its policy keep this event from it")
    return first_attempt(client, name, event, payload, emitted["id"], timeout, given_up)


def first_attempt(
    client: Client, name: str, event: str, payload: Mapping[str, Any], event_id: str, timeout: float,
    given_up: Callable[[], bool] = lambda: False,
) -> Answer:  # fmt: skip
    """Wait for the first attempt of an event that was sent; it is not tried again."""
    deadline = time.monotonic() + timeout
    while True:
        answer = _answer(client, name, event, payload, event_id)
        if answer is not None:
            break
        if given_up():
            answer = Answer(event, payload, "no reply", "given up: the files have changed")
            break
        if not wait_until(deadline, _PAUSE):
            answer = Answer(event, payload, "no reply", f"none within {timeout:g} s")
            break
    if not answer.ok:  # it would be tried again
        cancel(client, event_id)
    return answer


def cancel(client: Client, event_id: str) -> None:
    """Give an event up, unless it is final already."""
    with contextlib.suppress(UsageError):
        client.call("event.cancel", id=event_id)


def _answer(client: Client, name: str, event: str, payload: Mapping[str, Any], event_id: str) -> Answer | None:
    """The outcome of the first attempt, if it is there; or the reason why there is none."""
    row = client.call("event.show", id=event_id)
    delivery = next(one for one in row["deliveries"] if one["plugin"] == name)
    state = delivery["state"]
    if state in ("queued", "in_flight"):
        shown = client.call("plugin.show", name=name)
        if state == "in_flight" or shown["state"] not in _DOWN:
            return None
        said = [line for line in shown.get("stderr") or () if line]
        why = shown["error"] or "it did not come up"
        return Answer(event, payload, "not started", f"{why}: {said[-1]}" if said else why)
    if state not in ("ok", "skipped"):
        last = client.call("plugin.show", name=name).get("last") or {}
        state = last["outcome"] if last.get("event_id") == event_id else state
    return Answer(event, payload, state, delivery["detail"], delivery["reply"], delivery["latency_us"])
