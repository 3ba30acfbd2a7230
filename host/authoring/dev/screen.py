"""The author's view of ``isolator dev``: lines for people, or one JSON object a line (key ``kind``)."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import click

from host.authoring.loading import Loaded
from host.authoring.sending import Answer
from host.cli import denials
from host.cli.denials import Denial
from host.cli.output import latency, result_in, safe
from isolator.cli.output import styled

_MARKS = {"stdout": "|", "stderr": "!"}
HELP = (
    "return: send the last event again · NAME [JSON]: send that one · events: which there are · "
    "reload: as after a save · quit, ^C: end"
)


class Screen:
    """Writes from several threads, a whole thing at a time."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._lock = threading.Lock()

    def _write(self, kind: str, text: str, /, **data: Any) -> None:
        with self._lock:
            click.echo(json.dumps({"kind": kind, **data}) if self._as_json else text)

    def ready(self, root: str) -> None:
        """A daemon of its own runs."""
        hint = f"from another terminal: sudo isolator --root {root} plugin explain NAME, and the like"
        self._write("ready", f"{HELP}\n{hint}", root=root)

    def loaded(self, loaded: Loaded, seconds: float) -> None:
        """A version is in use."""
        for warning in loaded.warnings if not self._as_json else ():
            click.echo(f"isolator: warning: {safe(warning)}", err=True)
        version = f"{loaded.plugin} {safe(loaded.version)} ({loaded.mode})"
        self._write(
            "loaded", styled(f"▸ {version} is in use, after {latency(int(seconds * 1e6))}", bold=True),
            plugin=loaded.plugin, version=loaded.version, mode=loaded.mode, effective_digest=loaded.effective_digest,
            warnings=loaded.warnings, seconds=round(seconds, 3),
        )  # fmt: skip

    def answered(self, answer: Answer) -> None:
        """An event has an outcome."""
        reply = safe(answer.detail or result_in(answer.reply or ""))
        outcome = styled(answer.outcome, "green" if answer.ok else "red")
        text = f"▸ {answer.event}: {outcome} ({latency(answer.latency_us)})  {reply}"
        self._write("answer", text, **answer.to_json())

    def wrote(self, line: Mapping[str, Any]) -> None:
        """The plugin has written a line."""
        self._write("log", f"{_MARKS.get(line['stream'], '#')} {safe(line['line']) if line['line'] else ''}", **line)

    def exchanged(self, exchange: Mapping[str, Any]) -> None:
        """The recorder has answered a request."""
        text = f"→ {safe(exchange['method'])} {safe(exchange['url'])}: {exchange['status']}"
        self._write("exchange", text, **exchange)

    def denied(self, denial: Denial, name: str) -> None:
        """The plugin was refused something, with the line to add."""
        self._write("denial", "\n".join(denials.lines([denial], name)), denial=denial.to_json())

    def crashed(self, why: str) -> None:
        """The plugin has ended by itself."""
        self._write("crashed", styled(f"▸ it has ended: {safe(why)}", fg="red"), why=why)

    def events(self, events: Mapping[str, str]) -> None:
        """List the events of a plugin, each with an example of a payload, or the reason why there is none."""
        text = "\n".join(f"  {event} {safe(example)}" for event, example in events.items())
        self._write("events", text, events=dict(events))

    def note(self, text: str) -> None:
        """Anything else that the author should know."""
        self._write("note", f"▸ {safe(text)}", text=text)

    def failed(self, error: Exception) -> None:
        """Something could not be done; the loop goes on."""
        shown = getattr(error, "to_json", lambda: {"why": str(error)})()
        self._write("error", styled(f"▸ {safe(error)}", fg="red"), error=shown)
