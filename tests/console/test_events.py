"""Events over HTTP: CloudEvents of those with the role, signed ones from outside, and ways in without the right."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest

from tests.console.support import KEYS, PORT, VIEWER, Console
from tests.system.daemon import EVENT

OUTSIDE = "shop.example"
STRUCTURED = "application/cloudevents+json"


def cloud(number: str, **more: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": number, "source": "/ci", "type": "deploy.completed", "data": EVENT, **more}


def emitted(console: Console, event_id: str) -> dict[str, Any]:
    found: dict[str, Any] = console.at_socket(f"/v1/event/show?id={event_id}").json
    return found


def signed_body(kind: str = "deploy.completed") -> bytes:
    return json.dumps({"type": kind, "data": EVENT}).encode()


def ingress(console: Console, body: bytes, headers: dict[str, str], path: str = "/v1/ingress/shop") -> tuple[int, Any]:
    answer = console.at_port(path, method="POST", host=OUTSIDE, body=body, **headers)
    return answer.status, answer.json


def test_structured_and_binary_cloud_events_are_one_event_by_source_and_id(console: Console) -> None:
    body = json.dumps(cloud("a1")).encode()
    first = console.at_socket("/v1/events", method="POST", body=body, content_type=STRUCTURED)
    assert first.status == 200 and not first.json["duplicate"], first.text
    assert emitted(console, first.json["id"])["by"] == "console:uid:0"
    assert EVENT.items() <= emitted(console, first.json["id"])["payload"].items()
    binary = {"ce_specversion": "1.0", "ce_id": "%611", "ce_source": "/c%69", "ce_type": "deploy.completed"}
    again = console.at_socket(
        "/v1/events", method="POST", body=json.dumps(EVENT).encode(), content_type="application/json", **binary
    )
    assert again.status == 200 and again.json["duplicate"] and again.json["id"] == first.json["id"]
    other = json.dumps(cloud("a1", source="/other")).encode()
    assert not console.at_socket("/v1/events", method="POST", body=other, content_type=STRUCTURED).json["duplicate"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (cloud("b1", specversion="0.3"), STRUCTURED), (cloud("b2", type=7), STRUCTURED),
        (cloud("b3", data=[1]), STRUCTURED),
        ({**cloud("b4"), "data_base64": "AA=="}, STRUCTURED), ([cloud("b5")], STRUCTURED), (cloud(""), STRUCTURED),
        (cloud("b6"), "application/json"), (cloud("b7"), "text/plain"), (cloud("b8", type="no.such"), STRUCTURED),
        (cloud("b9", data={"deployment_id": 7}), STRUCTURED),
    ],
)  # fmt: skip
def test_event_that_is_none_is_refused(console: Console, body: Any, kind: str) -> None:
    answer = console.at_socket("/v1/events", method="POST", body=json.dumps(body).encode(), content_type=kind)
    assert answer.status in (400, 404) and answer.json["error"]["why"], answer.text


def test_bytes_that_are_no_json_and_too_many_are_refused(console: Console) -> None:
    for body in (b"", b"{", b"\xff", b"[" * 100_000, b'{"id": NaN}', b'"' + b"x" * (1 << 20) + b'"'):
        answer = console.at_socket("/v1/events", method="POST", body=body, content_type=STRUCTURED)
        assert answer.status == 400, (body[:10], answer.text)


def test_nobody_but_the_console_gets_the_name_of_another(console: Console) -> None:
    from isolator_client import Client

    with Client(root=console.daemon.root) as client:
        found = client.emit("deploy.completed", EVENT, on_behalf_of="uid:1")
    assert emitted(console, found.id)["by"] == "uid:0"
    (accepted,) = [
        one for one in console.daemon.records() if one["type"] == "event.accepted" and one["event_id"] == found.id
    ]
    assert accepted["data"]["on_behalf_of"] == "uid:1"


def test_signed_event_gets_in_and_is_one_event_however_often_it_is_sent(console: Console) -> None:
    body = signed_body()
    status, first = ingress(console, body, console.signed(body, number="m1"))
    assert status == 200 and emitted(console, first["id"])["by"] == "console:ingress:shop", first
    status, again = ingress(console, body, console.signed(body, number="m1", key=KEYS[1]))  # the key before goes on
    assert status == 200 and again["duplicate"] and again["id"] == first["id"]
    headers = console.signed(body, number="m2")
    headers["webhook_signature"] = f"v1,{base64.b64encode(b'x' * 32).decode()} v1a,zzz {headers['webhook_signature']}"
    assert ingress(console, body, headers)[0] == 200  # one of several signatures fits


def test_signature_is_the_only_way_in_from_outside(console: Console) -> None:
    body = signed_body()
    good = console.signed(body, number="n1")
    host, cookie = console.enter()
    ways = {
        "no headers": {}, "no signature": {**good, "webhook_signature": ""},
        "another key": console.signed(body, number="n1", key=b"k" * 32), "empty key": console.signed(body, key=b""),
        "another id": {**good, "webhook_id": "n2"}, "no id": {**good, "webhook_id": ""},
        "another time": {**good, "webhook_timestamp": str(int(time.time()) + 1)},
        "too old": console.signed(body, number="n1", at=int(time.time()) - 400),
        "from the future": console.signed(body, number="n1", at=int(time.time()) + 400),
        "no number": {**good, "webhook_timestamp": "now"},
        "another version": {**good, "webhook_signature": good["webhook_signature"].replace("v1,", "v2,")},
        "cut signature": {**good, "webhook_signature": good["webhook_signature"][:-8]},
        "cookie": {"cookie": cookie},
        "uid of root in a header": {"x_forwarded_user": "root", "x_forwarded_for": "127.0.0.1"},
    }  # fmt: skip
    answers = {name: ingress(console, body, headers) for name, headers in ways.items()}
    assert {name: status for name, (status, _) in answers.items()} == dict.fromkeys(ways, 401)
    assert ingress(console, body + b" ", good)[0] == 401  # the raw body counts
    assert (
        ingress(console, body, good, "/v1/ingress/nobody") == answers["no headers"]
    )  # and names are not to be guessed
    assert host
    refused = console.at_port("/v1/ingress/shop", method="POST", host=OUTSIDE, body=body)
    assert refused.status == 401 and refused.headers["www-authenticate"] == 'Standard-Webhooks realm="ingress"'


def test_signed_event_of_another_type_or_shape_is_refused(console: Console) -> None:
    for body, status in ((signed_body("deploy.failed"), 403), (b"{}", 400), (b"[]", 400), (b"no", 400)):
        assert ingress(console, body, console.signed(body, number=f"o{len(body)}"))[0] == status, body


@pytest.mark.parametrize(
    "path", ["/v1/events", "/v1/token", "/", "/v1/ingress", "/v1/ingress/shop/more", "//v1/ingress/shop"]
)
def test_name_from_outside_opens_nothing_but_the_ingress(console: Console, path: str) -> None:
    body = signed_body()
    answer = console.at_port(path, method="POST", host=OUTSIDE, body=body, **console.signed(body, number="p1"))
    assert answer.status in (401, 403, 404), (path, answer.text)


def test_viewer_cannot_emit(console: Console) -> None:
    data = json.dumps(cloud("v1"))
    assert console.as_user(VIEWER, "/v1/events", "-H", f"content-type: {STRUCTURED}", "-d", data)[0] == 403
    assert console.at_port("/v1/events", method="POST", host=f"127.0.0.1:{PORT}", body=data.encode()).status == 401
