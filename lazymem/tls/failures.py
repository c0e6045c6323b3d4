"""What OpenSSL says in a code, in one line that says whose fault it is and what to do."""

from __future__ import annotations

import enum
import ssl

from lazymem.errors import TlsError

_EXPIRED, _NOT_YET, _UNSUITABLE = 10, 9, 26
_OTHER_AUTHORITY = frozenset({2, 7, 18, 19, 20, 21})
_REVOKED, _NO_LIST, _OLD_LIST = 23, 3, 12
_OTHER_NAME = frozenset({62, 64})
"""X509_V_ERR_*, of OpenSSL's x509_vfy.h."""

ISSUE = "'lazymem pki issue' makes one"
RENEW = "'lazymem pki issue --renew' makes a new one"


class Side(enum.Enum):
    """Of a connection. `peer`: what the other one is called."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def peer(self) -> str:
        return Side.SERVER.value if self is Side.CLIENT else Side.CLIENT.value


def translated(error: ssl.SSLError, side: Side) -> TlsError:
    """`error`, met at the `side`'s end of a connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsError(_of_certificate(error, side))
    return TlsError(_of_reason(error.reason or str(error), side))


def _of_certificate(error: ssl.SSLCertVerificationError, side: Side) -> str:
    """The peer's certificate is not believed here."""
    peer, code = side.peer, error.verify_code
    if code == _EXPIRED:
        return f"the {peer}'s certificate has expired: {RENEW}"
    if code == _NOT_YET:
        return f"the {peer}'s certificate is not valid yet: look at both hosts' clocks"
    if code == _REVOKED:
        return f"the {peer}'s certificate was revoked by its authority"
    if code in (_NO_LIST, _OLD_LIST):
        what = "has expired" if code == _OLD_LIST else "is not of its authority"
        return f"the {peer}'s certificate is not believed: the list of revoked ones in our --tls-ca file {what}"
    if code in _OTHER_AUTHORITY:
        return f"the {peer}'s certificate is not of the authority in our --tls-ca file"
    if code in _OTHER_NAME:
        return f"the server's certificate is for another name: {error.verify_message.rstrip('.')}; see --tls-name"
    if code == _UNSUITABLE:
        return f"the {peer}'s certificate is not one for a {peer}: {ISSUE} with --{peer}"
    return f"the {peer}'s certificate is not believed: {error.verify_message}"


def _of_reason(reason: str, side: Side) -> str:
    """Anything else: the peer does not believe us (its alerts name ours), or speaks something else."""
    peer, own = side.peer, side.value
    if "WRONG_VERSION_NUMBER" in reason or "HTTP" in reason or "RECORD" in reason or "BAD_LENGTH" in reason:
        return f"the {peer} does not speak TLS: both sides need --tls-cert, --tls-key and --tls-ca, or neither"
    if "UNSUPPORTED_PROTOCOL" in reason or "PROTOCOL_VERSION" in reason:
        return f"the {peer} does not speak TLS 1.3"
    if "CERTIFICATE_EXPIRED" in reason:
        return f"the {peer} says that our certificate has expired: {RENEW}"
    if "CERTIFICATE_REVOKED" in reason:
        return f"the {peer} says that our certificate was revoked: {ISSUE}"
    if "UNKNOWN_CA" in reason:
        return f"the {peer} does not know the authority of our certificate: its --tls-ca names another one"
    if "CERTIFICATE_REQUIRED" in reason or "DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return f"a client without a certificate: {ISSUE} with --client" if own == "server" else "a certificate is asked"
    if "ALERT" in reason and "CERTIFICATE" in reason:
        return f"the {peer} does not take our certificate: it is not one for a {own}, or damaged; {ISSUE} with --{own}"
    return f"TLS with the {peer} failed: {reason.lower().replace('_', ' ')}"
