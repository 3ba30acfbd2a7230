"""Trials through a running daemon: the plugin's folder as it is, each event once."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from host.authoring.runner.cage import Cage
from host.authoring.runner.senders import Sender, Sending, attempt, sender_of
from host.authoring.sending import Answer
from host.authoring.trial import Plan, Trial
from host.cli.examples import example_of
from host.events import Catalogue, format_time, from_schema
from host.plugins.manifest import Manifest, parse
from host.queue.interface import Event
from isolator.errors import NotFoundError, translated
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet
from isolator.policy.model import EffectivePolicy
from isolator.policy.names import covers_hook


def is_served(root: str | None) -> bool:
    """Whether a daemon runs cages for this user."""
    return os.access(Paths.of(root).run_socket, os.W_OK)


class RunnerTrials:
    """Trials of one plugin through the daemon of ``root``."""

    def __init__(self, root: str | None, plan: Plan) -> None:
        self._root, self._plan = root, plan
        self._catalogue = Catalogue()
        for name, schema in plan.schemas.items():
            self._catalogue.register(from_schema(name, schema))

    def round(self) -> Trial:
        """Send every event to the folder as it is now; raises IsolatorError for what cannot run."""
        plan, folder = self._plan, Path(self._plan.folder)
        name = str(folder / "plugin.json")
        with translated(FileNotFoundError, NotFoundError, name, "not there", "write one (see 'isolator new')"):
            manifest = parse((folder / "plugin.json").read_bytes(), name=name)
        core, mode = manifest.core, manifest.transport.mode
        sender = sender_of(mode)
        grant = None
        if plan.policy is not None:
            from isolator.policy.parse.load import parse_plugin_policy

            grant = parse_plugin_policy(plan.policy.read_bytes(), source=str(plan.policy))
        effective = meet(core, grant, HostConfig()).effective
        trial = Trial(core.name, core.version, mode, effective.digest())
        trial.warnings.append("through the role 'runner': no host API, and refused connections are in the trail alone")
        with (
            tempfile.TemporaryDirectory(prefix="isolator-test-") as made,
            sender(Cage(self._root, Path(made), folder, manifest, effective, plan.config), trial) as send,
        ):
            for name in plan.events or dict.fromkeys(map(self._catalogue.canonical, core.hooks)):
                trial.answers.append(self._answer(name, effective, manifest, send))
        return trial

    def _answer(self, name: str, effective: EffectivePolicy, manifest: Manifest, send: Sender) -> Answer:
        event_type = self._catalogue.need(name)
        payload = self._plan.events.get(name) or example_of(name, event_type.schema(), event_type.filled)
        hook = next((hook for hook in manifest.core.hooks if self._catalogue.canonical(hook) == event_type.name), None)
        if hook is None or not any(covers_hook(granted, hook) for granted in effective.hooks):
            return Answer(name, payload, "withheld", "its manifest or its policy keeps this event from it")
        valid = self._catalogue.validate(name, payload)
        now = time.time()
        event = Event(1, f"ev_test_{os.urandom(8).hex()}", event_type.name, format_time(now), now, now, valid.json)
        key = manifest.delivery.order_key(event_type.order_by, payload) or ""
        outcome, latency = attempt(send, Sending(event, hook, event_type, key, self._plan.timeout))
        return Answer(name, payload, outcome.kind, outcome.detail, outcome.text or None, latency)
