"""A throw-away authority for TLS: made in one process, kept in its memory alone, and trusted by one daemon's cages.

Those cages find it where programs look for certificates: ``trusted_folder`` is a copy of the host's ``/etc/ssl/certs``
with it added, which a private daemon has in the place of that folder, in a mount namespace of its own.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import shutil
import ssl
from collections import OrderedDict
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isolator.linux.descriptors import owning

CERTIFICATES = Path("/etc/ssl/certs")
BUNDLE = "ca-certificates.crt"
VARIABLES = {
    name: str(CERTIFICATES / BUNDLE)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
}
"""Variables by which programs that bring certificates of their own find more."""
# In small letters: OpenSSL makes the name of a certificate's file from its subject in small letters.
_NAME = "isolator throw-away authority"
_DAYS = 2
_MOST_CONTEXTS = 256


class Authority:
    """An authority, and contexts of servers with its certificates."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
        self._contexts: OrderedDict[str, ssl.SSLContext] = OrderedDict()
        sign = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self._certificate = (
            _dated(self._subject, self._subject, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(sign, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        # One key for all servers: nothing but this process has it.
        self._server_key = ec.generate_private_key(ec.SECP256R1())

    @property
    def pem(self) -> str:
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def context(self, host: str) -> ssl.SSLContext:
        """The context of a server that is called ``host``, a name or an address."""
        if host in self._contexts:
            self._contexts.move_to_end(host)
            return self._contexts[host]
        context = self._contexts[host] = self.fresh_context(host)
        if len(self._contexts) > _MOST_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    def fresh_context(self, host: str) -> ssl.SSLContext:
        """The same, for one connection alone."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        _load(context, self._issue(host), self._server_key)
        return context

    def _issue(self, host: str) -> x509.Certificate:
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        key = self._key.public_key()
        # Without a subject of its own, so the name is critical (RFC 5280, 4.2.1.6).
        return (
            _dated(x509.Name([]), self._subject, self._server_key.public_key())
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def trusted_folder(pem: str, folder: Path) -> None:
    """Make ``folder`` a copy of the host's certificates, with one more that everything trusts."""
    if CERTIFICATES.is_dir():
        shutil.copytree(CERTIFICATES, folder, symlinks=True)
    else:
        folder.mkdir()
    folder.chmod(0o755)
    bundle = folder / BUNDLE
    text = bundle.read_text() if bundle.exists() else ""
    bundle.unlink(missing_ok=True)  # a link, on some systems
    for name in (BUNDLE, f"{_file_name(pem)}.0"):
        (folder / name).write_text(text + pem if name == BUNDLE else pem)
        (folder / name).chmod(0o644)


def _file_name(pem: str) -> str:
    """The hash of a subject, by which OpenSSL finds its file: of names in canonical form, without their wrapping."""
    subject = x509.load_pem_x509_certificate(pem.encode()).subject.public_bytes()
    assert subject[1] < 0x80, "a short name has a length of one byte"
    return f"{int.from_bytes(hashlib.sha1(subject[2:], usedforsecurity=False).digest()[:4], 'little'):08x}"


def _dated(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _load(context: ssl.SSLContext, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Give a context its certificate and key, by a file that is on no disk and has no name."""
    plain = serialization.NoEncryption()
    both = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain
    )
    with owning(os.memfd_create("server", os.MFD_CLOEXEC)) as fd:
        os.write(fd, both)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
