"""Records of what was done for a caller: each is on its way to the trail before the caller has its answer."""

from __future__ import annotations

import asyncio
import json

from tests.host.fake_supervisor import Daemon
from tests.host.test_host_api import CALLER
from tests.support import sidecars

ORDER = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
KILLED = """
import os
from host.control.connection import Connection as Control
from host.host_api.connection import Connection as HostApi
from host.wire.lines import LineProtocol
written = LineProtocol.{method}
def write(self, *data):
    answers = isinstance(self, {of}) and (data or self._gathered)
    written(self, *data)
    if answers:
        os.kill(os.getpid(), 9)
LineProtocol.{method} = write
"""
"""The host ends once it has written its first answer."""


async def test_change_that_is_answered_is_on_record_although_the_host_is_killed_then(daemon: Daemon) -> None:
    await daemon.kill_host()
    daemon.first = KILLED.format(method="flush", of="Control")
    await daemon.start_host()
    answer = await daemon.answer("event.register", {"name": "order.placed", "schema": ORDER})
    assert answer["result"]["name"] == "order.placed"
    await daemon.until(lambda: daemon.of_type("control.called"))
    (record,) = daemon.of_type("control.called")
    assert (record["data"]["verb"], record["data"]["verdict"]) == ("event.register", "ok")


async def test_call_of_a_plugin_that_is_answered_is_on_record_although_the_host_is_killed_then(daemon: Daemon) -> None:
    await daemon.kill_host()
    daemon.first = KILLED.format(method="send", of="HostApi")
    await daemon.start_host()
    said = 'print(json.dumps(call("kv.set", {"key": "a", "value": 1})), file=open("answer", "w"), flush=True)\n'
    one = daemon.add("one", sidecars.oneshot("return {}", first=CALLER + said), permissions=["kv"])
    one.folder.chmod(0o777)
    asking = asyncio.create_task(daemon.answer("plugin.start", {"name": "one"}))
    await daemon.until(lambda: daemon.of_type("api.called"))
    (record,) = daemon.of_type("api.called")
    assert (record["data"]["method"], record["data"]["verdict"]) == ("kv.set", "granted")
    await daemon.poll((one.folder / "answer").exists)
    await daemon.poll((one.folder / "answer").read_text)
    assert json.loads((one.folder / "answer").read_text())["result"] == {}
    await asyncio.gather(asking, return_exceptions=True)
