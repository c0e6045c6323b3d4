"""Authorities and certificates for tests, made by `lazymem pki`'s own code: good ones and each kind of bad one."""

from __future__ import annotations

import datetime
from pathlib import Path

from lazymem.settings import TlsSettings
from lazymem.tls.authority import Issued, Wanted, issue, make_authority, revoked, serial_of
from lazymem.tls.options import tls_words

YEAR = datetime.timedelta(days=365)
OVER = datetime.timedelta(minutes=-30)
"""Valid since an hour ago, until half an hour ago."""


class Pki:
    """An authority in `folder`."""

    def __init__(self, folder: Path, name: str = "tests") -> None:
        folder.mkdir(mode=0o700, parents=True)
        self.folder = folder
        self._authority = make_authority(name, YEAR)
        self.ca = self._written("ca.crt", self._authority.certificate)

    def _written(self, name: str, data: bytes) -> Path:
        """As a whole: a mount may read it at any time."""
        path, draft = self.folder / name, self.folder / f".{name}"
        draft.touch(mode=0o600)
        draft.write_bytes(data)
        draft.rename(path)
        return path

    def issued(self, wanted: Wanted, lifetime: datetime.timedelta = YEAR) -> Issued:
        return issue(self._authority, wanted, lifetime)

    def write(self, file: str, made: Issued, ca: Path | None = None) -> TlsSettings:
        return TlsSettings(
            self._written(f"{file}.crt", made.certificate), self._written(f"{file}.key", made.key), ca or self.ca
        )

    def server(self, *, ca: Path | None = None, lifetime: datetime.timedelta = YEAR) -> TlsSettings:
        """For 127.0.0.1 and localhost, and "ram.example"."""
        wanted = Wanted("ram.example", server=True, client=False, hosts=("127.0.0.1", "localhost"))
        return self.write("server", self.issued(wanted, lifetime), ca)

    def revoke(self, settings: TlsSettings) -> None:
        """From the next connection on, for all that have this authority's file."""
        listed = revoked(self._authority, [serial_of(settings.cert.read_bytes())])
        self._written("ca.crt", self._authority.certificate + listed)

    def renewed(self, settings: TlsSettings, wanted: Wanted) -> bytes:
        """Another certificate of the same key."""
        return issue(self._authority, wanted, YEAR, settings.key.read_bytes()).certificate

    def client(
        self, name: str = "host-b", *, ca: Path | None = None, lifetime: datetime.timedelta = YEAR
    ) -> TlsSettings:
        return self.write(name, self.issued(Wanted(name, server=False, client=True), lifetime), ca)


def options(settings: TlsSettings) -> tuple[str, ...]:
    """As at a command line."""
    return tuple(tls_words(settings))
