"""Delivery to one-shot sidecars: real scripts, real sockets, a real host process."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from isolator.errors import IsolatorError
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars

FAST_RETRY = 'return {"status": "retry", "retry_after_ms": 20}'


async def test_an_event_starts_the_plugin_and_reaches_it(daemon: Daemon) -> None:
    daemon.add("greeter", sidecars.oneshot('return {"status": "ok", "message": params["url"]}'))
    emitted = await daemon.emit(url="https://shop.example")
    row = await daemon.outcome(emitted)
    (delivery,) = row["deliveries"]
    assert delivery["state"] == "ok"
    assert delivery["attempts"] == 1
    assert json.loads(delivery["reply"])["result"]["message"] == "https://shop.example"
    assert daemon.sidecars["greeter"].starts == 1
    kinds = [r["type"] for r in daemon.records if r["event_id"] == emitted["id"]]
    assert kinds == ["event.accepted", "event.dispatched", "event.response"]


async def test_trail_has_size_and_digest_of_the_request(daemon: Daemon) -> None:
    daemon.add("echo", sidecars.raw('data = connection.recv(65536)\nprint(data.decode(), end="", flush=True)\n'
               'connection.sendall(b\'{"jsonrpc":"2.0","result":{},"id":1}\')\nconnection.close()'))  # fmt: skip
    emitted = await daemon.emit()
    await daemon.outcome(emitted)
    (record,) = daemon.of_type("event.dispatched")
    line = (await daemon.ask("plugin.logs", name="echo"))["lines"][0]["line"].encode() + b"\n"
    assert record["data"]["request_bytes"] == len(line)
    assert record["data"]["request_sha256"] == hashlib.sha256(line).hexdigest()
    request = json.loads(line)
    assert request["method"] == "deploy.completed"
    assert request["params"]["_meta"]["id"] == emitted["id"]
    assert request["params"]["_meta"]["attempt"] == 1


async def test_older_spelling_of_an_event_reaches_its_subscriber(daemon: Daemon) -> None:
    script = sidecars.oneshot('return {"message": method}')
    daemon.add("old", script, hooks=["on_deploy_complete"])
    daemon.add("new", script, hooks=["deploy.completed"])
    row = await daemon.outcome(await daemon.emit())
    seen = {d["plugin"]: json.loads(d["reply"])["result"]["message"] for d in row["deliveries"]}
    assert seen == {"old": "on_deploy_complete", "new": "deploy.completed"}


async def test_each_connection_carries_one_request(daemon: Daemon) -> None:
    # A script that reads an empty request fails, so none may be made that is not used.
    daemon.add("counts", sidecars.oneshot('return {"message": str(params["_meta"]["attempt"])}'))
    await daemon.deliver()
    await daemon.ask("plugin.pause", name="counts")
    emitted = [await daemon.emit(project_id=f"p{number % 3}") for number in range(30)]
    await daemon.ask("plugin.resume", name="counts")
    for one in emitted:
        (delivery,) = (await daemon.outcome(one))["deliveries"]
        assert (delivery["state"], delivery["attempts"]) == ("ok", 1)
    assert daemon.sidecars["counts"].starts == 1
    assert daemon.connected == 1, "the host makes the others by itself"


async def test_skipped_counts_as_success(daemon: Daemon) -> None:
    daemon.add("skipper", sidecars.oneshot('return {"status": "skipped"}'))
    assert (await daemon.deliver())["state"] == "skipped"


@pytest.mark.parametrize("result", ['"just text"', "None", "[1, 2]", "17", "{}"])
async def test_results_of_any_shape_are_accepted(daemon: Daemon, result: str) -> None:
    daemon.add("shapes", sidecars.oneshot(f"return {result}"))
    assert (await daemon.deliver())["state"] == "ok"


async def test_a_reply_that_ends_with_the_connection_needs_no_newline(daemon: Daemon) -> None:
    reply = '{"jsonrpc":"2.0","result":{"status":"ok"},"id":1}'
    daemon.add("plain", sidecars.raw(f"connection.recv(4096)\nconnection.sendall(b'{reply}')\nconnection.close()"))
    assert (await daemon.deliver())["state"] == "ok"


async def test_retry_is_repeated_with_the_same_event_id(daemon: Daemon) -> None:
    body = f"""
global seen
seen = globals().get("seen", []) + [params["_meta"]["id"]]
if len(seen) < 3:
    {FAST_RETRY}
return {{"message": " ".join(seen)}}
"""
    daemon.add("third-time", sidecars.oneshot(body))
    emitted = await daemon.emit()
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    assert delivery["state"] == "ok"
    assert delivery["attempts"] == 3
    assert json.loads(delivery["reply"])["result"]["message"].split() == [emitted["id"]] * 3
    assert [r["data"]["attempt"] for r in daemon.of_type("event.dispatched")] == [1, 2, 3]


async def test_attempts_end_in_a_dead_letter_that_can_be_replayed(daemon: Daemon) -> None:
    flag = daemon.root / "works"
    body = f'if os.path.exists({str(flag)!r}):\n    return {{"status": "ok"}}\n{FAST_RETRY}'
    daemon.add("hopeless", sidecars.oneshot(body), delivery={"attempts": 2})
    emitted = await daemon.emit()
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    assert (delivery["state"], delivery["attempts"]) == ("dead", 2)
    (letter,) = (await daemon.ask("event.dead"))["deliveries"]
    assert letter["event_id"] == emitted["id"]
    assert "2 attempts failed" in letter["detail"]
    flag.touch()
    assert (await daemon.ask("event.replay", id=emitted["id"]))["plugins"] == ["hopeless"]
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    assert delivery["state"] == "ok"
    assert [r["type"] for r in daemon.records if r["type"] in ("event.dead", "event.replayed")] == [
        "event.dead",
        "event.replayed",
    ]


@pytest.mark.parametrize(
    ("code", "state"), [(-31001, "dead"), (-31007, "ok"), (-32601, "dead"), (-32602, "dead"), (-31008, "dead")]
)
async def test_error_code_decides_between_success_and_dead_letter(daemon: Daemon, code: int, state: str) -> None:
    reply = f'b\'{{"jsonrpc":"2.0","error":{{"code":{code},"message":"so"}},"id":1}}\\n\''
    daemon.add("coded", sidecars.raw(f"connection.recv(4096)\nconnection.sendall({reply})\nconnection.close()"))
    delivery = await daemon.deliver()
    assert delivery["state"] == state
    assert delivery["attempts"] == 1


async def test_busy_is_no_attempt(daemon: Daemon) -> None:
    body = """
count = globals().get("count", 0) + 1
request = json.loads(connection.recv(4096))
if count < 4:
    reply = {"error": {"code": -31006, "message": "busy", "data": {"retry_after_ms": 10}}}
else:
    reply = {"result": {"message": request["params"]["_meta"]["attempt"]}}
connection.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, **reply}).encode() + b"\\n")
connection.close()
"""
    daemon.add("busy", sidecars.raw(body), delivery={"attempts": 2})
    delivery = await daemon.deliver()
    assert (delivery["state"], delivery["attempts"]) == ("ok", 1)


NEW_MAJOR = """
import host.events as events
from host.schemas.shape import Property, Record, Scalar
from isolator.policy import request
fields = {"project_id": Property(Scalar("string"), True), "seconds": Property(Scalar("integer"), True)}
request.API_MAJORS = (1, 2)
down = {2: lambda payload: {"project_id": payload["project_id"], "took_ms": payload["seconds"] * 1000}}
events.BUILT_IN += (events.EventType("test.built", Record("test.built", fields), "project_id", version=2, down=down),)
"""


async def test_two_majors_of_a_payload_are_served_at_once(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.policy.request.API_MAJORS", (1, 2))
    await daemon.kill_host()
    daemon.first = NEW_MAJOR
    await daemon.start_host()
    script = sidecars.oneshot('return {"message": json.dumps({k: v for k, v in params.items() if k != "_meta"})}')
    body = "send(id=id, result={'message': json.dumps({k: v for k, v in params.items() if k != '_meta'})})"
    daemon.add("old", script, hooks=["test.built"], api_version="1")
    daemon.add(
        "old-stream", sidecars.stream(body), hooks=["test.built"], api_version="1.4", transport={"mode": "stream"}
    )
    daemon.add("new", script, hooks=["test.built"], api_version="2")
    emitted = await daemon.ask("event.emit", name="test.built", payload={"project_id": "p", "seconds": 3})
    row = await daemon.outcome(emitted)
    seen = {d["plugin"]: json.loads(json.loads(d["reply"])["result"]["message"]) for d in row["deliveries"]}
    older = {"project_id": "p", "took_ms": 3000}
    assert seen == {"old": older, "old-stream": older, "new": {"project_id": "p", "seconds": 3}}


# Size


async def test_a_large_event_loses_its_meta_then_its_optional_fields(daemon: Daemon) -> None:
    daemon.add("small", sidecars.oneshot('return {"message": ",".join(sorted(params))}'))
    delivery = await daemon.deliver(commit_message="x" * 1900, branch="b" * 200, url="https://a.example/" + "u" * 1900)
    keys = json.loads(str(delivery["reply"]))["result"]["message"].split(",")
    assert delivery["state"] == "ok"
    assert "commit_message" not in keys
    assert "_meta" not in keys
    assert {"project_id", "deployment_id", "url", "duration_ms", "finished_at", "branch"} <= set(keys)
    assert daemon.of_type("event.dispatched")[0]["data"]["request_bytes"] <= 4096


async def test_required_fields_that_do_not_fit_are_a_dead_letter_and_never_sent(daemon: Daemon) -> None:
    schema = {"type": "object", "properties": {"blob": {"type": "string"}}, "required": ["blob"]}
    await daemon.ask("event.register", name="backup.failed", schema=schema)
    daemon.add("small", sidecars.OK, hooks=["backup.failed"])
    emitted = await daemon.ask("event.emit", name="backup.failed", payload={"blob": "x" * 5000})
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    assert (delivery["state"], delivery["detail"], delivery["attempts"]) == ("dead", "payload_too_large", 0)
    assert not daemon.of_type("event.dispatched")


# Order


async def test_order_is_kept_within_a_key_and_a_retrying_event_holds_back_only_its_key(daemon: Daemon) -> None:
    log = daemon.root / "order"
    log.touch()
    log.chmod(0o666)
    body = f"""
with open({str(log)!r}, "a") as file:
    file.write(params["project_id"] + params["deployment_id"] + "\\n")
if params["deployment_id"] == "1" and params["project_id"] == "a":
    count = globals()["count"] = globals().get("count", 0) + 1
    if count < 3:
        return {{"status": "retry", "retry_after_ms": 150}}
return {{}}
"""
    daemon.add("orderly", sidecars.oneshot(body))
    emitted = [await daemon.emit(project_id=p, deployment_id=d) for d in "123" for p in "ab"]
    for event in emitted:
        await daemon.outcome(event)
    seen = log.read_text().split()
    assert [s for s in seen if s[0] == "b"] == ["b1", "b2", "b3"]
    assert [s for s in seen if s[0] == "a"] == ["a1", "a1", "a1", "a2", "a3"]
    assert seen.index("b3") < seen.index("a2")


# The trail


async def test_event_is_held_while_the_trail_cannot_be_written(daemon: Daemon) -> None:
    daemon.add("good", sidecars.OK)
    await daemon.deliver()
    daemon.tell_audit({"blocked": "no space left"})
    await _until_status(daemon, "audit_blocked", "no space left")
    emitted = await daemon.emit()
    row = await daemon.outcome(emitted, timeout=0.3)
    assert row["deliveries"][0]["state"] == "queued"
    daemon.tell_audit({"blocked": None})
    row = await daemon.outcome(emitted)
    assert row["deliveries"][0]["state"] == "ok"


async def test_a_new_audit_process_gets_the_records_that_the_old_one_did_not_write(daemon: Daemon) -> None:
    from isolator.ipc.channel import pair

    daemon.audit_acks = False
    daemon.add("good", sidecars.OK)
    emitted = await daemon.emit()
    await daemon.outcome(emitted)
    await daemon.until(lambda: len(daemon.of_type("event.response")) == 1)
    daemon.records.clear()
    daemon.audit_acks = True
    ours, theirs = pair()
    daemon.listen_to_audit(ours)
    assert daemon.channel is not None
    daemon.channel.notify("audit.source", fds=[theirs.fileno()])
    theirs.close()
    await daemon.until(lambda: len(daemon.of_type("event.response")) == 1)
    assert len(daemon.of_type("event.accepted")) == 1


# Subscription


async def test_only_subscribed_events_are_dispatched(daemon: Daemon) -> None:
    daemon.add("narrow", sidecars.OK, hooks=["domain.added"])
    emitted = await daemon.emit()
    assert emitted["plugins"] == []


async def test_a_wrong_payload_is_refused_with_the_field(daemon: Daemon) -> None:
    with pytest.raises(IsolatorError, match="unknown field ulr"):
        await daemon.ask("event.emit", name="deploy.completed", payload={"ulr": "x"})
    with pytest.raises(IsolatorError, match=r"did you mean deploy\.completed"):
        await daemon.ask("event.emit", name="deploy.complete", payload={})


async def _until_status(daemon: Daemon, key: str, value: object) -> None:
    async with asyncio.timeout(10):
        while True:
            if (await daemon.ask("status"))[key] == value:
                return
            await asyncio.sleep(0.01)
