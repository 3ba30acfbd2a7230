"""The catalogue: payloads, times, spellings, schemas, and translation between majors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel

from host.channel.reply import ONESHOT_REQUEST, build_params, oneshot_request
from host.events import BUILT_IN, Catalogue, EventType, from_schema
from host.queue.interface import Event
from host.schemas.shape import Property, Record, Scalar
from isolator.errors import NotFoundError, UsageError

DEPLOY: dict[str, Any] = {"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}


def _event(payload: dict[str, Any], name: str = "deploy.completed") -> Event:
    return Event(1, "ev_1", name, "2026-01-01T00:00:00.000Z", 0.0, 1.0, json.dumps(payload, separators=(",", ":")))


def test_a_missing_time_is_filled_in_and_a_present_one_is_kept() -> None:
    catalogue = Catalogue()
    assert catalogue.validate("deploy.completed", DEPLOY).fields["finished_at"].endswith("Z")
    kept = catalogue.validate("deploy.completed", {**DEPLOY, "finished_at": "2026-03-12T12:00:00+02:00"})
    assert kept.fields["finished_at"] == "2026-03-12T10:00:00.000Z"


@pytest.mark.parametrize("given", [{}, {"finished_at": None}])
def test_time_that_is_filled_in_stands_in_its_place_and_optional_fields_behind_it(given: dict[str, Any]) -> None:
    validated = Catalogue().validate("deploy.completed", {"branch": "b", "commit_sha": "c", **DEPLOY, **given})
    order = ["project_id", "deployment_id", "url", "duration_ms", "finished_at", "commit_sha", "branch"]
    assert list(validated.fields) == list(json.loads(validated.json)) == order


@pytest.mark.parametrize(
    "wrong",
    [
        {"duration_ms": "12"},
        {"duration_ms": 1.5},
        {"duration_ms": -1},
        {"duration_ms": True},
        {"url": "javascript:alert(1)"},
        {"url": None},
        {"finished_at": "yesterday"},
        {"finished_at": "2026-03-12T10:00:00"},
        {"project_id": ""},
        {"internal_token": "x"},
    ],
)
def test_a_payload_that_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Catalogue().validate("deploy.completed", {**DEPLOY, **wrong})


def test_every_event_publishes_a_schema_with_its_required_fields() -> None:
    for event_type in BUILT_IN:
        schema = event_type.schema()
        assert schema["additionalProperties"] is False
        required = set(schema["required"])
        assert event_type.order_by is None or event_type.order_by in required
        assert required & set(event_type.optional_fields()) == set()


def test_both_spellings_of_a_hook_mean_the_event() -> None:
    catalogue = Catalogue()
    assert catalogue.canonical("on_deploy_complete") == "deploy.completed"
    assert catalogue.validate("on_deploy_complete", DEPLOY).type.name == "deploy.completed"
    with pytest.raises(NotFoundError):
        catalogue.validate("on_coffee_ready", {})


def test_a_built_in_event_cannot_be_replaced() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    with pytest.raises(UsageError, match="built in"):
        Catalogue().register(from_schema("deploy.completed", schema))
    with pytest.raises(UsageError, match="order_by"):
        Catalogue().register(from_schema("backup.done", schema, "b"))
    with pytest.raises(UsageError, match="dotted"):
        Catalogue().register(from_schema("Backup", schema))


def test_a_schema_made_by_pydantic_is_understood() -> None:
    class Backup(BaseModel):
        volume: str
        size: int
        ratio: float | None = None
        tags: list[str] = []

    event_type = from_schema("backup.done", Backup.model_json_schema(), "volume")
    event_type.check.validate_python({"volume": "v", "size": 1, "tags": ["a"]})
    for wrong in ({"volume": 1, "size": 1}, {"volume": "v"}, {"volume": "v", "size": 1, "more": 1}):
        with pytest.raises(ValueError, match=r"volume|size|more"):
            event_type.check.validate_python(wrong)


def test_host_starts_without_pydantic_but_for_its_core() -> None:
    code = "import sys, host.service; print({'pydantic', 'pydantic_core.core_schema', 'argparse'} & {*sys.modules})"
    paths = "import sys; sys.path[:0] = " + repr(sys.path) + "; "
    assert subprocess.check_output([sys.executable, "-I", "-c", paths + code], text=True) == "set()\n"


def test_a_schema_that_would_be_checked_only_in_part_is_refused() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "ipv4"}}}
    with pytest.raises(UsageError, match="'format' is not supported"):
        from_schema("backup.done", schema)


THIRD = {
    name: Property(Scalar(kind), True)
    for name, kind in (("job", "string"), ("state", "string"), ("seconds", "integer"))
}
"""Fields of a payload whose second and third major changed it."""


def _down3(payload: dict[str, Any]) -> dict[str, Any]:
    """Major 3 renamed ``took_ms`` to ``seconds``."""
    return {**{k: v for k, v in payload.items() if k != "seconds"}, "took_ms": payload["seconds"] * 1000}


def _down2(payload: dict[str, Any]) -> dict[str, Any]:
    """Major 2 replaced ``ok`` by ``state``."""
    return {**{k: v for k, v in payload.items() if k != "state"}, "ok": payload["state"] == "done"}


def test_an_older_plugin_gets_the_major_it_knows() -> None:
    event_type = EventType("job.ended", Record("job.ended", THIRD), "job", version=3, down={3: _down3, 2: _down2})
    event = _event({"job": "j", "state": "done", "seconds": 2}, "job.ended")
    assert build_params(event, event_type, 3) == {"job": "j", "state": "done", "seconds": 2}
    assert build_params(event, event_type, 2) == {"job": "j", "state": "done", "took_ms": 2000}
    assert build_params(event, event_type, 1) == {"job": "j", "ok": True, "took_ms": 2000}
    line = oneshot_request(event, "job.ended", event_type, attempt=1, timeout=10, major=1, meta=False)
    assert line is not None
    assert json.loads(line)["params"] == {"job": "j", "ok": True, "took_ms": 2000}


@pytest.mark.parametrize("size", range(3600, 4300, 7))
def test_a_one_shot_request_is_never_longer_than_one_read(size: int) -> None:
    catalogue = Catalogue()
    payload = catalogue.validate("deploy.completed", {**DEPLOY, "commit_message": "m" * 1900}).fields
    payload["url"] = "https://x.example/" + "u" * (size - 2300)
    event = _event(payload)
    line = oneshot_request(event, "deploy.completed", catalogue.get("deploy.completed"), attempt=1, timeout=10,
                           major=1, meta=True)  # fmt: skip
    assert line is not None
    assert len(line) <= ONESHOT_REQUEST
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line)["params"]["url"] == payload["url"]


def test_text_of_any_script_fits_by_its_bytes() -> None:
    catalogue = Catalogue()
    payload = catalogue.validate(
        "deploy.completed", {**DEPLOY, "commit_message": "é" * 2000, "branch": "ü" * 200}
    ).fields
    line = oneshot_request(_event(payload), "deploy.completed", catalogue.get("deploy.completed"), attempt=1, timeout=1,
                           major=1, meta=True)  # fmt: skip
    assert line is not None
    assert len(line) <= ONESHOT_REQUEST
    json.loads(line)
