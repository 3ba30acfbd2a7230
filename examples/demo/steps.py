"""The steps of the demo, each on the running daemon and through its command line only.

Every step adds the promises that it has put to the test, with the evidence it has seen.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import report
from attack import hostile
from daemon import DemoError
from stage import EXAMPLES, NOTIFIER, Demo, deploy

SECRET = "T024DEMO/B024DEMO/xoxSecretOfTheWebhook"


def ledger(demo: Demo) -> None:
    report.heading(1, "What this host can enforce")
    report.command(["isolator", "check"])
    code, text = demo.daemon.run("check")
    report.output(text)
    states = [entry["state"] for entry in json.loads(demo.daemon.run("check", "--json")[1])["controls"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("enforced", "degraded", "unavailable"))
    demo.promise("No mandatory control is missing", code == 0, counts)


def add_notifier(demo: Demo) -> None:
    report.heading(2, f"A plugin is added: {NOTIFIER}")
    report.say(
        "What it asks for, what it gets, which line decided that, and what each layer promises. There is no policy"
        " for it yet, so one is written. ($ROOT is the folder below which this demo's daemon lives.)"
    )
    secret = demo.work / "webhook.txt"
    secret.write_text(f"https://hooks.slack.com/services/{SECRET}")
    secret.chmod(0o600)
    shutil.copytree(EXAMPLES / NOTIFIER, demo.work / NOTIFIER)
    config = ["--config", "slack_webhook_url=@webhook.txt", "--config", "ca_file=@ca.pem"]
    demo.daemon.show("plugin", "add", NOTIFIER, *config, "--yes", "--verbose")


def emit_events(demo: Demo) -> None:
    report.heading(3, "Three events, and the messages they cause")
    report.say("The first starts the plugin: its cage is built, then it runs. The others find it running.")
    events: tuple[tuple[str, dict[str, Any]], ...] = (
        ("deploy.started", {**deploy(1), "started_at": "2026-01-01T10:00:00Z"}),
        ("deploy.completed", {**deploy(1), "url": "https://shop.example", "duration_ms": 8123}),
        ("deploy.failed", {**deploy(2), "error_code": "BUILD_FAILED"}),
    )
    stories = [demo.deliver(name, payload, "before", show=True) for name, payload in events]
    demo.story = stories[0]
    with contextlib.suppress(TimeoutError):
        demo.net.wait(lambda contacts: sum(c.kind == "webhook" for c in contacts) >= len(events), "messages", 5)
    arrived = demo.net.of("webhook")
    report.blank()
    report.say("What arrived at the pretend Slack, over the plugin's own TLS connection:")
    for contact in arrived:
        report.output(f"{contact.body['message']['channel']}  {contact.body['message']['text']}")
    texts = {contact.body["message"]["text"] for contact in arrived}
    times = ", ".join(f"{ms:.0f}" for ms in demo.deliveries["before"])
    demo.promise(
        "Each event arrives, once",
        len(arrived) == len(texts) == len(events) and all(c.body["path"].endswith(SECRET) for c in arrived),
        f"{len(arrived)} messages, delivered in {times} ms",
    )


def meanwhile(demo: Demo) -> None:
    report.heading(5, "All the while, and the record of it")
    during, before = sorted(demo.deliveries["during"]), sorted(demo.deliveries["before"])
    arrived, sent = len(demo.net.of("webhook")), len(during) + len(before)
    report.say(
        f"While the attacks ran, the notifier delivered {len(during)} events: median {during[len(during) // 2]:.0f} ms,"
        f" slowest {during[-1]:.0f} ms (before: {before[0]:.0f} to {before[-1]:.0f} ms)."
    )
    starts = demo.trail.kinds("plugin.started", NOTIFIER)
    demo.promise(
        "The neighbour does not notice",
        arrived == sent and len(starts) == 1 and Path(f"/proc/{demo.pid_of(NOTIFIER)}").exists(),
        f"{arrived - len(before)} of {len(during)} arrived, slowest {during[-1]:.0f} ms"
        + (f"; started {len(starts)} times" if len(starts) != 1 else ""),
    )
    report.blank()
    report.say("What the first event caused, in order:")
    demo.daemon.show("audit", "story", demo.story)


def record_holds(demo: Demo) -> None:
    """With the daemon stopped: the trail is then sealed to its last record."""
    demo.promise(
        "The daemon stops when told",
        demo.daemon.exit_code == 0,
        f"SIGTERM: exit code {demo.daemon.exit_code}",
    )
    report.blank()
    report.say("The daemon is stopped, which seals the trail. Is it whole?")
    report.command(["isolator", "audit", "verify"])
    whole, text = demo.daemon.run("audit", "verify")
    report.output(text)
    demo.promise(
        "The trail verifies",
        whole == 0,
        "all hashes and seals, by the public key" if whole == 0 else f"exit code {whole}",
    )
    changed_byte(demo)
    leaked = [str(path.relative_to(demo.root)) for path in (demo.root / "var/log").rglob("*") if holds_secret(path)]
    demo.promise(
        "A secret is in no log or record",
        not leaked,
        f"the webhook's address: found in {', '.join(leaked)}" if leaked else "the webhook's address: not found",
    )


def changed_byte(demo: Demo) -> None:
    copy = demo.work / "copy"
    shutil.copytree(demo.root / "var/log/isolator/audit", copy)
    trail = copy / "audit.jsonl"
    lines = trail.read_bytes().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if b'"event.response"' in line and demo.story.encode() in line)
    seq = json.loads(lines[number])["seq"]
    digit = re.search(rb'"latency_us": ?\d*?([0-8])', lines[number])
    if digit is None:
        raise DemoError(f"record {seq} has no latency to falsify")
    at = digit.start(1)
    lines[number] = lines[number][:at] + bytes([lines[number][at] + 1]) + lines[number][at + 1 :]
    trail.write_bytes(b"".join(lines))
    report.blank()
    report.say(f"And a copy of it, with one byte changed: a digit of the latency in record {seq}.")
    report.command(["isolator", "audit", "verify", "copy"])
    broken, text = demo.daemon.run("audit", "verify", "copy")
    report.output(text)
    named = re.search(rf"\brecord {seq}\b", text) is not None
    demo.promise(
        "One changed byte is found, named",
        broken != 0 and named,
        f"record {seq} " + ("named" if named else "NOT named") + f", exit code {broken}",
    )


def holds_secret(path: Path) -> bool:
    return path.is_file() and SECRET.rsplit("/", 1)[1].encode() in path.read_bytes()


STEPS = (ledger, add_notifier, emit_events, hostile, meanwhile)
