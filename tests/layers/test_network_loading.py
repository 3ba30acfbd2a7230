"""Rules that are sent from a recording of what libnftables sent: the same, or the library's own."""

from __future__ import annotations

import subprocess

import pytest

from isolator.errors import ConfinementError
from isolator.layers.network import loading
from isolator.layers.network import namespace as network
from isolator.linux import netns
from isolator.policy.model import NetworkPolicy
from tests.layers.conftest import LISTED, PUBLIC, Make, connect


@pytest.fixture
def no_recordings(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes | None]:
    batches: dict[str, bytes | None] = {}
    monkeypatch.setattr(loading, "_batches", batches)
    return batches


def listing(cage: network.CageNetwork) -> str:
    return netns.in_network(cage.netns_fd, loading.list_ruleset)


@pytest.mark.vm
@pytest.mark.parametrize("policy", [PUBLIC, LISTED, NetworkPolicy(mode="none")], ids=["public", "listed", "none"])
def test_rules_that_are_sent_from_a_recording_are_those_of_the_text(
    make: Make, no_recordings: dict[str, bytes | None], policy: NetworkPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_library, recorded = make(policy), make(policy)
    assert no_recordings[by_library.loaded]
    monkeypatch.setattr(loading.nftables, "Nftables", None)  # nothing of it is needed from here on
    sent = make(policy)
    monkeypatch.undo()
    assert listing(by_library) == listing(recorded) == listing(sent)
    assert network.is_loaded(sent, policy)
    assert connect(sent, "9.9.9.9", 8080) == connect(by_library, "9.9.9.9", 8080)
    assert connect(sent, "127.0.0.1", network.PORT) == connect(by_library, "127.0.0.1", network.PORT)
    network.confirm(sent, policy)
    netns.in_network(sent.netns_fd, lambda: subprocess.run(["nft", "flush", "ruleset"], check=True))
    with pytest.raises(ConfinementError):
        network.confirm(sent, policy)


def test_recorded_rules_take_the_place_of_others(make: Make, no_recordings: dict[str, bytes | None]) -> None:
    wanted = listing([make(LISTED), make(LISTED)][1])
    cage = make(PUBLIC)
    network.load(cage, LISTED)
    assert listing(cage) == wanted


def test_recording_that_makes_other_rules_is_not_used(
    make: Make, no_recordings: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, other = listing(make(LISTED)), loading.nft_batch.record
    public = make(PUBLIC).loaded
    monkeypatch.setattr(loading.nft_batch, "record", lambda text: other(public))
    cage = make(LISTED)
    assert no_recordings[cage.loaded] == b""
    assert listing(cage) == wanted
    network.confirm(cage, LISTED)
    assert listing(make(LISTED)) == wanted


def test_batch_that_the_kernel_refuses_gives_way_to_the_library(
    make: Make, no_recordings: dict[str, bytes | None]
) -> None:
    wanted, text = listing(make(LISTED)), make(LISTED).loaded
    batch = no_recordings[text]
    assert batch
    no_recordings[text] = batch.replace(b"refused\0", b"refusex\0", 1)  # a chain that no rule's jump finds
    cage = make(LISTED)
    assert listing(cage) == wanted
    assert no_recordings[text] == b""
    network.confirm(cage, LISTED)


def test_memory_for_recordings_has_a_bound(
    make: Make, no_recordings: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_MOST", 1)
    make(LISTED)
    public = make(PUBLIC)
    assert [*no_recordings] == [public.loaded]
