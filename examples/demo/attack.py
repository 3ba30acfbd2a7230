"""Step 4 of the demo: the hostile plugin is added and tries everything it knows, one event for each attack."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contained
import internet
import report
from contained import ATTEMPTS, LOG, MEMORY, TASKS, Attempt, Fact, Target
from daemon import DemoError, Record, caused_by, event_id_of
from stage import DATABASE_PORT, EXAMPLES, HOSTILE, NOTIFIER, Demo, deploy, response_of

MIB = 1 << 20


@dataclass(frozen=True)
class Result:
    """One attack as it was seen from inside, from the audit, and from the kernel's files."""

    attempt: Attempt
    succeeded: bool
    killed: str
    """Why the cage was ended, if it was."""
    kept: tuple[int, float]
    """Bytes of the plugin's output that were kept during it, and for how many seconds it went on."""
    facts: tuple[Fact, ...]
    missing: tuple[str, ...]
    """What there is no evidence of."""


def hostile(demo: Demo) -> None:
    report.heading(4, "A hostile plugin is added, and attacks")
    report.say(
        "It asks for far too much. Its operator wrote a policy before (examples/demo/hostile.toml), so that is what it"
        " gets. Nothing else of what it asks for is granted."
    )
    policy = demo.root / "etc/isolator/policies/hostile.toml"
    shutil.copyfile(Path(__file__).with_name("hostile.toml"), policy)
    shutil.copytree(EXAMPLES / HOSTILE, demo.work / HOSTILE)
    demo.daemon.show("plugin", "add", HOSTILE, "--yes")
    target = known_to_the_attacker(demo)
    report.blank()
    report.say(f"The targets are real; the host itself reaches: {targets_are_real(demo, target)}.")
    demo.net.settle()
    before = {kind: len(demo.net.of(kind)) for kind in ("metadata", "resolver", "collector")}
    database_before = len(demo.database_contacts)
    report.say(
        "Now each attack, one event each. Below it stands what stopped it: the layer, what the plugin was told, and"
        " what the audit and the kernel recorded of it."
    )
    report.command(["isolator", "event", "emit", "error.detected", '{"title": "ATTACK", ...}', "--wait"])
    report.blank()
    results = [attack(demo, number, attempt, target) for number, attempt in enumerate(ATTEMPTS, 1)]
    demo.net.settle()
    arrived = {kind: len(demo.net.of(kind)) - count for kind, count in before.items()}
    judge(demo, results, {**arrived, "database": len(demo.database_contacts) - database_before})


def known_to_the_attacker(demo: Demo) -> Target:
    """Real paths of this run: the cage must hold though the attacker knows them all."""
    lib, run = demo.root / "var/lib/isolator", demo.root / "run/isolator"
    secrets = [str(demo.work / "webhook.txt")]
    for place in (lib / "host", lib / "audit"):
        secrets += sorted(str(path) for path in place.rglob("*") if path.is_file())[:3]
    secrets += [str(path) for path in sorted((lib / "state").glob("*"))[:2]]
    sockets = sorted(str(path) for path in run.rglob("*") if path.is_socket())[:6]
    places = [str(lib), str(run), str(demo.root / "etc/isolator/policies")]
    return Target(demo.pid_of(NOTIFIER), secrets, sockets, places, internet.HOST, DATABASE_PORT)


def targets_are_real(demo: Demo, target: Target) -> str:
    """From the host itself everything that will be attacked can be reached: being stopped is no accident."""
    from dns import message

    question = message.make_query("loot.collector.example.net", "A").to_wire()
    checks = {
        "the database": internet.exchange(("127.0.0.1", DATABASE_PORT), b"\n"),
        "the metadata service": internet.exchange((internet.METADATA, 80), b"GET / HTTP/1.0\r\n\r\n"),
        "collector.example.net": internet.exchange((internet.COLLECTOR, 443), b"\n"),
        "8.8.8.8 by UDP": internet.exchange((internet.OUTSIDE_RESOLVER, 53), question, socket.SOCK_DGRAM),
        "by TCP": internet.exchange((internet.OUTSIDE_RESOLVER, 53), len(question).to_bytes(2, "big") + question),
        "/etc/shadow": Path("/etc/shadow").read_bytes(),
        "all the secrets": b"".join(Path(path).read_bytes()[:16] for path in target.secrets if Path(path).is_file()),
    }
    silent = [name for name, answer in checks.items() if not answer]
    if silent:
        raise DemoError(f"these targets do not answer even the host, so an attack on them proves nothing: {silent}")
    return ", ".join(checks)


def attack(demo: Demo, number: int, attempt: Attempt, target: Target) -> Result:
    """Have one attack made, gather the evidence, print it."""
    pid, logs_before, began = demo.pid_of_running(HOSTILE), log_bytes(demo), time.monotonic()
    refused_before = contained.cgroup_counter(pid, "pids", "pids.events", "max") if pid else None
    words = ("event", "emit", "error.detected", json.dumps(contained.payload(attempt, target)), "--wait", "--json")
    with demo.daemon.start(*words) as process:
        try:
            if attempt.during or number % 4 == 0:
                event = {**deploy(100 + number), "url": "https://shop.example", "duration_ms": number}
                demo.deliver("deploy.completed", event, "during")
            text, _ = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            raise
    event_id = event_id_of(text)
    ended = demo.trail.wait(lambda r: response_of(r, event_id, HOSTILE), 30)
    if ended is None:
        raise DemoError(f"{attempt.name}: the audit has no outcome of {event_id}")
    kept = (log_bytes(demo) - logs_before, time.monotonic() - began)
    said, killed = said_by_plugin(ended), ""
    # What repeats itself within a second is written at its end.
    due = [("call", call, "syscall.denied") for call in (contained.calls_refused(attempt, said) if said else ())]
    due += [("", "", kind) for kind in attempt.records]
    missing = [
        f"no record: {kind} {value}" for key, value, kind in due if not on_record(demo, event_id, kind, key, value)
    ]
    records = demo.trail.of(event_id)
    if said is None:
        killed, facts = killed_because(demo, json.loads(text[text.index("{") :]))
        said = {"succeeded": False, "detail": killed, "how_far": ""}
    else:
        facts = contained.facts(attempt, said, records)
        more, lacking = kernel_facts(demo, attempt, refused_before, kept)
        facts = [(layer, "; ".join(filter(None, [text, more.pop(layer, "")]))) for layer, text in facts]
        facts += list(more.items())
        missing += lacking
    verdict = "contained" if LOG in attempt.by else "SUCCEEDED" if said["succeeded"] else "stopped"
    far = f": {said['how_far']}" if not str(said["how_far"]).endswith(" tried") and said["how_far"] else ""
    report.finding(number, attempt.tries + far, verdict, facts)
    return Result(attempt, bool(said["succeeded"]), killed, kept, tuple(facts), tuple(missing))


def on_record(demo: Demo, event_id: str, kind: str, key: str, value: str) -> bool:
    """Is there a record of that type of that event (with that field), or will there be in a moment?"""

    def wanted(record: Record) -> bool:
        return record["type"] == kind and caused_by(record, event_id) and (not key or record["data"][key] == value)

    return demo.trail.wait(wanted, 3) is not None


def kernel_facts(
    demo: Demo, attempt: Attempt, refused_before: int | None, kept: tuple[int, float]
) -> tuple[dict[str, str], list[str]]:
    """What the kernel's own files say of this attack, by layer; and which of it is missing."""
    pid = demo.pid_of(HOSTILE)
    match attempt.name:
        case "setuid-root":
            held = contained.privileges(pid)
            powers = [part for part in held.split(", ") if part.startswith("Cap") and not part.endswith(" 0")]
            return {contained.CAPS: f"/proc/PID/status: {held}"}, powers
        case "fork-bomb":
            before, now = refused_before or 0, contained.cgroup_counter(pid, "pids", "pids.events", "max") or 0
            grown = [] if now > before else ["pids.events did not grow"]
            return {TASKS: f"its pids.events: max {before} -> {now}"}, grown
        case "flood-stdout":
            return {LOG: f"{kept[0] / MIB:.1f} MiB of it kept on disk, the rest counted and dropped"}, []
    return {}, []


def killed_because(demo: Demo, emitted: dict[str, Any]) -> tuple[str, list[Fact]]:
    """The cage was ended in the middle of it: why, by the supervisor's record, and what became of event and plugin."""
    crash = demo.trail.wait(lambda r: r["type"] == "plugin.crashed" and r.get("plugin") == HOSTILE, 10)
    if crash is None:
        return "nothing", [("unexplained", "it gave no answer, and the audit has no plugin.crashed")]
    again = restarted(demo, crash)
    cause, kills = str(crash["data"].get("cause")), crash["data"].get("oom_kills")
    state = next((d["state"] for d in emitted["deliveries"] if d["plugin"] == HOSTILE), "unknown")
    layer = MEMORY if cause == "out of memory" and kills else f"unexplained {cause}"
    text = f"the whole cage was ended; on record: plugin.crashed, {cause}, oom_kills {kills}; its event: {state}"
    return cause, [(layer, text + (f"; started again as pid {again['data']['pid']}" if again else ""))]


def restarted(demo: Demo, crash: Record) -> Record | None:
    """The record of the start that followed a crash."""
    return demo.trail.wait(
        lambda r: r["type"] == "plugin.started" and r["plugin"] == HOSTILE and r["seq"] > crash["seq"], 15
    )


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


def judge(demo: Demo, results: list[Result], arrived: dict[str, int]) -> None:
    real = [result for result in results if LOG not in result.attempt.by]
    won = [result.attempt.name for result in real if result.succeeded]
    demo.promise(
        "No attack comes through",
        not won,
        f"{len(real) - len(won)} of {len(real)} stopped" + (f"; came through: {', '.join(won)}" if won else ""),
    )
    other = [
        f"{result.attempt.name} ({', '.join([layer for layer, _ in result.facts] + list(result.missing))})"
        for result in results
        if result.missing or not result.attempt.expected({layer for layer, _ in result.facts})
    ]
    demo.promise(
        "Each is stopped by its own layer",
        not other,
        f"all {len(results)} by those expected, on record" if not other else f"not as expected: {', '.join(other)}",
    )
    questions = [contact.body["name"] for contact in demo.net.of("dns") if contact.body["name"] != "hooks.slack.com"]
    demo.promise(
        "The far side sees nothing of it",
        not any(arrived.values()) and not questions,
        f"{sum(arrived.values())} contacts, {len(questions)} foreign DNS questions"
        + "".join(f"; {kind}: {count}" for kind, count in arrived.items() if count),
    )
    kept, seconds = next(result.kept for result in results if LOG in result.attempt.by)
    demo.promise(
        "Output without end fills no disk",
        kept <= (seconds + 2) * MIB,
        f"16 MiB sent, {kept / MIB:.1f} MiB kept in {seconds:.1f} s",
    )
    ends = [result.killed for result in results if result.killed]
    crashed = demo.trail.kinds("plugin.crashed", HOSTILE)
    again = restarted(demo, crashed[-1]) if crashed else None
    demo.promise(
        "What is ended says why, returns",
        not crashed or (again is not None and len(crashed) == len(ends)),
        f"{', '.join(ends)}; started again" if again else "it was never ended" if not crashed else "not started again",
    )
