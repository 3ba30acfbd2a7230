"""Certificates of versions: that ``isolator certify`` has played the faults of the protocol against one, and it held.

One counts here if this host has made it, or if a certifier of ``[trust]`` has signed it; root keeps those, a file for
each digest. Of a certificate from elsewhere root takes 64 bytes that fit, or do not, what it works out itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from isolator.errors import DeniedError, NotFoundError
from isolator.linux.durable import replace_file
from isolator.paths import Paths
from isolator.policy.parse.trusted import read_trusted
from isolator.policy.trust import CERTIFICATE, CERTIFICATE_TYPE, Trust, certified, signed_bytes
from isolator.registration.signatures import verifies

HERE = "this host"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Certificate:
    """A certificate that counts, or did; ``key``: the certifier's, empty for this host."""

    name: str
    version: str
    digest: str
    key: str = ""
    certified: int = CERTIFICATE


@dataclass(frozen=True)
class Claim:
    """A certificate from elsewhere, as its reader found it; nothing of it is believed."""

    name: str
    version: str
    digest: str
    signatures: tuple[str, ...]
    """In hexadecimal digits."""


def checked(claim: Claim, trust: Trust) -> Certificate:
    """The certificate that a claim is if a certifier has signed it; raises DeniedError."""
    signed = signed_bytes(certified(claim.name, claim.version, claim.digest), CERTIFICATE_TYPE)
    for key in trust.certifiers.values():
        if verifies(key, signed, claim.signatures):
            return Certificate(claim.name, claim.version, claim.digest, key)
    why = "no certifier of [trust] in host.toml has signed it" if claim.signatures else "it is not signed"
    why = f"proves nothing here: {why}"
    raise DeniedError(f"certificate of {claim.name} {claim.version}", why, "run 'isolator certify' here")


def keep(paths: Paths, certificate: Certificate) -> None:
    """Have a certificate count from now on."""
    paths.certificates.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = paths.certificates / f"{certificate.digest}.json"
    replace_file(path, json.dumps(asdict(certificate)).encode() + b"\n", temporary=path.with_suffix(".new"))


def certifier(paths: Paths, digest: str, trust: Trust) -> str | None:
    """Who has certified a version: a name of ``[trust.certifiers]``, or ``HERE``; None: nobody who counts."""
    if not _DIGEST.fullmatch(digest):
        return None
    try:
        found = Certificate(**json.loads(read_trusted(paths.certificates / f"{digest}.json")))
    except (NotFoundError, DeniedError, ValueError, TypeError):
        return None
    if (found.digest, found.certified) != (digest, CERTIFICATE):
        return None
    return HERE if not found.key else next((name for name, key in trust.certifiers.items() if key == found.key), None)


def require(paths: Paths, name: str, version: str, digest: str, trust: Trust) -> None:
    """Raise DeniedError for a version that nobody who counts has certified."""
    if certifier(paths, digest, trust) is None:
        why = "is not certified, and its policy takes nothing else ([require] certified)"
        remedy = "isolator certify DIR on this host, or --accept FILE for a certifier's certificate"
        raise DeniedError(f"plugin {name} {version}", why, remedy)
