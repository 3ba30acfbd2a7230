"""``isolator plugin test``: events into a plugin in the real cage, without an installed daemon."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from host.authoring.options import of_a_plugin, recorder_of
from host.cli.output import safe
from isolator.cli.output import here, print_json
from isolator.errors import IsolatorError, UsageError, translated

if TYPE_CHECKING:
    from host.authoring.runner.trials import RunnerTrials
    from host.authoring.trial import Plan, Trials


@click.command(
    epilog="\b\nExamples:\n  sudo isolator plugin test ./deploy-bell\n"
    "  sudo isolator plugin test . --event deploy.failed --payload @failed.json --watch\n"
    "  sudo isolator plugin test . --policy prod.toml --recording answers.jsonl --junit report.xml\n\n"
    "In CI the exit code says it: 0 every event was handled, 1 one was not, others as usual.",
)
@of_a_plugin
@click.option("--event", "events", metavar="NAME", multiple=True, help="Send this event (default: one of each hook).")
@click.option("--watch", is_flag=True, help="Repeat it whenever a file in DIR changes.")
@click.option("--junit", metavar="FILE", help="Write a report for CI.")
@here
def test(
    root: str | None, plan: Plan, recording: str | None, watch: bool, junit: str | None, as_json: bool
) -> int:  # fmt: skip
    """Send events to a plugin in its cage, and show replies, log, and what it was refused.

    A daemon of this command's own does it, below a root of its own, which is gone afterwards: none needs to run, and
    the one that runs is left alone. Ceiling, defaults and network are those of this host's host.toml. It has what its
    policy grants: with the network it was granted, it reaches the real other side, unless a --recording answers in
    its place. Needs root, or the role runner of a running daemon: that builds the cage then, within [runner], without
    host API and without --recording.
    """
    from host.authoring import trial_report
    from isolator.linux.signals import ending_cleanly

    def work(trials: Trials | RunnerTrials) -> int:
        trial = trials.round()
        if as_json:
            print_json(trial_report.to_json(trial))
        else:
            trial_report.show(trial)
        if junit is not None:
            _write(lambda: trial_report.write_junit(trial, Path(junit)), junit)
        return 0 if trial.ok else 1

    with ending_cleanly(), contextlib.ExitStack() as stack:
        trials = _trials(root, plan, recording, stack)
        return _repeat(plan.folder, plan.policy, lambda: work(trials)) if watch else work(trials)


def _trials(root: str | None, plan: Plan, recording: str | None, stack: contextlib.ExitStack) -> Trials | RunnerTrials:
    """Trials on a daemon of this command's own, which ends with the stack, or through one that runs."""
    from host.authoring.private_daemon import PrivateDaemon
    from host.authoring.trial import Trials

    if os.geteuid() != 0:
        from host.authoring.runner.trials import RunnerTrials, is_served

        if is_served(root):
            if recording is not None:
                raise UsageError("--recording", "is root's alone", "leave it out, or use sudo")
            return RunnerTrials(root, plan)
    recorder = recorder_of(recording, lambda text: click.echo(f"isolator: {safe(text)}", err=True))
    return Trials(stack.enter_context(PrivateDaemon("plugin test", root, recorder)), plan)


def _repeat(folder: str, policy: Path | None, work: Callable[[], int]) -> int:
    """Work now, and again after every change; errors are shown. Ends with ^C."""
    from host.authoring.watching import Watching

    changed = threading.Event()
    with contextlib.closing(Watching(folder, policy, changed.set)):
        while True:
            try:
                work()
            except IsolatorError as error:
                click.echo(f"isolator: {error}", err=True)
            click.echo("\nwaiting for a change; ^C ends it", err=True)
            changed.wait()
            changed.clear()


def _write(write: Callable[[], None], name: str) -> None:
    with translated(OSError, UsageError, f"--junit {name}", "", "name another file"):
        write()
