"""Session of ``isolator dev``: one plugin in a private daemon, loaded again on each save, until its author ends it.

The main thread does one thing after the other: it loads, and sends events. Threads bring it saves and the lines of its
author, and show what the plugin writes and is refused as it happens. They end with the daemon, or with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from host.authoring.dev.screen import HELP, Screen
from host.authoring.loading import Loaded, Loader, Loading
from host.authoring.private_daemon import PrivateDaemon
from host.authoring.sending import hooks_of, no_event, payload_for, send
from host.authoring.trial import Plan, register_schemas
from host.authoring.watching import Watching
from host.cli import denials, trail
from host.cli.arguments import json_object
from host.cli.plugin import wait_ready
from host.client.client import Client
from isolator.audit import reader
from isolator.audit.record import Record, parse
from isolator.audit.schema import PluginCrashed
from isolator.errors import IsolatorError

_SAVED = object()
_QUIT = ("quit", "exit", "q")
_LINE = 1 << 16
_EXEC = "exec"
"""The mode in which nothing runs between events."""


class Session:
    """See the module."""

    def __init__(self, daemon: PrivateDaemon, plan: Plan, screen: Screen) -> None:
        self._daemon, self._plan, self._screen = daemon, plan, screen
        self._loader = Loader(daemon, plan.folder, plan.config, plan.policy)
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._saved = threading.Event()
        self._saved_at = 0.0
        self._loading: Loading | None = None
        """The newest version, which may be on trial."""
        self._last: tuple[str, Mapping[str, Any]] | None = None
        self._following = False
        self._entry: Mapping[str, Any] = {}
        self._lines: list[Mapping[str, Any]] = []
        self._shown: set[str] = set()
        """Denials that this version's author has seen."""
        self._faulty = False
        """The last save could not be loaded."""

    def run(self) -> None:
        """Go on until the author quits; raises KeyboardInterrupt for ^C."""
        with self._daemon.client() as client:
            register_schemas(client, self._plan.schemas)
            self._screen.ready(self._daemon.root)
            with contextlib.closing(Watching(self._plan.folder, self._plan.policy, self._note_save)):
                self._note_save()
                threading.Thread(target=self._read_lines, name="keys", daemon=True).start()
                while (wish := self._work.get()) not in _QUIT:
                    try:
                        self._do(client, wish)
                    except IsolatorError as error:
                        self._screen.failed(error)

    def _note_save(self) -> None:
        if not self._saved.is_set():
            self._saved_at = time.monotonic()
            self._saved.set()
            self._work.put(_SAVED)

    def _do(self, client: Client, wish: Any) -> None:
        if isinstance(wish, IsolatorError):  # the version that was in use has ended within its trial
            assert self._loader.registered is not None
            self._know(client, self._loader.registered)
            raise wish
        if wish is _SAVED:
            self._saved.clear()
            before, self._faulty = self._faulty, True
            self._load(client, mended=before)
            self._faulty = False
            for event, payload in self._plan.events.items():
                self._send(client, event, payload_for(client, event) if payload is None else payload)
        elif wish == "help":
            self._screen.note(HELP)
        elif wish == "reload":
            self._note_save()
        elif self._loader.registered is None:
            self._screen.note("nothing is in use yet: mend the error above, and save")
        elif wish == "events":
            self._screen.events({event: _example(client, event) for event in hooks_of(client, self._loader.registered)})
        else:
            self._send(client, *self._wanted(client, wish))

    def _load(self, client: Client, *, mended: bool) -> None:
        if self._loading is not None:  # what comes of it is shown already
            with contextlib.suppress(IsolatorError):
                self._loading.finish()
        began, newest = self._saved_at, trail.newest(self._daemon.root)
        loading = self._loading = self._loader.begin(client)
        loaded = loading.up(client)
        if loaded.unchanged and self._entry.get("state") != "failed":
            if mended:
                self._screen.note(f"{loaded.plugin} {loaded.version} is what is in use already")
            return
        self._shown.clear()
        self._know(client, loaded.plugin)
        if not self._following:
            self._following = True
            for target, arguments in ((self._follow_log, (loaded.plugin,)), (self._follow_trail, (loaded, newest))):
                threading.Thread(target=target, args=arguments, daemon=True).start()
        if loading.decided and loaded.mode != _EXEC:
            wait_ready(client, loaded.plugin, client.call("plugin.start", name=loaded.plugin)["run"])
        self._screen.loaded(loaded, time.monotonic() - began)
        loading.when_refused(self._work.put)

    def _know(self, client: Client, name: str) -> None:
        """Keep what explains the denials of the version in use."""
        self._lines = client.call("plugin.explain", name=name)["proposal"]["lines"]
        self._entry = client.call("plugin.show", name=name)

    def _wanted(self, client: Client, line: str) -> tuple[str, Mapping[str, Any]]:
        """The event that a line means: NAME [JSON], or nothing for the last one."""
        event, _, payload = line.strip().partition(" ")
        if not event:
            if self._last is not None:
                return self._last
            assert self._loader.registered is not None
            event = next(iter((*self._plan.events, *hooks_of(client, self._loader.registered))), "")
            if not event:
                raise no_event(self._loader.registered)
        return event, json_object(payload) if payload.strip() else payload_for(client, event)

    def _send(self, client: Client, event: str, payload: Mapping[str, Any]) -> None:
        assert self._loader.registered is not None
        self._last = (event, payload)
        answer = send(
            client, self._loader.registered, event, payload, self._plan.timeout, given_up=self._saved.is_set
        )  # fmt: skip
        self._daemon.settle()  # the requests of an event are told before its answer
        self._screen.answered(answer)

    # Threads

    def _read_lines(self) -> None:
        """Bring the author's lines; not by sys.stdin, whose lock would hold up the end of the process."""
        rest = b""
        with contextlib.suppress(OSError):
            while data := os.read(0, _LINE):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._work.put(line.decode(errors="replace").strip())
                if len(rest) > _LINE:
                    rest = b""
            if rest.strip():
                self._work.put(rest.decode(errors="replace").strip())
            self._work.put(_QUIT[0])

    def _follow_log(self, name: str) -> None:
        with contextlib.suppress(IsolatorError, OSError), self._daemon.client(timeout=None) as client:
            for line in client.call("plugin.logs", name=name, lines=1000, follow=True)["lines"]:
                self._screen.wrote(line)
            for line in client.notifications():
                self._screen.wrote(line)

    def _follow_trail(self, loaded: Loaded, after: int) -> None:
        follower = reader.Follower(self._daemon.paths.audit_log, after)
        with contextlib.closing(follower), contextlib.suppress(OSError):
            while True:
                while lines := follower.available():
                    for line in lines:
                        record = parse(line)
                        if record is not None and record.plugin == loaded.plugin:
                            self._show_record(record)
                follower.wait()

    def _show_record(self, record: Record) -> None:
        if record.type == PluginCrashed.TYPE:
            self._screen.crashed(_end_in_words(record.data))
        if record.type not in denials.TYPES:
            return
        for denial in denials.collect([record], self._entry, self._lines):
            # Once for each version, however often it tries.
            seen = json.dumps([denial.kind, denial.type, dict(denial.data)], sort_keys=True, default=str)
            if seen not in self._shown:
                self._shown.add(seen)
                self._screen.denied(denial, str(self._entry["name"]))


def _end_in_words(data: Mapping[str, Any]) -> str:
    """How a run has ended by itself, or why it did not begin."""
    if data.get("reason"):
        return str(data["reason"])
    code, number = data.get("exit_code"), data.get("signal")
    how = f"exit code {code}" if code is not None else f"signal {number}" if number is not None else ""
    return ", ".join(filter(None, (str(data.get("cause") or ""), how)))


def _example(client: Client, event: str) -> str:
    try:
        return json.dumps(payload_for(client, event))
    except IsolatorError as error:
        return f"({error})"
