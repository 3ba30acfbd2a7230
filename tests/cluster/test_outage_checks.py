"""Checks of the outages: each notices what it is there for."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.cluster.delivery.cursor import MOST_ENDED
from isolator.linux import netns
from tests.cluster.outages import history
from tests.cluster.outages.faults import Done
from tests.cluster.outages.history import IN_FLIGHT, Folded, History
from tests.cluster.outages.watch import watch
from tests.support.ledger import COURIER, PORT, Handled, Holding, Ledger, ledger
from tests.support.routed import OUTSIDE, Network, both_ways, network
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for


def _history() -> History:
    found = History()
    found.events["k"] += ["a", "b", "c"]
    found.events["l"] += ["x"]
    found.folds[7] = Folded(7, "d", {})
    return found


def _handled(*events: str, link: int = 1) -> list[Handled]:
    return [Handled(event, "l" if event == "x" else "k", 0.0, "h1", 5, ("run", link)) for event in events]


def test_event_that_is_lost_or_made_up_is_noticed() -> None:
    assert history.lost(_history(), ["a"], ["a", "b", "c", "x"]) == []
    assert len(history.lost(_history(), ["a", "y"], ["a", "b", "x", "z"])) == 3


def test_event_that_passes_another_of_its_key_is_noticed_and_repetitions_are_not() -> None:
    for right in ("abcx", "axbc", "xababc", "abcbc"):
        assert history.out_of_order(_history(), _handled(*right)) == []
    for wrong in ("bacx", "acbx", "abacx"):
        assert history.out_of_order(_history(), _handled(*wrong))


def test_repetitions_by_another_host_process_are_counted() -> None:
    events = [f"e{number}" for number in range(MOST_ENDED + IN_FLIGHT + 1)]
    first, again = _handled(*events), _handled(*events[1:], link=2)
    assert history.repeated([*first, *first]).events == 0
    assert history.repeated([*first, *again]) == history.Repeated(len(again), len(again), [])
    assert len(history.repeated([*first, *_handled(*events, link=2)]).wrong) == 1


def test_host_that_has_folded_something_else_is_noticed() -> None:
    right = Folded(7, "d", {})
    assert history.differing(_history(), {"h1": right}) == []
    for other in (Folded(7, "e", {}), Folded(7, "d", {("p", "k"): "v"}), Folded(8, "d", {})):
        assert len(history.differing(_history(), {"h1": right, "h2": other})) == 1


def test_take_over_is_measured_from_its_fault() -> None:
    holdings = [Holding(5, "h1", 0.0, 20.0), Holding(9, "h2", 27.5, 30.0)]
    faults = [Done("host cut off", "h2", 9.0, 40.0), Done("host cut off", "h1", 10.0, 40.0)]
    (take,) = history.take_overs(holdings, faults)
    assert (take.seconds, history.idle(holdings)) == (17.5, [7.5])
    assert "host cut off h2 -1.0 to 30.0; host cut off h1 0.0 to 30.0" in history.reasons(_history(), take, faults)


@pytest.mark.parametrize(("used", "thawed", "wrong"), [(100, 0, 0), (400, 0, 1), (400, 1, 0)])
def test_frozen_cage_that_acts_is_noticed_and_one_that_was_thawed_meanwhile_is_not(
    tmp_path: Path, used: int, thawed: int, wrong: int
) -> None:
    trail, group = tmp_path / "var/log/isolator/audit/audit.jsonl", tmp_path / "group"
    trail.parent.mkdir(parents=True)
    group.mkdir()

    def write(name: str, text: str) -> None:
        (group / "new").write_text(text)
        (group / "new").rename(group / name)

    def record(kind: str, **data: str) -> None:
        with trail.open("a") as file:
            file.write(json.dumps({"type": f"plugin.{kind}", "plugin": COURIER.name, "data": data}) + "\n")

    write("cgroup.events", "populated 1\nfrozen 1\n")
    write("cpu.stat", "usage_usec 1000\n")
    record("started", cgroup=str(group))
    with watch({"h1": tmp_path}) as watched:
        wait_for(lambda: watched.looks, what="two looks")
        for _ in range(thawed):
            record("thawed")
        write("cpu.stat", f"usage_usec {1000 + used}\n")
        looks = watched.looks
        wait_for(lambda: watched.looks > looks + 2, what="further looks")
    assert len(watched.wrong) == wrong


@pytest.fixture
def joined() -> Iterator[Network]:
    with network(2) as made:
        yield made


@pytest.fixture
def kept(joined: Network) -> Iterator[Ledger]:
    with ledger(joined, {machine.address: machine.name for machine in joined.machines}) as made:
        yield made


def test_two_hosts_that_act_at_a_time_are_noticed(joined: Network, kept: Ledger) -> None:
    links = [
        netns.in_network(machine.fd, lambda: socket.create_connection((OUTSIDE, PORT), 10))
        for machine in joined.machines
    ]

    def write(number: int, machine: int, epoch: int, run: str = "") -> None:
        line = {"run": run or str(machine), "number": number, "epoch": epoch}
        links[machine].sendall(json.dumps(line).encode() + b"\n")
        assert links[machine].recv(10) == b"ok\n"

    write(1, 0, 5)
    write(1, 1, 9)
    write(1, 0, 5)  # the same line once more: its answer was lost
    assert kept.wrong == [] and [(one.host, one.epoch) for one in kept.holdings] == [("m1", 5), ("m2", 9)]
    write(2, 0, 5)
    assert "m1 acts in epoch 5" in kept.wrong[0]
    write(2, 0, 9, "another")
    assert "m1 and m2 act in epoch 9" in kept.wrong[1]
    for link in links:
        link.close()


def test_way_that_is_cut_carries_nothing_until_all_who_have_cut_it_have_mended_it(joined: Network) -> None:
    a, b = joined.machines
    sockets = [
        netns.in_network(machine.fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for machine in (a, b)
    ]
    for machine, sock in zip((a, b), sockets, strict=True):
        sock.bind((machine.address, PORT))

    def passes(source: int, target: int, timeout: float = seconds(5)) -> bool:
        """Whether a datagram goes this way; what the router has dropped is dropped before the next is sent."""
        sockets[source].sendto(b"x", ((a, b)[target].address, PORT))
        sockets[target].settimeout(timeout)
        try:
            return sockets[target].recv(10) == b"x"
        except TimeoutError:
            return False

    assert passes(0, 1) and passes(1, 0)
    with joined.cut([(a, b)]):
        with joined.cut(both_ways([a], [b])):
            assert not passes(0, 1, 0.3) and not passes(1, 0, 0.3)
        assert not passes(0, 1, 0.3) and passes(1, 0)
    assert passes(0, 1) and passes(1, 0)
    for sock in sockets:
        sock.close()
