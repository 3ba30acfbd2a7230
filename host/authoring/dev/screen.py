"""The author's view of ``isolator dev``: lines for people, or one JSON object a line (key ``kind``)."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
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

    @contextlib.contextmanager
    def _writing(self, kind: str, **data: Any) -> Iterator[bool]:
        """Write JSON, or have the block write text: whether it should."""
        with self._lock:
            if self._as_json:
                click.echo(json.dumps({"kind": kind, **data}))
            yield not self._as_json

    def ready(self, root: str) -> None:
        """A daemon of its own runs."""
        with self._writing("ready", root=root) as as_text:
            if as_text:
                click.echo(
                    f"{HELP}\nfrom another terminal: sudo isolator --root {root} plugin explain NAME, and the like"
                )

    def loaded(self, loaded: Loaded, seconds: float) -> None:
        """A version is in use."""
        about = {"plugin": loaded.plugin, "version": loaded.version, "mode": loaded.mode}
        more = {"effective_digest": loaded.effective_digest, "warnings": loaded.warnings, "seconds": round(seconds, 3)}
        with self._writing("loaded", **about, **more) as as_text:
            if as_text:
                for warning in loaded.warnings:
                    click.echo(f"isolator: warning: {safe(warning)}", err=True)
                version = f"{loaded.plugin} {safe(loaded.version)} ({loaded.mode})"
                click.echo(styled(f"▸ {version} is in use, after {latency(int(seconds * 1e6))}", bold=True))

    def answered(self, answer: Answer) -> None:
        """An event has an outcome."""
        with self._writing("answer", **answer.to_json()) as as_text:
            if as_text:
                said = answer.detail or result_in(answer.reply or "")
                colour = "green" if answer.ok else "red"
                outcome = styled(answer.outcome, colour)
                click.echo(f"▸ {answer.event}: {outcome} ({latency(answer.latency_us)})  {safe(said)}")

    def wrote(self, line: Mapping[str, Any]) -> None:
        """The plugin has written a line."""
        with self._writing("log", **line) as as_text:
            if as_text:
                click.echo(f"{_MARKS.get(line['stream'], '#')} {safe(line['line']) if line['line'] else ''}")

    def exchanged(self, exchange: Mapping[str, Any]) -> None:
        """The recorder has answered a request."""
        with self._writing("exchange", **exchange) as as_text:
            if as_text:
                click.echo(f"→ {safe(exchange['method'])} {safe(exchange['url'])}: {exchange['status']}")

    def denied(self, denial: Denial, name: str) -> None:
        """The plugin was refused something, with the line to add."""
        with self._writing("denial", denial=denial.to_json()) as as_text:
            if as_text:
                denials.show([denial], name)

    def crashed(self, why: str) -> None:
        """The plugin has ended by itself."""
        with self._writing("crashed", why=why) as as_text:
            if as_text:
                click.echo(styled(f"▸ it has ended: {safe(why)}", fg="red"))

    def events(self, events: Mapping[str, str]) -> None:
        """List the events of a plugin, each with an example of a payload, or the reason why there is none."""
        with self._writing("events", events=dict(events)) as as_text:
            if as_text:
                for event, example in events.items():
                    click.echo(f"  {event} {safe(example)}")

    def note(self, text: str) -> None:
        """Anything else that the author should know."""
        with self._writing("note", text=text) as as_text:
            if as_text:
                click.echo(f"▸ {safe(text)}")

    def failed(self, error: Exception) -> None:
        """Something could not be done; the loop goes on."""
        shown = getattr(error, "to_json", lambda: {"why": str(error)})()
        with self._writing("error", error=shown) as as_text:
            if as_text:
                click.echo(styled(f"▸ {safe(error)}", fg="red"))
