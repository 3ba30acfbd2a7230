"""Denial rules: every reason for which the network of a cage refuses something, with its explanation and its remedy.

The ``rule`` of a ``net.denied`` or ``net.query`` record is one of these codes, or the grant that allowed it. The broker
and the supervisor record them, ``isolator plugin denials`` explains them, and the table of docs/egress.md is generated
from them. Denials of other kinds carry no code: ``syscall.denied`` names the call, ``fs.denied`` says why in words,
``api.called`` names the permission.
"""

from __future__ import annotations

from enum import Enum, StrEnum


class Remedy(Enum):
    """The setting that allows a denied attempt, in Markdown."""

    NONE = "no setting"
    EGRESS = "`egress` in `[grant]` of the policy, if the manifest requests it too"
    EXCEPTION = "`exceptions` in `[network]` of `host.toml`, never a policy"
    RATE = "`connects_per_second` in `[limits]` of the policy"
    OPEN = "`connects_open` in `[limits]` of the policy"
    NO_SNI = "`allow_no_sni = true` in `[grant]` of the policy"
    ECH = "`allow_ech = true` in `[grant]` of the policy"


class DenialRule(StrEnum):
    """One code of the trail; ``explanation`` tells operators why, ``remedy`` which setting would allow it."""

    explanation: str
    remedy: Remedy

    def __new__(cls, code: str, explanation: str, remedy: Remedy = Remedy.NONE) -> DenialRule:
        self = str.__new__(cls, code)
        self._value_, self.explanation, self.remedy = code, explanation, remedy
        return self

    # The policy does not grant the destination.
    NOT_GRANTED = "not-granted", "its policy grants neither this name nor this address", Remedy.EGRESS
    NO_NETWORK = "no-network", "its policy grants no network at all", Remedy.EGRESS
    PORT = "port", "its policy grants the destination, but not this port", Remedy.EGRESS
    # The address is on the inside.
    BLOCKED_ADDRESS = "blocked-address", "the address is private or reserved", Remedy.EXCEPTION
    HOST_ADDRESS = "host-address", "that is the host itself", Remedy.EXCEPTION
    GATEWAY = "gateway", "that is the host's gateway", Remedy.EXCEPTION
    NEIGHBOUR = "neighbour", "the address is on a link of the host's own, as near as a private one", Remedy.EXCEPTION
    # The address means nothing outside the cage.
    UNALLOCATED = (
        "unallocated",
        "the address stands for no name in this cage; the program kept one from earlier or made it up",
    )
    BROKER_PORT = "broker-port", "that port belongs to the cage itself"
    # Too much at once.
    RATE = "rate", "more new connections than its policy allows in a second", Remedy.RATE
    TOO_MANY_OPEN = "too-many-open", "more open connections than its policy allows", Remedy.OPEN
    # Not TCP; the trail has it with the protocol: ``protocol-udp``.
    PROTOCOL = "protocol", "only TCP leaves a cage"
    # The first bytes name another server, none, or none that can be read.
    SNI_MISMATCH = "sni-mismatch", "the connection was to one name and asked for another inside (TLS server name)"
    HOST_MISMATCH = "host-mismatch", "the connection was to one name and asked for another inside (HTTP Host)"
    NO_SNI = "no-sni", "TLS without a server name", Remedy.NO_SNI
    ENCRYPTED_HELLO = "encrypted-hello", "TLS whose server name is encrypted (ECH), or may be", Remedy.ECH
    NOT_TLS = "not-tls", "something other than TLS on port 443", Remedy.NO_SNI
    NO_HOST = "no-host", "HTTP without a Host", Remedy.NO_SNI
    NOT_HTTP = "not-http", "something other than HTTP on port 80", Remedy.NO_SNI
    HTTP2 = "http2", "HTTP/2 without TLS, whose requests name their server where nobody sees it", Remedy.NO_SNI
    MALFORMED = "malformed", "what it sent breaks the rules of TLS or HTTP, so nobody can tell whom it is for"
    INCOMPLETE = "incomplete", "it stopped in the middle of saying whom the connection is for"
    SILENT = "silent", "it connected and then did not say whom the connection is for"
    # Names.
    NAME_FORM = "name-form", "that is no host name"
    RECORD_TYPE = "record-type", "only addresses are answered; other records can carry data out"
    DNS_FORM = "dns-form", "that is no question for the address of an internet name"
    DNS_RATE = "dns-rate", "it asked for names faster than a cage may"
    DNS_BUSY = "dns-busy", "too many of its lookups were under way, or their answers took too long to read"
    TOO_MANY_NAMES = "too-many-names", "it used more names than a cage may"
    UPSTREAM = "upstream", "the host's resolver gave no answer: see resolvers in host.toml, or /etc/resolv.conf"
    # The host's own troubles.
    AUDIT_UNAVAILABLE = "audit-unavailable", "nothing is let out while the audit trail cannot be written"
    RECORDS_LOST = "records-lost", "there were more refusals than could be read one by one"
    RULESET_CHANGED = "ruleset-changed", "somebody changed the rules of its network from outside"

    @classmethod
    def of(cls, code: str) -> DenialRule | None:
        """The rule that a record names; None for a grant and for the code of another version."""
        if code.startswith(f"{cls.PROTOCOL}-"):
            return cls.PROTOCOL
        return next((rule for rule in cls if rule == code), None)


def protocol_rule(protocol: str) -> str:
    """The code of a refused packet that is not TCP, ``protocol-udp`` for ``udp``."""
    return f"{DenialRule.PROTOCOL}-{protocol}"


INSTEAD = {
    "inotify_add_watch": (
        "in /usr the use of files tells what the host runs, so only changes can be watched: leave IN_OPEN, IN_ACCESS "
        "and IN_CLOSE_NOWRITE out (Python's watchdog: event_filter=[FileModifiedEvent, ...])"
    ),
}
"""Advice by system call: why a cage refuses what ordinary programs ask of it, and what they can do instead."""


def table() -> str:
    """Every code with its explanation and its remedy, as the table of docs/egress.md."""
    rows = ["| `rule` | because | allowed by |", "|---|---|---|"]
    for rule in DenialRule:
        code = protocol_rule("udp") + "` (`-icmp`, …)" if rule is DenialRule.PROTOCOL else f"{rule}`"
        rows.append(f"| `{code} | {rule.explanation} | {rule.remedy.value} |")
    return "\n".join(rows) + "\n"
