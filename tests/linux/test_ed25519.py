"""Ed25519 by libcrypto: the vectors of RFC 8032, and the package ``cryptography`` as a second opinion."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519 as other

from isolator.linux.ed25519 import PrivateKey, PublicKey

VECTORS = [  # RFC 8032, 7.1: TEST 1 to TEST 3
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("seed", "public", "message", "signature"), VECTORS)
def test_vectors_of_the_rfc(seed: str, public: str, message: str, signature: str) -> None:
    key = PrivateKey(bytes.fromhex(seed))
    assert key.public_key().public_bytes_raw().hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    PublicKey(bytes.fromhex(public)).verify(bytes.fromhex(signature), bytes.fromhex(message))


def test_another_implementation_takes_its_signatures_and_it_takes_theirs() -> None:
    message = b"with a \0 in it"
    mine = PrivateKey.generate()
    other.Ed25519PublicKey.from_public_bytes(mine.public_key().public_bytes_raw()).verify(mine.sign(message), message)
    theirs = other.Ed25519PrivateKey.generate()
    PublicKey(theirs.public_key().public_bytes_raw()).verify(theirs.sign(message), message)
    assert PrivateKey(mine.private_bytes_raw()).sign(message) == mine.sign(message)


@pytest.mark.parametrize("spoilt", range(64))
def test_signature_with_one_wrong_bit_does_not_fit(spoilt: int) -> None:
    key = PrivateKey.generate()
    signature = bytearray(key.sign(b"message"))
    signature[spoilt] ^= 1
    with pytest.raises(ValueError, match="does not fit"):
        key.public_key().verify(bytes(signature), b"message")


@pytest.mark.parametrize("signature", [b"", b"\0" * 63, b"\0" * 64, b"\0" * 65])
def test_what_is_no_signature_does_not_fit(signature: bytes) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        PrivateKey.generate().public_key().verify(signature, b"message")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_key_of_another_length_is_refused(length: int) -> None:
    for kind in (PrivateKey, PublicKey):
        with pytest.raises(ValueError, match="32 bytes"):
            kind(bytes(length))


def test_no_other_copy_of_openssl_is_loaded() -> None:
    code = (
        "from isolator.linux.ed25519 import PrivateKey; key = PrivateKey.generate(); key.sign(b'')\n"
        "print(sorted({line.split()[-1] for line in open('/proc/self/maps') if 'crypt' in line}))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("/") >= 1 and "cryptography" not in done.stdout
