"""Trial of a plugin in a private daemon: events in, replies out, with its log and what it was refused.

Every byte of the plugin is read by the daemon's own unprivileged processes, as in production; here are their answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host.authoring.private_daemon import PrivateDaemon, wait_until
from host.cli import denials, trail
from host.cli.denials import Denial
from host.cli.examples import example_of
from host.client.client import Client
from isolator.audit.reader import Query
from isolator.errors import IsolatorError, UsageError
from isolator.policy.names import OLDER_HOOKS

_ENDED = ("plugin.stopped", "plugin.crashed", "exec.ended")
_DOWN = ("backoff", "failed", "rejected")
_STUCK = ("no reply", "not started", "not sent")
"""Outcomes after which the plugin has nothing to answer with."""
_PAUSE = 0.02
_RECORD_SECONDS = 10.0
_MOST_LINES = 1000


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


@dataclass
class Trial:
    """Outcome of one round: an answer for each event, then what was written and refused meanwhile."""

    plugin: str
    version: str
    mode: str
    effective_digest: str
    answers: list[Answer] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    denials: list[Denial] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every event was handled."""
        return all(answer.ok for answer in self.answers)


@dataclass(frozen=True)
class Plan:
    """The wishes of one command: ``events`` by name, each with its payload, or None for an example."""

    folder: str
    events: Mapping[str, Mapping[str, Any] | None]
    config: Mapping[str, str]
    policy: Path | None
    schemas: Mapping[str, Mapping[str, Any]]
    timeout: float


class Trials:
    """A private daemon with one plugin in it, which can be tried again and again."""

    def __init__(self, daemon: PrivateDaemon, plan: Plan) -> None:
        self._daemon, self._plan = daemon, plan
        self._registered: str | None = None
        with daemon.client() as client:
            for name, schema in plan.schemas.items():
                client.call("event.register", name=name, schema=dict(schema))

    def round(self) -> Trial:
        """Take the folder over as it is now, and send every event; raises IsolatorError for what cannot run."""
        before = trail.newest(self._daemon.root)
        with self._daemon.client() as client:
            trial = self._take_over(client)
            lines = len(self._log(client, trial.plugin))
            for name, payload in self._events(client, trial.plugin).items():
                if trial.answers and trial.answers[-1].outcome in _STUCK:
                    trial.answers.append(Answer(name, payload, "not sent", "the event before got no reply"))
                else:
                    trial.answers.append(self._send(client, trial.plugin, name, payload))
            self._stop(client, trial.plugin, before)
            trial.log = self._log(client, trial.plugin)[lines:]
            trial.denials = self._denials(client, trial.plugin, before)
        return trial

    def _take_over(self, client: Client) -> Trial:
        plan, update = self._plan, {"update": self._registered} if self._registered else {}
        config = dict(plan.config)

        def stage() -> dict[str, Any]:
            return client.call("plugin.stage", path=plan.folder, config=config, **update)

        staged = stage()
        name = staged["name"]
        if plan.policy is not None and self._registered is None:
            client.call("plugin.discard", token=staged["token"])
            policy = self._daemon.paths.policies / f"{name}.toml"
            policy.write_bytes(_without_demands(plan.policy.read_bytes()))
            staged = stage()
        if staged["missing"]:
            key = staged["missing"][0]
            raise UsageError(f"plugin {name}", f"needs the config {key}", f"add --config {key}=VALUE")
        if self._registered is None:
            done = client.call("plugin.commit", token=staged["token"], config=config)
            self._registered = name
        else:
            done = client.call("plugin.update", token=staged["token"], config=config, approve=True)
        digest = done["plugin"]["effective_digest"] or ""
        return Trial(name, staged["version"], staged["mode"], digest, warnings=[*staged["warnings"], *staged["faults"]])

    def _events(self, client: Client, name: str) -> dict[str, Mapping[str, Any]]:
        """The events to send, each with its payload; without a wish one of each hook."""
        wanted = self._plan.events
        if not wanted:
            manifest = client.call("plugin.show", name=name).get("manifest") or {}
            wanted = dict.fromkeys(OLDER_HOOKS.get(hook, hook) for hook in manifest.get("hooks", ()))
        types = {entry["name"]: entry for entry in client.call("event.types")["types"]}
        return {
            event: _example(types, event) if payload is None else payload for event, payload in wanted.items()
        }  # fmt: skip

    def _send(self, client: Client, name: str, event: str, payload: Mapping[str, Any]) -> Answer:
        emitted = client.call("event.emit", name=event, payload=dict(payload))
        if name not in emitted["plugins"]:
            return Answer(event, payload, "withheld", "its manifest, its filters or its policy keep this event from it")
        return self._await(client, name, event, payload, emitted["id"])

    def _await(self, client: Client, name: str, event: str, payload: Mapping[str, Any], event_id: str) -> Answer:
        """The outcome of an event that was sent, which is not tried again."""
        deadline = time.monotonic() + self._plan.timeout
        while True:
            answer = self._answer(client, name, event, payload, event_id)
            if answer is not None:
                break
            if not wait_until(deadline, _PAUSE):
                answer = Answer(event, payload, "no reply", f"none within {self._plan.timeout:g} s")
                break
        if not answer.ok:  # it would be tried again
            self._cancel(client, event_id)
        return answer

    @staticmethod
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

    @staticmethod
    def _cancel(client: Client, event_id: str) -> None:
        with contextlib.suppress(UsageError):  # it is final already
            client.call("event.cancel", id=event_id)

    def _stop(self, client: Client, name: str, before: int) -> None:
        """Stop the plugin, and wait until all that it did is on record: its end comes last."""
        run = client.call("plugin.show", name=name).get("run")
        client.call("plugin.stop", name=name)
        deadline = time.monotonic() + _RECORD_SECONDS
        while run is not None and not any(record.run == run for record in self._records(name, _ENDED, before)):
            if not wait_until(deadline, _PAUSE):
                raise IsolatorError("the trail of this trial", "has no end of the run", "run the command again")

    def _records(self, name: str, types: Sequence[str], before: int) -> Iterable[Any]:
        found = trail.search(self._daemon.root, Query(name, tuple(types)))
        return (record for _, record in found if record.seq > before)

    def _denials(self, client: Client, name: str, before: int) -> list[Denial]:
        entry = client.call("plugin.show", name=name)
        lines = client.call("plugin.explain", name=name)["proposal"]["lines"]
        return denials.collect(self._records(name, denials.TYPES, before), entry, lines)

    @staticmethod
    def _log(client: Client, name: str) -> list[dict[str, Any]]:
        lines = client.call("plugin.logs", name=name, lines=10 * _MOST_LINES)["lines"]
        return [dict(line) for line in lines]


def _without_demands(policy: bytes) -> bytes:
    """A policy without what it demands of a version's origin: here it is being tried."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        document = tomlkit.parse(policy.decode())
    except (ValueError, TOMLKitError):
        return policy  # whoever reads it says what is wrong
    document.pop("require", None)
    return tomlkit.dumps(document).encode()


def _example(types: Mapping[str, Mapping[str, Any]], event: str) -> dict[str, Any]:
    entry = types.get(OLDER_HOOKS.get(event, event))
    if entry is None:
        raise UsageError(f"event {event}", "no such event", f"an event of your platform: --schema {event}=FILE")
    return example_of(event, entry["schema"], entry["filled"])
