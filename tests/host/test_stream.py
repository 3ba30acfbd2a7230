"""Stream mode: handshake, many in flight, breaches of a hostile peer, health, idleness."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.host.fake_supervisor import Daemon, Sidecar
from tests.support import sidecars
from tests.support.sidecars import STREAM_OK, stream
from tests.support.timeouts import seconds

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/python-stream-counter/stream-counter"


def _add(daemon: Daemon, name: str, script: str, **more: Any) -> Sidecar:
    more["transport"] = {"mode": "stream", **more.get("transport", {})}
    return daemon.add(name, script, **more)


async def _only(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    (delivery,) = (await daemon.outcome(await daemon.emit(**fields)))["deliveries"]
    assert isinstance(delivery, dict)
    return delivery


async def test_one_connection_carries_many_events(daemon: Daemon) -> None:
    body = "count = globals()['count'] = globals().get('count', 0) + 1\nsend(id=id, result={'message': str(count)})"
    sidecar = _add(daemon, "counter", stream(body))
    replies = [json.loads((await _only(daemon))["reply"])["result"]["message"] for _ in range(5)]
    assert replies == list("12345")
    assert sidecar.starts == 1


async def test_half_an_emoji_ends_no_connection(daemon: Daemon) -> None:
    """As common writers of JSON make it, in an event and in a reply."""
    sidecar = _add(daemon, "cuts", stream(r"send(id=id, result={'message': params['project_id'] + ' \ud83d'})"))
    for _ in range(2):
        delivery = await _only(daemon, project_id="half \ud83d")
        assert (delivery["state"], delivery["attempts"]) == ("ok", 1)
        assert json.loads(delivery["reply"])["result"]["message"].startswith("half \ufffd ")
    assert sidecar.starts == 1
    assert not daemon.of_type("plugin.health")


async def test_replies_may_come_in_any_order(daemon: Daemon) -> None:
    body = """
waiting = globals().setdefault("waiting", [])
waiting.append((id, params["project_id"]))
if len(waiting) == 8:
    for number, project in reversed(waiting):
        send(id=number, result={"message": project})
"""
    _add(daemon, "reverser", stream(body))
    emitted = [await daemon.emit(project_id=f"p{n}") for n in range(8)]
    for number, event in enumerate(emitted):
        (delivery,) = (await daemon.outcome(event))["deliveries"]
        assert json.loads(delivery["reply"])["result"]["message"] == f"p{number}"


async def test_pause_of_any_length_holds_no_key_for_good(daemon: Daemon) -> None:
    huge = 10**400
    script = stream(f"send(id=id, result={{'status': 'retry', 'retry_after_ms': {huge}}})")
    _add(daemon, "patient", script, delivery={"attempts": 1})
    delivery = await _only(daemon)
    assert (delivery["state"], delivery["status"]) == ("dead", "retry")


async def test_one_key_is_never_in_flight_twice(daemon: Daemon) -> None:
    body = """
seen = globals().setdefault("seen", [])
seen.append(params["deployment_id"])
time.sleep(0.02)
import select
more = select.select([connection], [], [], 0)[0]
send(id=id, result={"message": "overlap" if more else "alone"})
"""
    _add(daemon, "serial", stream(body))
    emitted = [await daemon.emit(deployment_id=str(n)) for n in range(10)]
    for event in emitted:
        (delivery,) = (await daemon.outcome(event))["deliveries"]
        assert json.loads(delivery["reply"])["result"]["message"] == "alone"


async def test_requests_in_flight_are_no_more_than_the_manifest_allows(daemon: Daemon) -> None:
    body = """
waiting = globals().setdefault("waiting", [])
waiting.append(id)
import select
if not select.select([connection], [], [], 0.2)[0]:
    for number in waiting:
        send(id=number, result={"message": str(len(waiting))})
    waiting.clear()
"""
    _add(daemon, "narrow", stream(body), transport={"max_in_flight": 3})
    emitted = [await daemon.emit(project_id=f"p{n}") for n in range(9)]
    for event in emitted:
        (delivery,) = (await daemon.outcome(event))["deliveries"]
        assert int(json.loads(delivery["reply"])["result"]["message"]) <= 3


COUNTS_TAKEN = """
from host.queue.consumer import SqliteConsumer
take = SqliteConsumer.take
async def counted(*arguments):
    delivery = await take(*arguments)
    open({path!r}, "a").write("x")
    return delivery
SqliteConsumer.take = counted
"""


async def test_event_behind_a_full_window_is_sent_with_a_reply_and_wakes_no_worker(daemon: Daemon) -> None:
    await daemon.kill_host()
    taken, go = daemon.root / "taken", daemon.root / "go"
    taken.touch()
    taken.chmod(0o666)
    daemon.first = COUNTS_TAKEN.format(path=str(taken))
    await daemon.start_host()
    wait = f"while params['project_id'] != 'first' and not os.path.exists({str(go)!r}):\n    time.sleep(0.01)"
    _add(daemon, "slow", stream(f"{wait}\nsend(id=id, result={{}})"), transport={"max_in_flight": 2})
    assert (await _only(daemon, project_id="first"))["state"] == "ok"
    before = taken.read_text()
    emitted = [await daemon.emit(project_id=f"p{n}") for n in range(8)]
    go.touch()
    for event in emitted:
        (delivery,) = (await daemon.outcome(event))["deliveries"]
        assert (delivery["state"], delivery["attempts"]) == ("ok", 1)
    assert taken.read_text() == before == "x"


async def test_a_refused_handshake_says_why_and_holds_the_queue(daemon: Daemon) -> None:
    body = "if method == 'host.refused':\n    print('refused', params['code'], params['data']['supported'], flush=True)"
    _add(daemon, "future", stream(body, hello='{"protocol": "7"}'))
    emitted = await daemon.emit()
    async with asyncio.timeout(seconds(15)):
        while (holding := (await daemon.ask("plugin.list"))["plugins"][0]["holding"]) is None:  # noqa: ASYNC110 # no event tells
            await asyncio.sleep(0.01)
    assert "chose protocol '7'; offered: 1" in holding
    (delivery,) = (await daemon.ask("event.show", id=emitted["id"]))["deliveries"]
    assert (delivery["state"], delivery["attempts"]) == ("queued", 0)
    log = daemon.paths.plugin_log / "future.log"
    await daemon.poll(lambda: log.exists() and log.read_text().endswith("\n"))
    lines = [e["line"] for e in (await daemon.ask("plugin.logs", name="future"))["lines"]]
    assert lines[0] == "refused -31002 ['1']"


async def test_a_plugin_gets_only_events_that_it_handles(daemon: Daemon) -> None:
    _add(daemon, "picky", stream("send(id=id, result={})", hello='{"protocol": "1", "handles": ["domain.added"]}'),
         hooks=["deploy.completed", "domain.added"])  # fmt: skip
    assert (await _only(daemon))["state"] == "dead"


@pytest.mark.parametrize(
    ("breach", "why"),
    [
        ("connection.sendall(b'garbage\\n')", "not valid JSON"),
        ("connection.sendall(b'\\xff\\xfe\\n')", "not valid JSON"),
        ("connection.sendall(b'[' * 100 + b']' * 100 + b'\\n')", "nested deeper"),
        ('connection.sendall(b\'[{"jsonrpc":"2.0"}]\\n\')', "not a JSON object"),
        ("send(id='0' * 16, result={})", "an id that no open request has"),
        ("send(id=id, result={})\nsend(id=id, result={})", "an id that no open request has"),
        ("send(id=7, result={})", "an id that no open request has"),
        ("send(id=id)", "neither request nor reply"),
        ("connection.sendall(b'{\"result\":NaN}\\n')", "not valid JSON"),
        ("connection.sendall(b'x' * (2 << 20))", "longer than 1048576"),
    ],
)
async def test_breach_gets_an_error_is_recorded_and_ends_the_connection(daemon: Daemon, breach: str, why: str) -> None:
    answer = "\nprint('host said', connection.makefile().readline(), flush=True)\nos._exit(0)"
    _add(daemon, "breaker", stream(breach + answer), delivery={"attempts": 1})
    _add(daemon, "good", STREAM_OK)
    row = await daemon.outcome(await daemon.emit())
    states = {d["plugin"]: d["state"] for d in row["deliveries"]}
    assert states["good"] == "ok"
    assert states["breaker"] in ("dead", "ok")
    await daemon.until(lambda: bool(daemon.of_type("plugin.health")))
    record = daemon.of_type("plugin.health")[0]
    assert record["plugin"] == "breaker"
    assert why in record["data"]["detail"]
    assert (await daemon.ask("status"))["plugins"] == 2


async def test_ids_cannot_be_guessed(daemon: Daemon) -> None:
    _add(daemon, "ids", stream("send(id=id, result={'message': id})"))
    ids = {json.loads((await _only(daemon))["reply"])["result"]["message"] for _ in range(20)}
    assert len(ids) == 20
    assert all(len(i) == 16 for i in ids)
    assert len({i[:2] for i in ids}) > 5


async def test_a_late_reply_is_no_breach(daemon: Daemon) -> None:
    body = """
if params["deployment_id"] == "slow" and params["_meta"]["attempt"] == 1:
    late = globals()["late"] = id
elif method == "deploy.completed":
    if "late" in globals():
        send(id=globals().pop("late"), result={})
    send(id=id, result={})
"""
    body = f"if method == '$/cancel':\n    continue\n{body}"
    _add(daemon, "late", stream(body), delivery={"timeout": "300ms"})
    slow = await daemon.emit(deployment_id="slow", project_id="a")
    await daemon.until(lambda: len(daemon.of_type("event.response")) == 1)
    (delivery,) = (await daemon.outcome(await daemon.emit(project_id="b")))["deliveries"]
    assert delivery["state"] == "ok"
    (delivery,) = (await daemon.outcome(slow))["deliveries"]
    assert (delivery["state"], delivery["attempts"]) == ("ok", 2)
    assert not daemon.of_type("plugin.health")


async def test_events_in_flight_when_the_plugin_dies_come_again(daemon: Daemon) -> None:
    flag = daemon.root / "flag"
    flag.mkdir(mode=0o777)
    flag.chmod(0o777)
    body = f"""
if not os.path.exists({str(flag / "x")!r}):
    open({str(flag / "x")!r}, "w").close()
    os._exit(1)
send(id=id, result={{}})
"""
    _add(daemon, "once", stream(body))
    emitted = [await daemon.emit(project_id=f"p{n}") for n in range(4)]
    for event in emitted:
        (delivery,) = (await daemon.outcome(event))["deliveries"]
        assert delivery["state"] == "ok"


async def test_of_many_in_flight_only_the_culprit_is_quarantined(daemon: Daemon) -> None:
    body = """
import select
if params["project_id"] == "poison":
    select.select([connection], [], [], 0.2)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.05)
send(id=id, result={})
"""
    _add(daemon, "fragile", stream(body))
    emitted = {n: await daemon.emit(project_id=n) for n in ("poison", "a", "b", "c", "d")}
    states = {}
    for name, event in emitted.items():
        (delivery,) = (await daemon.outcome(event, timeout=30))["deliveries"]
        states[name] = delivery["state"]
    assert states == {"poison": "quarantined", "a": "ok", "b": "ok", "c": "ok", "d": "ok"}


async def test_isolation_of_retries_ends_with_the_events_that_are_given_up(daemon: Daemon) -> None:
    flag = daemon.root / "flag"
    flag.mkdir(mode=0o777)
    flag.chmod(0o777)
    body = f"""
waiting = globals().setdefault("waiting", [])
waiting.append(id)
if len(waiting) == 2:
    if not os.path.exists({str(flag / "x")!r}):
        open({str(flag / "x")!r}, "w").close()
        os._exit(1)
    for number in waiting:
        send(id=number, result={{}})
    waiting.clear()
"""
    _add(daemon, "pairs", stream(body), delivery={"attempts": 1})
    for state in ("dead", "ok"):
        emitted = [await daemon.emit(project_id=project) for project in "ab"]
        assert [(await daemon.outcome(event))["deliveries"][0]["state"] for event in emitted] == [state] * 2


async def test_a_stream_survives_the_restart_of_the_host(daemon: Daemon) -> None:
    sidecar = _add(daemon, "steady", STREAM_OK)
    await _only(daemon)
    await daemon.kill_host()
    await daemon.start_host()
    assert (await _only(daemon))["state"] == "ok"
    assert sidecar.starts == 1


async def test_a_plugin_that_speaks_shutdown_gets_it_before_its_signal(daemon: Daemon) -> None:
    body = """
if method == "shutdown":
    print("saving before", params["reason"], flush=True)
send(id=id, result={})
"""
    hello = '{"protocol": "1", "capabilities": {"shutdown": True, "ping": False}}'
    _add(daemon, "tidy", stream(body, hello=hello))
    await _only(daemon)
    await daemon.ask("plugin.stop", name="tidy")
    log = daemon.paths.plugin_log / "tidy.log"
    await daemon.poll(lambda: log.exists() and "saving before operator" in log.read_text())


# Health


async def test_a_stream_plugin_that_stops_answering_pings_is_restarted(daemon: Daemon) -> None:
    body = "if method == 'ping':\n    time.sleep(60)\nsend(id=id, result={})"
    sidecar = _add(daemon, "stuck", stream(body), health={"interval": "100ms", "timeout": "100ms", "misses": 2})
    await _only(daemon)
    await daemon.until(lambda: sidecar.starts == 2)
    misses = [r["data"]["misses"] for r in daemon.of_type("plugin.health")]
    assert misses[:2] == [1, 2]


async def test_a_plugin_is_not_declared_dead_because_the_host_slept(daemon: Daemon) -> None:
    """As when a virtual machine is paused: no plugin could answer in time, and none is at fault."""
    sidecar = _add(daemon, "fine", STREAM_OK, health={"interval": "20ms", "timeout": "1s", "misses": 1})
    await _only(daemon)
    assert daemon.host is not None
    assert sidecar.process is not None
    os.kill(sidecar.process.pid, signal.SIGSTOP)
    await asyncio.sleep(0.3)  # by now a ping is out, and nobody answers it
    os.kill(daemon.host.pid, signal.SIGSTOP)
    await asyncio.sleep(3.0)
    os.kill(daemon.host.pid, signal.SIGCONT)
    assert (await daemon.ask("status"))["plugins"] == 1
    os.kill(sidecar.process.pid, signal.SIGCONT)
    assert (await _only(daemon))["state"] == "ok"
    assert sidecar.starts == 1
    assert not daemon.of_type("plugin.health")


async def test_a_oneshot_plugin_is_pinged_only_when_it_asks(daemon: Daemon) -> None:
    body = 'print(method, flush=True)\nreturn {"status": "skipped"}'
    daemon.add("plain", sidecars.oneshot(body))
    daemon.add("asks", sidecars.oneshot(body), health={"ping": True, "interval": "100ms"})
    await daemon.outcome(await daemon.emit())
    log = daemon.paths.plugin_log / "asks.log"
    await daemon.poll(lambda: '"line":"ping"' in log.read_text())
    assert "ping" not in (daemon.paths.plugin_log / "plain.log").read_text()


async def test_an_idle_plugin_is_stopped_and_started_by_the_next_event(daemon: Daemon) -> None:
    sidecar = daemon.add("idler", sidecars.OK, activation={"idle": "200ms"})
    await daemon.outcome(await daemon.emit())
    await daemon.until(lambda: sidecar.state == "stopped")
    (delivery,) = (await daemon.outcome(await daemon.emit()))["deliveries"]
    assert delivery["state"] == "ok"
    assert sidecar.starts == 2


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the example is not in this tree")
async def test_the_example_counts(daemon: Daemon) -> None:
    _add(daemon, "counter", EXAMPLE.read_text(), permissions=["kv"])
    replies = [json.loads((await _only(daemon))["reply"])["result"]["count"] for _ in range(3)]
    assert replies == [1, 2, 3]


@pytest.mark.parametrize(
    ("mode", "script"),
    [
        (
            "oneshot",
            sidecars.oneshot('return {"status": "sent " + TOKEN, "message": "x" * 395 + TOKEN}'),
        ),
        ("stream", stream('send(id=id, result={"status": os.environ["TOKEN"], "message": TOKEN})')),
        ("stream", stream("pass", hello='None, error={"code": TOKEN, "message": "x" * 195 + TOKEN')),
        ("stream", stream("pass", hello='{"protocol": "x" * 17 + TOKEN}')),
        ("stream", stream("send(id=id, method=TOKEN)\nsend(id=id, result={})")),
    ],
)
async def test_no_text_of_the_plugin_shows_a_secret(daemon: Daemon, mode: str, script: str) -> None:
    secret = "xoxb-123456789-abcdef"
    schema = {"token": {"type": "string", "secret": True}}
    script = script.replace("import json,", 'TOKEN = __import__("os").environ["TOKEN"]\nimport json,', 1)
    sidecar = daemon.add("leaky", script, transport={"mode": mode}, config_schema=schema, delivery={"attempts": 1})
    await daemon.ask("config.set", name="leaky", config={"token": secret})
    emitted = await daemon.emit()
    row = await daemon.outcome(emitted, timeout=2.0)
    shown = [row, await daemon.ask("plugin.show", name="leaky"), await daemon.ask("event.list"), daemon.records]
    assert sidecar.starts
    assert secret[:6] not in json.dumps(shown)
    await daemon.stop_sidecar(sidecar)
    await daemon.kill_host()
    for path in daemon.paths.host_lib.glob("host.db*"):
        assert secret[:6].encode() not in path.read_bytes()
