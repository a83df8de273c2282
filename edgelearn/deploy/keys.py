"""Certificates for TLS, and the key pairs by which a SuperLink knows its nodes."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelearn.errors import ExtraMissingError

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise ExtraMissingError(
        package="cryptography", extra="deploy", needed_for="making certificates and keys"
    ) from None

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, CertificateBuilder

_CA_DAYS, _SERVER_DAYS = 3650, 825
_CURVE = ec.SECP384R1  # one of those that Flower accepts for nodes


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority of one deployment.

    Attributes:
        certificate: What everybody trusts.
        key: What signs; needed only to sign more.
    """

    certificate: Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls) -> Authority:
        """Make a new authority."""
        key = ec.generate_private_key(_CURVE())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edgelearn deployment")])
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True,
            content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            _builder(name, name, key.public_key(), days=_CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
        )
        return cls(builder.sign(key, hashes.SHA384()), key)

    def issue(self, hosts: Sequence[str]) -> tuple[Certificate, ec.EllipticCurvePrivateKey]:
        """Issue a server certificate for host names and IP addresses.

        Example:
            >>> certificate, _ = Authority.create().issue(["localhost", "127.0.0.1"])
            >>> certificate.subject.rfc4514_string()
            'CN=localhost'
        """
        key = ec.generate_private_key(_CURVE())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
        alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = (
            _builder(name, self.certificate.subject, key.public_key(), days=_SERVER_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(alternatives, critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        return builder.sign(self.key, hashes.SHA384()), key


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Write a certificate as PEM."""
    _write(path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def write_private_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key as PEM, readable for its owner alone."""
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write(path, data, mode=0o600)


def write_node_key(private: Path, public: Path) -> None:
    """Make the key pair of a node, in the OpenSSH format that Flower reads."""
    key = ec.generate_private_key(_CURVE())
    data = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    _write(private, data, mode=0o600)
    shown = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write(public, shown + b"\n", mode=0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    """Write a file that never had looser permissions than these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
