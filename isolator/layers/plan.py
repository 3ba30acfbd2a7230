"""The plan of one cage, as it travels from the supervisor to the launcher. Standard library only."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Plan:
    """What the child does with itself: one section a layer, and the program to exec.

    ``sections`` maps a layer's name to what its ``enter`` needs; a layer that is missing is not entered (only
    tests of a layer's absence make such plans). ``fds`` maps names to descriptors: numbers of the sender until
    it is sent, positions in the packet on the way, numbers of the child in the child.

    Descriptors that every plan has: ``stdin stdout stderr``. Whoever is parked to become the cage has two more of
    his own: the link to the supervisor (SOCK_SEQPACKET: what failed or the seccomp listener goes up, one byte ``x``
    comes down when everything is confirmed, end of file means that exec happened), and the pipe into which pid 1
    writes the raw wait status of the sidecar.
    """

    cage: str
    argv: list[str]
    env: dict[str, str]
    cwd: str = "/"
    umask: int = 0o022
    clone_flags: int = 0
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    fds: dict[str, int] = field(default_factory=dict)
    _owned: list[int] = field(default_factory=list)

    def give(self, name: str, fd: int) -> None:
        """Add a descriptor that this plan owns: the sender closes it once the plan was sent."""
        self.fds[name] = fd
        self._owned.append(fd)

    def close_given(self) -> None:
        """Close what ``give`` added."""
        while self._owned:
            os.close(self._owned.pop())

    def pack(self) -> tuple[bytes, list[int]]:
        """The packet and the descriptors that go with it."""
        names = list(self.fds)
        body = {**self.__dict__, "fds": {name: i for i, name in enumerate(names)}}  # asdict would copy all of it
        del body["_owned"]
        return json.dumps(body, separators=(",", ":")).encode(), [self.fds[name] for name in names]

    @classmethod
    def unpack(cls, packet: bytes, fds: list[int]) -> Plan:
        """The plan with the receiver's descriptor numbers."""
        body = json.loads(packet)
        body["fds"] = {name: fds[i] for name, i in body["fds"].items()}
        return cls(**body)
