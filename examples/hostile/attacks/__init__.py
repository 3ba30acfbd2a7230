"""The attacks, by name, in the order in which `all` tries them (what may kill the plugin comes last).

An attack is a function of what the attacker knows (`Known`) that returns an `Outcome`. It is written as an
attacker would write it: it succeeds wherever the layer that stops it is missing, and every bomb is bounded
in count, size and time, and cleaned up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import bombs, files, kernel, network
from .outcome import Known, Outcome, said

ATTACKS: dict[str, Callable[[Known], Outcome]] = {
    "read-shadow": files.read_shadow,
    "read-secret": files.read_secret,
    "write-outside": files.write_outside,
    "host-loopback": network.host_loopback,
    "metadata": network.metadata,
    "other-socket": network.other_socket,
    "ungranted-name": network.ungranted_name,
    "resolver-udp": network.resolver_udp,
    "resolver-tcp": network.resolver_tcp,
    "mount": kernel.mount,
    "user-namespace": kernel.user_namespace,
    "ptrace-init": kernel.ptrace_init,
    "ptrace-outside": kernel.ptrace_outside,
    "setuid-root": kernel.setuid_root,
    "open-files": bombs.open_files,
    "fill-tmp": bombs.fill_tmp,
    "fill-state": bombs.fill_state,
    "flood-stdout": bombs.flood_stdout,
    "fork-bomb": bombs.fork_bomb,
    "memory-bomb": bombs.memory_bomb,
}


def attempt(name: str, known: Known) -> dict[str, Any]:
    """Try one attack; whatever stops it is the result, never an exception."""
    try:
        outcome = ATTACKS[name](known)
    except Exception as error:  # the report must arrive whatever the attack met
        outcome = Outcome(False, said(error))
    return {"attempt": name, **outcome.as_dict()}
