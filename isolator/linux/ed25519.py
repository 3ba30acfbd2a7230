"""Ed25519 (RFC 8032) by the libcrypto that Python's hashes come from, for a process that has that one anyway.

The package ``cryptography`` brings a copy of OpenSSL along: 1.5 MiB of every process, for one signature a minute. Keys
have the methods of its keys that are used here.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p

_TYPE = 1087
"""``EVP_PKEY_ED25519`` of openssl/evp.h."""
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64


@functools.cache
def _library() -> ctypes.CDLL:
    import _hashlib

    library = ctypes.CDLL(getattr(_hashlib, "__file__", None))  # a symbol is looked for in what it needs, too
    for name in ("EVP_PKEY_new_raw_private_key", "EVP_PKEY_new_raw_public_key"):
        getattr(library, name).restype = c_void_p
        getattr(library, name).argtypes = [c_int, c_void_p, c_char_p, c_size_t]
    library.EVP_PKEY_get_raw_public_key.argtypes = [c_void_p, c_char_p, POINTER(c_size_t)]
    library.EVP_MD_CTX_new.restype = c_void_p
    for name in ("EVP_DigestSignInit", "EVP_DigestVerifyInit"):
        getattr(library, name).argtypes = [c_void_p] * 5
    library.EVP_DigestSign.argtypes = [c_void_p, c_char_p, POINTER(c_size_t), c_char_p, c_size_t]
    library.EVP_DigestVerify.argtypes = [c_void_p, c_char_p, c_size_t, c_char_p, c_size_t]
    for name in ("EVP_PKEY_free", "EVP_MD_CTX_free"):
        getattr(library, name).restype = None
        getattr(library, name).argtypes = [c_void_p]
    return library


class _Key:
    def __init__(self, make: str, raw: bytes) -> None:
        if len(raw) != _KEY_BYTES:
            raise ValueError(f"an Ed25519 key has {_KEY_BYTES} bytes, not {len(raw)}")
        self._raw, self._library = raw, _library()
        self._key = _made(getattr(self._library, make)(_TYPE, None, raw, _KEY_BYTES))

    def __del__(self) -> None:
        if hasattr(self, "_key"):
            self._library.EVP_PKEY_free(self._key)

    def _digest(self, what: str, *arguments: object) -> bool:
        """Sign or verify in one call, which Ed25519 has no other way of."""
        context = _made(self._library.EVP_MD_CTX_new())
        try:
            _made(getattr(self._library, f"{what}Init")(context, None, None, None, self._key) == 1)
            return bool(getattr(self._library, what)(context, *arguments) == 1)
        finally:
            self._library.EVP_MD_CTX_free(context)


class PublicKey(_Key):
    """A public key of 32 bytes; raises ValueError for others."""

    def __init__(self, raw: bytes) -> None:
        super().__init__("EVP_PKEY_new_raw_public_key", raw)

    def public_bytes_raw(self) -> bytes:
        """Its 32 bytes."""
        return self._raw

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raise ValueError unless the signature is that of the message."""
        if not self._digest("EVP_DigestVerify", signature, len(signature), message, len(message)):
            raise ValueError("the signature does not fit")


class PrivateKey(_Key):
    """A private key of 32 bytes; raises ValueError for others."""

    def __init__(self, raw: bytes) -> None:
        super().__init__("EVP_PKEY_new_raw_private_key", raw)

    @classmethod
    def generate(cls) -> PrivateKey:
        """A new key: 32 bytes of the kernel's randomness are one."""
        return cls(os.urandom(_KEY_BYTES))

    def private_bytes_raw(self) -> bytes:
        """Its 32 bytes."""
        return self._raw

    def public_key(self) -> PublicKey:
        """The public key that belongs to it."""
        raw, size = ctypes.create_string_buffer(_KEY_BYTES), c_size_t(_KEY_BYTES)
        _made(self._library.EVP_PKEY_get_raw_public_key(self._key, raw, byref(size)) == 1)
        return PublicKey(raw.raw)

    def sign(self, message: bytes) -> bytes:
        """The signature, of 64 bytes."""
        made, size = ctypes.create_string_buffer(_SIGNATURE_BYTES), c_size_t(_SIGNATURE_BYTES)
        _made(self._digest("EVP_DigestSign", made, byref(size), message, len(message)))
        return made.raw


def _made(result: int | None) -> int:
    if not result:
        raise OSError("libcrypto refused an Ed25519 key")
    return result
