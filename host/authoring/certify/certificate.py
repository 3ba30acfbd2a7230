"""``certificate.json``: an envelope of DSSE about name, version and digest, with the report beside it.

By itself it proves nothing: a host believes what it has made itself, or what a certifier of its ``[trust]`` has signed.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host.authoring.certify.certifier import Report
from host.authoring.pack import written_whole
from host.authoring.sign import public_half, read_given
from isolator.errors import IsolatorError, translated
from isolator.policy.request import MAX_BYTES
from isolator.policy.trust import CERTIFICATE_TYPE, certified, signed_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def to_json(report: Report) -> dict[str, Any]:
    return {
        "plugin": report.plugin, "version": report.version, "mode": report.mode, "digest": report.digest,
        "ok": report.ok, "whole": report.whole,
        "checks": [
            {
                "check": one.check.name, "title": one.check.title, "ok": not one.findings,
                "skipped": one.skipped or None, "findings": one.findings,
            }
            for one in report.results
        ],
    }  # fmt: skip


def write(report: Report, path: Path, key: Ed25519PrivateKey | None) -> None:
    """Write the certificate of a report in which nothing was found. Raises IsolatorError."""
    payload = certified(report.plugin, report.version, report.digest)
    signatures = []
    if key is not None:
        signature = key.sign(signed_bytes(payload, CERTIFICATE_TYPE))
        signatures = [{"keyid": public_half(key), "sig": base64.b64encode(signature).decode()}]
    envelope = {
        "payloadType": CERTIFICATE_TYPE, "payload": base64.b64encode(payload).decode(), "signatures": signatures,
        "report": to_json(report),
    }  # fmt: skip
    with translated(OSError, IsolatorError, str(path)), written_whole(path) as out:
        out.write(json.dumps(envelope, indent=2).encode() + b"\n")


def read(path: Path) -> bytes:
    """The bytes of a certificate from elsewhere; raises IsolatorError. What they say is for a reader to find out."""
    return read_given(path, most=MAX_BYTES + 1)
