"""Delivery to one-shot sidecars: real scripts, real sockets, a real host process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time

import pytest

from isolator.errors import IsolatorError
from tests import sidecars
from tests.host.supervisor_double import Daemon

FAST_RETRY = 'return {"status": "retry", "retry_after_ms": 20}'


async def _only(daemon: Daemon, **fields: object) -> dict[str, object]:
    row = await daemon.outcome(await daemon.emit(**fields))
    (delivery,) = row["deliveries"]
    return delivery


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


async def test_the_request_is_what_the_trail_says_it_is(daemon: Daemon) -> None:
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


async def test_the_older_spelling_is_received_by_who_subscribed_it(daemon: Daemon) -> None:
    script = sidecars.oneshot('return {"message": method}')
    daemon.add("old", script, hooks=["on_deploy_complete"])
    daemon.add("new", script, hooks=["deploy.completed"])
    row = await daemon.outcome(await daemon.emit())
    seen = {d["plugin"]: json.loads(d["reply"])["result"]["message"] for d in row["deliveries"]}
    assert seen == {"old": "on_deploy_complete", "new": "deploy.completed"}


async def test_skipped_counts_as_success(daemon: Daemon) -> None:
    daemon.add("skipper", sidecars.oneshot('return {"status": "skipped"}'))
    assert (await _only(daemon))["state"] == "skipped"


@pytest.mark.parametrize("result", ['"just text"', "None", "[1, 2]", "17", "{}"])
async def test_results_of_any_shape_are_accepted(daemon: Daemon, result: str) -> None:
    daemon.add("shapes", sidecars.oneshot(f"return {result}"))
    assert (await _only(daemon))["state"] == "ok"


async def test_a_reply_that_ends_with_the_connection_needs_no_newline(daemon: Daemon) -> None:
    reply = '{"jsonrpc":"2.0","result":{"status":"ok"},"id":1}'
    daemon.add("plain", sidecars.raw(f"connection.recv(4096)\nconnection.sendall(b'{reply}')\nconnection.close()"))
    assert (await _only(daemon))["state"] == "ok"


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
async def test_error_codes_mean_what_they_say(daemon: Daemon, code: int, state: str) -> None:
    reply = f'b\'{{"jsonrpc":"2.0","error":{{"code":{code},"message":"so"}},"id":1}}\\n\''
    daemon.add("coded", sidecars.raw(f"connection.recv(4096)\nconnection.sendall({reply})\nconnection.close()"))
    delivery = await _only(daemon)
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
    delivery = await _only(daemon)
    assert (delivery["state"], delivery["attempts"]) == ("ok", 1)


NEW_MAJOR = """
from pydantic import BaseModel
import host.events as events
from isolator.policy import request
class Built(BaseModel):
    project_id: str
    seconds: int
request.API_MAJORS = (1, 2)
down = {2: lambda payload: {"project_id": payload["project_id"], "took_ms": payload["seconds"] * 1000}}
events.BUILT_IN += (events.EventType("test.built", Built, "project_id", version=2, down=down),)
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


# What plugins do to their host


@pytest.mark.parametrize(
    "answer",
    [
        "b'not json\\n'",
        "b'\\xff\\xfe\\n'",
        "b'[]\\n'",
        'b\'{"jsonrpc":"2.0","id":1}\\n\'',
        'b\'{"jsonrpc":"2.0","result":NaN,"id":1}\\n\'',
        'b\'{"jsonrpc":"2.0","result":1e999,"id":1}\\n\'',
        'b\'{"jsonrpc":"2.0","result":{},"id":77}\\n\'',
        "b'{\"jsonrpc\":\"2.0\",\"result\":' + b'[' * 5000 + b']' * 5000 + b',\"id\":1}\\n'",
        "b'{\"jsonrpc\":\"2.0\",\"result\":' + b'[' * 70 + b']' * 70 + b',\"id\":1}\\n'",
        'b\'{"jsonrpc":"2.0","result":"\\\\ud800","id":1}\\n\'',
        "b'\\n'",
    ],
)
async def test_garbage_is_a_failed_attempt_and_harms_nobody(daemon: Daemon, answer: str) -> None:
    daemon.add("liar", sidecars.raw(f"connection.recv(4096)\nconnection.sendall({answer})\nconnection.close()"),
               delivery={"attempts": 1})  # fmt: skip
    daemon.add("honest", sidecars.OK)
    row = await daemon.outcome(await daemon.emit())
    states = {d["plugin"]: d["state"] for d in row["deliveries"]}
    assert states == {"liar": "dead", "honest": "ok"}
    (bad,) = [r for r in daemon.of_type("event.response") if r["plugin"] == "liar"]
    assert bad["data"]["outcome"] in ("failed", "unknown")


async def test_a_reply_of_a_gigabyte_costs_the_host_nothing(daemon: Daemon) -> None:
    body = """
connection.recv(4096)
block = b"x" * (1 << 20)
try:
    for _ in range(1024):
        connection.sendall(block)
    print("all sent", flush=True)
except OSError:
    print("cut off", flush=True)
connection.close()
"""
    daemon.add("flood", sidecars.raw(body), delivery={"attempts": 1})
    before = _memory(daemon)
    delivery = await _only(daemon)
    assert delivery["state"] == "dead"
    assert "65536" in str(delivery["detail"])
    assert _memory(daemon) - before < 8 << 20


async def test_a_reply_byte_by_byte_does_not_hold_up_others(daemon: Daemon) -> None:
    drip = 'connection.recv(4096)\nwhile True:\n    connection.send(b" ")\n    time.sleep(0.01)'
    daemon.add("drip", sidecars.raw(drip), delivery={"timeout": "500ms", "attempts": 1})
    daemon.add("good", sidecars.OK)
    began = time.monotonic()
    emitted = await daemon.emit()
    for _ in range(5):
        last = await daemon.emit()
    row = await daemon.outcome(emitted)
    states = {d["plugin"]: d["state"] for d in row["deliveries"]}
    assert states == {"drip": "dead", "good": "ok"}
    assert time.monotonic() - began < 10
    good = [d for d in (await daemon.ask("event.show", id=last["id"]))["deliveries"] if d["plugin"] == "good"]
    assert good[0]["state"] == "ok"


async def test_what_follows_the_first_line_is_ignored(daemon: Daemon) -> None:
    reply = '{"jsonrpc":"2.0","result":{"status":"ok"},"id":1}'
    more = f"b'{reply}' + b'\\n' + b'garbage\\n' * 1000"
    daemon.add("chatty", sidecars.raw(f"connection.recv(4096)\nconnection.sendall({more})\nconnection.close()"))
    for _ in range(3):
        assert (await _only(daemon))["state"] == "ok"


@pytest.mark.parametrize(
    "body", ["connection.close()", "connection.recv(10)\nconnection.sendall(b'{}')\nconnection.close()"]
)
async def test_closing_with_the_request_unread_is_one_failed_attempt(daemon: Daemon, body: str) -> None:
    daemon.add("rude", sidecars.raw(body), delivery={"attempts": 1})
    delivery = await _only(daemon)
    assert (delivery["state"], delivery["attempts"]) == ("dead", 1)


async def test_silence_is_an_unknown_outcome_and_a_failed_attempt(daemon: Daemon) -> None:
    silent = "connection.recv(4096)\nkept = globals().get('kept', []) + [connection]"
    daemon.add("mute", sidecars.raw(silent), delivery={"timeout": "200ms", "attempts": 1})
    delivery = await _only(daemon)
    assert delivery["state"] == "dead"
    (record,) = daemon.of_type("event.response")
    assert record["data"]["outcome"] == "unknown"
    assert record["data"]["detail"] == "no reply in time"


async def test_closing_without_a_reply_is_unknown_and_repeated(daemon: Daemon) -> None:
    body = """
count = globals().get("count", 0) + 1
connection.recv(4096)
if count > 1:
    connection.sendall(b'{"jsonrpc":"2.0","result":{"status":"ok"},"id":1}\\n')
connection.close()
"""
    daemon.add("moody", sidecars.raw(body))
    delivery = await _only(daemon)
    assert (delivery["state"], delivery["attempts"]) == ("ok", 2)
    assert [r["data"]["outcome"] for r in daemon.of_type("event.response")] == ["unknown", "ok"]


async def test_a_plugin_that_dies_on_contact_without_a_request_is_never_probed(daemon: Daemon) -> None:
    """E1: such a script ends when a connection closes unused; it must survive start and delivery."""
    body = "data = connection.recv(4096)\nif not data:\n    sys.exit(3)\n"
    body += 'connection.sendall(b\'{"jsonrpc":"2.0","result":{},"id":1}\\n\')\nconnection.close()'
    daemon.add("touchy", sidecars.raw(body))
    for _ in range(20):
        assert (await _only(daemon))["state"] == "ok"
    assert daemon.sidecars["touchy"].starts == 1


async def test_a_slow_starter_is_waited_for_and_that_is_no_attempt(daemon: Daemon) -> None:
    daemon.add("slow", "import time\ntime.sleep(1.0)\n" + sidecars.OK)
    delivery = await _only(daemon)
    assert (delivery["state"], delivery["attempts"]) == ("ok", 1)


async def test_a_plugin_that_never_listens_holds_only_itself(daemon: Daemon) -> None:
    daemon.add("deaf", "import time\nwhile True:\n    time.sleep(60)\n")
    daemon.add("good", sidecars.OK)
    emitted = await daemon.emit()
    row = await daemon.outcome(emitted, timeout=1.0)
    states = {d["plugin"]: (d["state"], d["attempts"]) for d in row["deliveries"]}
    assert states == {"deaf": ("queued", 0), "good": ("ok", 1)}


async def test_an_event_that_kills_the_plugin_twice_is_quarantined_and_the_rest_goes_on(daemon: Daemon) -> None:
    daemon.add("fragile", sidecars.oneshot('if params["deployment_id"] == "poison":\n    os._exit(9)\nreturn {}'))
    poison = await daemon.emit(deployment_id="poison")
    after = await daemon.emit(deployment_id="fine")
    (delivery,) = (await daemon.outcome(after))["deliveries"]
    assert delivery["state"] == "ok"
    (delivery,) = (await daemon.outcome(poison))["deliveries"]
    assert (delivery["state"], delivery["attempts"]) == ("quarantined", 2)
    (record,) = daemon.of_type("event.quarantined")
    assert record["event_id"] == poison["id"]


async def test_a_socket_served_by_somebody_else_gets_nothing(daemon: Daemon) -> None:
    path = daemon.root / "other.sock"
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.bind(str(path))
    other.listen(8)
    other.setblocking(False)
    daemon.foreign_listener = str(path)
    daemon.add("thief", sidecars.OK, delivery={"attempts": 1})
    delivery = await _only(daemon)
    assert delivery["state"] == "dead"
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(other)
    assert await loop.sock_recv(connection, 100) == b""
    connection.close()
    other.close()
    (record,) = daemon.of_type("plugin.health")
    assert "uid 0" in record["data"]["detail"]
    assert not daemon.of_type("event.dispatched")


# Size


async def test_a_large_event_loses_its_meta_then_its_optional_fields(daemon: Daemon) -> None:
    daemon.add("small", sidecars.oneshot('return {"message": ",".join(sorted(params))}'))
    delivery = await _only(daemon, commit_message="x" * 1900, branch="b" * 200, url="https://a.example/" + "u" * 1900)
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


async def test_nothing_is_sent_while_the_trail_cannot_be_written(daemon: Daemon) -> None:
    daemon.add("good", sidecars.OK)
    await _only(daemon)
    daemon.tell_audit({"blocked": "no space left"})
    await _until_status(daemon, "audit_blocked", "no space left")
    emitted = await daemon.emit()
    row = await daemon.outcome(emitted, timeout=0.3)
    assert row["deliveries"][0]["state"] == "queued"
    daemon.tell_audit({"blocked": None})
    row = await daemon.outcome(emitted)
    assert row["deliveries"][0]["state"] == "ok"


async def test_a_new_audit_process_gets_what_the_old_one_did_not_write(daemon: Daemon) -> None:
    from isolator.ipc import pair

    daemon.audit_acks = False
    daemon.add("good", sidecars.OK)
    emitted = await daemon.emit()
    await daemon.outcome(emitted)
    await daemon.until(lambda: len(daemon.of_type("event.response")) == 1)
    daemon.records.clear()
    daemon.audit_acks = True
    ours, theirs = pair()
    daemon._listen_to_audit(ours)
    assert daemon.channel is not None
    daemon.channel.notify("audit.source", fds=[theirs.fileno()])
    theirs.close()
    await daemon.until(lambda: len(daemon.of_type("event.response")) == 1)
    assert len(daemon.of_type("event.accepted")) == 1


# Who may receive


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


def _memory(daemon: Daemon) -> int:
    assert daemon.host is not None
    with open(f"/proc/{daemon.host.pid}/statm") as file:  # noqa: PTH123 # proc
        return int(file.read().split()[1]) * 4096
