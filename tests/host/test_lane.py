"""Lane against a plain model: order per key, holding back, nothing lost, nothing twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from host.queue.interface import Delivery
from host.queue.lane import Lane

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(["a", "b", "c", None])),
        st.tuples(st.just("pop"), st.none()),
        st.tuples(st.just("ack"), st.integers(0, 5)),
        st.tuples(st.just("nak"), st.tuples(st.integers(0, 5), st.floats(0.5, 3))),
        st.tuples(st.just("term"), st.integers(0, 20)),
        st.tuples(st.just("expedite"), st.integers(0, 20)),
        st.tuples(st.just("tick"), st.floats(0.1, 4)),
    ),
    max_size=80,
)


@settings(max_examples=400, deadline=None)
@given(STEPS)
def test_a_lane_keeps_order_per_key_and_loses_nothing(steps: list[tuple[str, object]]) -> None:
    lane = Lane()
    now, seq = 1.0, 0
    pending: dict[int, Delivery] = {}
    flight: list[Delivery] = []
    finished: dict[object, list[int]] = {}
    for step, argument in steps:
        if step == "add":
            seq += 1
            delivery = Delivery(seq, "p", argument if argument is None else str(argument))
            pending[seq] = delivery
            lane.add(delivery)
        elif step == "pop":
            delivery = lane.pop(now)
            if delivery is None:
                busy = {d.key for d in flight if d.key is not None}
                for other in pending.values():
                    if other in flight or (other.key is not None and other.key in busy):
                        continue
                    older = [d for d in pending.values() if d.key == other.key and d.seq < other.seq]
                    assert other.due > now or (other.key is not None and older)
                continue
            assert delivery.seq in pending
            assert delivery.due <= now
            if delivery.key is not None:
                assert all(d.key != delivery.key for d in flight), "one of a key at a time"
                assert all(d.seq >= delivery.seq for d in pending.values() if d.key == delivery.key)
            flight.append(delivery)
        elif step == "ack" and flight:
            delivery = flight.pop(int(argument) % len(flight))  # type: ignore[call-overload]
            lane.remove(delivery)
            del pending[delivery.seq]
            finished.setdefault(delivery.key, []).append(delivery.seq)
        elif step == "nak" and flight:
            index, delay = argument  # type: ignore[misc]
            delivery = flight.pop(index % len(flight))
            lane.put_back(delivery, now + delay)
        elif step == "term" and pending:
            delivery = list(pending.values())[int(argument) % len(pending)]  # type: ignore[call-overload]
            if delivery not in flight:
                lane.remove(delivery)
                del pending[delivery.seq]
        elif step == "expedite" and pending:
            delivery = list(pending.values())[int(argument) % len(pending)]  # type: ignore[call-overload]
            if delivery not in flight:
                first = min((d for d in pending.values() if d.key == delivery.key), key=lambda d: d.seq)
                before = lane.expedite(delivery)
                assert before is (None if first is delivery or delivery.key is None else first)
        elif step == "tick":
            now += float(argument)  # type: ignore[arg-type]
        assert lane.depth == len(pending)
        assert {d.seq for d in lane.pending()} == set(pending)
        for key in "abc":
            assert [d.seq for d in lane.pending() if d.key == key] == [s for s, d in pending.items() if d.key == key]
    for key, order in finished.items():
        if key is not None:
            assert order == sorted(order)
    # Everything that is left can be delivered.
    for delivery in flight:
        lane.put_back(delivery, now)
    now += 10.0
    while (left := lane.pop(now)) is not None:
        del pending[left.seq]
        lane.remove(left)
    assert not pending
    assert lane.depth == 0


def test_a_removed_delivery_may_be_added_again() -> None:
    lane = Lane()
    first = Delivery(1, "p", "a")
    lane.add(first)
    assert lane.pop(0.0) is first
    lane.put_back(first, 5.0)
    lane.remove(first)
    again = Delivery(1, "p", "a")
    lane.add(again)
    lane.put_back(lane.pop(0.0) or first, 5.0)
    assert lane.pop(6.0) is again
    assert lane.pop(6.0) is None
