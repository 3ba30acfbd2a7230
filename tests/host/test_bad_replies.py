"""Bad one-shot sidecars: garbage, floods, silence, deaths; their neighbours do not notice."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from host.channel.reply import BUSY, SHORTEST_PAUSE, interpret
from isolator.ipc.messages import Origin
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds


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


@pytest.mark.parametrize(
    "reply",
    [
        '{"jsonrpc":"2.0","id":1,"result":{"status":"ok","message":"half \\ud83d"}}',
        '{"jsonrpc":"2.0","id":1,"result":{"status":"ok","message":"\\ude00 half, whole \\ud83d\\ude00"}}',
        '\ufeff{"jsonrpc":"2.0","id":1,"result":{"status":"ok"}}',
    ],
)
async def test_replies_of_common_writers_are_read(daemon: Daemon, reply: str) -> None:
    answer = repr(reply.encode() + b"\n")
    daemon.add("cut", sidecars.raw(f"connection.recv(4096)\nconnection.sendall({answer})\nconnection.close()"))
    delivery = await daemon.deliver()
    assert (delivery["state"], delivery["attempts"]) == ("ok", 1)


@pytest.mark.parametrize("answer", ["b'done\\n'", "b'[]\\n'", "b'x' * 70_000"])
async def test_finished_work_with_an_unreadable_reply_is_not_repeated_for_ever(daemon: Daemon, answer: str) -> None:
    body = (
        f"connection.recv(4096)\ntry:\n    connection.sendall({answer})\nexcept OSError:\n    pass\nconnection.close()"
    )
    daemon.add("odd", sidecars.raw(body))
    delivery = await daemon.deliver()
    assert (delivery["state"], delivery["attempts"]) == ("dead", 2)
    assert "answered 2 times with what is no reply" in str(delivery["detail"])


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
    delivery = await daemon.deliver()
    assert delivery["state"] == "dead"
    assert "65536" in str(delivery["detail"])
    assert _memory(daemon) - before < 8 << 20


async def test_a_reply_byte_by_byte_does_not_hold_up_others(daemon: Daemon) -> None:
    drip = 'connection.recv(4096)\nwhile True:\n    connection.send(b" ")\n    time.sleep(0.01)'
    daemon.add("drip", sidecars.raw(drip), delivery={"timeout": "500ms", "attempts": 1})
    daemon.add("endless", sidecars.raw(drip), delivery={"timeout": "10m"})
    daemon.add("good", sidecars.OK)
    emitted = [await daemon.emit() for _ in range(6)]

    async def until(event: dict[str, Any], **wanted: str) -> None:
        """Wait until deliveries of an event stand so."""
        states: dict[str, str] = {}
        while not wanted.items() <= states.items():
            shown = await daemon.outcome(event, timeout=0.1)
            states = {one["plugin"]: one["state"] for one in shown["deliveries"]}

    async with asyncio.timeout(seconds(60)):
        await until(emitted[0], drip="dead", endless="in_flight", good="ok")
        await until(emitted[-1], good="ok")
        await until(emitted[0], endless="in_flight")


async def test_bytes_after_the_first_line_are_ignored(daemon: Daemon) -> None:
    reply = '{"jsonrpc":"2.0","result":{"status":"ok"},"id":1}'
    more = f"b'{reply}' + b'\\n' + b'garbage\\n' * 1000"
    daemon.add("chatty", sidecars.raw(f"connection.recv(4096)\nconnection.sendall({more})\nconnection.close()"))
    for _ in range(3):
        assert (await daemon.deliver())["state"] == "ok"


@pytest.mark.parametrize(
    "body", ["connection.close()", "connection.recv(10)\nconnection.sendall(b'{}')\nconnection.close()"]
)
async def test_closing_with_the_request_unread_is_one_failed_attempt(daemon: Daemon, body: str) -> None:
    daemon.add("rude", sidecars.raw(body), delivery={"attempts": 1})
    delivery = await daemon.deliver()
    assert (delivery["state"], delivery["attempts"]) == ("dead", 1)


async def test_silence_is_an_unknown_outcome_and_a_failed_attempt(daemon: Daemon) -> None:
    silent = "connection.recv(4096)\nkept = globals().get('kept', []) + [connection]"
    daemon.add("mute", sidecars.raw(silent), delivery={"timeout": "200ms", "attempts": 1})
    delivery = await daemon.deliver()
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
    delivery = await daemon.deliver()
    assert (delivery["state"], delivery["attempts"]) == ("ok", 2)
    assert [r["data"]["outcome"] for r in daemon.of_type("event.response")] == ["unknown", "ok"]


async def test_a_plugin_that_dies_on_contact_without_a_request_is_never_probed(daemon: Daemon) -> None:
    """E1: such a script ends when a connection closes unused; it must survive start and delivery."""
    body = "data = connection.recv(4096)\nif not data:\n    sys.exit(3)\n"
    body += 'connection.sendall(b\'{"jsonrpc":"2.0","result":{},"id":1}\\n\')\nconnection.close()'
    daemon.add("touchy", sidecars.raw(body))
    for _ in range(20):
        assert (await daemon.deliver())["state"] == "ok"
    assert daemon.sidecars["touchy"].starts == 1


async def test_a_slow_starter_is_waited_for_and_that_is_no_attempt(daemon: Daemon) -> None:
    daemon.add("slow", "import time\ntime.sleep(1.0)\n" + sidecars.OK)
    delivery = await daemon.deliver()
    assert (delivery["state"], delivery["attempts"]) == ("ok", 1)


async def test_a_plugin_that_never_listens_holds_only_itself(daemon: Daemon) -> None:
    daemon.add("deaf", "import time\nwhile True:\n    time.sleep(60)\n")
    daemon.add("good", sidecars.OK)
    emitted = await daemon.emit()
    row = await daemon.outcome(emitted, timeout=1.0)
    states = {d["plugin"]: (d["state"], d["attempts"]) for d in row["deliveries"]}
    assert states == {"deaf": ("queued", 0), "good": ("ok", 1)}


KILLS_ITSELF = 'if params["deployment_id"] == "poison":\n    os.kill(os.getpid(), signal.SIGKILL)\nreturn {}'


async def test_an_event_that_kills_the_plugin_twice_is_quarantined_and_the_rest_goes_on(daemon: Daemon) -> None:
    daemon.add("fragile", sidecars.oneshot(KILLS_ITSELF))
    poison = await daemon.emit(deployment_id="poison")
    after = await daemon.emit(deployment_id="fine")
    (delivery,) = (await daemon.outcome(after))["deliveries"]
    assert delivery["state"] == "ok"
    (delivery,) = (await daemon.outcome(poison))["deliveries"]
    assert (delivery["state"], delivery["attempts"]) == ("quarantined", 2)
    (record,) = daemon.of_type("event.quarantined")
    assert record["event_id"] == poison["id"]


async def test_an_uncaught_exception_is_a_failed_attempt_like_others(daemon: Daemon) -> None:
    body = """
if params["_meta"]["attempt"] < 4:
    raise OSError("503 Service Unavailable")
return {}
"""
    daemon.add("unlucky", sidecars.oneshot(body))
    delivery = await daemon.deliver()
    assert (delivery["state"], delivery["attempts"]) == ("ok", 4)
    assert not daemon.of_type("event.quarantined")


@pytest.mark.parametrize("origin", [Origin.DAEMON, Origin.OPERATOR])
async def test_event_does_not_answer_for_a_run_that_others_ended(daemon: Daemon, origin: Origin) -> None:
    sidecar = daemon.add("victim", sidecars.oneshot(KILLS_ITSELF), delivery={"attempts": 3})
    sidecar.origin = origin
    delivery = await daemon.deliver(deployment_id="poison")
    assert (delivery["state"], delivery["attempts"]) == ("dead", 3)
    assert not daemon.of_type("event.quarantined")


async def test_a_socket_served_by_somebody_else_gets_nothing(daemon: Daemon) -> None:
    path = daemon.root / "other.sock"
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.bind(str(path))
    other.listen(8)
    other.setblocking(False)
    daemon.foreign_listener = str(path)
    daemon.add("thief", sidecars.OK, delivery={"attempts": 1})
    delivery = await daemon.deliver()
    assert delivery["state"] == "dead"
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(other)
    assert await loop.sock_recv(connection, 100) == b""
    connection.close()
    other.close()
    (record,) = daemon.of_type("plugin.health")
    assert "uid 0" in record["data"]["detail"]
    assert not daemon.of_type("event.dispatched")


def _memory(daemon: Daemon) -> int:
    assert daemon.host is not None
    with open(f"/proc/{daemon.host.pid}/statm") as file:  # noqa: PTH123 # proc
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("wait", [0, 0.001, 99])
def test_pause_that_a_plugin_asks_for_has_a_floor(wait: float) -> None:
    """A plugin that is always busy costs ten attempts a second at most."""
    busy = {"error": {"code": BUSY, "message": "busy", "data": {"retry_after_ms": wait}}}
    assert interpret(busy)[3] == SHORTEST_PAUSE
    assert interpret({"result": {"status": "retry", "retry_after_ms": wait}})[3] == SHORTEST_PAUSE


@pytest.mark.parametrize("wait", [600_001, 10**400], ids=["long", "too large for a float"])
def test_pause_that_a_plugin_asks_for_has_a_ceiling(wait: int) -> None:
    busy = {"error": {"code": BUSY, "message": "busy", "data": {"retry_after_ms": wait}}}
    assert interpret(busy)[3] == 600
    assert interpret({"result": {"status": "retry", "retry_after_ms": wait}})[3] == 600


BEFORE = """if True:
    from host.delivery.oneshot import OneshotDelivery
    from host.delivery.stream import StreamDelivery
    for kind in (OneshotDelivery, StreamDelivery):
        def faulty(self, plugin, hook, delivery, now=kind.deliver_now):
            if "poison" in delivery.event.payload:
                raise ZeroDivisionError("of the host's own")
            return now(self, plugin, hook, delivery)
        kind.deliver_now = faulty
"""
AFTER = """if True:
    from host.delivery.outcome import Outcomes
    note = Outcomes._note
    def faulty(self, delivery, outcome, status, detail):
        if outcome == "ok" and "poison" in delivery.event.payload:
            raise ZeroDivisionError("of the host's own")
        note(self, delivery, outcome, status, detail)
    Outcomes._note = faulty
"""


@pytest.mark.parametrize("when", [BEFORE, AFTER], ids=["before it is sent", "once it is answered"])
@pytest.mark.parametrize("mode", ["oneshot", "stream"])
async def test_fault_of_the_host_with_one_event_keeps_those_behind_it_from_nothing(
    daemon: Daemon, mode: str, when: str
) -> None:
    await daemon.kill_host()
    daemon.first = when
    await daemon.start_host()
    script = sidecars.OK if mode == "oneshot" else sidecars.stream("if id is not None:\n    send(id=id, result={})")
    daemon.add("notifier", script, delivery={"attempts": 1}, transport={"mode": mode})
    row = await daemon.outcome(await daemon.emit(project_id="before"))
    assert row["deliveries"][0]["state"] == "ok"
    row = await daemon.outcome(await daemon.emit(project_id="poison"))
    assert row["deliveries"][0]["state"] == "dead"
    assert "ZeroDivisionError" in row["deliveries"][0]["detail"]
    assert row["deliveries"][0]["attempts"] == 1
    row = await daemon.outcome(await daemon.emit(project_id="good"))
    assert row["deliveries"][0]["state"] == "ok"
