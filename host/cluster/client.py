"""The servers' client, as far as it has to mistrust: a server without TLS, and what other hosts have headers say.

A server takes a message for any subject from itself, and it lets whoever asks for a stored message choose where the
answer goes: to another host's subject, say, under which it is stored as if that host had written it. What a host has
published itself shows by its header: an answer has more of them, or, asked for without, none.
"""

from __future__ import annotations

import re
from typing import Any, Final

import nats.errors
from nats.aio.client import Client

NO_TLS: Final = "offers no TLS, and [cluster] tls or --tls asks for it"
HEADERS: Final = {"Isolator": "1"}
"""Headers with which each host publishes its messages."""
PUBLISHED: Final = "published"
"""In the headers of a stored message: not empty if a host has published it itself."""
_ITS_OWN: Final = b"\r\nIsolator: 1"
_STORED: Final = re.compile(
    rb"NATS/1\.0(.*)\r\nNats-Stream: [^\r\n]*\r\nNats-Subject: ([^\r\n]*)\r\nNats-Sequence: ([0-9]+)"
    rb"\r\nNats-Time-Stamp: ([^\r\n]*)\r\n\r\n\Z",
    re.DOTALL,
)
"""The servers' own lines are the last, whatever the message has itself: those, or a status, would be believed else."""


class MistrustfulClient(Client):
    """A client that tells no password where TLS is wanted and none offered, and reads headers as servers write them."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self.options.get("tls") is not None and not info.get("tls_required"):
            raise nats.errors.Error(NO_TLS)
        await super()._process_info(info, initial_connection)

    async def _process_headers(self, headers: Any) -> dict[str, str] | None:
        stored = _STORED.match(bytes(headers or b""))
        if stored is not None:
            subject, place, time = (stored[at].decode("ascii", "replace") for at in (2, 3, 4))
            own = "yes" if stored[1] == _ITS_OWN else ""
            return {"Nats-Subject": subject, "Nats-Sequence": place, "Nats-Time-Stamp": time, PUBLISHED: own}
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
        except ValueError:  # of another host, with bytes that would end the connection
            return None
        return found
