"""Loading of a ruleset, by a thread that is in the cage's namespace and ends right after.

libnftables takes half a millisecond to read a text, and each context a copy of the process's table of descriptors. So
what it sends for a text is recorded when that is loaded for the second time, and sent again from then on. Only a
recording is used after which the kernel lists the same ruleset as after the text itself.
"""

from __future__ import annotations

from isolator.linux import nft_batch, nftables
from isolator.linux.netlink import Generations

_MOST = 256

_batches: dict[str, bytes | None] = {}
"""By text that was loaded: what to send in its place; None once, empty where a recording does not hold."""


def load(text: str, generations: Generations) -> int:
    """Put a ruleset that replaces the one in force in its place; returns its generation. Raises OSError."""
    batch = _batches.get(text)
    if batch:
        try:
            return generations.commit(batch)
        except OSError:  # the library says what the kernel does not want
            _batches[text] = b""
    with nftables.Nftables() as library:
        library.run(text)
    if text not in _batches:
        if len(_batches) >= _MOST:
            del _batches[next(iter(_batches))]
        _batches[text] = None
    elif batch is None:
        _batches[text] = _recording(text, generations)
    return generations.current()


def list_ruleset() -> str:
    """The ruleset in force, as the kernel has it; raises OSError."""
    with nftables.Nftables() as library:
        return library.run("list ruleset")


def _recording(text: str, generations: Generations) -> bytes:
    """What to send for a text that is in force, and in force afterwards."""
    wanted = list_ruleset()
    try:
        batch = nft_batch.record(text)
        generations.commit(batch)
    except OSError:
        return b""
    if list_ruleset() == wanted:
        return batch
    with nftables.Nftables() as library:
        library.run(text)
    return b""
