"""Trial of a plugin in a private daemon: events in, replies out, with its log and what it was refused."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host.authoring.loading import Loader
from host.authoring.private_daemon import PrivateDaemon, wait_until
from host.authoring.sending import Answer, hooks_of, payload_for, send
from host.cli import denials, trail
from host.cli.denials import Denial
from host.client.client import Client
from isolator.audit.reader import Query
from isolator.errors import IsolatorError

_ENDED = ("plugin.stopped", "plugin.crashed", "exec.ended")
_STUCK = ("no reply", "not started", "not sent")
"""Outcomes after which the plugin has nothing to answer with."""
_PAUSE = 0.02
_RECORD_SECONDS = 10.0
_MOST_LINES = 1000


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


def register_schemas(client: Client, schemas: Mapping[str, Mapping[str, Any]]) -> None:
    """Make a platform's own events known to the daemon."""
    for name, schema in schemas.items():
        client.call("event.register", name=name, schema=dict(schema))


class Trials:
    """A private daemon with one plugin in it, which can be tried again and again."""

    def __init__(self, daemon: PrivateDaemon, plan: Plan) -> None:
        self._daemon, self._plan = daemon, plan
        self._loader = Loader(daemon, plan.folder, plan.config, plan.policy)
        with daemon.client() as client:
            register_schemas(client, plan.schemas)

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
        loaded = self._loader.load(client)
        return Trial(loaded.plugin, loaded.version, loaded.mode, loaded.effective_digest, warnings=loaded.warnings)

    def _events(self, client: Client, name: str) -> dict[str, Mapping[str, Any]]:
        """The events to send, each with its payload; without a wish one of each hook."""
        wanted = self._plan.events or dict.fromkeys(hooks_of(client, name))
        return {
            event: payload_for(client, event) if payload is None else payload for event, payload in wanted.items()
        }  # fmt: skip

    def _send(self, client: Client, name: str, event: str, payload: Mapping[str, Any]) -> Answer:
        return send(client, name, event, payload, self._plan.timeout)

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
