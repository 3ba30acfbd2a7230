"""Signatures of packages, checked against ``[trust]``: who has published a version, and whether it may be had."""

from __future__ import annotations

from collections.abc import Sequence

from isolator.errors import DeniedError
from isolator.policy.trust import Trust, is_older, signed_bytes, statement

_TRUST = "[trust] of host.toml"


def publisher_of(name: str, version: str, digest: str, signatures: Sequence[str], trust: Trust) -> str:
    """The publisher who has signed a version; empty when nobody has, or nobody is trusted. Raises DeniedError."""
    what = f"plugin {name} {version}"
    refuse_withdrawn(name, version, digest, trust)
    owners = trust.owners(name)
    if not signatures:
        if owners or trust.require:
            why = f"is not signed, and only {' or '.join(owners) or 'signed plugins'} may be added"
            raise DeniedError(what, f"{why} ({_TRUST})", "take the package that its publisher has signed")
        return ""
    signed = signed_bytes(statement(name, version, digest))
    found = [name for name, one in trust.publishers.items() if verifies(one.key, signed, signatures)]
    for publisher in found:
        if publisher in owners:
            return publisher
    if found:
        raise DeniedError(what, f"{found[0]} has signed it and may not publish {name}", f"see {_TRUST}")
    if trust.publishers or trust.require:
        raise DeniedError(what, "is signed with a key that this host does not trust", f"see {_TRUST}")
    return ""


def refuse_withdrawn(name: str, version: str, digest: str, trust: Trust) -> None:
    """Raise DeniedError for a version that is withdrawn."""
    if trust.is_withdrawn(name, version, digest):
        raise DeniedError(f"plugin {name} {version}", f"is withdrawn ({_TRUST})", "take another version")


def changes(publisher: str, version: str, before: str, version_before: str) -> list[str]:
    """Changes of origin in an update that an operator has to agree to, one phrase each."""
    found = []
    if before and publisher != before:
        found.append(f"publisher: {publisher or 'nobody'} instead of {before}")
    if (before or publisher) and is_older(version, version_before):
        found.append(f"version: {version}, older than {version_before}")
    return found


def verifies(key: str, signed: bytes, signatures: Sequence[str]) -> bool:
    """Whether one of the signatures is that of a key; each in hexadecimal digits."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    for signature in signatures:
        try:
            public.verify(bytes.fromhex(signature), signed)
        except InvalidSignature:
            continue
        return True
    return False
