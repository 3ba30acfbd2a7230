"""The reader of certificates from elsewhere: as ``service.py``, for ``isolator certify --accept``.

``python3 -I -m isolator.reader.certificate 1``: standard input has one file after its length, standard output gets one
line: ``{"claim"}``, or ``{"at", "why", "remedy"}``. The file is an envelope of DSSE with the report beside it.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from isolator.errors import UsageError
from isolator.policy.request import MAX_BYTES
from isolator.policy.trust import CERTIFICATE_TYPE, SIGNATURE_BYTES
from isolator.reader.package import MOST_SIGNATURES
from isolator.reader.service import line_of, serve


def answer(text: bytes) -> bytes:
    """The line for one certificate."""
    return line_of(lambda: {"claim": _claim(text)})


def _claim(text: bytes) -> dict[str, Any]:
    try:
        if len(text) > MAX_BYTES:
            raise ValueError
        envelope = json.loads(text)
        if envelope["payloadType"] != CERTIFICATE_TYPE:
            raise ValueError
        payload = json.loads(base64.b64decode(envelope["payload"], validate=True))
        signatures = [base64.b64decode(one["sig"], validate=True) for one in envelope["signatures"]]
        if len(signatures) > MOST_SIGNATURES or any(len(one) != SIGNATURE_BYTES for one in signatures):
            raise ValueError
        fields = {key: str(payload[key]) for key in ("name", "version", "digest")}
    except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
        raise UsageError("", "is no certificate", "make one with 'isolator certify'") from None
    return {**fields, "signatures": [one.hex() for one in signatures]}


if __name__ == "__main__":
    answer(b"{}")
    serve(answer)
