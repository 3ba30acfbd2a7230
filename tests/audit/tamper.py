"""What somebody without the key can do to a trail."""

from __future__ import annotations

import hashlib
import re

from isolator.audit.record import GENESIS, HASH_TAIL, PREV_TAIL


def rechain(lines: list[bytes], prev: str = GENESIS, first: int | None = 1) -> list[bytes]:
    """Give lines new numbers and hashes so that they form a chain, as anybody can."""
    done = []
    for number, line in enumerate(lines):
        body = line[:-PREV_TAIL] + f',"prev":"{prev}"'.encode()
        if first is not None:
            body = re.sub(rb'^\{"seq":\d+,', b'{"seq":%d,' % (first + number), body)
        prev = hashlib.sha256(body).hexdigest()
        done.append(body + f',"hash":"{prev}"}}'.encode())
    return done


def unhashed(line: bytes) -> bytes:
    """What the hash of a line covers."""
    return line[:-HASH_TAIL]
