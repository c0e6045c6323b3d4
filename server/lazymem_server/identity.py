"""Who a client is: by its certificate, or over a Unix socket by its user."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

from lazymem_server.allowed import ANY

_PEER = struct.Struct("<3i")
"""struct ucred: pid, uid, gid."""

_STARTED_AS = os.geteuid()
"""Not who we are by now: what root opened before it became somebody is not for all who are that."""

USER_PREFIX = "uid:"
"""Before the number of a user of this host; no certificate gives such an identity."""


def certificate_identities(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """Its DNS names (RFC 6125 puts them before the common name), or if it has none its common names.

    `certificate`: as `ssl.SSLSocket.getpeercert` gives it.
    """
    found = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    if not found:
        subject = (pair for group in certificate.get("subject", ()) for pair in group)
        found = [value for name, value in subject if name == "commonName"]
    return tuple(value for value in found if _is_sensible(value))


def _is_sensible(identity: str) -> bool:
    """It stands in logs, and must not be taken for something else."""
    return identity.isprintable() and not identity.startswith(USER_PREFIX) and identity != ANY


def user_identities(connected: socket.socket) -> tuple[str, ...] | None:
    """Of the process at the other end of a Unix socket; None: root, or the user who started us, who can read the files
    anyway."""
    _, user, _ = _PEER.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return None if user in (0, _STARTED_AS) else (f"{USER_PREFIX}{user}",)
