"""The HTTP API is as its OpenAPI document says, which follows from the types of the control socket."""

from __future__ import annotations

import json
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from host.console import api
from host.control.verbs import verbs
from isolator_client import Client
from tests.console.support import Console
from tests.system.daemon import ECHO, event, write_plugin

DOCUMENT = api.document()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
READING = sorted(path for path, item in DOCUMENT["paths"].items() if "get" in item)


@pytest.fixture(scope="module")
def furnished(console: Console, tmp_path_factory: pytest.TempPathFactory) -> Console:
    folder = tmp_path_factory.mktemp("plugins")
    console.daemon.cli("plugin", "add", str(write_plugin(folder / "echo", ECHO)), "--yes")
    console.daemon.cli("event", "emit", "deploy.completed", event(1), "--wait")
    return console


def test_document_is_served_and_has_every_verb_that_reads(furnished: Console) -> None:
    assert furnished.at_socket("/v1/openapi.json").json == json.loads(json.dumps(DOCUMENT))
    streams = {"audit.follow", "audit.search"}  # their lines are notifications, and the console has pages of its own
    reads = {verb for verb, one in verbs().items() if one.spec.role == "viewer"} - streams
    assert {path.removeprefix("/v1/").replace("/", ".") for path in READING} == {*reads, ".healthz"}


@pytest.mark.parametrize("path", READING)
def test_answers_are_as_the_document_says(furnished: Console, path: str) -> None:
    """Whatever is in the query, the answer is one that the document has, and fits its schema."""

    @given(case=SCHEMA[path]["GET"].as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case: schemathesis.Case) -> None:
        query = "&".join(
            f"{quote(str(key), safe='')}={quote(_text(value), safe='')}" for key, value in case.query.items()
        )
        answer = furnished.at_socket(f"{path}?{query}" if query else path)
        assert str(answer.status) in DOCUMENT["paths"][path]["get"]["responses"], (query, answer.text)
        assert answer.status < 500, (query, answer.text)
        _valid(answer.json, DOCUMENT["paths"][path]["get"]["responses"][str(answer.status)])

    check()


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, (bool, int, float)) else str(value)


def _valid(value: object, response: dict[str, object]) -> None:
    from jsonschema_rs import validator_for

    schema = response["content"]["application/json"]["schema"]  # type: ignore[index]
    validator_for({**schema, "components": DOCUMENT["components"]}).validate(value)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("plugin/show", "name"), ("plugin/show?name=", "name"), ("plugin/show?name=echo&name=echo", "twice"),
        ("event/list?limit=-1", "limit"), ("event/list?limit=1e9", "not a number"),
        ("event/list?limit=nan", "not a number"),
        ("status?x=1", "not known"), ("plugin/logs?name=echo&follow=true", "not known"),
        ("event/list?limit=10001", "limit"),
    ],
)  # fmt: skip
def test_bad_parameter_is_named(furnished: Console, query: str, why: str) -> None:
    answer = furnished.at_socket(f"/v1/{query}")
    assert answer.status == 400 and why in answer.text, answer.text


def test_events_are_filtered_without_a_script(furnished: Console) -> None:
    def rows(query: str) -> int:
        answer = furnished.at_socket(f"/events?{query}", accept="text/html")
        assert answer.status == 200, answer.text
        return answer.text.count('href="/story/')

    found = furnished.at_socket("/v1/event/list").json["events"][0]["accepted"]
    ago = int(time.time() - found) + 60
    assert rows("") >= 1 == rows(f"type=deploy.completed&plugin=echo&outcome=ok&since={ago}s") == rows("plugin=echo")
    for none in ("type=deploy.failed", "plugin=nobody", "outcome=dead", "since=0s"):
        assert rows(none) == 0, none


def test_page_of_an_event_has_a_bound(furnished: Console) -> None:
    all_of = {"type": "array", "items": {"type": "integer"}}
    with Client(root=furnished.daemon.root) as client:
        client.call("event.register", name="test.large", schema={"type": "object", "properties": {"all": all_of}})
        found = client.emit("test.large", {"all": list(range(9000))})
    answer = furnished.at_socket(f"/story/{found.id}", accept="text/html")
    assert answer.status == 200 and "Only its beginning" in answer.text and len(answer.body) < 200_000


def test_missing_thing_is_not_found(furnished: Console) -> None:
    assert furnished.at_socket("/v1/plugin/show?name=nobody").status == 404
    assert furnished.at_socket("/v1/nothing").status == 404
    assert furnished.at_socket("/v1/plugin/remove?name=echo").status == 404  # what changes something has no path


def test_document_in_the_docs_is_the_one_that_is_served() -> None:
    written = Path(__file__).parents[2] / "docs/openapi.json"
    assert json.loads(written.read_text()) == json.loads(json.dumps(DOCUMENT))
