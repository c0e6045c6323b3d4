"""The options of TLS, the same at every command that connects or listens."""

from __future__ import annotations

import argparse
from pathlib import Path

from lazymem.errors import UsageError
from lazymem.settings import TlsSettings

_ALL = "--tls-cert, --tls-key and --tls-ca"


def add_tls_options(parser: argparse.ArgumentParser, *, name: bool) -> None:
    """`name`: also --tls-name, for a client. `lazymem pki` makes the files."""
    group = parser.add_argument_group("TLS, over TCP (lazymem pki makes the files)")
    group.add_argument("--tls-cert", metavar="FILE", type=Path, help="our certificate, PEM")
    group.add_argument("--tls-key", metavar="FILE", type=Path, help="its key, PEM, mode 0600")
    group.add_argument("--tls-ca", metavar="FILE", type=Path, help="the authority of the other side's certificate, PEM")
    if name:
        group.add_argument(
            "--tls-name", metavar="NAME", help="what the server's certificate must be for (default: the host)"
        )


def tls_words(settings: TlsSettings) -> list[str]:
    """The same options, for another command."""
    words = ["--tls-cert", str(settings.cert), "--tls-key", str(settings.key), "--tls-ca", str(settings.ca)]
    return [*words, "--tls-name", settings.name] if settings.name else words


def maybe_tls(found: argparse.Namespace) -> TlsSettings | None:
    """What `add_tls_options` found; None without TLS. The files are not looked at.

    Raises:
        UsageError: some of the options, and not all; or a name that none can have.
    """
    files = (found.tls_cert, found.tls_key, found.tls_ca)
    name = getattr(found, "tls_name", None)
    if not any(files) and name is None:
        return None
    if not all(files):
        raise UsageError(f"TLS needs {_ALL} (lazymem pki makes all three)")
    if name is not None and (not name or name.startswith(".") or not name.isascii() or " " in name):
        raise UsageError(f"--tls-name {name!r}: no certificate is for this name")
    cert, key, ca = (path.absolute() for path in files)
    return TlsSettings(cert, key, ca, name or "")
