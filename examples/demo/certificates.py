"""A private certificate authority that lives for one run: `issue` writes ca.pem, webhook.pem and webhook.key."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def issue(directory: Path, host: str) -> None:
    """Write into ``directory`` an authority's certificate and a certificate and key for ``host``; valid for a day."""
    now = datetime.datetime.now(datetime.UTC)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Pretend authority of the demo")])

    def begin(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), False)
        )

    signing = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    root = begin(authority, authority_key)
    root = root.add_extension(x509.BasicConstraints(True, 0), True).add_extension(signing, True)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = begin(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]), key)
    leaf = leaf.add_extension(x509.BasicConstraints(False, None), True)
    leaf = leaf.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(root.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    (directory / "webhook.pem").write_bytes(leaf.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    descriptor = os.open(directory / "webhook.key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
