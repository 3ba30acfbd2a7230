"""Search of a buffer for a text by the C library (memmem(3)), which passes over most bytes without looking at them.

``bytes.find`` looks at one byte to see how far it may skip, glibc at a pair, which is rarer.
"""

from __future__ import annotations

import ctypes

from isolator.linux._libc import libc

_memmem = libc.memmem
_memmem.restype = ctypes.c_void_p
_memmem.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)


def holds(buffer: bytearray, end: int, text: bytes) -> bool:
    """Whether ``text`` stands in the first ``end`` bytes of ``buffer``; raises ValueError for an empty one."""
    begin = ctypes.c_char.from_buffer(buffer)
    return _memmem(ctypes.byref(begin), min(end, len(buffer)), text, len(text)) is not None
