"""The alarm on CLOCK_BOOTTIME."""

from __future__ import annotations

import select

from isolator.linux.boottime import BootAlarm, boottime
from tests.support.timeouts import seconds


def gone_off(alarm: BootAlarm, within: float) -> bool:
    return bool(select.select([alarm.fileno()], [], [], within)[0])


def test_alarm_goes_off_at_its_time_and_once() -> None:
    alarm = BootAlarm()
    try:
        at = boottime() + 0.05
        alarm.set(at)
        assert gone_off(alarm, seconds(10))
        assert boottime() >= at
        alarm.clear()
        assert not gone_off(alarm, 0)
        alarm.set(0.0)
        assert gone_off(alarm, seconds(10)), "a time that has passed"
        alarm.set(None)
        assert not gone_off(alarm, 0)
        alarm.clear()
    finally:
        alarm.close()
