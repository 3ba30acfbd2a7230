"""After the machine was started anew in the middle of deliveries (``reboot_before.py``): what has become of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isolator.audit.files import trail
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for
from tests.vm.reboot_before import BOOT, PLUGIN, accepted
from tests.vm.service import Service, needs_machine

TRAIL = Path("/var/log/isolator/audit")
pytestmark = [pytest.mark.vm, needs_machine]


@pytest.fixture(scope="module")
def service() -> Service:
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() != BOOT.read_text(), (
        "the machine did not restart"
    )
    made = Service()
    made.wait_active()  # nobody but systemd starts it
    return made


def test_everything_accepted_arrives_in_order(service: Service) -> None:
    wanted = accepted()
    try:
        wait_for(lambda: set(wanted) <= set(service.seen(PLUGIN)), seconds(30), "an accepted event was lost")
    except AssertionError:
        print(sorted(set(wanted) - set(service.seen(PLUGIN))), service.journal())
        raise
    first = {name: place for place, name in reversed(list(enumerate(service.seen(PLUGIN))))}
    places = [first[name] for name in wanted]
    assert places == sorted(places), "events of one project arrived in another order than they were accepted in"


def test_the_trail_is_whole_across_the_restart(service: Service) -> None:
    service.cli("audit", "verify")
    records = _records()
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    start = max(number for number, record in enumerate(records) if record["type"] == "host.started")
    before, after = records[:start], records[start:]
    waiting = _events(before, "event.accepted") - _events(before, "event.response")
    assert waiting, "nothing was being delivered when the machine went down"
    assert waiting <= _events(after, "event.response")


def test_each_run_that_was_begun_has_its_end(service: Service) -> None:
    records = _records()
    begun = {record["run"] for record in records if record["type"] == "plugin.started"}
    ended = {record["run"] for record in records if record["type"] in ("plugin.stopped", "plugin.crashed")}
    running = {service.json("plugin", "show", PLUGIN)["run"]}
    assert begun - ended == running


def _records() -> list[dict[str, Any]]:
    return [json.loads(line) for file in trail(TRAIL) for line in file.read_text().splitlines()]


def _events(records: list[dict[str, Any]], kind: str) -> set[str]:
    return {record["event_id"] for record in records if record["type"] == kind}
