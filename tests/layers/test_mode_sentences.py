"""The sentence of ``plugin explain`` about a mode: each clause of it names the test that notices if it is untrue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isolator.layers.explain import mode_sentence
from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet
from isolator.policy.request import MODES, ManifestCore

TESTS = Path(__file__).resolve().parents[1]
CLAUSES = {
    "Runs once for each event, in a cage of its own: nothing stays from one event to the next": (
        "system/test_exec.py::test_each_event_runs_the_program_in_a_fresh_cage_and_the_last_line_is_the_result"
    ),
    ", but for /state": "system/test_exec.py::test_exit_code_decides_about_the_event",
    "; a run that fails is a failed attempt and no crash.": (
        "system/test_exec.py::test_exit_code_decides_about_the_event"
    ),
    "Serves HTTP to the host alone": "system/test_http.py::test_port_of_a_cage_is_reached_from_nowhere_else",
    ", on its socket": "system/test_http.py::test_event_arrives_as_a_cloudevent_with_a_signature_that_verifies",
    r", on port \d+ of its own loopback": "system/test_http.py::test_port_of_a_cage_is_reached_from_nowhere_else",
    "; a redirect is never followed.": "system/test_http.py::test_status_decides_about_the_event",
    "Speaks MCP with the host alone": (
        "mcp/test_servers.py::test_server_that_asks_floods_and_answers_what_nobody_asked_delays_nobody"
    ),
    ", which makes calls of its tools out of events": (
        "mcp/test_servers.py::test_event_becomes_a_call_with_arguments_of_its_payload"
    ),
    " and of what callers ask": "mcp/test_servers.py::test_editor_of_either_era_sees_and_calls_granted_tools_alone",
    "; a tool that has changed is blocked for them until it is approved.": (
        "mcp/test_servers.py::test_tool_that_changes_or_is_renamed_is_blocked_until_approved"
    ),
}


@pytest.mark.parametrize("state", [0, 1 << 20])
@pytest.mark.parametrize(("mode", "port"), [*((mode, None) for mode in MODES), ("http", 5000)])
def test_each_clause_of_a_mode_has_a_test(mode: str, port: int | None, state: int) -> None:
    core = ManifestCore(
        name="any", version="1.0.0", api_version="1", binary="./any", hooks=(), mode=mode, port=port,
        limits={"state": state},
    )  # fmt: skip
    rest = mode_sentence(meet(core, None, HostConfig())).get("mode", "")
    assert bool(rest) == (mode not in ("oneshot", "stream"))
    while rest:
        match, test = next((m, test) for clause, test in CLAUSES.items() if (m := re.match(clause, rest)))
        rest = rest[match.end() :]
        file, _, name = test.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(), test
