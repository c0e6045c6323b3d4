"""OpenSSL contexts from the files that the user named: TLS 1.3, both sides with a certificate of one authority.

A context is made again when its files change, so a renewed certificate is used from the next connection on, without a
restart. Files that have become unreadable meanwhile leave the last good context in use: a guest waits for a connection.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
from pathlib import Path

from lazymem.errors import UsageError
from lazymem.settings import TlsSettings
from lazymem.tls.failures import Side

log = logging.getLogger(__name__)

_REVOKED = b"-----BEGIN X509 CRL-----"
"""In the authority's file: the certificates that it takes back (`lazymem pki revoke`)."""

_Signature = tuple[tuple[int, int, int], ...] | None
"""What changes when a file does; None: one is missing, which `make_context` then says better."""


class Contexts:
    """The context of one side, from its files as they are at each call."""

    def __init__(self, settings: TlsSettings, side: Side, protocol: str = "") -> None:
        """`protocol`: as for `make_context`."""
        self._settings = settings
        self._side = side
        self._protocol = protocol
        self._made: tuple[_Signature, ssl.SSLContext] | None = None
        self._complained = ""

    def current(self) -> ssl.SSLContext:
        """
        Raises:
            UsageError: a file cannot be used, and never could.
        """
        try:
            signature = _maybe_signature(self._settings)
            if self._made is None or self._made[0] != signature:
                self._made = signature, make_context(self._settings, self._side, self._protocol)
                self._complained = ""
        except UsageError as error:
            if self._made is None:
                raise
            if str(error) != self._complained:
                self._complained = str(error)
                log.warning("%s; the certificate that was read before stays in use", error)
        return self._made[1]


_clients: dict[tuple[TlsSettings, str], Contexts] = {}
"""A process has one set of files, or few."""


def client_context(settings: TlsSettings, protocol: str = "") -> ssl.SSLContext:
    """A client's, for a connection that is made now. Raises UsageError as `Contexts.current`."""
    if (settings, protocol) not in _clients:
        _clients[settings, protocol] = Contexts(settings, Side.CLIENT, protocol)
    return _clients[settings, protocol].current()


def make_context(settings: TlsSettings, side: Side, protocol: str = "") -> ssl.SSLContext:
    """`protocol`: what a client wants to speak, or a server knows, that is not the pages' (by ALPN, RFC 7301).

    Raises:
        UsageError: which file cannot be used, and why.
    """
    _look_at_key(settings.key)
    client = side is Side.CLIENT
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if client else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = client
    context.hostname_checks_common_name = False  # a name that anybody may have written there; alternative names count
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol:
        context.set_alpn_protocols([protocol])
    if not client:
        context.num_tickets = 0  # nobody resumes a session, so nobody skips being asked for a certificate
    try:
        context.load_verify_locations(cafile=settings.ca)
        if _REVOKED in settings.ca.read_bytes():
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--tls-ca {settings.ca}: {_why(error, 'no certificate in it')}") from error
    try:
        context.load_cert_chain(settings.cert, settings.key, password=_no_password)
    except ssl.SSLError as error:
        raise UsageError(f"--tls-cert {settings.cert}: {_why(error, 'no certificate in it, or no key')}") from error
    except OSError as error:
        raise UsageError(f"--tls-cert {settings.cert}, --tls-key {settings.key}: {error.strerror}") from error
    return context


def _look_at_key(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UsageError(f"--tls-key {path}: {error.strerror}") from error
    if mode & stat.S_IRWXO:
        raise UsageError(f"--tls-key {path}: every user of this host may read it; chmod 600 {path}")


def _no_password() -> str:
    raise UsageError("the key has a password, and nobody is there to type it: name a key without one")


def _why(error: OSError, otherwise: str) -> str:
    if not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    if "KEY_VALUES_MISMATCH" in (error.reason or ""):
        return "it is not the certificate of the key in --tls-key"
    return otherwise


def _maybe_signature(settings: TlsSettings) -> _Signature:
    try:
        found = [os.stat(path) for path in (settings.cert, settings.key, settings.ca)]
    except OSError:
        return None
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)
