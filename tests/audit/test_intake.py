"""Intake: each record of a packet is written once, whatever stands beside it and in whatever order numbers come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from isolator.audit.intake import Intake
from isolator.audit.log import Chain, Limits
from isolator.audit.metrics import Metrics
from isolator.audit.recover import ChainEnd
from isolator.audit.seal import Signer, load_signer

TIME = "2026-01-02T03:04:05.000006Z"
SESSIONS = ("0000000a", "0000000b")


def intake(signer: Signer, **origins: str) -> Intake:
    return Intake(Chain(ChainEnd(origins=origins), signer, Limits()), Metrics())


def line(**changed: Any) -> bytes:
    return json.dumps({"time": TIME, "type": "net.query", "data": {}} | changed).encode()


def written(taking: Intake) -> list[dict[str, Any]]:
    return [json.loads(one) for batch in taking.chain.take() for one in batch.lines]


def signer_in(place: Path) -> Signer:
    for folder in (place / "lib", place / "log"):
        folder.mkdir()
    return load_signer(place / "lib", place / "log")


def test_refused_line_costs_no_other_of_its_packet(tmp_path: Path) -> None:
    odd = line(time=TIME.replace("2", "\N{ARABIC-INDIC DIGIT TWO}"))
    bad = (odd, b"", b"[", b"[]", line(type="audit.seal"), line(plugin=5), line(data={"x": float("nan")}))
    taking = intake(signer_in(tmp_path))
    assert taking.take("broker", b"\n".join(one for each in bad for one in (each, line(plugin="p")))) == 2 * len(bad)
    kinds = [(one["type"], one["plugin"]) for one in written(taking)]
    assert kinds.count(("net.query", "p")) == len(bad)
    assert sum(kind == "audit.gap" for kind, _ in kinds) > 3 and len(taking.chain.origins) == 0


def test_every_number_is_written_once_and_what_was_lost_is_counted(tmp_path: Path) -> None:
    signer = signer_in(tmp_path)
    number = st.tuples(st.sampled_from(SESSIONS), st.integers(1, 6), st.booleans())

    @given(st.lists(st.lists(number, min_size=1), min_size=1), st.sampled_from(["", "0000000a:2", "0000000b:3"]))
    def hold(packets: list[list[tuple[str, int, bool]]], before: str) -> None:
        taking = intake(signer, **({"broker": before} if before else {}))
        session, _, text = before.partition(":")
        last = int(text or 0)
        expected: list[tuple[str, Any]] = []
        for packet in packets:
            for its, count, good in packet:
                if its == session and count <= last:
                    continue
                if its == session and count > last + 1:
                    expected.append(("lost", count - last - 1))
                if good:
                    expected.append(("broker", f"broker:{its}:{count}"))
                    session, last = its, count
            nan = float("nan")
            lines = [line(n=f"{its}:{count}", data={} if good else {"x": nan}) for its, count, good in packet]
            assert taking.take("broker", b"\n".join(lines)) == len(packet)
        found = [
            ("lost", one["data"]["count"]) if one["type"] == "audit.gap" else ("broker", one["origin"])
            for one in written(taking)
            if one["type"] != "audit.gap" or one["data"]["why"].startswith("lost")
        ]
        assert found == expected
        assert taking.chain.origins.get("broker", "") == (f"{session}:{last}" if session else "")

    hold()
