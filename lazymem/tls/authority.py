"""Certificates for hosts that hand guests' memory to each other: an authority of one's own, and what it signs.

X.509 v3 as RFC 5280 wants it, keys on the curve P-256 (quick to shake hands with, and in every TLS library). The only
module that imports `cryptography`, which takes a tenth of a second: never from a command that waits for a mount.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lazymem.errors import UsageError

LIST = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----\n?", re.DOTALL)
"""A list of revoked certificates, in a PEM file with others."""

AHEAD = datetime.timedelta(hours=1)
"""A certificate is valid from so long before it was made: hosts' clocks differ."""

_MAX_COMMON_NAME_CHARS = 64
"""RFC 5280, ub-common-name."""


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes
    not_after: datetime.datetime


@dataclass(frozen=True)
class Wanted:
    """What a certificate is to be for. `hosts`: names and addresses, besides `name`, that clients dial."""

    name: str
    server: bool
    client: bool
    hosts: tuple[str, ...] = ()


def make_authority(name: str, lifetime: datetime.timedelta) -> Issued:
    """A self-signed one, which may sign certificates of hosts and nothing that signs again."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    builder = _begun(subject, subject, key.public_key(), lifetime)
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _signed(builder.add_extension(usage, critical=True), key, key)


def issue(authority: Issued, wanted: Wanted, lifetime: datetime.timedelta, maybe_key: bytes | None = None) -> Issued:
    """A host's certificate; it ends with its authority's at the latest. `maybe_key`: of the one that it follows.

    Raises:
        UsageError: the authority has expired, or cannot be read; a name that no certificate can have.
    """
    signer, signer_key = _load(authority.certificate, "the authority's"), _load_key(authority.key, "the authority's")
    left = signer.not_valid_after_utc - _now()
    if left <= datetime.timedelta(0):
        raise UsageError("the authority itself has expired: make another one with 'lazymem pki init'")
    key = _load_key(maybe_key, "the host's") if maybe_key is not None else ec.generate_private_key(ec.SECP256R1())
    builder = _begun(_subject(wanted.name), signer.subject, key.public_key(), min(lifetime, left))
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(_purposes(wanted)), critical=False)
    builder = builder.add_extension(identifier, critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(wanted)), critical=False)
    return _signed(builder, key, signer_key)


def serial_of(certificate: bytes) -> int:
    """Raises UsageError: it is none."""
    return _load(certificate, "the host's").serial_number


def revoked(authority: Issued, serials: Iterable[int]) -> bytes:
    """The authority's list (RFC 5280, 5) of the certificates with these `serials`, and of those on the list that is
    behind its own certificate already. It holds for as long as the authority: one that ends before shuts everybody out.

    Raises:
        UsageError: the authority cannot be read.
    """
    signer, signer_key = _load(authority.certificate, "the authority's"), _load_key(authority.key, "the authority's")
    lists = LIST.findall(authority.certificate)
    before = [x509.load_pem_x509_crl(each) for each in lists]
    on_it = {each.serial_number: each.revocation_date_utc for found in before for each in found}
    on_it |= {serial: _now() for serial in serials if serial not in on_it}
    builder = x509.CertificateRevocationListBuilder(issuer_name=signer.subject, last_update=_naive(_now() - AHEAD))
    builder = builder.next_update(_naive(signer.not_valid_after_utc))
    for serial, date in sorted(on_it.items()):
        one = x509.RevokedCertificateBuilder(serial_number=serial, revocation_date=_naive(date))
        builder = builder.add_revoked_certificate(one.build())
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    builder = builder.add_extension(x509.CRLNumber(int(_now().timestamp())), critical=False)
    return builder.sign(signer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _naive(moment: datetime.datetime) -> datetime.datetime:
    """In UTC, as this builder compares them."""
    return moment.astimezone(datetime.UTC).replace(tzinfo=None)


def read_wanted(certificate: bytes) -> Wanted:
    """What an earlier certificate of ours was for, to renew it. Raises UsageError: it is none."""
    found = _load(certificate, "the host's")
    try:
        purposes = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise UsageError("the host's certificate is not one that 'lazymem pki issue' made") from error
    common = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    dialled = (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))
    return Wanted(
        str(common[0].value) if common else dialled[0],
        server=ExtendedKeyUsageOID.SERVER_AUTH in purposes,
        client=ExtendedKeyUsageOID.CLIENT_AUTH in purposes,
        hosts=dialled,
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(_now() - AHEAD).not_valid_after(_now() + lifetime)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer_key: ec.EllipticCurvePrivateKey
) -> Issued:
    certificate = builder.sign(signer_key, hashes.SHA256())
    return Issued(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.not_valid_after_utc,
    )


def _subject(name: str) -> x509.Name:
    if not 0 < len(name) <= _MAX_COMMON_NAME_CHARS:
        raise UsageError(f"{name!r}: a certificate's name has 1 to {_MAX_COMMON_NAME_CHARS} characters")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(**said: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: said.get(name, False) for name in names})


def _purposes(wanted: Wanted) -> list[x509.ObjectIdentifier]:
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH] if wanted.server else []
    return [*purposes, ExtendedKeyUsageOID.CLIENT_AUTH] if wanted.client else purposes


def _alternatives(wanted: Wanted) -> list[x509.GeneralName]:
    """The name itself first: it is the client's identity, and mostly the server's host name."""
    found: list[x509.GeneralName] = []
    for host in dict.fromkeys((wanted.name, *wanted.hosts)):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            found.append(_dns_name(host))
    return found


def _dns_name(host: str) -> x509.GeneralName:
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise UsageError(f"{host!r} cannot be a host's name: write it in ASCII (xn--...)") from error


def _load(certificate: bytes, whose: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise UsageError(f"in {whose} .crt file is no certificate") from error


def _load_key(key: bytes, whose: str) -> ec.EllipticCurvePrivateKey:
    try:
        found = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise UsageError(f"in {whose} .key file is no key, or one with a password") from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{whose} key is not one that 'lazymem pki' made")
    return found
