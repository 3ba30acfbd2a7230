"""The reader process: ``python3 -I -m isolator.reader.service COUNT``, started by ``isolator/registration/reading.py``.

Standard input has COUNT manifests, each after its length (4 bytes, big-endian). Standard output gets one line of JSON
for each, as soon as it is there: ``{"core", "manifest"}`` or ``{"at", "why", "remedy"}``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from isolator.errors import UsageError
from isolator.linux.files import write_all
from isolator.policy.parse.strict import prose
from isolator.policy.request import MAX_BYTES
from isolator.reader.hardening import begin_share, harden
from isolator.reader.json_text import load_json_with_lines
from isolator.reader.manifest import parse_manifest

_SAMPLE = b'{"name": "sample", "version": "1.0.0", "api_version": "1", "binary": "./x", "hooks": ["a.b"], "sandbox": 1}'


def answer(text: bytes) -> bytes:
    """The line for one manifest."""

    def read() -> dict[str, Any]:
        # Without a name: what the file is called is known to who wants the answer.
        data, lines = load_json_with_lines(text, max_bytes=MAX_BYTES, name="")
        core = parse_manifest(data, lines=lines, name="")
        return {"core": core.model_dump(mode="json"), "manifest": data}

    return line_of(read)


def line_of(read: Callable[[], dict[str, Any]]) -> bytes:
    """The line for what ``read`` returns, or for its refusal (UsageError)."""
    try:
        found = read()
    except UsageError as error:
        found = {"at": error.what, "why": prose(error.why), "remedy": prose(error.remedy)}
    except (MemoryError, RecursionError):
        found = {"at": "", "why": "takes too much memory to read", "remedy": "make it smaller"}
    return json.dumps(found, ensure_ascii=False).encode() + b"\n"


def main() -> None:
    """Answer for the manifests on standard input."""
    answer(_SAMPLE)  # what is imported or compiled on first use is so by now
    serve(answer)


def serve(answered: Callable[[bytes], bytes]) -> None:
    """Give up every right, and write what ``answered`` makes of each text on standard input."""
    count = int(sys.argv[1])
    harden(count)
    for _ in range(count):
        begin_share()
        size = int.from_bytes(_read(4), "big")
        write_all(1, answered(_read(size)))


def _read(size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(0, size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


if __name__ == "__main__":
    main()
