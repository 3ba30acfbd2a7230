"""Certificates that a client goes by; OpenSSL is loaded only here, by those who need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isolator.errors import IsolatorError

if TYPE_CHECKING:
    import ssl


def context_of(ca: str) -> ssl.SSLContext:
    """A client's context with the certificates of a file, or the system's for an empty name; raises IsolatorError."""
    import ssl

    try:
        return ssl.create_default_context(cafile=ca or None)
    except OSError as error:
        why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror or str(error)
        remedy = "[cluster] ca names a file of certificates, which every user can read"
        raise IsolatorError(ca, f"cannot be used: {why}", remedy) from None
