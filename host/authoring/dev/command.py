"""``isolator dev``: see the package."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from host.authoring.options import of_a_plugin, recorder_of

if TYPE_CHECKING:
    from host.authoring.trial import Plan


@click.command(
    epilog="\b\nExamples:\n  sudo isolator dev ./deploy-bell\n"
    "  sudo isolator dev . --event deploy.failed --payload @failed.json\n"
    "  sudo isolator dev . --recording answers.jsonl --config webhook_url=@webhook.txt\n"
    "  echo deploy.completed | sudo isolator dev . --json\n\n"
    "\b\nOn standard input, a line each:\n  an empty line        the last event again\n"
    "  NAME [JSON]          that event, with an example of a payload or with JSON\n"
    "  events               the events that the plugin asks for, with examples\n"
    "  reload               load it again, as after a save\n"
    "  quit                 end, as ^C and the end of the input do",
)
@of_a_plugin
@click.option("--event", "events", metavar="NAME", multiple=True, help="Send this event after each load.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of text.")
@click.pass_obj
def dev(root: str | None, plan: Plan, recording: str | None, as_json: bool) -> None:
    """Run a plugin in its cage while you write it: loaded again on each save, with its log and what it is refused.

    A daemon of this command's own does it, below a root of its own; ^C ends both, and nothing is left. Needs root.
    Ceiling, defaults and network are those of this host's host.toml. A version that does not come up is shown, and the
    one before stays in use. With --recording, answers of granted names are recorded into FILE the first time, and
    played from then on; their TLS ends at an authority that only this cage trusts.
    """
    from host.authoring.dev.screen import Screen
    from host.authoring.dev.session import Session
    from host.authoring.private_daemon import PrivateDaemon
    from isolator.linux.signals import ending_cleanly

    screen = Screen(as_json=as_json)
    recorder = recorder_of(recording, screen.note, screen.exchanged)
    # ^C is the usual end. A second one while everything is removed would leave something.
    with ending_cleanly(), contextlib.suppress(KeyboardInterrupt), PrivateDaemon("dev", root, recorder) as daemon:
        Session(daemon, plan, screen).run()
