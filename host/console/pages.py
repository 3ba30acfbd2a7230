"""The pages: each function gathers the context of one template, with nothing but reading verbs and the trail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from host.cli.denials import Denial, attempt, collect
from host.console.charts import Points, line, seconds_of, values
from host.console.upstream import Live, Upstream
from host.queue.interface import FINAL
from isolator.audit import files, reader
from isolator.audit.record import Record, parse
from isolator.audit.schema import AuditSeal
from isolator.audit.story import collect as collect_story
from isolator.audit.story import story_lines
from isolator.cli.audit import moment
from isolator.errors import IsolatorError, NotFoundError, UnavailableError
from isolator.policy.meet.advice import Advice
from isolator.policy.units import format_size

Context = dict[str, Any]
NEWEST = 1000
"""Events among which the page of events looks."""
SHOWN = 100
"""Rows of a page."""
PAYLOAD = 32_768
"""Characters of a payload on the page of its event."""
LOG_LINES = 50
SEAL_WITHIN = 5000
"""Records after one among which its seal is looked for: ``seal_records`` of host.toml is 1000."""
READS = 2
"""Readers of the trail's files at a time."""
_STORY_RECORDS = 2000


class Pages:
    """Contexts of the pages. ``trail``: the folder of the trail."""

    def __init__(self, upstream: Upstream, live: Live, trail: Path) -> None:
        self._upstream, self._live, self._trail = upstream, live, trail
        self._reads = asyncio.Semaphore(READS)

    async def overview(self) -> Context:
        """Alarms, plugins, queue, last denials."""
        status, listed = await asyncio.gather(self._upstream.call("status"), self._upstream.call("plugin.list"))
        plugins = sorted(listed["plugins"], key=_urgency)
        recent = [(one, Denial("refusal", one.type, one.data, Advice(""))) for one in self._live.newest_denials(8)]
        return {
            "status": status, "alarms": listed["alarms"], "plugins": plugins, "denied": self._live.denied(),
            "recent": [(record, attempt(denial)) for record, denial in recent],
        }  # fmt: skip

    async def plugin(self, name: str) -> Context:
        """One plugin: promises, lines, versions, usage, log, health."""
        call = self._upstream.call
        shown, explained, logs = await asyncio.gather(
            call("plugin.show", name=name),
            _or(call("plugin.explain", name=name), {"proposal": {"lines": []}}),
            _or(call("plugin.logs", name=name, lines=LOG_LINES), {"lines": [], "dropped": 0}),
        )
        sentences = (explained["proposal"].get("sentences") or {}).values()
        return {
            "plugin": shown, "modes": _MODES, "proposal": explained["proposal"], "promises": list(sentences),
            "charts": _charts(self._live.usage(name), shown), "log": logs["lines"],
            "dropped": logs["dropped"], "denials": _rows(collect(self._live.denials(name), shown))[:20],
        }  # fmt: skip

    async def events(self, query: Mapping[str, str]) -> Context:
        """The newest events that a filter leaves."""
        wanted = {key: query.get(key, "").strip()[:200] for key in ("type", "plugin", "outcome", "since")}
        found, types = await asyncio.gather(
            self._upstream.call("event.list", limit=NEWEST, brief=True), self._upstream.call("event.types")
        )
        since = _since(wanted["since"])
        fits = [event for event in found["events"] if _fits(event, wanted, since)]
        names = sorted({delivery["plugin"] for event in found["events"] for delivery in event["deliveries"]})
        outcomes = sorted({delivery["state"] for event in found["events"] for delivery in event["deliveries"]})
        return {
            "events": fits[:SHOWN], "found": len(fits), "looked": len(found["events"]), "wanted": wanted,
            "types": sorted(entry["name"] for entry in types["types"]), "plugins": names, "outcomes": outcomes,
        }  # fmt: skip

    async def story(self, event_id: str) -> Context:
        """Everything that an event caused, line by line, each with its record."""
        event = await self._upstream.call("event.show", id=event_id)
        records = await self._caused(event["id"], event["accepted"]) or await self._caused(event["id"], 0.0)
        lines = list(story_lines(event["id"], records, 100, event["deliveries"])) if records else []
        settled = all(one["state"] in FINAL for one in event["deliveries"])
        payload = json.dumps(event["payload"], indent=2)
        return {
            "event": event, "lines": lines, "final": FINAL, "payload": payload[:PAYLOAD], "cut": len(payload) > PAYLOAD,
            "topics": "time" if settled else "event net plugin exec",
        }  # fmt: skip

    async def _caused(self, event_id: str, since: float) -> list[Record]:
        found = await self._read(lambda: collect_story(self._trail, event_id, since=since))
        return [record for _, record in found][:_STORY_RECORDS]

    async def denials(self, name: str | None) -> Context:
        """Show each refusal once, with the line that grants it."""
        listed = (await self._upstream.call("plugin.list"))["plugins"]
        denied = self._live.denied()
        names = [name] if name else [entry["name"] for entry in listed if denied[entry["name"]]]
        groups = []
        for one in names[:SHOWN]:
            shown = await self._upstream.call("plugin.show", name=one)
            groups.append((one, _rows(collect(self._live.denials(one), shown))))
        return {"groups": groups, "plugins": [entry["name"] for entry in listed], "name": name, "kept": denied.total()}

    async def trail(self) -> Context:
        """Last seal, state, anchor, newest records."""
        lines = await self._read(lambda: reader.tail(self._trail, 30))
        records = [record for text in reversed(lines) if (record := parse(text)) is not None]
        status = await self._upstream.call("status")
        return {"live": self._live, "records": records, "trail": status["trail"], "seal": self._live.seal}

    async def record(self, text: str) -> Context:
        """One record, and the seal over it."""
        if not re.fullmatch(r"[0-9]{1,16}", text, re.ASCII):
            raise NotFoundError("record", "its number is no number", "see the page of the trail")
        seq = int(text)
        line, seal = await self._read(lambda: _with_seal(self._trail, seq))
        return {"line": line.decode("ascii", "backslashreplace"), "record": parse(line), "seal": seal, "seq": seq}

    async def _read(self, work: Callable[[], Any]) -> Any:
        async with self._reads:
            try:
                return await asyncio.to_thread(work)
            except PermissionError:
                why = "its files may not be read by this user"
                raise UnavailableError("audit trail", why, "set [console] in host.toml, or run as root") from None


def _with_seal(trail: Path, seq: int) -> tuple[bytes, Record | None]:
    """The line of a record, and the next seal after it if there is one."""
    with contextlib.closing(reader.Follower(trail, max(seq - 1, 0))) as follower:
        lines = follower.available(1)
        if not lines or files.seq_of(lines[0]) != seq:
            raise NotFoundError(f"record {seq}", "there is none, or it is no longer kept", "isolator audit verify")
        wanted, seen = lines[0], 0
        while lines and seen < SEAL_WITHIN:
            for text in lines:
                record = parse(text) if b'"type":"audit.seal"' in text else None
                if record is not None and record.type == AuditSeal.TYPE and record.seq > seq:
                    return wanted, record
            seen += len(lines)
            lines = follower.available(1)
        return wanted, None


_CHARTS: tuple[tuple[str, str, int, Callable[[float], str]], ...] = (
    ("processor, cores", "cpu", 1000, "{:.2f}".format),
    ("memory", "memory", 1, lambda value: format_size(int(value) >> 20 << 20 or int(value) >> 10 << 10)),
    ("tasks", "tasks", 1, "{:.0f}".format),
)
"""Title, key of the limits, what divides a limit to have the chart's unit, and the form of a value."""
_FIELDS = {"cpu": "cpu_us"}
_MODES = {
    "oneshot": "oneshot: a connection for each event", "stream": "stream: one lasting connection",
    "http": "http: a request for each event", "exec": "exec: its program runs once for each event",
    "mcp": "mcp: a server of tools",
}  # fmt: skip


def _charts(points: Points, shown: Mapping[str, Any]) -> list[tuple[str, str, str, Markup]]:
    """Title, present value, cap and chart of each resource."""
    caps, made = (shown.get("effective") or {}).get("resources") or {}, []
    for title, key, divisor, form in _CHARTS if shown["mode"] != "exec" else _CHARTS[:2]:  # tasks are not on record
        series, cap = values(points, _FIELDS.get(key, key)), _number(caps.get(key), divisor)
        now, most = form(series[-1][1]) if series else "–", form(cap) if cap else "no cap"
        made.append((title, now, most, line(series, cap, f"{title}: {now} of {most}")))
    return made


def _urgency(plugin: Mapping[str, Any]) -> tuple[bool, str]:
    """Order of the overview: what needs a look comes first."""
    troubled = plugin["failing_since"] or plugin.get("pending") or plugin["state"] in ("failed", "rejected", "backoff")
    return not troubled, plugin["name"]


def _rows(denials: list[Denial]) -> list[Context]:
    """Denials for a page, the latest first."""
    rows = [{"denial": one, "attempt": attempt(one), "advice": one.advice} for one in reversed(denials)]
    return rows[:SHOWN]


def _number(value: Any, divisor: int = 1) -> float | None:
    return value / divisor if isinstance(value, (int, float)) and value else None


async def _or(work: Awaitable[dict[str, Any]], instead: dict[str, Any]) -> dict[str, Any]:
    try:
        return await work
    except IsolatorError:
        return instead


def _fits(event: Mapping[str, Any], wanted: Mapping[str, str], since: float) -> bool:
    deliveries = event["deliveries"]
    return (
        wanted["type"] in ("", event["name"])
        and event["accepted"] >= since
        and (not wanted["plugin"] or any(one["plugin"] == wanted["plugin"] for one in deliveries))
        and (not wanted["outcome"] or any(one["state"] == wanted["outcome"] for one in deliveries))
    )


def _since(text: str) -> float:
    """Unix time of ``2h`` (ago) or an ISO time; 0 for none. Raises UsageError."""
    found = moment(text or None)
    return seconds_of(found) if found is not None else 0.0
