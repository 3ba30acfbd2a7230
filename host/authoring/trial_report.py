"""Report of a trial: for people, as JSON, and as JUnit XML for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click

from host.authoring.trial import Trial
from host.cli import denials
from host.cli.output import latency, paragraph, result_in, safe, table

_MARKS = {"stdout": " ", "stderr": "!"}
_SHOWN_LINES = 40


def show(trial: Trial) -> None:
    """Print a trial for people."""
    click.echo(f"{trial.plugin} {safe(trial.version)} ({trial.mode})")
    for warning in trial.warnings:
        click.echo(f"isolator: warning: {safe(warning)}", err=True)
    rows = [[a.event, a.outcome, latency(a.latency_us), a.detail or result_in(a.reply or "")] for a in trial.answers]
    table(["event", "outcome", "latency", "reply"], rows)
    if trial.log:
        click.echo("\nlog" if len(trial.log) <= _SHOWN_LINES else f"\nlog, its last {_SHOWN_LINES} lines")
        for line in trial.log[-_SHOWN_LINES:]:
            click.echo(f"  {_MARKS.get(line['stream'], '#')} {safe(line['line']) if line['line'] else ''}")
    if trial.denials:
        click.echo("\nrefused, failed, or at a limit")
        click.echo("\n".join(denials.lines(trial.denials, trial.plugin)))
    if not trial.ok:
        failed = [answer.event for answer in trial.answers if not answer.ok]
        paragraph(f"\nfailed: {', '.join(failed)}")


def to_json(trial: Trial) -> dict[str, Any]:
    return {
        "plugin": trial.plugin, "version": trial.version, "mode": trial.mode, "ok": trial.ok,
        "effective_digest": trial.effective_digest,
        "events": [answer.to_json() for answer in trial.answers],
        "log": trial.log,
        "denials": [denial.to_json() for denial in trial.denials],
        "warnings": trial.warnings,
    }  # fmt: skip


def write_junit(trial: Trial, path: Path) -> None:
    """Write a trial as JUnit XML: a test case for each event."""
    failures = sum(not answer.ok for answer in trial.answers)
    counts = {"tests": str(len(trial.answers)), "failures": str(failures), "errors": "0", "skipped": "0"}
    top = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(top, "testsuite", {"name": f"{trial.plugin} {safe(trial.version)}", **counts})
    for answer in trial.answers:
        seconds = f"{(answer.latency_us or 0) / 1e6:.6f}"
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": trial.plugin, "name": answer.event, "time": seconds}
        )  # fmt: skip
        if not answer.ok:
            message = safe(answer.detail or answer.outcome)
            ElementTree.SubElement(case, "failure", {"type": answer.outcome, "message": message}).text = message
    # Escaped as for a terminal: XML has no control characters, and a plugin may write any.
    ElementTree.SubElement(suite, "system-out").text = "\n".join(safe(line["line"]) for line in trial.log)
    refused = [f"{denials.attempt(denial)}: {safe(denial.advice.why)}" for denial in trial.denials]
    ElementTree.SubElement(suite, "system-err").text = "\n".join(refused)
    ElementTree.indent(top)
    ElementTree.ElementTree(top).write(path, encoding="utf-8", xml_declaration=True)
