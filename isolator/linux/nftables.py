"""libnftables in-process: one buffer is one transaction, which the kernel takes whole or not at all.

A context belongs to the thread, and to the network namespace, in which it was made (its netlink socket is
opened there), so it is made, used and freed by the thread that entered the namespace.

libnftables waits for its socket with select(2), and the C library ends the process (FORTIFY_SOURCE) when that socket's
number is 1024 or more, as it is in a daemon of a hundred running plugins. So the thread gets a table of descriptors of
its own (``isolator.linux.apart.leave_descriptors``), in which number 0 is free: it can use none that is open before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading

from isolator.linux.apart import leave_descriptors

LIBRARY = "libnftables.so.1"

_OUTPUT_STATELESS = 1 << 2  # no counters, no state of limits: two listings of one ruleset are equal
_OUTPUT_NUMERIC = 0x780  # protocols, priorities, symbols and times as numbers: names depend on files of the host


class NftablesError(OSError):
    """libnftables refused a command; the message is its own first complaint."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_free.restype = None
    for name in ("nft_ctx_free", "nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_ctx_output_set_flags.restype = None
    return library


def available() -> str | None:
    """None when libnftables can be loaded, else the loader's reason."""
    try:
        _library()
    except (OSError, AttributeError) as error:
        return str(error)
    return None


class Nftables:
    """A context for the calling thread's network namespace; close it in the same thread."""

    def __init__(self) -> None:
        self._library = _library()
        _have_low_numbers()
        self._context = self._library.nft_ctx_new(0)
        if not self._context:
            raise NftablesError("libnftables gave no context")
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_output_set_flags(self._context, _OUTPUT_STATELESS | _OUTPUT_NUMERIC)

    def __enter__(self) -> Nftables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, commands: str) -> str:
        """Run ``commands`` as one transaction and return what they print; raises NftablesError."""
        failed = self._library.nft_run_cmd_from_buffer(self._context, commands.encode())
        complaint = (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
        output = (self._library.nft_ctx_get_output_buffer(self._context) or b"").decode(errors="replace")
        if failed:
            raise NftablesError(complaint.strip().partition("\n")[0] or "nftables refused the commands")
        return output

    def close(self) -> None:
        """Free the context; harmless when repeated."""
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None


def _have_low_numbers() -> None:
    """Leave the table of descriptors: those opened from here on are the thread's own, and close with it.

    Always, and not only when numbers are high: other threads may open hundreds between the look and the use.
    """
    if threading.get_ident() == threading.main_thread().ident:
        return  # of a command or a test, which has few open
    leave_descriptors()
    with contextlib.suppress(OSError):
        os.close(0)  # of this thread's table
