"""The six steps of the demo, each on the running daemon and through its command line only.

Every step adds the promises that it has put to the test, with the evidence it has seen.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contained
import internet
import report
from daemon import Daemon, DemoError, Record, Trail, caused_by, event_id_of
from report import Promise

NOTIFIER = "slack-deploy-notifier"
HOSTILE = "hostile"
EXAMPLES = Path(__file__).resolve().parents[1]
DATABASE_PORT = 5432
SECRET = "T024DEMO/B024DEMO/xoxSecretOfTheWebhook"


@dataclass
class Demo:
    """Everything the steps share."""

    root: Path
    work: Path
    daemon: Daemon
    net: internet.Internet
    trail: Trail
    database_contacts: list[str]
    promises: list[Promise] = field(default_factory=list)
    deliveries: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds of the notifier's deliveries, by the time of the demo they belong to."""
    story: str = ""
    flood_kept: tuple[int, float] = (0, 0.0)

    def promise(self, text: str, held: bool, evidence: str) -> None:
        self.promises.append(Promise(text, held, evidence))

    def pid_of(self, plugin: str) -> int:
        """The process of a running plugin, by its number on the host."""
        started = self.trail.kinds("plugin.started", plugin)
        if not started:
            raise DemoError(f"the audit has no plugin.started of {plugin}")
        return int(started[-1]["data"]["pid"])

    def deliver(self, name: str, payload: dict[str, Any], when: str, *, show: bool = False) -> str:
        """Emit one event to the notifier, wait for it, remember its latency; its id."""
        words = ["event", "emit", name, json.dumps(payload), "--wait"]
        if show:
            report.command(["isolator", *words])
        code, text = self.daemon.run(*words, "--json")
        event_id = event_id_of(text)
        done = self.trail.wait(lambda r: response_of(r, event_id, NOTIFIER), 20)
        if code != 0 or done is None:
            raise DemoError(f"{name} was not delivered to {NOTIFIER}: {text.strip()[:300]}")
        asked = next(r for r in self.trail.of(event_id) if r["type"] == "event.dispatched" and r["plugin"] == NOTIFIER)
        took = done["data"]["latency_us"] / 1000
        self.deliveries.setdefault(when, []).append(took)
        if show:
            queued = (asked["data"]["queued_us"] or 0) / 1000
            report.output(f"{event_id}  {done['data']['outcome']}: queued {queued:.1f} ms, answered in {took:.1f} ms")
        return event_id


def response_of(record: Record, event_id: str, plugin: str) -> bool:
    """Is it the plugin's answer to that event?"""
    return record["type"] == "event.response" and record.get("plugin") == plugin and caused_by(record, event_id)


def deploy(number: int) -> dict[str, Any]:
    return {"project_id": "proj_abc123", "deployment_id": f"dep_{number:03}"}


# ------------------------------------------------------------------------------------ 1 to 3


def ledger(demo: Demo) -> None:
    report.heading(1, "What this host can enforce")
    report.say("Every control with its state, and the kernel's reason where something is missing.")
    report.command(["isolator", "check"])
    code, text = demo.daemon.run("check")
    report.output(text)
    found = demo.daemon.json("check")
    entries = found if isinstance(found, list) else found.get("ledger") or found.get("controls")
    states = [entry["state"] for entry in entries]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("enforced", "degraded", "unavailable"))
    demo.promise("No mandatory control is missing", code == 0, counts)


def add_notifier(demo: Demo) -> None:
    report.heading(2, f"A plugin is added: {NOTIFIER}")
    report.say("What it asks for, what the policy allows, and what the cage will promise.")
    secret = demo.work / "webhook.txt"
    secret.write_text(f"https://hooks.slack.com/services/{SECRET}")
    secret.chmod(0o600)
    config = ["--config", f"slack_webhook_url=@{secret}", "--config", f"ca_file=@{demo.net.ca}"]
    demo.daemon.show("plugin", "add", str(EXAMPLES / NOTIFIER), *config, "--yes")
    demo.daemon.show("plugin", "explain", NOTIFIER)


def emit_events(demo: Demo) -> None:
    report.heading(3, "Three events, and the messages they cause")
    report.say("The first starts the plugin: a cage is built, then the sidecar runs. The others find it running.")
    events: tuple[tuple[str, dict[str, Any]], ...] = (
        ("deploy.started", {**deploy(1), "started_at": "2026-01-01T10:00:00Z", "project_name": "shop"}),
        ("deploy.completed", {**deploy(1), "url": "https://shop.example", "duration_ms": 8123, "project_name": "shop"}),
        ("deploy.failed", {**deploy(2), "error_code": "BUILD_FAILED", "stage": "build"}),
    )
    for name, payload in events:
        demo.story = demo.deliver(name, payload, "before", show=True)
    with contextlib.suppress(TimeoutError):
        demo.net.wait(lambda contacts: sum(c.kind == "webhook" for c in contacts) >= len(events), "messages", 5)
    arrived = demo.net.of("webhook")
    report.blank()
    report.say("What arrived at the pretend Slack (TLS, over the plugin's own connection):")
    for contact in arrived:
        report.say(f"{contact.body['message']['channel']}  {contact.body['message']['text']}", 2)
    texts = {contact.body["message"]["text"] for contact in arrived}
    times = ", ".join(f"{ms:.0f}" for ms in demo.deliveries["before"])
    demo.promise(
        "Each event arrives, once",
        len(arrived) == len(texts) == len(events) and all(c.body["path"].endswith(SECRET) for c in arrived),
        f"{len(arrived)} messages at the webhook; deliveries took {times} ms",
    )


# ------------------------------------------------------------------------------------ 4


def known_to_the_attacker(demo: Demo) -> contained.Target:
    """Real paths of this run: the cage must hold though the attacker knows them all."""
    lib, run = demo.root / "var/lib/isolator", demo.root / "run/isolator"
    secrets = [str(demo.work / "webhook.txt")]
    for place in (lib / "host", lib / "audit"):
        secrets += sorted(str(path) for path in place.rglob("*") if path.is_file())[:3]
    secrets += [str(path) for path in sorted((lib / "state").glob("*"))[:2]]
    sockets = sorted(str(path) for path in run.rglob("*") if path.is_socket())[:6]
    places = [str(lib), str(run), str(demo.root / "etc/isolator/policies")]
    return contained.Target(demo.pid_of(NOTIFIER), secrets, sockets, places, internet.HOST, DATABASE_PORT)


def targets_are_real(demo: Demo, target: contained.Target) -> str:
    """From the host itself everything that will be attacked can be reached: being stopped is no accident."""
    from dns import message

    question = message.make_query("loot.collector.example.net", "A").to_wire()
    checks = {
        "database on loopback": internet.exchange(("127.0.0.1", DATABASE_PORT), b"\n"),
        "metadata service": internet.exchange((internet.METADATA, 80), b"GET / HTTP/1.0\r\n\r\n"),
        "collector": internet.exchange((internet.COLLECTOR, 443), b"\n"),
        "8.8.8.8/udp": internet.exchange((internet.OUTSIDE_RESOLVER, 53), question, socket.SOCK_DGRAM),
        "8.8.8.8/tcp": internet.exchange((internet.OUTSIDE_RESOLVER, 53), len(question).to_bytes(2, "big") + question),
        "/etc/shadow": Path("/etc/shadow").read_bytes(),
        "secrets": b"".join(Path(path).read_bytes()[:16] for path in target.secrets if Path(path).is_file()),
    }
    silent = [name for name, answer in checks.items() if not answer]
    if silent:
        raise DemoError(f"these targets do not answer even the host, so an attack on them proves nothing: {silent}")
    return ", ".join(checks)


def hostile(demo: Demo) -> None:
    report.heading(4, "A hostile plugin is added, and attacks")
    policy = Path(__file__).with_name("hostile.toml")
    report.say("It asks for far too much. Its operator wrote this policy before:")
    shutil.copyfile(policy, demo.root / "etc/isolator/policies/hostile.toml")
    report.output("\n".join(line for line in policy.read_text().splitlines() if not line.startswith("#")))
    demo.daemon.show("plugin", "add", str(EXAMPLES / HOSTILE), "--yes")
    target = known_to_the_attacker(demo)
    report.blank()
    report.say(f"The targets are real; the host itself reaches: {targets_are_real(demo, target)}.")
    before = {kind: len(demo.net.of(kind)) for kind in ("metadata", "resolver", "collector", "dns")}
    database_before = len(demo.database_contacts)
    report.say(
        "Now each attack, one event each: what the plugin itself says happened, the layer that this points to, and"
        " what the audit and the cgroup recorded. In between the notifier goes on working."
    )
    report.command(["isolator", "event", "emit", "error.detected", '{"title": "ATTACK", ...}', "--wait"])
    results = [attack(demo, number, attempt, target) for number, attempt in enumerate(contained.ATTEMPTS, 1)]
    after = {kind: len(demo.net.of(kind)) - count for kind, count in before.items()}
    judge(demo, results, after, len(demo.database_contacts) - database_before)


@dataclass(frozen=True)
class Result:
    """One attack as it was seen from inside, from the audit, and from the cgroup."""

    attempt: contained.Attempt
    succeeded: bool
    killed: str
    recorded: list[str]
    explained: bool


def attack(demo: Demo, number: int, attempt: contained.Attempt, target: contained.Target) -> Result:
    logs_before, began = log_bytes(demo), time.monotonic()
    denied_forks = None
    with contextlib.suppress(DemoError):
        denied_forks = contained.cgroup_counter(demo.pid_of(HOSTILE), "pids", "pids.events", "max")
    words = ("event", "emit", "error.detected", json.dumps(contained.payload(attempt, target)), "--wait", "--json")
    with demo.daemon.start(*words) as process:
        if attempt.during or number % 4 == 0:
            event = {**deploy(100 + number), "url": "https://shop.example", "duration_ms": number}
            demo.deliver("deploy.completed", event, "during")
        text, _ = process.communicate(timeout=60)
    event_id = event_id_of(text)
    ended = demo.trail.wait(
        lambda r: response_of(r, event_id, HOSTILE) or (r["type"] == "plugin.crashed" and caused_by(r, event_id)), 30
    )
    if ended is None:
        raise DemoError(f"{attempt.name}: the audit has neither an answer nor a crash")
    for kind in attempt.records:
        demo.trail.wait(lambda r, kind=kind: r["type"] == kind and caused_by(r, event_id), 3)  # type: ignore[misc] # bound
    records = demo.trail.of(event_id)
    said = said_by_plugin(ended)
    recorded = contained.layers_recorded(records)
    killed = ""
    if said is None:
        killed = str((ended.get("data") or {}).get("cause") or (ended.get("data") or {}).get("outcome"))
        crash = demo.trail.wait(lambda r: r["type"] == "plugin.crashed" and r.get("plugin") == HOSTILE, 10)
        if crash is not None:
            killed = str(crash["data"].get("cause"))
        said = {"succeeded": False, "detail": f"no answer: the cage was ended ({killed})", "how_far": "never came back"}
    if denied_forks is not None and attempt.name == "fork-bomb":
        now = contained.cgroup_counter(demo.pid_of(HOSTILE), "pids", "pids.events", "max")
        if now is not None and now > denied_forks:
            recorded.append(f"cgroup pids.events: max {denied_forks} -> {now}")
    if attempt.name == "flood-stdout":
        demo.flood_kept = (log_bytes(demo) - logs_before, time.monotonic() - began)
        recorded.append(f"log: {demo.flood_kept[0] >> 10} KiB kept, the rest counted and dropped")
    layers = contained.layers_said(attempt, said["detail"])
    if killed:
        layers = [f"cgroup: memory.max ({killed})"] if killed in {"oom", "out of memory"} else [f"unexplained {killed}"]
    verdict = "SUCCEEDED" if said["succeeded"] and attempt.layers else "stopped" if attempt.layers else "contained"
    report.blank()
    report.say(f"{number:2}. {attempt.tries}: {verdict}, {said['how_far']}")
    report.say(f"said:    {said['detail'].replace(str(demo.root), 'ROOT')}", 4)
    report.say(f"layer:   {'; '.join(layers) or 'capture of the output: rate and size'}", 4)
    report.say(f"record:  {'; '.join(recorded) or 'none needed: nothing was there to refuse'}", 4)
    missing = [kind for kind in attempt.records if not any(r["type"] == kind for r in records)]
    explained = not missing and not any(layer.startswith("unexplained") for layer in layers)
    return Result(attempt, bool(said["succeeded"]), killed, recorded, explained)


def said_by_plugin(record: Record) -> dict[str, Any] | None:
    """The plugin's own report out of its `event.response`; None when it never answered."""
    response = (record.get("data") or {}).get("response")
    if isinstance(response, str):
        with contextlib.suppress(ValueError):
            response = json.loads(response)
    if isinstance(response, dict):
        response = response.get("result", response)
        if isinstance(response, dict) and "succeeded" in response:
            return response
    return None


def log_bytes(demo: Demo) -> int:
    """What the daemon keeps of all plugins' output."""
    return sum(path.stat().st_size for path in (demo.root / "var/log/isolator/plugins").rglob("*") if path.is_file())


def judge(demo: Demo, results: list[Result], arrived: dict[str, int], database: int) -> None:
    real = [result for result in results if result.attempt.layers]
    won = [result.attempt.name for result in real if result.succeeded]
    demo.promise(
        "No attack comes through",
        not won,
        f"{len(real) - len(won)} of {len(real)} stopped" + (f"; came through: {', '.join(won)}" if won else ""),
    )
    unexplained = [result.attempt.name for result in results if not result.explained]
    demo.promise(
        "What stopped each is known and on record",
        not unexplained,
        f"{sum(bool(result.recorded) for result in results)} attacks have records of their own"
        + (f"; unexplained: {', '.join(unexplained)}" if unexplained else ""),
    )
    outside = {kind: count for kind, count in arrived.items() if kind != "dns"} | {"database": database}
    questions = [contact.body["name"] for contact in demo.net.of("dns") if contact.body["name"] != "hooks.slack.com"]
    demo.promise(
        "Nothing of it is seen on the far side",
        not any(outside.values()) and not questions,
        ", ".join(f"{kind} {count}" for kind, count in outside.items()) + f", foreign questions {len(questions)}",
    )
    kept, seconds = demo.flood_kept
    demo.promise(
        "Output without end fills no disk",
        kept <= (seconds + 2) * (1 << 20),
        f"16 MiB sent, {kept >> 10} KiB kept in {seconds:.1f} s",
    )
    ends = [result.killed for result in results if result.killed]
    again = None
    if crashed := demo.trail.kinds("plugin.crashed", HOSTILE):
        seq = crashed[-1]["seq"]
        again = demo.trail.wait(
            lambda r: r["type"] == "plugin.started" and r["plugin"] == HOSTILE and r["seq"] > seq, 15
        )
    demo.promise(
        "A plugin that is killed says why and starts again",
        not ends or again is not None,
        (f"killed by: {', '.join(ends)}; " if ends else "never killed; ")
        + (f"started again as pid {again['data']['pid']}" if again else "no restart was due"),
    )


# ------------------------------------------------------------------------------------ 5


def trail(demo: Demo) -> None:
    report.heading(5, "All the while, and the record of it")
    during = sorted(demo.deliveries["during"])
    before = sorted(demo.deliveries["before"])
    arrived, sent = len(demo.net.of("webhook")), len(during) + len(before)
    report.say(
        f"While the attacks ran, the notifier delivered {len(during)} events: median {during[len(during) // 2]:.0f} ms,"
        f" slowest {during[-1]:.0f} ms (before: {before[0]:.0f} to {before[-1]:.0f} ms)."
    )
    starts = demo.trail.kinds("plugin.started", NOTIFIER)
    demo.promise(
        "The neighbour does not notice",
        arrived == sent and len(starts) == 1 and Path(f"/proc/{demo.pid_of(NOTIFIER)}").exists(),
        f"{len(during)} of {len(during)} delivered during the attacks, slowest {during[-1]:.0f} ms; never restarted",
    )
    report.blank()
    report.say("What one event caused, in order:")
    demo.daemon.show("audit", "story", demo.story)
    verify(demo)
    leaked = [str(path.relative_to(demo.root)) for path in (demo.root / "var/log").rglob("*") if holds_secret(path)]
    demo.promise(
        "A secret is in no log and no record",
        not leaked,
        "searched for the webhook's address" + (f"; found in {', '.join(leaked)}" if leaked else ": not found"),
    )


def holds_secret(path: Path) -> bool:
    return path.is_file() and SECRET.rsplit("/", 1)[1].encode() in path.read_bytes()


def verify(demo: Demo) -> None:
    report.blank()
    report.say("Is the trail whole? Then the same with one byte changed in a copy of it:")
    report.command(["isolator", "audit", "verify"])
    whole, text = demo.daemon.run("audit", "verify")
    report.output(text)
    copy = demo.work / "copy.jsonl"
    shutil.copyfile(demo.root / "var/log/isolator/audit/audit.jsonl", copy)
    lines = copy.read_bytes().splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if b'"event.response"' in line and demo.story.encode() in line)
    seq = json.loads(lines[number])["seq"]
    digit = re.search(rb'"latency_us": ?\d*?([0-8])', lines[number])
    if digit is None:
        raise DemoError(f"record {seq} has no latency to falsify")
    at = digit.start(1)
    lines[number] = lines[number][:at] + bytes([lines[number][at] + 1]) + lines[number][at + 1 :]
    copy.write_bytes(b"".join(lines))
    copy.chmod(0o644)
    report.say(f"(changed: one digit of the latency in record {seq})")
    report.command(["isolator", "audit", "verify", str(copy)])
    broken, text = demo.daemon.run("audit", "verify", str(copy))
    report.output(text)
    named = re.search(rf"\b{seq}\b", text) is not None
    demo.promise("The trail verifies", whole == 0, "every record of this run, in order, hashes and seals")
    demo.promise(
        "One changed byte is found and named", broken != 0 and named, f"record {seq} named, exit code {broken}"
    )


STEPS = (ledger, add_notifier, emit_events, hostile, trail)
