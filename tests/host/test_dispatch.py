"""Delivery to one-shot sidecars: real scripts, real sockets, a real host process."""

from __future__ import annotations

import json

from tests.host import scripts
from tests.host.supervisor_double import Daemon


async def test_an_event_starts_the_plugin_and_reaches_it(daemon: Daemon) -> None:
    daemon.add("greeter", scripts.oneshot('return {"status": "ok", "message": params["url"]}'))
    emitted = await daemon.emit(url="https://shop.example")
    row = await daemon.outcome(emitted)
    (delivery,) = row["deliveries"]
    assert delivery["state"] == "ok"
    assert delivery["attempts"] == 1
    assert json.loads(delivery["reply"])["result"]["message"] == "https://shop.example"
    assert daemon.sidecars["greeter"].starts == 1
    kinds = [r["type"] for r in daemon.records if r["event_id"] == emitted["id"]]
    assert kinds == ["event.accepted", "event.dispatched", "event.response"]
