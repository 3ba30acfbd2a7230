"""Changes that somebody without the key can make to a trail."""

from __future__ import annotations

import hashlib
import re

from isolator.audit.record import GENESIS, PREV_TAIL


def rechain(lines: list[bytes], prev: str = GENESIS, first: int | None = 1) -> list[bytes]:
    """Give lines new numbers and hashes so that they form a chain, as anybody can; seals name the new hashes too."""
    done = []
    for number, line in enumerate(lines):
        body = line[:-PREV_TAIL] + f',"prev":"{prev}"'.encode()
        if first is not None:
            body = re.sub(rb'^\{"seq":\d+,', b'{"seq":%d,' % (first + number), body)
        if b'"type":"audit.seal"' in body:
            body = re.sub(rb'"data":(\{.*?)"hash":"[0-9a-f]{64}"', rb'"data":\1"hash":"%b"' % prev.encode(), body)
        prev = hashlib.sha256(body).hexdigest()
        done.append(body + f',"hash":"{prev}"}}'.encode())
    return done
