"""The published client's check of the chain, against what the real writer wrote and somebody changed."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from isolator.audit.log import Limits
from isolator.audit.record import parse
from isolator_client.errors import DeniedError, IsolatorError, UnavailableError
from isolator_client.protocol import Notification
from isolator_client.trail import Recorded, Trail
from tests.audit.tamper import rechain
from tests.audit.test_verify import Written


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    written = Written(tmp_path_factory.mktemp("trail"), 40, Limits())
    return written.live.read_text("ascii").splitlines()


def take(trail: Trail, lines: list[str]) -> list[Recorded]:
    return list(trail.take(Notification("audit.records", {"lines": lines})))


def test_the_records_are_those_that_the_daemon_reads(lines: list[str]) -> None:
    trail = Trail(after=0)
    taken = take(trail, lines[:7]) + take(trail, []) + take(trail, lines[7:])
    assert [record.line for record in taken] == lines
    for record in taken:
        theirs = parse(record.line.encode())
        assert theirs is not None
        fields = "seq time type origin plugin run event_id delivery_id data prev hash cut".split()
        assert [getattr(record, name) for name in fields] == [getattr(theirs, name) for name in fields]
        assert record.event_ids == theirs.events
    assert trail.follow().params == {"after": len(lines)}


def test_the_place_is_known_from_the_answer_on(lines: list[str]) -> None:
    trail = Trail(lines=5)
    assert trail.follow().params == {"lines": 5}
    trail.begins(10)
    assert trail.follow().params == {"after": 10}
    trail.begins(3)  # the answer of a later connection
    assert take(trail, lines[10:12])[0].seq == 11


def test_older_records_may_be_gone(lines: list[str]) -> None:
    assert take(Trail(after=0), lines[20:])[0].seq == 21


def test_several_events_may_have_caused_a_record(lines: list[str]) -> None:
    body = json.loads(lines[0]) | {"event_id": None, "data": {"event_ids": ["e1", "e2"]}}
    (line,) = rechain([json.dumps(body, separators=(",", ":")).encode()])
    assert take(Trail(after=0), [line.decode()])[0].event_ids == ("e1", "e2")


def _changed(lines: list[str]) -> list[str]:
    return [*lines[:5], lines[5].replace('"number":', '"Number":'), *lines[6:]]


def _rechained(lines: list[str]) -> list[str]:
    anew = rechain([line.encode() for line in lines[5:]], first=6)
    return lines[:5] + [line.decode() for line in anew]


def _begun_elsewhere(lines: list[str]) -> list[str]:
    return [line.decode() for line in rechain([line.encode() for line in lines], prev="1" * 64)]


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (_changed, "record 6 is no record, or its hash does not fit"),
        (lambda lines: lines[:5] + lines[6:], "record 6 is missing: 7 came instead"),
        (lambda lines: lines[:5] + lines[4:], "record 5 came again"),
        (lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], "record 6 is missing"),
        (_rechained, "record 6 does not continue the record before it"),
        (_begun_elsewhere, "record 1 does not continue"),
        (lambda lines: [*lines[:5], "nonsense"], "record 6 is no record"),
        (lambda lines: [*lines[:5], "[1]"], "record 6 is no record"),
        (lambda lines: [*lines[:5], lines[5] + " "], "record 6 is no record"),
        (lambda lines: [*lines[:5], lines[5].replace('"data":{', '"data":{"é":1,', 1)], "record 6 is no record"),
        (lambda lines: [*lines[:5], lines[5].replace('"seq":6', '"seq":true')], "record 6 is no record"),
    ],
)
def test_whatever_was_changed_is_noticed(lines: list[str], tamper: Callable[[list[str]], list[str]], why: str) -> None:
    with pytest.raises(IsolatorError, match=f"audit trail: {why}"):
        take(Trail(after=0), tamper(lines))


def test_a_gap_after_the_place_to_go_on_is_noticed(lines: list[str]) -> None:
    with pytest.raises(IsolatorError, match="record 11 is missing: 13"):
        take(Trail(after=10), lines[12:])


def test_a_socket_that_denies_is_only_away_once_the_trail_has_begun() -> None:
    trail, denied = Trail(), DeniedError("socket", "not for you")
    assert trail.away(denied) is denied
    trail.begins(0)
    assert isinstance(trail.away(denied), UnavailableError)
